"""AwqLinear: the module that stands in for nn.Linear."""

# No "from __future__ import annotations" here: TorchScript reads the annotations of AwqLinear as types.
import torch
from torch import Tensor, nn

from awq_ext import ops
from awq_ext.functional import linear

W_BIT = 4
PACK = 8  # codes in one int32 word


class AwqLinear(nn.Module):
    """A linear layer with 4-bit weights, under AutoAWQ's buffer names and in its ``gemm`` layout.

    Buffers (n = out_features, k = in_features, G = k / group_size):

    * ``qweight`` int32 [k, n/8], ``qzeros`` int32 [G, n/8], ``scales`` float [G, n], ``bias`` float [n] or None.

    ``.to(dtype)`` casts scales and bias only. The buffers are uninitialised until a state dict is loaded; make a
    filled module with :meth:`from_linear`. Layout: AutoAWQ ``awq/modules/linear/gemm.py``.

    Raises ValueError if in_features is not a multiple of group_size or out_features is not a multiple of 8.
    """

    in_features: int
    out_features: int
    group_size: int
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        reason = why_not(in_features, out_features, group_size)
        if reason is not None:
            raise ValueError(f"AwqLinear: {reason}")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = in_features if group_size == -1 else group_size
        groups = in_features // self.group_size
        words = out_features // PACK
        self.register_buffer("qweight", torch.empty(in_features, words, dtype=torch.int32, device=device))
        self.register_buffer("qzeros", torch.empty(groups, words, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(groups, out_features, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles neither autograd Functions nor keyword-only defaults
            return torch.ops.awq_ext.linear(
                x, self.qweight, self.scales, self.qzeros, self.bias, group_size=self.group_size
            )
        return linear(x, self.qweight, self.scales, self.qzeros, self.bias, group_size=self.group_size)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        *,
        zero_point: bool = True,
        range: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "AwqLinear":
        """Round a linear's weight to nearest, group by group.

        ``range`` (float32 [n, G, 2]) gives the lowest and highest value of each group, see
        :func:`awq_ext.ops.quantize`; ``dtype`` is that of scales and bias (None: the weight's, float16 for
        float32). Raises ValueError for shapes that AwqLinear refuses, RuntimeError for weights that are not finite.
        """
        weight = linear.weight.detach()
        if dtype is None:
            dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16
        reason = why_not(linear.in_features, linear.out_features, group_size)
        if reason is not None:
            raise ValueError(f"AwqLinear: {reason}")
        return cls.from_codes(
            linear, *ops.quantize(weight, group_size=group_size, zero_point=zero_point, range=range, dtype=dtype)
        )

    @classmethod
    def from_codes(cls, linear: nn.Linear, q: Tensor, scales: Tensor, zeros: Tensor) -> "AwqLinear":
        """Replace a linear's weight by codes and parameters as :func:`awq_ext.ops.quantize` returns them.

        q uint8 [n, k], scales [n, G] in the dtype that bias will have, too, zeros uint8 [n, G]. Raises ValueError for
        shapes that AwqLinear refuses, RuntimeError for codes above 15.
        """
        n, k = q.shape
        module = cls(k, n, linear.bias is not None, group_size=k // scales.shape[1], device="meta")
        module.qweight = ops.pack(q)
        module.qzeros = ops.pack(zeros)
        module.scales = scales.t().contiguous()
        module.bias = None if linear.bias is None else linear.bias.detach().to(scales.dtype, copy=True)
        return module.train(linear.training)

    @torch.jit.unused
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [n, k] that this layer multiplies with, in ``dtype`` (None: that of scales)."""
        return ops.dequantize(self.qweight, self.scales, self.qzeros, group_size=self.group_size, dtype=dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}"
        )


def why_not(in_features: int, out_features: int, group_size: int) -> str | None:
    """The reason why a linear of this shape cannot be held in 4 bits at this group size, or None if it can."""
    if group_size != -1 and group_size < 1:
        return f"group_size must be positive, or -1 for one group over in_features, got {group_size}"
    if in_features < 1 or (group_size != -1 and in_features % group_size):
        return f"in_features {in_features} is not a multiple of group_size {group_size}"
    if out_features < 1 or out_features % PACK:
        return f"out_features {out_features} is not a multiple of {PACK}"
    return None
