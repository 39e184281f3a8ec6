"""`awq_ext::add_gram` against what torch has for it: `addmm_`, with the same factors, and the plain product of them.

A Gram matrix is symmetric, so t k (k + 1) additions and multiplications are all it needs, and all that the operator
and `addmm_`, which does twice as many, are credited with. The plain product, of factors that are rounded before the
clock starts, is credited with its 2 t k^2: that is the rate at which the machine multiplies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import take_turns, write

from awq_ext import ops

ROWS = 2048  # four rows of 512 tokens
WIDTHS = [576, 1536, 4096]

PRODUCTS: Any = torch.backends.mkldnn.matmul


def measure(k: int, bfloat16: bool) -> dict[str, Any]:
    x, sums = torch.randn(ROWS, k), torch.zeros(k, k)
    factor = x.bfloat16() if bfloat16 else x

    ops.add_gram(sums, x, bfloat16=bfloat16)
    want = (factor.double().T @ factor.double()).triu()
    assert ((sums - want).abs() <= 1e-5 * (x.norm(dim=0)[:, None] * x.norm(dim=0))).all()

    def addmm(_: int) -> object:
        PRODUCTS.fp32_precision = "bf16" if bfloat16 else "ieee"
        sums.addmm_(x.T, x)
        PRODUCTS.fp32_precision = "none"
        return sums

    contestants: dict[str, tuple[int, Callable[[int], object]]] = {
        "add_gram": (ROWS * k * (k + 1), lambda _: ops.add_gram(sums, x, bfloat16=bfloat16)),
        "addmm_": (ROWS * k * (k + 1), addmm),
        "product": (2 * ROWS * k * k, lambda _: factor.T @ factor),
    }
    seconds = take_turns({name: call for name, (_, call) in contestants.items()}, rounds=9)
    rates = {name: {at: flops / s / 1e9 for at, s in seconds[name].items()} for name, (flops, _) in contestants.items()}
    medians = {name: rate["median"] for name, rate in rates.items()}
    name = "bfloat16" if bfloat16 else "float32"
    print(
        f"{k:6} {name:8} {medians['add_gram']:5.0f} GFLOP/s, {medians['add_gram'] / medians['addmm_']:4.1f} times "
        f"addmm_, {medians['add_gram'] / medians['product']:4.0%} of the machine's product"
    )
    return {"rows": ROWS, "k": k, "factors": name, "gflops": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [measure(k, bfloat16) for k in WIDTHS for bfloat16 in (True, False)]
    print(write(f"gram_{args.threads}t", results))


if __name__ == "__main__":
    main()
