"""awq_ext::linear on a CPU beside what else multiplies by 4-bit weights there, dense products and the machine's peaks.

    python benchmarks/linear_cpu.py --threads 2 --peers DIR/bin/*

`peers/ggml.sh DIR` builds the drivers in DIR/bin; without them llama.cpp and ik_llama.cpp are missing. All turns of a
case are in the same minute. Weights rotate over 512 MiB, three copies at least, for every number of rows.

- read: the time to read the bytes of our weight from memory, by as many threads; no product of few rows is faster.
- dot: the time of as many multiply-adds of bytes in registers; the default takes two for each multiplication.
- error: rms, relative, against float64 with the contestant's own dequantized weights and its own x. Rounding the
  output to bfloat16 alone costs 1.7e-3, which llama.cpp's float32 outputs are spared.
- A peer that was built with several compilers counts with the better one, shape by shape.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import repeat, turn_by_turn, write
from peers.driver import Driver, machine
from torch import Tensor

from awq_ext import ops
from awq_ext.layouts import repack_scales

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "14336x4096", "32000x4096", "576x1536", "1024x1024"]
ROWS = [1, 2, 4, 8, 16, 32, 128, 512]
ROTATE_BYTES = 512 << 20
ERROR = {"float32": 2e-6, "bfloat16": 4e-3, "int8": 2e-2}  # by the precision a contestant claims

Times = dict[str, dict[str, Any]]


class Contestant(NamedTuple):
    precision: str
    call: Callable[[Tensor, int], Tensor]  # of these rows, with the i-th copy of the weight
    weight: Tensor  # [n, k] as this contestant has it, float32 or less


def how_many(*tensors: Tensor) -> range:
    """Copies to rotate through."""
    return range(max(3, ROTATE_BYTES // sum(tensor.nbytes for tensor in tensors)))


def copies(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(tensor.clone() for tensor in tensors) for _ in how_many(*tensors)]


def ours(weight: Tensor, group_size: int) -> tuple[dict[str, Contestant], int]:
    """All of `awq_ext`, and the bytes of its weight. What layouts and modes are called is said here only."""
    q, scales, zeros = ops.quantize(weight, group_size=group_size, dtype=torch.float16)

    def pack() -> tuple[Tensor, ...]:
        return (
            ops.pack(q, layout="strips"),
            repack_scales(scales.t(), "gemm", "strips"),
            ops.pack(zeros, layout="strips.zeros"),
        )

    packed = pack()
    options: dict[str, Any] = {"group_size": group_size, "layout": "strips"}
    exact = ops.dequantize(*packed, **options, dtype=torch.float32)
    turns = [pack() for _ in how_many(*packed)]  # clones would not lie in large pages

    def call(activation: str, x: Tensor, i: int) -> Tensor:
        return torch.ops.awq_ext.linear(x, *turns[i % len(turns)], **options, activation=activation)

    modes = {"bfloat16": "exact", "int8": "int8", "float32": "exact"}
    found = {f"awq_ext {name}": Contestant(name, partial(call, mode), exact) for name, mode in modes.items()}
    return found, sum(tensor.nbytes for tensor in packed)


def of_torch(weight: Tensor, group_size: int) -> dict[str, Contestant]:
    """Dense products, and torch's int4 kernel, whose weight is (code - 8) * scale + zero, both bfloat16."""
    n, k = weight.shape
    groups = weight.view(n, k // group_size, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((groups - low) / scale).round_().clamp_(0, 15)
    scale, zero = scale.bfloat16(), (low + 8 * scale).bfloat16()
    exact = ((codes - 8) * scale + zero).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 1)
    scales = torch.cat([scale, zero], -1).transpose(0, 1).contiguous()
    dense32, dense16, fours = copies(weight), copies(weight.bfloat16()), copies(packed, scales)
    int4 = torch.ops.aten._weight_int4pack_mm_for_cpu

    def call(x: Tensor, i: int) -> Tensor:
        words, scales = fours[i % len(fours)]
        return int4(x, words, group_size, scales)

    return {
        "torch int4": Contestant("bfloat16", call, exact),
        "torch dense float32": Contestant("float32", lambda x, i: F.linear(x, *dense32[i % len(dense32)]), weight),
        "torch dense bfloat16": Contestant(
            "bfloat16", lambda x, i: F.linear(x, *dense16[i % len(dense16)]), dense16[0][0]
        ),
    }


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float64, without the whole weight in float64."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(2048)], -1)


