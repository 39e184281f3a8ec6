"""AwqLinear: the module that stands in for nn.Linear."""

# No "from __future__ import annotations" here: TorchScript reads the annotations of AwqLinear as types.
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from awq_ext import _library, ops
from awq_ext.functional import linear, resolve_activation
from awq_ext.layouts import FLOATS, find_codes, repack_scales, strips_can_have

W_BIT = 4
PACK = 8  # codes in one int32 word
PACKED = ("qweight", "qzeros", "scales")  # what a layout arranges

torch.fx.wrap("linear")  # which asks of its inputs what torch.fx cannot know while it traces


class AwqLinear(nn.Module):
    """A linear layer with 4-bit weights that speaks AutoAWQ's names and ``gemm`` layout to the outside.

    Its state dict (n = out_features, k = in_features, G = k / group_size):

    * ``qweight`` int32 [k, n/8], ``qzeros`` int32 [G, n/8], ``scales`` float [G, n], ``bias`` float [n] or None.

    In memory the weight is there once, in the ``layout`` that the device's kernels read fastest, and the buffers of the
    first three names hold that: "strips" on a CPU, "fragments" on CUDA, "gemm" elsewhere and with a group size that
    those kernels cannot have. The state dict is then made when it is asked for, and does not share memory with the
    module. :meth:`repack` changes the layout by hand, for those who write to the buffers themselves.

    ``activation`` says how exactly a CPU rounds the inputs, see :func:`awq_ext.functional.linear`; None is what
    :func:`awq_ext.set_cpu_activation` says. ``.to(dtype)`` casts scales and bias only. The buffers are uninitialised
    until a state dict is loaded; make a filled module with :meth:`from_linear`. Layout: AutoAWQ
    ``awq/modules/linear/gemm.py``.

    Raises ValueError if in_features is not a multiple of group_size or out_features is not a multiple of 8, and for
    another dtype of scales than float32, float16 and bfloat16.
    """

    in_features: int
    out_features: int
    group_size: int
    layout: str
    activation: str | None
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
        if dtype not in FLOATS.values():
            raise ValueError(f"AwqLinear: dtype, that of scales, must be float32, float16 or bfloat16, got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = in_features if group_size == -1 else group_size
        self.layout = "gemm"
        self.activation = None
        groups = in_features // self.group_size
        words = out_features // PACK
        self.register_buffer("qweight", torch.empty(in_features, words, dtype=torch.int32, device=device))
        self.register_buffer("qzeros", torch.empty(groups, words, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(groups, out_features, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles neither autograd Functions nor keyword-only defaults
            activation = self.activation
            return torch.ops.awq_ext.linear(
                x,
                self.qweight,
                self.scales,
                self.qzeros,
                self.bias,
                group_size=self.group_size,
                layout=self.layout,
                activation="exact" if activation is None else activation,
            )
        held: dict[str, Any] = self._buffers  # to ask the module for each takes as long as to multiply a small matrix
        return linear(
            x,
            held["qweight"],
            held["scales"],
            held["qzeros"],
            held["bias"],
            group_size=self.group_size,
            layout=self.layout,
            activation=self.activation,
        )

    @torch.jit.unused
    def repack(self, layout: str | None = None) -> "AwqLinear":
        """Hold the weight in ``layout``, "gemm", "strips" or "fragments"; None: the one for the device that it is on.

        Strips are multiplied on a CPU only, with a group size that they can have, and fragments on CUDA only:
        elsewhere the layer then raises RuntimeError when it is called.
        """
        if layout is None:
            devices = {t.device.type for t in (self.qweight, self.qzeros, self.scales)}
            device = devices.pop() if len(devices) == 1 else "several"  # while a skeleton is being filled
            layout = best_layout(self.group_size, self.in_features, device)
        if layout != self.layout:
            self.qweight, self.qzeros, self.scales = self._in_layout(layout)
            self.layout = layout
        return self

    def _in_layout(self, layout: str) -> tuple[Tensor, Tensor, Tensor]:
        """qweight, qzeros and scales in a layout."""
        n, k, groups = self.out_features, self.in_features, self.scales.shape[0]
        qweight = _repack(self.qweight, self.layout, layout, n, k)
        qzeros = _repack(self.qzeros, f"{self.layout}.zeros", f"{layout}.zeros", n, groups)
        return qweight, qzeros, repack_scales(self.scales, self.layout, layout)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "gemm":
            for name, tensor in zip(PACKED, self._in_layout("gemm"), strict=True):
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.repack("gemm")  # what a state dict lacks stays as it is
        super()._load_from_state_dict(*arguments)
        self.repack()

    def _apply(self, fn: Any, recurse: bool = True) -> "AwqLinear":
        device = fn(torch.empty(0, dtype=torch.int32)).device.type
        if best_layout(self.group_size, self.in_features, device) == "gemm":
            self.repack("gemm")  # while operators can: they may not know the device that comes
        return super()._apply(fn, recurse).repack()

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
        module.layout = best_layout(module.group_size, k, q.device.type)
        module.qweight = ops.pack(q, layout=module.layout)
        module.qzeros = ops.pack(zeros, layout=f"{module.layout}.zeros")
        module.scales = repack_scales(scales.t().contiguous(), "gemm", module.layout)
        module.bias = None if linear.bias is None else linear.bias.detach().to(scales.dtype, copy=True)
        return module.train(linear.training)

    @classmethod
    def concatenate(cls, layers: Sequence["AwqLinear"]) -> "AwqLinear":
        """One layer with the outputs of ``layers``, one behind the other: q, k and v, or gate and up, in one call.

        A call of small matrices is mostly waking threads and going through the dispatcher, and one call does that
        once. ``y.split([layer.out_features for layer in layers], -1)`` gives the parts of its outputs. The weight is
        copied. Raises ValueError unless all layers have the same in_features, group_size, ``activation``, and dtypes
        and device of their tensors, and all have a bias or none has.
        """
        if not layers:
            raise ValueError("AwqLinear.concatenate: expected at least one layer, got none")
        first, *others = layers
        for i, layer in enumerate(others, 1):
            for what, a, b in zip(_SHARED, _shared(first), _shared(layer), strict=True):
                if a != b:
                    found = f"{a} of layer 0, {b} of layer {i}"
                    raise ValueError(f"AwqLinear.concatenate: {what} must be the same: {found}")
        parts = [layer._in_layout("gemm") for layer in layers]
        outputs = sum(layer.out_features for layer in layers)
        module = cls(first.in_features, outputs, first.bias is not None, group_size=first.group_size, device="meta")
        module.qweight, module.qzeros, module.scales = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        module.bias = None if first.bias is None else torch.cat([layer.get_buffer("bias") for layer in layers])
        module.activation = first.activation
        return module.train(first.training).repack()

    @torch.jit.unused
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [n, k] that this layer multiplies with, in ``dtype`` (None: that of scales)."""
        return ops.dequantize(
            self.qweight, self.scales, self.qzeros, group_size=self.group_size, layout=self.layout, dtype=dtype
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}"
        )


_SHARED = ("in_features", "group_size", "activation", "dtype of scales", "dtype of the bias", "device")


def _shared(layer: AwqLinear) -> tuple[Any, ...]:
    """What layers must have in common to be concatenated, in the order of _SHARED."""
    bias = None if layer.bias is None else layer.bias.dtype
    return layer.in_features, layer.group_size, layer.activation, layer.scales.dtype, bias, layer.qweight.device


def _repack(words: Tensor, src: str, dst: str, n: int, k: int) -> Tensor:
    """The words of codes [n, k] in another layout; src may fill up its tiles beyond what dst has room for."""
    codes = find_codes(dst)
    assert codes is not None
    rows, cols = codes.word_shape(n, k)
    return ops.repack(words, src=src, dst=dst)[:rows, :cols].contiguous()


def best_layout(group_size: int, in_features: int, device: str) -> str:
    """The layout in which a weight is multiplied fastest on this type of device."""
    if device == "cpu" and strips_can_have(in_features, group_size):
        return "strips"
    if device == "cuda" and _library.CUDA_LIBRARY in _library.loaded():
        return "fragments" if _library.native().fragments_can_have(in_features, group_size) else "gemm"
    return "gemm"


def explain(layer: AwqLinear, m: int, dtype: torch.dtype | None = None, gpu: str | None = None) -> str:
    """How the layer multiplies ``m`` rows of inputs in ``dtype``: the kernel, and why that one. A line of text.

    ``dtype`` None is float32 on a CPU and the dtype of scales elsewhere. With ``gpu``, the name of an architecture such
    as "sm_90", the answer is for the layer on a GPU of that kind, and there need not be one. Raises ValueError for an
    architecture that is not known, TypeError for another kind of layer.
    """
    if not isinstance(layer, AwqLinear):
        raise TypeError(f"explain: layer must be an AwqLinear, got {type(layer).__name__}")
    device = layer.qweight.device
    if gpu is not None or device.type == "cuda":
        return _explain_cuda(layer, m, dtype or layer.scales.dtype, device, gpu)
    if device.type != "cpu":
        dtype = dtype or layer.scales.dtype
        return f"{layer.layout} on {device}: the weight is dequantized to {dtype}, and torch multiplies"
    dtype = dtype or torch.float32
    activation = resolve_activation(layer.activation, dtype)
    plan = _library.native().plan_linear(
        m, layer.out_features, layer.in_features, _name(dtype), layer.layout, activation, layer.group_size
    )
    pieces = f"{plan['tiles']} pieces of {plan['tile']} columns"
    return f"{plan['kernel']} at level {plan['level']}, {pieces} over {torch.get_num_threads()} threads: {plan['why']}"


def _explain_cuda(layer: AwqLinear, m: int, dtype: torch.dtype, device: torch.device, gpu: str | None) -> str:
    if gpu is None and layer.layout != "fragments":
        return f"{layer.layout} on {device}: the weight is dequantized to {dtype}, and torch multiplies"
    if gpu is None:
        found = torch.cuda.get_device_properties(device)
        shared = found.shared_memory_per_multiprocessor - 1024  # a block may have all but what the system keeps
        facts = {"arch": 10 * found.major + found.minor, "sms": found.multi_processor_count, "shared_bytes": shared}
    else:
        digits = gpu.removeprefix("sm_").rstrip("a")
        if not digits.isdecimal():
            raise ValueError(f"explain: gpu must be the name of an architecture, such as 'sm_90', got {gpu!r}")
        facts = {"arch": int(digits)}
    shape = (m, layer.out_features, layer.in_features, layer.group_size)
    plan = _library.native().plan_cuda(*shape, dtype=_name(dtype), scale_dtype=_name(layer.scales.dtype), **facts)
    where = gpu or f"{device} (sm_{facts['arch']})"
    if plan["kernel"] == "dequantize":
        return f"dequantize on {where}, the weight to {dtype}, and torch multiplies: {plan['why']}"
    (rows, tokens), (x, y) = plan["tile"], plan["grid"]
    divided = [f", {plan[name]} {text}" for name, text in _DIVIDED.items() if plan[name] > 1]
    blocks = f"{x * y} blocks for {rows} columns and {tokens} rows each{''.join(divided)}"
    return f"{plan['kernel']} on {where}, {blocks}: {plan['why']}"


_DIVIDED = {"cluster": "of them to a cluster", "splits": "parts of in_features"}  # of a plan, if there are several


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_not(in_features: int, out_features: int, group_size: int) -> str | None:
    """The reason why a linear of this shape cannot be held in 4 bits at this group size, or None if it can."""
    if group_size != -1 and group_size < 1:
        return f"group_size must be positive, or -1 for one group over in_features, got {group_size}"
    if in_features < 1 or (group_size != -1 and in_features % group_size):
        return f"in_features {in_features} is not a multiple of group_size {group_size}"
    if out_features < 1 or out_features % PACK:
        return f"out_features {out_features} is not a multiple of {PACK}"
    return None
