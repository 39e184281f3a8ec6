"""pack, unpack and repack against the machine's own copy, and against AutoAWQ's packing code.

A conversion is credited with the bytes that it must read and write, and its rate compared with a copy's. Two ways: the
operators, whose results are fresh tensors, against `Tensor.clone` of as large a tensor, since new memory has its price;
and `_native.repack` between buffers that exist already, against `memmove` on as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from common import take_turns, write
from torch import Tensor

from awq_ext import _library
from awq_ext.layouts import layouts

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # out_features, in_features
LAYOUTS = ["gemm", "gemv", "gptq", "gemv_fast", "compressed-tensors", "marlin"]
ROTATE_BYTES = 128 << 20  # of words, read and written each; of codes twice as much
HALF = 0.5  # of the copy's speed: the goal

ops = torch.ops.awq_ext
native = _library.native()


@dataclass(frozen=True)
class Contestant:
    name: str
    bytes: int  # read and written
    call: Callable[[int], object]
    copy_bytes: int
    copy: Callable[[int], object]


class Buffers:
    """Random words and codes of one shape, in as many copies as no cache holds, and as many results."""

    def __init__(self, n: int, k: int):
        self.n, self.k, self.nbytes = n, k, n * k // 2
        self.count = max(2, -(-ROTATE_BYTES // self.nbytes))
        self.codes = [torch.randint(0, 16, (n, k), dtype=torch.uint8) for _ in range(self.count)]
        self.words = [torch.randint(0, 256, (self.nbytes,), dtype=torch.uint8) for _ in range(self.count)]
        self.results = [torch.zeros(self.nbytes, dtype=torch.uint8) for _ in range(self.count)]

    def words_of(self, layout: str) -> list[Tensor]:
        """The random words as a layout has them; every bit pattern is some codes."""
        meta = ops.pack(torch.empty(self.n, self.k, dtype=torch.uint8, device="meta"), layout=layout)
        return [words.view(meta.dtype).view(meta.shape) for words in self.words]


def check(buffers: Buffers) -> None:
    """What is timed is right: each conversion agrees with the others."""
    q = buffers.codes[0]
    packed = {layout: ops.pack(q, layout=layout) for layout in LAYOUTS}
    for src in LAYOUTS:
        assert torch.equal(ops.unpack(packed[src], layout=src), q), src
        for dst in LAYOUTS:
            assert torch.equal(ops.repack(packed[src], src=src, dst=dst), packed[dst]), (src, dst)


def operators(buffers: Buffers) -> list[Contestant]:
    """The operators beside clones of tensors as large as their results."""
    nbytes, count = buffers.nbytes, buffers.count

    def clone(i: int) -> Tensor:
        return buffers.words[i % count].clone()

    def clone_codes(i: int) -> Tensor:
        return buffers.codes[i % count].clone()

    found = []
    for layout in LAYOUTS:
        words = buffers.words_of(layout)
        pack = lambda i, layout=layout: ops.pack(buffers.codes[i % count], layout=layout)  # noqa: E731
        unpack = lambda i, layout=layout, words=words: ops.unpack(words[i % count], layout=layout)  # noqa: E731
        found.append(Contestant(f"pack {layout}", 3 * nbytes, pack, 2 * nbytes, clone))
        found.append(Contestant(f"unpack {layout}", 3 * nbytes, unpack, 4 * nbytes, clone_codes))
    for src in LAYOUTS:
        words = buffers.words_of(src)
        for dst in LAYOUTS:
            if src != dst and "gemm" in (src, dst):
                repack = lambda i, words=words, src=src, dst=dst: ops.repack(  # noqa: E731
                    words[i % count], src=src, dst=dst
                )
                found.append(Contestant(f"repack {src} {dst}", 2 * nbytes, repack, 2 * nbytes, clone))
    return found


def between_buffers(buffers: Buffers, threads: int, pool: ThreadPoolExecutor) -> list[Contestant]:
    """`_native.repack` into buffers that exist, and memmove; each thread takes a run of blocks."""
    n, k, nbytes, count = buffers.n, buffers.k, buffers.nbytes, buffers.count
    sources = [memoryview(words.numpy()) for words in buffers.words]
    targets = [memoryview(result.numpy()) for result in buffers.results]

    def together(work: Callable[[int], object]) -> None:
        if threads == 1:
            work(0)
        else:
            list(pool.map(work, range(threads)))

    def share(total: int, thread: int) -> int:
        return total * thread // threads

    def copy(i: int) -> None:
        source, target = buffers.words[i % count].data_ptr(), buffers.results[i % count].data_ptr()

        def work(thread: int) -> None:
            begin, end = share(nbytes, thread), share(nbytes, thread + 1)
            ctypes.memmove(target + begin, source + begin, end - begin)

        together(work)

    def repack(i: int, src: str, dst: str) -> None:
        outer = n if layouts()[dst].weight.outer == "out_features" else k
        blocks = outer // native.BLOCK
        block_bytes = nbytes // blocks
        source, target = sources[i % count], targets[i % count]

        def work(thread: int) -> None:
            begin, end = share(blocks, thread), share(blocks, thread + 1)
            native.repack(source, target[begin * block_bytes : end * block_bytes], src, dst, n, k, begin, end)

        together(work)

    found = []
    for src in LAYOUTS:
        for dst in LAYOUTS:
            if src != dst:
                call = lambda i, src=src, dst=dst: repack(i, src, dst)  # noqa: E731
                found.append(Contestant(f"buffers {src} {dst}", 2 * nbytes, call, 2 * nbytes, copy))
    return found


def measure(contestants: Sequence[Contestant], rounds: int) -> dict[str, dict[str, object]]:
    """Gigabytes a second, read and written, and the share of its copy's: by the medians, and by the fast rounds.

    Each takes turns with its copy alone: the two are never far apart, whatever else the machine does.
    """
    results: dict[str, dict[str, object]] = {}
    for contestant in contestants:
        seconds = take_turns({"copy": contestant.copy, "conversion": contestant.call}, rounds, 0.02)
        copy, own = seconds["copy"], seconds["conversion"]
        work = contestant.bytes / contestant.copy_bytes
        results[contestant.name] = {
            "seconds": own,
            "seconds_of_copy": copy,
            "gb_per_s": round(contestant.bytes / own["median"] / 1e9, 2),
            "of_copy": round(work * copy["median"] / own["median"], 3),
            "of_copy_p10": round(work * copy["p10"] / own["p10"], 3),
        }
        print(
            f"  {contestant.name}: {results[contestant.name]['gb_per_s']} GB/s, "
            f"{results[contestant.name]['of_copy']} of a copy's",
            flush=True,
        )
    return results


# --- the peer --------------------------------------------------------------------------------------------------------


def autoawq(path: Path) -> dict[str, types.ModuleType]:
    """AutoAWQ's packing modules, without the rest of the package, which wants other versions of everything."""
    package = types.ModuleType("awq")
    package.__path__ = [str(path / "awq")]
    sys.modules["awq"] = package
    names = ["modules.linear.gemm", "modules.linear.gemv", "modules.linear.gemv_fast", "utils.packing_utils"]
    return {name.rpartition(".")[2]: importlib.import_module(f"awq.{name}") for name in names}