def measure(
    n: int, k: int, group_size: int, args: argparse.Namespace, drivers: list[Driver], peaks: Driver
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    weight = torch.randn(n, k) * 0.02
    contestants, weight_bytes = ours(weight, group_size)
    contestants |= of_torch(weight, group_size)
    x = {"float32": torch.randn(max(args.rows), k)}
    x["bfloat16"] = x["int8"] = x["float32"].bfloat16()
    checked = sorted({0, *(m - 1 for m in args.rows)})
    want = {name: product(x[c.precision][checked], c.weight) for name, c in contestants.items()}
    results = []
    for m in args.rows:
        turns = {"read": peaks.turn("read", weight_bytes, 1, 1, args.threads)}
        turns["dot"] = peaks.turn("dot", n, k, m, args.threads)
        facts: dict[str, dict[str, Any]] = {}
        count = sum(row < m for row in checked)
        for name, c in contestants.items():
            rows = x[c.precision][:m]
            off = c.call(rows, 0)[checked[:count]].double() - want[name][:count]
            facts[name] = {"error": float(off.norm() / want[name][:count].norm()), "limit": ERROR[c.precision]}
            turns[name] = repeat(partial(c.call, rows))
        for driver in drivers:
            library, _, compiler = driver.path.name.partition("-")
            for kind in driver.types:
                name, answer = f"{library} {kind} ({compiler})", driver.ask(kind, n, k, m, args.threads, 0)
                facts[name] = {"error": answer.error, "limit": ERROR["int8"], "layout": answer.layout}
                turns[name] = driver.turn(kind, n, k, m, args.threads)
        wrong = {name: fact for name, fact in facts.items() if not fact["error"] <= fact.pop("limit")}
        assert not wrong, f"[{n}, {k}], m = {m}: {wrong}"
        times = turn_by_turn(turns, args.rounds)
        result = {"n": n, "k": k, "m": m, "group_size": group_size}
        result["peaks"] = {name: times.pop(name) for name in ("read", "dot")}
        results.append(result | {"seconds": {name: of | facts[name] for name, of in times.items()}})
        show(results[-1])
    return results


def best(result: dict[str, Any]) -> tuple[Times, str]:
    """The times without compilers in names, the better one's under each, and the name of the fastest peer in 4 bits."""
    found: Times = {}
    for name, of in result["seconds"].items():
        short = name.partition(" (")[0]
        if short not in found or of["median"] < found[short]["median"]:
            found[short] = of
    peers = [name for name in found if not name.startswith(("awq_ext", "torch dense"))]
    return found, min(peers, key=lambda name: found[name]["median"])


def show(result: dict[str, Any]) -> None:
    """The case, a line for each contestant."""
    times, peer = best(result)
    limits = [result["peaks"]["read"]["median"], result["peaks"]["dot"]["median"], times[peer]["median"]]
    print(
        f"\n[{result['n']}, {result['k']}], group {result['group_size']}, m = {result['m']}: "
        f"read {limits[0] * 1e6:.1f} us, dot {limits[1] * 1e6:.1f} us\n{'':22} {'us':>9} {'p10':>9} {'p90':>9} "
        f"{'of read':>8} {'of dot':>8} {'x peer':>8} {'error':>8}"
    )
    for name, of in times.items():
        at = " ".join(f"{of[key] * 1e6:9.1f}" for key in ("median", "p10", "p90"))
        ratios = " ".join(f"{limit / of['median']:8.2f}" for limit in limits)
        print(f"  {name:20} {at} {ratios} {of['error']:8.1e} {of.get('layout', '')}", flush=True)


def summary(results: list[dict[str, Any]]) -> None:
    """A line for each case: of each of ours the time, the share of the peak, the speed beside the peer's."""
    names = [name for name in results[0]["seconds"] if name.startswith("awq_ext")]
    print(f"\n{'':26} " + " ".join(f"{name.removeprefix('awq_ext '):>22}" for name in names))
    print(f"{'n x k, group, m':26} " + f"{'us':>8} {'share':>6} {'speed':>6} " * len(names) + " best peer")
    for result in results:
        times, peer = best(result)
        limit = result["peaks"]["read" if result["m"] <= 16 else "dot"]["median"]
        line = f"{result['n']} x {result['k']}, {result['group_size']}, {result['m']}"
        line = f"{line:26} "
        for name in names:
            seconds = times[name]["median"]
            line += f"{seconds * 1e6:8.0f} {limit / seconds:6.2f} {times[peer]['median'] / seconds:6.2f} "
        print(f"{line} {peer}")
    print("share: of the peak of reading up to m = 16, of products above; speed: times as fast as the best peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK", help="out_features x in_features")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument(
        "--group-sizes", type=int, nargs="+", default=[128, 64, 32], help="all but the first with the first shape only"
    )
    parser.add_argument("--peers", type=Path, nargs="*", default=[], metavar="DRIVER", help="files of DIR/bin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help="of the result file (linear_cpu_THREADSt)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes]
    drivers = [Driver(path) for path in args.peers]
    if not drivers:
        print("llama.cpp and ik_llama.cpp are missing: --peers (see peers/ggml.sh)")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        peaks = machine(folder)
        for n, k in shapes:
            for group_size in args.group_sizes if (n, k) == shapes[0] else args.group_sizes[:1]:
                results += measure(n, k, group_size, args, drivers, peaks)
    summary(results)
    about = [driver.about for driver in [*drivers, peaks]]
    print(write(args.name or f"linear_cpu_{args.threads}t", {"drivers": about, "cases": results}))


if __name__ == "__main__":
    main()
