"""What quantization does to a model: perplexity, and KL divergence and agreement with the original, by method.

    python benchmarks/quality.py MODEL --name NAME --calibration c4.txt --texts wiki.test.raw code.txt --group-size 64
        [--methods awq awq+] [--seeds 0 1 2] [--peer AutoAWQ=DIR] [--bits 3] [--bos]

Every version of the model is scored against the original on the same windows of every text, as `awq-ext eval` does, by
this project's loader and in float32. With seed 0 the calibration windows are the first of the text, as those of the
peers are; with others they are drawn from it. A 4-bit version goes through a checkpoint on disk. `--peer` scores a
checkpoint of someone else's beside them, in 4 bits or floats; give its name several times if it has been made with
several seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import write
from torch import Tensor

from awq_ext import load_quantized, quantize
from awq_ext.block import METHODS
from awq_ext.evaluate import divergence, first_tokens
from awq_ext.hub import resolve
from awq_ext.pretrained import load_any, load_float

FIGURES = ("perplexity", "increase", "nll_difference", "kl", "kl_p99", "top1")


def quantized(args: argparse.Namespace, method: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model, and what there is to say about its making."""
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/model" if args.bits == 4 else None
        # Other numbers of bits are simulated by weights, which float16 would round once more.
        source: Any = args.model if out else load_float(resolve(args.model), torch.float32)
        start = time.perf_counter()
        model: Any = quantize(
            source,
            args.model,
            calibration=args.calibration,
            samples=args.samples,
            seq_len=args.seq_len,
            seed=seed,
            shuffle=seed != 0,
            w_bit=args.bits,
            q_group_size=args.group_size,
            method=method,
            out=out,
            load=False,
        )
        facts: dict[str, Any] = {"seed": seed, "calibration": model.awq_report.calibration}
        if not args.no_times:
            facts["quantize_seconds"] = time.perf_counter() - start
        return model if out is None else load_quantized(out, dtype=torch.float32), facts


def versions(args: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, model and what there is to say about it, one at a time; first the peers', which may have a wrong path."""
    for name, _, path in (peer.partition("=") for peer in args.peer):
        yield name, load_any(path, torch.float32)[0], {"checkpoint": Path(path).name}
    for method in args.methods:
        for seed in args.seeds if method != "rtn" else args.seeds[:1]:
            yield method, *quantized(args, method, seed)


def score(model: Any, original: Any, ids: Tensor, bos: int | None) -> dict[str, Any]:
    result = divergence(model, original, ids, bos=bos)
    return {
        "perplexity": result.model.value,
        "increase": result.model.value - result.original.value,
        "nll_difference": result.nll_difference,
        "nll_difference_error": result.nll_error,
        "kl": result.kl,
        "kl_p99": result.kl_p99,
        "top1": result.top1,
        "original_perplexity": result.original.value,
        "predictions": result.model.tokens,
    }


def averages(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By version and text, over the seeds; and for "all texts" over these."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for version in dict.fromkeys(run["version"] for run in runs):
        of_version = [run for run in runs if run["version"] == version]
        texts = {
            text: [run for run in of_version if run["text"] == text] for text in (run["text"] for run in of_version)
        }
        means[version] = {
            text: {figure: mean(run[figure] for run in some) for figure in FIGURES}
            for text, some in [*texts.items(), ("all texts", of_version)]
        }
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", required=True, nargs="+")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--bos", action="store_true", help="score windows that begin with the bos token")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["rtn", "gptq", "awq", "awq+"])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument(
        "--no-times", action="store_true", help="where others use the machine, too: seconds say nothing"
    )
    args = parser.parse_args()
    original, tokenizer = load_any(args.model, torch.float32)
    bos = tokenizer.bos_token_id if args.bos else None
    texts = {
        Path(path).name: first_tokens(Path(path).read_text(encoding="utf-8"), tokenizer, args.tokens)
        for path in args.texts
    }
    settings = {name: getattr(args, name) for name in ("group_size", "bits", "samples", "seq_len", "seeds", "bos")}
    settings |= {"calibration": Path(args.calibration).name, "tokens": args.tokens, "window": 512}
    name = f"quality_{args.name}_g{args.group_size}" + ("" if args.bits == 4 else f"_int{args.bits}")
    runs: list[dict[str, Any]] = []
    for version, model, facts in versions(args):
        for text, ids in texts.items():
            runs.append({"version": version, **facts, "text": text, **score(model, original, ids, bos)})
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in runs[-1].items()})
        # After each version: whoever interrupts hours of this keeps what there is.
        path = write(name, {"settings": settings, "runs": runs, "means": averages(runs)})
    for version, by_text in averages(runs).items():
        for text, figures in by_text.items():
            print(f"{version:12} {text:24}", *(f"{name} {value:.4f}" for name, value in figures.items()))
    print(path)


if __name__ == "__main__":
    main()
