"""Perplexity of a model and of what each method makes of it, on the same text.

    python benchmarks/quality.py MODEL --calibration c4.txt --text wiki.test.raw --group-size 64 [--bos]
        [--methods awq awq+]

Windows and tokens are those of `awq-ext ppl`. Each version goes through a checkpoint on disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import write

from awq_ext.evaluate import first_tokens, perplexity
from awq_ext.pretrained import load_any
from awq_ext.quantizer import METHODS, quantize


def score(path: str, args: argparse.Namespace) -> dict[str, float]:
    model, tokenizer = load_any(path, torch.float32)
    ids = first_tokens(Path(args.text).read_text(encoding="utf-8"), tokenizer, args.tokens)
    result = perplexity(model, None, ids, bos=tokenizer.bos_token_id if args.bos else None)
    return {"perplexity": result.value, "tokens": result.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--bos", action="store_true")
    parser.add_argument(
        "--no-times", action="store_true", help="where others use the machine, too: seconds say nothing"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "gptq", "awq", "awq+"])
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {"original": score(args.model, args)}
    for method in args.methods:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            quantize(
                args.model,
                calibration=args.calibration,
                samples=args.samples,
                q_group_size=args.group_size,
                method=method,
                out=f"{out}/model",
            )
            seconds = time.perf_counter() - start
            results[method] = score(f"{out}/model", args)
            if not args.no_times:
                results[method]["quantize_seconds"] = seconds
    for name, result in results.items():
        print(name, result)
    settings = {"group_size": args.group_size, "samples": args.samples, "seq_len": 512, "bos": args.bos}
    texts = {"calibration": Path(args.calibration).name, "text": Path(args.text).name}
    print(write(f"quality_{args.name}_g{args.group_size}", {**settings, **texts, "versions": results}))


if __name__ == "__main__":
    main()
