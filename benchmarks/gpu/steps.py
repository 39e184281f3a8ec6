"""The steps of `run_all.py` that run in torch; each prints a line of JSON for each case that it has measured.

    python benchmarks/gpu/steps.py dense|linear|dequantize|stack|PEER [--shapes NxK ..] [--rows M ..] [--dtypes ..]

Everything is awq_ext's public interface. Weights are random codes with random scales and zeros, a reference is the
float64 product with what they stand for, and an error above its limit ends the step. `--device cpu` is a rehearsal
with small shapes, which shows that the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import Contestant, Weight, layout_of, pack, random_weight, table
from model import ROWS, shapes_of
from peers import PEERS, Absent
from timing import Call, clocks, copies, seconds
from torch import Tensor

from awq_ext import _library, ops

REFUSED = 3
"""Exit status of a step that cannot run here."""


def plan(m: int, n: int, k: int, group: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What awq_ext chooses for scales of float16; nothing in a rehearsal."""
    if device.type == "cpu":
        return {}
    of = torch.cuda.get_device_properties(device)
    facts = {"arch": 10 * of.major + of.minor, "sms": of.multi_processor_count}
    facts["shared_bytes"] = getattr(of, "shared_memory_per_block_optin", 0)
    name = str(dtype).removeprefix("torch.")
    return dict(_library.native().plan_cuda(m, n, k, group, dtype=name, scale_dtype="float16", **facts))


def linear(weight: Weight, dtype: torch.dtype) -> Contestant:
    layout = layout_of(weight.q.device)
    packed = copies(*pack(weight, layout))
    options: dict[str, Any] = {"group_size": weight.group, "layout": layout}
    n, k = weight.q.shape

    def of(x: Tensor) -> Call:
        return lambda i: ops.linear(x, *packed[i], **options)

    note = lambda m: {"plan": plan(m, n, k, weight.group, dtype, weight.q.device)}  # noqa: E731
    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), note=note)


def dequantize(weight: Weight, dtype: torch.dtype) -> Contestant:
    """The weight in x's type, made anew for every product: what the other kernels have to beat."""
    layout = layout_of(weight.q.device)
    packed = copies(*pack(weight, layout))
    options: dict[str, Any] = {"group_size": weight.group, "layout": layout, "dtype": dtype}

    def of(x: Tensor) -> Call:
        return lambda i: F.linear(x, ops.dequantize(*packed[i], **options))

    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), limit=2.0)


def dense(weight: Weight, dtype: torch.dtype) -> Contestant:
    """The vendor's product of 16-bit floats."""
    wide = copies(weight.exact().to(dtype))

    def of(x: Tensor) -> Call:
        return lambda i: F.linear(x, *wide[i])

    return Contestant(of, len(wide), wide[0][0].nbytes, limit=2.0)


# --- a stack of linears, as one token goes through them ---------------------------------------------------------------


class Block(NamedTuple):
    """The four products of a Llama block: each takes x to x W^T."""

    qkv: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """No attention and no norms, but for one that keeps x bounded: products and what lies between them."""
        width = x.shape[-1]
        x = F.layer_norm(x + self.o(self.qkv(x)[..., :width]), (width,))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return F.layer_norm(x + self.down(F.silu(gate) * up), (width,))


def stack(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One step of decoding through all linears of a model with 7 billion weights, as one graph; 4 bits and dense."""
    hidden, inner, layers = (4096, 11008, 32) if args.device.type == "cuda" else (128, 256, 2)
    shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    for dtype in args.dtypes:
        times: dict[tuple[str, int], float] = {}
        for name in ("awq_ext", "dense"):
            blocks, nbytes = [], 0
            for _ in range(layers):
                calls: list[Callable[[Tensor], Tensor]] = []
                for n, k in shapes:
                    weight = random_weight(n, k, 128, args.device)
                    if name == "dense":
                        wide = weight.exact().to(dtype)
                        calls.append(partial(lambda w, x: F.linear(x, w), wide))
                        nbytes += wide.nbytes
                    else:
                        layout = layout_of(args.device)
                        packed = pack(weight, layout)
                        run = partial(ops.linear, group_size=128, layout=layout)
                        calls.append(partial(lambda run, packed, x: run(x, *packed), run, packed))
                        nbytes += sum(t.nbytes for t in packed)
                blocks.append(Block(*calls))

            def step(x: Tensor, blocks: list[Block], i: int) -> Tensor:
                for block in blocks:
                    x = block(x)
                return x

            for m in [m for m in args.rows if m <= 64]:
                x = torch.randn(m, hidden, device=args.device, dtype=dtype)
                of = seconds(partial(step, x, blocks), 1, args.device)
                times[name, m] = of["median"]
                record = {"name": name, "m": m, "dtype": str(dtype).split(".")[1], "layers": layers, "bytes": nbytes}
                record |= {"seconds": of, "tokens_per_second": m / of["median"], "clocks": clocks(args.device)}
                if name == "dense":
                    record["awq_ext_times_as_fast"] = of["median"] / times["awq_ext", m]
                yield record
            del blocks
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


STEPS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "dense": partial(table, "dense", dense),
    "linear": partial(table, "linear", linear),
    "dequantize": partial(table, "dequantize", dequantize),
    "stack": stack,
}


def arguments(words: list[str] | None, steps: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    parser.add_argument("--shapes", nargs="*", default=[], metavar="NxK", help="out_features x in_features")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16"])
    parser.add_argument(
        "--groups", type=int, nargs="+", default=[128, 64, 32], help="all but the first: first shape only"
    )
    parser.add_argument("--peers", type=Path, help="the directory that peers.sh made")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--check", action="store_true", help="only say whether the step could run here")
    args = parser.parse_args(words)
    args.shapes = shapes_of(args.shapes) if args.shapes or args.device == "cuda" else {"small": (256, 128)}
    if args.device == "cpu":
        args.rows = [m for m in args.rows if m <= 16]
    args.dtypes = [getattr(torch, name) for name in args.dtypes]
    args.device = torch.device(args.device)
    return args


def why_not(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if _library.CUDA_LIBRARY not in _library.loaded():
        return f"{_library.CUDA_LIBRARY} is not built (step build)"
    return None


def main(words: list[str] | None = None) -> None:
    args = arguments(words, [*STEPS, *PEERS])
    if (reason := why_not(args.device)) is not None:
        print(reason)
        sys.exit(REFUSED)
    if args.check:
        return
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    records = STEPS[args.step](args) if args.step in STEPS else PEERS[args.step](args.step, args)
    try:
        for record in records:
            print(json.dumps(record), flush=True)
    except Absent as reason:
        print(reason)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
