"""How long each kernel should take, from bytes, bytes in flight, instructions and products: computed, nothing measured.

    python benchmarks/gpu/model.py [--gpu h200] [--shapes 8192x8192] [--rows 1 16 256] [--out model.json]

A kernel's time is a fixed cost a launch, and the largest of

- memory: bytes from device memory, at the bandwidth or, if that is less, at what the bytes in flight allow (Little's
  law: bytes in flight of all multiprocessors that have a block / latency);
- cache: bytes that blocks read of x, at the rate of the second cache;
- issue: instructions of all warps, four a clock and multiprocessor;
- products: multiply-adds with what tiles are padded by, at the rate of the matrix units (mma.sync: a share of it),

the last two stretched where some multiprocessors get a piece of work more than others. So it is a lower bound under its
assumptions, which are the figures in `GPUS` and `KERNELS`. How a kernel cuts its work comes from `plan_cuda`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Plan = Mapping[str, Any]
"""What `_native.plan_cuda` says: kernel, tile (rows of W and of x), cluster, splits, stages, grid, threads, .."""


@dataclass(frozen=True)
class Gpu:
    """Bandwidth and products of the H200 are as measured on one (a copy from device to device, torch's product of
    8192^3 in bfloat16); everything else is a data sheet's figure, bandwidths times 0.9, products times 0.8."""

    name: str
    arch: int
    sms: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    flops: float  # two for each multiply-add, 16-bit floats, float32 sums, dense
    mma_share: float  # of those by mma.sync
    shared_bytes: int  # that a block may ask for
    latency: float = 0.9e-6  # s, of a load from memory under load: 0.8 to 1.2 us on Hopper
    cache_bandwidth: float = 8e12  # bytes a second from the second cache: published for H100 are 5.5 to 12
    launch: float = 2.5e-6  # s a kernel in a graph: start, ramp and tail


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 90, 132, 1.75e9, 4.3e12, 790e12, 0.63, 227 << 10),
        Gpu("h100", 90, 132, 1.75e9, 3.0e12, 790e12, 0.63, 227 << 10),
        Gpu("a100", 80, 108, 1.41e9, 1.8e12, 250e12, 1.0, 163 << 10, cache_bandwidth=4e12),
        Gpu("rtx3090", 86, 82, 1.7e9, 0.84e12, 57e12, 1.0, 99 << 10, cache_bandwidth=2e12),
        Gpu("rtx4090", 89, 128, 2.5e9, 0.91e12, 132e12, 1.0, 99 << 10, cache_bandwidth=4e12),
        Gpu("b200", 100, 148, 1.85e9, 7.2e12, 1800e12, 0.3, 227 << 10, cache_bandwidth=10e12),
        Gpu("rtx5090", 120, 170, 2.4e9, 1.6e12, 168e12, 1.0, 99 << 10, cache_bandwidth=5e12),
    )
}

