"""Quantizes a model with another package, on a CPU, in that package's own environment (see `install.sh`), or with ours.

    VENV/bin/python benchmarks/peers/run.py PEER MODEL OUT --windows IDS.npy --group-size 64

IDS.npy has the calibration tokens, int64 [samples, seq_len]; every peer gets the same and is left at its defaults,
asymmetric. Prints one line of JSON at the end: seconds and peak memory of the quantization, and versions. A peer has
the model in memory before and writes it after; our seconds go from a directory to a directory. What a package cannot do
on a CPU as it is, is mended here, and said.

Other numbers of bits than 4 are for comparing methods, not for use: the checkpoint is that of a model that is not
quantized, in float32, with weights that the codes stand for. AutoAWQ searches and rounds to any number of bits, but
packs 4 only, so its packing is left out there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Steps = tuple[Callable[[], Any], Callable[[], Any], list[str]]
"""What is timed, what is not (writing), and the packages whose versions matter."""

OURS = "awq_ext-"
"""What a method of ours begins with here."""

OUR_METHODS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "awq+": {"method": "awq+"},
    "awq+tuned": {"method": "awq+", "tune_steps": 20},
    "awq+untuned": {"method": "awq+", "tune_steps": 0},
}


def ours(args: argparse.Namespace, rows: list[list[int]]) -> Steps:
    from awq_ext import quantize

    ids = torch.tensor(rows)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"samples": len(rows), "seq_len": len(rows[0]), "q_group_size": args.group_size}
    options |= {"calibration": data, **OUR_METHODS[args.peer.removeprefix(OURS)]}
    if args.bits == 4:
        return lambda: quantize(args.model, out=args.out, load=False, **options), lambda: None, ["transformers"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return (
        lambda: quantize(model, w_bit=args.bits, **options),
        lambda: model.save_pretrained(args.out),
        ["transformers"],
    )


def autoawq(args: argparse.Namespace, rows: list[list[int]]) -> Steps:
    from awq import AutoAWQForCausalLM
    from awq.quantize import quantizer

    # Its search keeps the weights it is going to change by `v.cpu()`, which on a CPU is no copy: they would be scaled
    # again and again (perplexity 293,558 where a GPU run gives about 34). A clone does what `.cpu()` does on a GPU.
    source = textwrap.dedent(inspect.getsource(quantizer.AwqQuantizer._compute_best_scale))
    assert source.count("v.cpu() for") == 1
    exec(source.replace("v.cpu() for", "v.cpu().clone() for"), vars(quantizer))
    quantizer.AwqQuantizer._compute_best_scale = vars(quantizer).pop("_compute_best_scale")

    with tempfile.TemporaryDirectory() as folder:
        # Its transformers reads rope_theta where transformers 5 does not write it, and takes a default without a word.
        for path in Path(args.model).resolve().iterdir():
            os.symlink(path, Path(folder, path.name))
        config = json.loads(Path(folder, "config.json").read_text())
        rope = config.pop("rope_parameters", None) or {}
        config |= {key: value for key, value in rope.items() if key != "rope_type"}
        os.unlink(Path(folder, "config.json"))
        Path(folder, "config.json").write_text(json.dumps(config))
        options = {"device_map": "cpu", "safetensors": True, "torch_dtype": torch.float32}
        model = AutoAWQForCausalLM.from_pretrained(folder, **options)

    def quantize() -> None:
        model.quantize(
            None,
            quant_config={"zero_point": True, "q_group_size": args.group_size, "w_bit": args.bits, "version": "GEMM"},
            calib_data=rows,
            max_calib_samples=len(rows),
            max_calib_seq_len=len(rows[0]),
        )

    def simulate(self: Any, _: Any, linears: dict[str, torch.nn.Linear]) -> None:
        for linear in linears.values():  # rounded in float16, as those that it packs
            linear.weight.data = self.pseudo_quantize_tensor(linear.weight.data.half())[0].float()

    packages = ["autoawq", "transformers"]
    if args.bits == 4:
        return quantize, lambda: model.save_quantized(args.out, safetensors=True), packages
    quantizer.AwqQuantizer._apply_quant = simulate
    return quantize, lambda: model.model.save_pretrained(args.out), packages


def gptqmodel(args: argparse.Namespace, rows: list[list[int]]) -> Steps:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig

    options: dict[str, Any] = {"bits": 4, "group_size": args.group_size, "sym": False}
    if args.peer == "gptqmodel-awq":
        config, backend = AWQConfig(format=FORMAT.GEMM, **options), BACKEND.AWQ_TORCH
    else:
        # The first form of the format cannot tell a zero of 0 from one of 16.
        config, backend = GPTQConfig(format=FORMAT.GPTQ_V2, desc_act=False, **options), BACKEND.AUTO
    model = GPTQModel.load(args.model, config, device="cpu")
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    return (
        lambda: model.quantize(data, batch_size=8, backend=backend),
        lambda: model.save(args.out),
        ["gptqmodel", "transformers"],
    )


def llmcompressor(args: argparse.Namespace, rows: list[list[int]]) -> Steps:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines import cache
    from transformers import AutoModelForCausalLM

    cache.IntermediatesCache.pin_memory = lambda self, batch_index: None  # torch without CUDA cannot pin memory
    weights: dict[str, Any] = {"num_bits": args.bits, "type": "int", "symmetric": False}
    weights |= {"strategy": "group", "group_size": args.group_size}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    awq = [AWQModifier(duo_scaling=True), QuantizationModifier(**scheme)]
    recipe = awq if args.peer == "llmcompressor-awq" else [GPTQModifier(**scheme)]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    options = {"max_seq_length": len(rows[0]), "num_calibration_samples": len(rows)}

    def save() -> None:
        if args.bits == 4:
            model.save_pretrained(args.out, save_compressed=True)
        else:  # it packs when it saves; until then weights are what the codes stand for
            plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            weights = model.state_dict()
            plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
            plain.save_pretrained(args.out)

    run = lambda: oneshot(model=model, dataset=data, recipe=recipe, **options)  # noqa: E731
    return run, save, ["llmcompressor", "transformers"]


def autoround(args: argparse.Namespace, rows: list[list[int]]) -> Steps:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row), dtype=torch.long)} for row in rows]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(args.model),
        bits=4,
        group_size=args.group_size,
        sym=False,
        dataset=torch.utils.data.DataLoader(data, batch_size=8),
        nsamples=len(rows),
        seqlen=len(rows[0]),
        device_map="cpu",
    )
    return (
        rounding.quantize,
        lambda: rounding.save_quantized(args.out, format="auto_awq"),
        ["auto-round", "transformers"],
    )


PEERS = {
    "autoawq": autoawq,
    "gptqmodel-gptq": gptqmodel,
    "gptqmodel-awq": gptqmodel,
    "llmcompressor-gptq": llmcompressor,
    "llmcompressor-awq": llmcompressor,
    "autoround": autoround,
}

ANY_BITS = ("autoawq", "llmcompressor-gptq")
"""With other numbers of bits than 4, too."""


def peak_mib() -> float:
    """Of this process. Its ru_maxrss would be the launcher's, if that was larger before the exec."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=[*PEERS, *(OURS + method for method in OUR_METHODS)])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--windows", required=True, metavar="IDS.npy")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.bits != 4 and args.peer not in ANY_BITS and not args.peer.startswith(OURS):
        parser.error(f"{args.peer} is run with 4 bits only")
    torch.set_num_threads(args.threads)
    quantize, save, packages = PEERS.get(args.peer, ours)(args, np.load(args.windows).tolist())
    start = time.perf_counter()
    quantize()
    seconds = time.perf_counter() - start
    memory = peak_mib()
    save()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not Path(args.out, name).exists():
            shutil.copy(Path(args.model, name), args.out)
    versions = {"torch": torch.__version__} | {package: version(package) for package in packages}
    print(json.dumps({"seconds": seconds, "peak_mib": memory, "versions": versions}))


if __name__ == "__main__":
    main()
