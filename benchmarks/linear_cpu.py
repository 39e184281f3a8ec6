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
from common import Turn, repeat, rounds, write
from peers.driver import Driver, machine
from torch import Tensor

from awq_ext import ops

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "14336x4096", "32000x4096", "576x1536", "1024x1024"]
ROWS = [1, 2, 4, 8, 16, 32, 128, 512]
ROTATE_BYTES = 512 << 20
ERROR = {"float32": 2e-6, "bfloat16": 4e-3, "int8": 2e-2}  # by the precision a contestant claims

Times = dict[str, dict[str, Any]]


class Contestant(NamedTuple):
    precision: str
    call: Callable[[Tensor, int], Tensor]  # of these rows, with the i-th copy of the weight
    weight: Tensor  # [n, k] as this contestant has it, float32 or less


def copies(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    count = max(3, ROTATE_BYTES // sum(tensor.nbytes for tensor in tensors))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def ours(weight: Tensor, group_size: int) -> tuple[dict[str, Contestant], int]:
    """All of `awq_ext`, and the bytes of its weight. What layouts and modes are called is said here only."""
    q, scales, zeros = ops.quantize(weight, group_size=group_size, dtype=torch.float16)
    packed = ops.pack(q), scales.t().contiguous(), ops.pack(zeros)
    exact = ops.dequantize(*packed, group_size=group_size, dtype=torch.float32)
    turns = copies(*packed)
    linear = torch.ops.awq_ext.linear

    def call(x: Tensor, i: int) -> Tensor:
        return linear(x, *turns[i % len(turns)], group_size=group_size)

    found = {f"awq_ext {name}": Contestant(name, call, exact) for name in ("bfloat16", "float32")}
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
        read = peaks.turn("read", weight_bytes, 1, 1, args.threads)
        turns: dict[str, Turn] = {"read": read, "dot": peaks.turn("dot", n, k, m, args.threads)}
        facts: dict[str, dict[str, Any]] = {"read": {}, "dot": {}}
        at = [checked.index(0), checked.index(m - 1)]
        for name, c in contestants.items():
            rows = x[c.precision][:m]
            off = c.call(rows, 0)[[0, m - 1]].double() - want[name][at]
            facts[name] = {"error": float(off.norm() / want[name][at].norm()), "limit": ERROR[c.precision]}
            turns[name] = repeat(partial(c.call, rows))
        for driver in drivers:
            library, _, compiler = driver.path.name.partition("-")
            for kind in driver.types:
                name, answer = f"{library} {kind} ({compiler})", driver.ask(kind, n, k, m, args.threads, 0)
                facts[name] = {"error": answer.error, "limit": ERROR["int8"], "layout": answer.layout}
                turns[name] = driver.turn(kind, n, k, m, args.threads)
        wrong = {name: fact for name, fact in facts.items() if fact.get("error", 0) > fact.pop("limit", 0)}
        assert not wrong, f"[{n}, {k}], m = {m}: {wrong}"
        times: Times = {name: facts[name] | of for name, of in rounds(turns, args.rounds).items()}
        results.append({"n": n, "k": k, "m": m, "group_size": group_size, "seconds": times})
        show(results[-1])
    return results


def better(times: Times) -> Times:
    """Without the compilers in names: the better one's times."""
    found: Times = {}
    for name, of in times.items():
        name = name.partition(" (")[0]
        if name not in found or of["median"] < found[name]["median"]:
            found[name] = of
    return found


def best_peer(times: Times) -> str:
    return min(
        (name for name in times if name.startswith(("torch int4", "ggml", "ik"))),
        key=lambda name: times[name]["median"],
    )


def show(result: dict[str, Any]) -> None:
    """The case, a line for each contestant."""
    times = better(result["seconds"])
    read, dot, peer = (times[name]["median"] for name in ("read", "dot", best_peer(times)))
    heading = f"[{result['n']}, {result['k']}] group {result['group_size']}, m = {result['m']}"
    print(
        f"\n{heading:38} {'us':>9} {'p10':>9} {'p90':>9} {'of read':>8} {'of dot':>7} {'x best peer':>12} {'error':>8}"
    )
    for name, of in times.items():
        at = [f"{of[key] * 1e6:9.1f}" for key in ("median", "p10", "p90")]
        error = f"{of['error']:8.1e}" if "error" in of else ""
        ratios = f"{read / of['median']:8.2f} {dot / of['median']:7.2f} {peer / of['median']:12.2f}"
        print(f"  {name:36} {' '.join(at)} {ratios} {error}", flush=True)


def summary(results: list[dict[str, Any]]) -> None:
    """Of each of ours, a line for each case: the share of what limits it, and times as fast as the best peer."""
    names = [name for name in results[0]["seconds"] if name.startswith("awq_ext")]
    print(f"\n{'':28} " + " ".join(f"{name.removeprefix('awq_ext '):>22}" for name in names) + "  best peer")
    print(f"{'n x k, group, m':28} " + " ".join(f"{'us':>8} {'share':>6} {'speed':>6}" for _ in names))
    for result in results:
        times, m = better(result["seconds"]), result["m"]
        peer, limit = best_peer(times), "read" if m <= 16 else "dot"
        columns = []
        for name in names:
            ours = times[name]["median"]
            columns.append(
                f"{ours * 1e6:8.0f} {times[limit]['median'] / ours:6.2f} {times[peer]['median'] / ours:6.2f}"
            )
        case = f"{result['n']} x {result['k']}, {result['group_size']}, {m}"
        print(f"{case:28} {' '.join(columns)}  {peer}")
    print("share: of the read peak up to m = 16, of the dot peak above; speed: times as fast as the best peer")


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
        for number, group_size in enumerate(args.group_sizes):
            for n, k in shapes if number == 0 else shapes[:1]:
                results += measure(n, k, group_size, args, drivers, peaks)
    summary(results)
    about = [driver.about for driver in [*drivers, peaks]]
    print(write(args.name or f"linear_cpu_{args.threads}t", {"drivers": about, "cases": results}))


if __name__ == "__main__":
    main()
