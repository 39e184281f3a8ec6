"""`linear`: the operator with a gradient and with autocast, in the manner of torch.nn.functional."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from awq_ext.ops import ACTIVATIONS


class _Linear(torch.autograd.Function):
    """y = x W^T + bias with the gradient of x and bias; W is frozen, so it has none.

    The gradient lives here and not on the operator: a kernel on the Autograd key would tax every call of inference.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        qzeros: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        layout: str,
        activation: str,
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales, qzeros)  # type: ignore[arg-type]  # None may be saved too
        ctx.group_size, ctx.layout = group_size, layout  # type: ignore[attr-defined]
        ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]
        return torch.ops.awq_ext.linear(
            x, qweight, scales, qzeros, bias, group_size=group_size, layout=layout, activation=activation
        )

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        qweight, scales, qzeros = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(grad.dtype, qweight, scales, qzeros, ctx.group_size, ctx.layout)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, None, None


def _dense(
    dtype: torch.dtype, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, layout: str
) -> Tensor:
    """W [n, k] in a floating-point dtype."""
    rounded = torch.float32 if dtype == torch.float64 else dtype
    weight: Tensor = torch.ops.awq_ext.dequantize(
        qweight, scales, qzeros, group_size=group_size, layout=layout, dtype=rounded
    )
    return weight.to(dtype)


# Torch has no public way to ask. A version without these loses tangents as the operator does, but runs.
_in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way."""
    return _in_transform() or getattr(forward_ad, "_current_level", -1) >= 0


_cpu_activation = "exact"


def set_cpu_activation(activation: str) -> None:
    """How exactly a CPU rounds the inputs of 4-bit linears, where neither the call nor the layer says it.

    * "exact" (the default): less is lost than float16 or bfloat16 inputs have lost already. float32 inputs keep 24
      bits if ``torch.get_float32_matmul_precision()`` is "highest", as it is unless somebody has set it, else 16.
    * "int16": 16 bits, for float32 inputs too.
    * "int8": 8 bits, about twice as fast for many rows at once, as llama.cpp computes; outputs lose about 0.7 %.

    Raises ValueError for another name.
    """
    global _cpu_activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"set_cpu_activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _cpu_activation = activation


def resolve_activation(activation: str | None, dtype: torch.dtype) -> str:
    """What the operator is told, for a call or layer that says ``activation`` and inputs of this dtype."""
    if activation is not None:
        return activation
    return "int16" if _cpu_activation == "exact" and dtype == torch.float32 and _less_will_do() else _cpu_activation


@torch.compiler.assume_constant_result  # what is compiled keeps the setting that it was traced with
def _less_will_do() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "gemm",
    activation: str | None = None,
) -> Tensor:
    """y = x W^T + bias for a 4-bit weight W, differentiable in x and bias.

    Arguments are those of :func:`awq_ext.ops.linear`; ``activation`` None is what :func:`set_cpu_activation` says.
    Under ``torch.autocast`` x is cast to the autocast dtype, as ``torch.nn.functional.linear`` does, and y has that
    dtype; scales keep their own. Under the transforms of ``torch.func`` and in forward-mode differentiation the weight
    is dequantized to the dtype of x, and torch multiplies. The raw operator ``torch.ops.awq_ext.linear`` knows neither
    gradient nor autocast.
    """
    # As for torch's own linear; the meta device has no autocast, and torch refuses to be asked.
    castable = x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta
    if castable and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _transformed():  # whose rules the operator does not know: tangents would be lost
        weight = _dense(x.dtype, qweight, scales, qzeros, group_size, layout)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    activation = resolve_activation(activation, x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, qweight, scales, qzeros, bias, group_size, layout, activation)
    return torch.ops.awq_ext.linear.default(
        x, qweight, scales, qzeros, bias, group_size=group_size, layout=layout, activation=activation
    )
