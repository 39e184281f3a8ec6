"""What is measured: a weight of random codes, something that multiplies by it, and a record of error and time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import Call, clocks, relative_error, seconds, synchronize
from torch import Tensor

from awq_ext import ops
from awq_ext.layouts import repack_scales

ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""||y - reference|| / ||reference||: the rounding of y and, where a kernel rounds weights, of these."""


class Weight(NamedTuple):
    """Codes and zeros uint8, scales float16: W = (q - z) s of [n, k] in groups along k."""

    q: Tensor  # [n, k]
    scales: Tensor  # [n, G]
    zeros: Tensor  # [n, G]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    def exact(self) -> Tensor:
        """In float32, which holds it exactly."""
        of_groups = self.q.view(*self.scales.shape, self.group).float() - self.zeros[..., None].float()
        return (of_groups * self.scales[..., None].float()).view(self.q.shape)


def random_weight(n: int, k: int, group: int, device: torch.device, symmetric: bool = False) -> Weight:
    generator = torch.Generator(device).manual_seed(n * 31 + k)
    codes = partial(torch.randint, 0, 16, dtype=torch.uint8, device=device, generator=generator)
    scales = torch.rand(n, k // group, device=device, generator=generator) * 0.01 + 0.001
    zeros = torch.full((n, k // group), 8, dtype=torch.uint8, device=device) if symmetric else codes((n, k // group))
    return Weight(codes((n, k)), scales.half(), zeros)


class Contestant(NamedTuple):
    """What `measure` takes the time of: y = of(x)(i), with the i-th copy of the weight."""

    of: Callable[[Tensor], Call]
    count: int  # of copies
    nbytes: int  # of one
    graph: bool = True
    limit: float = 1.0  # of the error, as a multiple of ERROR
    note: Callable[[int], dict[str, Any]] = lambda m: {}


def layout_of(device: torch.device) -> str:
    return "fragments" if device.type == "cuda" else "strips"


def pack(weight: Weight, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """What `ops.linear` takes."""
    scales = repack_scales(weight.scales.t().contiguous(), "gemm", layout)
    return ops.pack(weight.q, layout=layout), scales, ops.pack(weight.zeros, layout=f"{layout}.zeros")


def measure(name: str, contestant: Contestant, weight: Weight, xs: dict[int, Tensor]) -> Iterator[dict[str, Any]]:
    """A record for each number of rows: the error first, then the time."""
    n, k = weight.q.shape
    exact = weight.exact()
    for m, x in xs.items():
        call = contestant.of(x)
        error = relative_error(call(contestant.count - 1), x, exact)
        limit = ERROR[x.dtype] * contestant.limit
        case = {"name": name, "m": m, "n": n, "k": k, "group": weight.group, "dtype": str(x.dtype).split(".")[1]}
        if not error <= limit:
            raise RuntimeError(f"{case}: error {error:.2e}, more than {limit:.1e}")
        synchronize(x.device)
        of = seconds(call, contestant.count, x.device, contestant.graph)
        speed = {"bytes_per_second": contestant.nbytes / of["median"], "flops": 2 * m * n * k / of["median"]}
        case |= {"seconds": of, "error": error, "copies": contestant.count, **speed}
        yield case | {"clocks": clocks(x.device), **contestant.note(m)}


def table(
    name: str, of: Callable[[Weight, torch.dtype], Contestant], args: argparse.Namespace, symmetric: bool = False
) -> Iterator[dict[str, Any]]:
    for n, k in args.shapes.values():
        for group in args.groups if (n, k) == next(iter(args.shapes.values())) else args.groups[:1]:
            weight = random_weight(n, k, group, args.device, symmetric)
            for dtype in args.dtypes:
                contestant = of(weight, dtype)
                xs = {m: torch.randn(m, k, device=args.device, dtype=dtype) for m in args.rows}
                yield from measure(name, contestant, weight, xs)
                del contestant, xs
            del weight
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
