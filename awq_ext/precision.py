"""Matrix products of calibration at the speed of bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fast_products() -> Iterator[None]:
    """While it is open, float32 matrix products on a CPU that multiplies bfloat16 numbers are made of such products.

    Factors are rounded to 8 bits, sums are float32. A statistic over thousands of tokens, or a gradient, does not need
    more, and forward passes over the calibration data are most of a quantization's time. A precision that has been set
    with ``torch.backends.mkldnn.matmul.fp32_precision`` or ``torch.set_float32_matmul_precision`` stays as it is, so
    "ieee" there gives float32 products.
    """
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if products.fp32_precision != "none" or not (can.get("avx512_bf16") or can.get("amx_bf16")):
        yield
        return
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = "none"