def against_autoawq(path: Path, n: int, k: int, group: int, rounds: int) -> dict[str, object]:
    """What AutoAWQ does in one function of its own, timed beside the same made of our operators."""
    peer = autoawq(path)
    groups = k // group
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    z = torch.randint(1, 16, (n, groups), dtype=torch.uint8)
    s = (torch.rand(n, groups) * 0.01 + 0.001).half()
    weight = (q.float() - z.repeat_interleave(group, 1)) * s.float().repeat_interleave(group, 1)
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    qweight, qzeros = ops.pack(q, layout="gemm"), ops.pack(z, layout="gemm.zeros")

    def round_and_pack(layout: str) -> Tensor:
        # AutoAWQ packs where it rounds, so rounding is part of ours as well.
        wide = [t.float().repeat_interleave(group, 1) for t in (s, z)]
        codes = torch.round(weight / wide[0] + wide[1]).to(torch.uint8)
        return ops.pack(codes, layout=layout)

    def from_linear(module: str, name: str, *parameters: Tensor) -> Tensor:
        layer = getattr(peer[module], name).from_linear(linear, 4, group, False, *parameters)
        return layer.qweight

    def unpack_theirs() -> Tensor:
        packing = peer["packing_utils"]
        codes, _ = packing.reverse_awq_order(*packing.unpack_awq(qweight, qzeros, 4), 4)
        return torch.bitwise_and(codes, 15)

    wide_s, wide_z = s.float(), z.float()
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "round and pack gemm": (
            lambda: from_linear("gemm", "WQLinear_GEMM", wide_s.t().contiguous(), wide_z.t().contiguous()),
            lambda: round_and_pack("gemm"),
        ),
        "round and pack gemv": (
            lambda: from_linear("gemv", "WQLinear_GEMV", wide_s, wide_z),
            lambda: round_and_pack("gemv"),
        ),
        "pack gemv_fast": (
            lambda: peer["gemv_fast"].pack_intweight(q.int(), 4, 64),
            lambda: ops.pack(q, layout="gemv_fast"),
        ),
        "unpack gemm": (lambda: unpack_theirs().t(), lambda: ops.unpack(qweight, layout="gemm")),
        "repack gemm gptq": (
            lambda: peer["packing_utils"].unpack_reorder_pack(qweight, qzeros, 4)[0],
            lambda: ops.repack(qweight, src="gemm", dst="gptq"),
        ),
    }
    results: dict[str, object] = {"n": n, "k": k, "group_size": group}
    for name, (theirs, ours) in pairs.items():
        assert torch.equal(theirs().to(torch.int64), ours().to(torch.int64)), name
        times = take_turns({"autoawq": lambda i, f=theirs: f(), "awq_ext": lambda i, f=ours: f()}, rounds)
        ratio = times["autoawq"]["median"] / times["awq_ext"]["median"]
        results[name] = {"seconds": times, "ratio": round(ratio, 1)}
        print(f"{name} [{n}, {k}]: AutoAWQ takes {ratio:.0f} times as long ({times['autoawq']['median']:.4f} s)")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    parser.add_argument("--autoawq", type=Path, help="a checkout of AutoAWQ, to time its packing code as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    shapes: list[dict[str, object]] = []
    below: list[str] = []
    with ThreadPoolExecutor(args.threads) as pool:
        for n, k in SHAPES[: args.shapes]:
            buffers = Buffers(n, k)
            check(buffers)
            print(f"[{n}, {k}]")
            found = measure([*operators(buffers), *between_buffers(buffers, args.threads, pool)], args.rounds)
            shapes.append({"n": n, "k": k, "conversions": found})
            below += [
                f"[{n}, {k}] {name}: {figures['of_copy']}"
                for name, figures in found.items()
                if float(str(figures["of_copy"])) < HALF
            ]
    results: dict[str, object] = {"load_before": load, "goal_of_copy": HALF, "below_goal": below, "shapes": shapes}
    print("below half of the copy:", *(below or ["none"]), sep="\n  ")
    if args.autoawq is not None:
        results["autoawq"] = against_autoawq(args.autoawq, 1024, 1024, 128, 5)
    print(write(f"pack_{args.threads}t", results))


if __name__ == "__main__":
    main()