SHAPES = {  # n x k of the linears of Llama-2-7B, Llama-3-8B and Llama-2-70B
    "7B qkv": (12288, 4096),
    "7B o": (4096, 4096),
    "7B gate+up": (22016, 4096),
    "7B down": (4096, 11008),
    "8B qkv": (6144, 4096),
    "8B gate+up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B gate+up": (57344, 8192),
    "70B down": (8192, 28672),
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
STEP = 64  # of k: what every kernel takes at a time


@dataclass(frozen=True)
class Problem:
    m: int
    n: int
    k: int
    group: int = 128

    @property
    def weight_bytes(self) -> float:
        """Codes, float16 scales and 4-bit zeros."""
        return self.n * self.k / 2 + self.n * math.ceil(self.k / self.group) * 2.5

    @property
    def dense_bytes(self) -> float:
        return self.n * self.k * 2

    @property
    def activation_bytes(self) -> float:
        """x once and y once."""
        return 2 * self.m * (self.k + self.n)

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Kernel:
    """What the plan does not say. Blocks of a multiprocessor are those that `tests/test_cuda_static.py` finds room for;
    instructions are those of main loops, `python tests/sass.py csrc/cuda/KERNEL.cu 90a`."""

    blocks: Callable[[Plan], int]
    in_flight: Callable[[Plan], float]  # bytes of weights that a block has asked for and not got
    warps: Callable[[Plan], int]  # that multiply
    instructions: Callable[
        [Plan], float
    ]  # of a warp, for one strip of 16 rows, a step of 64 k, and all tokens of the tile
    rate: Callable[[Gpu], float]  # of its products


def ring(plan: Plan) -> float:
    """Codes of all stages but the one that is read."""
    return (plan["stages"] - 1) * plan["tile"][0] * STEP / 2


KERNELS = {
    # Eight copies of 16 bytes a lane; 818 instructions for eight steps, with 16 tokens 931.
    "decode": Kernel(
        blocks=lambda plan: 3 if plan["tile"][1] <= 8 else 2,
        in_flight=lambda plan: 8 * 16 * plan["threads"],
        warps=lambda plan: plan["threads"] // 32,
        instructions=lambda plan: 88 + 14 * plan["tile"][1] / 8,
        rate=lambda gpu: gpu.flops * gpu.mma_share,
    ),
    # Two strips a warp: 494 instructions with 64 tokens, 384 with 32.
    "gemm_sm80": Kernel(
        blocks=lambda plan: 2,
        in_flight=ring,
        warps=lambda plan: plan["threads"] // 32,
        instructions=lambda plan: (274 + 27.5 * plan["tile"][1] / 8) / 2,
        rate=lambda gpu: gpu.flops * gpu.mma_share,
    ),
    # One strip a warp. With no group of less than a step 126 to 139 instructions for 96 tokens and more; for fewer, in
    # steps of 128 k, 186, 194 and 207.
    "gemm_sm90": Kernel(
        blocks=lambda plan: 2 if plan["tile"][1] <= 32 else 1,
        in_flight=lambda plan: ring(plan) * (2 if plan["tile"][1] <= 64 else 1),
        warps=lambda plan: plan["threads"] // 32 - 4,
        instructions=lambda plan: 90 + plan["tile"][1] / 4 if plan["tile"][1] <= 64 else 133,
        rate=lambda gpu: gpu.flops,
    ),
}


@dataclass(frozen=True)
class Time:
    """Seconds, and what they come from. What is not `launch` overlaps."""

    launch: float
    memory: float
    cache: float = 0.0
    issue: float = 0.0
    products: float = 0.0

    @property
    def seconds(self) -> float:
        return self.launch + max(self.memory, self.cache, self.issue, self.products)

    @property
    def bound(self) -> str:
        parts = ("launch", "memory", "cache", "issue", "products")
        return max(parts, key=lambda name: getattr(self, name))


def floor(problem: Problem, gpu: Gpu) -> float:
    """Seconds that no kernel for the problem stays below, with no cost of a launch."""
    return max((problem.weight_bytes + problem.activation_bytes) / gpu.bandwidth, problem.flops / gpu.flops)


def reading(bytes_in_flight: float, gpu: Gpu) -> float:
    """Bytes a second from memory, if so many are under way."""
    return min(gpu.bandwidth, bytes_in_flight / gpu.latency)


def planned(problem: Problem, gpu: Gpu, plan: Plan) -> Time:
    """Of one of `KERNELS`."""
    kernel = KERNELS[plan["kernel"]]
    n, m = (math.ceil(size / tile) * tile for size, tile in zip((problem.n, problem.m), plan["tile"], strict=True))
    tiles_n, tiles_m = n / plan["tile"][0], m / plan["tile"][1]
    pieces = tiles_n * tiles_m * max(plan["splits"], plan["cluster"])  # of work, each a block's
    stretch = math.ceil(pieces / gpu.sms) * gpu.sms / pieces
    steps = n / 16 * tiles_m * math.ceil(problem.k / STEP)
    issue = steps * kernel.instructions(plan) / (4 * gpu.sms * gpu.clock) * stretch
    products = 2 * n * m * problem.k / kernel.rate(gpu) * stretch
    # Every tile reads its rows of x and of the weight; the weight comes from memory the first time.
    cache = (tiles_n * 2 * problem.m * problem.k + tiles_m * problem.weight_bytes) / gpu.cache_bandwidth
    sums = 2 * plan["workspace_bytes"]  # written, and read by the kernel that adds them
    bytes_moved = problem.weight_bytes + problem.activation_bytes + sums
    blocks = min(math.prod(plan["grid"]), gpu.sms * kernel.blocks(plan))
    memory = bytes_moved / reading(blocks * kernel.in_flight(plan), gpu)
    return Time(gpu.launch * (2 if sums else 1), memory, cache, issue, products)


def dense(problem: Problem, gpu: Gpu) -> Time:
    """The vendor's product of 16-bit floats, at the best that was assumed of the GPU."""
    moved = problem.dense_bytes + problem.activation_bytes
    return Time(gpu.launch, moved / gpu.bandwidth, products=problem.flops / gpu.flops)


def dequantized(problem: Problem, gpu: Gpu) -> Time:
    """The weight is read, written in 16 bits, and multiplied by the vendor's product: one pass after the other."""
    after = dense(problem, gpu)
    passing = (problem.weight_bytes + problem.dense_bytes) / gpu.bandwidth
    return Time(2 * gpu.launch, passing + after.memory, products=passing + after.products)


def predict(problem: Problem, gpu: Gpu, plan: Plan) -> Time:
    return dequantized(problem, gpu) if plan["kernel"] == "dequantize" else planned(problem, gpu, plan)


def plan_of(problem: Problem, gpu: Gpu) -> Plan:
    """The plan of awq_ext for float16."""
    from awq_ext import _library

    shape = (problem.m, problem.n, problem.k, problem.group)
    return _library.native().plan_cuda(*shape, arch=gpu.arch, sms=gpu.sms, shared_bytes=gpu.shared_bytes)


def table(gpu: Gpu, shapes: dict[str, tuple[int, int]], rows: list[int], group: int = 128) -> list[dict[str, Any]]:
    cases = []
    for name, (n, k) in shapes.items():
        for m in rows:
            problem = Problem(m, n, k, group)
            plan = plan_of(problem, gpu)
            ours, detour, fp16 = predict(problem, gpu, plan), dequantized(problem, gpu), dense(problem, gpu)
            cases.append(
                {
                    "shape": name,
                    **asdict(problem),
                    "plan": dict(plan),
                    "floor": floor(problem, gpu),
                    "seconds": ours.seconds,
                    "bound": ours.bound,
                    "parts": asdict(ours),
                    "dequantize": detour.seconds,
                    "fp16": fp16.seconds,
                    "speed": fp16.seconds / ours.seconds,
                }
            )
    return cases


def show(cases: list[dict[str, Any]]) -> None:
    print(f"{'shape, group':24} {'m':>5} {'floor':>8} {'ours':>8} {'dequant.':>8} {'fp16':>8} {'speed':>6}  kernel")
    for case in cases:
        times = " ".join(f"{case[key] * 1e6:8.1f}" for key in ("floor", "seconds", "dequantize", "fp16"))
        plan = case["plan"]
        what = (
            f"{plan['kernel']} {plan['tile'][0]}x{plan['tile'][1]}, {plan['splits']} splits, bound by {case['bound']}"
        )
        shape = f"{case['n']}x{case['k']}, {case['group']}"
        print(f"{shape:24} {case['m']:5} {times} {case['speed']:6.2f}  {what}")


def shapes_of(names: list[str]) -> dict[str, tuple[int, int]]:
    """From "NxK", or all."""
    found = {}
    for name in names:
        n, _, k = name.partition("x")
        found[name] = (int(n), int(k))
    return found or SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--shapes", nargs="*", default=[], metavar="NxK", help="out_features x in_features")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    cases = table(gpu, shapes_of(args.shapes), args.rows, args.group_size)
    print(f"computed, not measured, from {gpu}; microseconds")
    show(cases)
    if args.out:
        args.out.write_text(json.dumps({"computed_from": asdict(gpu), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
