"""Forward passes and products of calibration in bfloat16, on a CPU that multiplies such numbers.

Forward passes over the calibration data are most of a quantization's time, and a statistic over thousands of tokens, or
a gradient, does not need the 24 bits of float32. Where a precision has been chosen with
``torch.set_float32_matmul_precision`` or ``torch.backends.mkldnn.matmul.fp32_precision``, nothing is done here, so
"highest" or "ieee" there gives float32 products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_PRODUCTS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_chosen_here = False  # the precision is torch's, of the whole process, and so is this


def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 numbers, and nobody else has chosen a precision."""
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (_chosen_here or _PRODUCTS.fp32_precision == "none") and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


@contextmanager
def fast_products() -> Iterator[None]:
    """While it is open, factors of float32 matrix products may be rounded to bfloat16, where that is faster.

    Sums and results stay float32, which Gram matrices need: their small eigenvalues are differences. oneDNN, which
    multiplies then, decides: on an AMD of family 26 it rounds nothing (relative error 4e-7) and takes half the time of
    what torch calls otherwise.
    """
    global _chosen_here
    if _chosen_here or not bfloat16_is_faster():
        yield
        return
    _chosen_here, _PRODUCTS.fp32_precision = True, "bf16"
    try:
        yield
    finally:
        _chosen_here, _PRODUCTS.fp32_precision = False, "none"


def fast_dtype(tensor: Tensor) -> torch.dtype:
    """What a factor like this one is best given as: bfloat16 if that is faster, else float32. float64 stays."""
    fast = tensor.device.type == "cpu" and tensor.dtype != torch.float64 and bfloat16_is_faster()
    return torch.bfloat16 if fast else torch.promote_types(tensor.dtype, torch.float32)


def fast_forward() -> AbstractContextManager[Any]:
    """While it is open, a forward pass of float32 works in bfloat16 where torch's autocast does, if that is faster.

    What is added up over layers stays float32. Products are nearly twice as fast as `fast_products` makes them, which
    converts both factors every time, and what is between them has half as many bytes to move.
    """
    return torch.autocast("cpu", torch.bfloat16) if bfloat16_is_faster() else nullcontext()


def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x @ weight.T + bias, for one weight and many x; in bfloat16 if that is faster, but for the bias."""
    factor = weight.to(fast_dtype(weight))
    if factor.dtype != torch.bfloat16:
        return lambda x: nn.functional.linear(x, factor, bias)

    def multiply(x: Tensor) -> Tensor:
        y = nn.functional.linear(x.to(factor.dtype), factor)
        return y if bias is None else y + bias

    return multiply


def embedding_weights(model: nn.Module) -> set[Tensor]:
    """Those that rows are looked up in, which may be as large as all the rest: no product needs them in float32."""
    return {module.get_parameter("weight") for module in model.modules() if isinstance(module, nn.Embedding)}


@contextmanager
def in_float32(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[dict[Tensor, torch.dtype]]:
    """While it is open, all floats of the model are float32 and none asks for a gradient. Gives their own dtypes.

    Tensors in ``but`` keep their dtypes.
    """
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes, trained = {t: t.dtype for t in floats}, {id(t) for t in floats if t.requires_grad}
    try:
        for tensor in floats:
            tensor.requires_grad_(False)
            if tensor not in but:
                tensor.data = tensor.data.float()
        yield dtypes
    finally:
        for tensor, dtype in dtypes.items():
            tensor.data = tensor.data.to(dtype)
            tensor.requires_grad_(id(tensor) in trained)
