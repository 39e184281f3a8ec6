"""Typed wrappers of ``torch.ops.awq_ext.*`` and, under each, its fake (shape-only) kernel.

n = out_features, k = in_features, g = group_size (-1 means k), G = k / g, and the weight is
``W[n, k] = (q[n, k] - z[n, k // g]) * s[n, k // g]`` with codes q and zeros z in 0..15. The operators that choose codes
take ``w_bit`` from 2 to 8, for codes and zeros in 0 .. 2^w_bit - 1; only those of 4 bits can be packed.
Every operator raises RuntimeError for a tensor of the wrong shape, dtype or device; the message names the tensor,
what was expected and what was got. Outputs are new tensors, and only :func:`add_gram` writes into one that it is given.
The same input gives the same bytes at any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq_ext import _library
from awq_ext.layouts import Codes, every_layout, find_codes, strips_can_have

_library.load()  # the package is importable without its libraries (see __init__), this module is not

_ops = torch.ops.awq_ext
ACTIVATIONS = ("exact", "int16", "int8")  # see linear
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_OPTIONAL = ("qzeros", "bias", "range", "tie", "row_weight")


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "gemm",
    activation: str = "exact",
) -> Tensor:
    """y = x W^T + bias, without gradient (:func:`awq_ext.functional.linear` has one).

    x [..., k] float32, float16, bfloat16, or float64 on a CPU; any strides, any number of rows (none included).
    scales float [G, n]; bias float [n]; by the layout

    - "gemm": qweight int32 [k, n/8], qzeros int32 [G, n/8];
    - "strips", on a CPU, for a group_size that is a multiple of 8 or k: qweight and qzeros as :func:`pack` and
      :func:`repack` give them, scales as :func:`awq_ext.layouts.repack_scales` does;
    - "fragments", on CUDA, for n a multiple of 8: the same.

    Without qzeros every zero is 8. Returns [..., n] in x's dtype. Products are accumulated in float32 (float64 for
    float64 x) and rounded once; a row of x with an infinity or a NaN gives a row without finite guarantees and
    touches no other. Codes and zeros may be summed apart, so 15 sum |x| over a group must stay within float32's range.
    On CUDA with layout "gemm", and where no kernel can do better with "fragments" (:func:`awq_ext.explain` tells), the
    weight is rounded to x's dtype first, and the product is torch's own.

    With layout "strips", x is rounded to integers, by one step for every 128 values at most of a row and group, and
    their products are exact. ``activation`` says how many bits suffice; the other layouts never round x:

    - "exact": less is lost than by x's own dtype; 16 bits for float16 and bfloat16, 24 for float32;
    - "int16": 16 bits, for float32 x too;
    - "int8": 8 bits, about twice as fast for many rows, and no more exact than that.
    """
    return _ops.linear(x, qweight, scales, qzeros, bias, group_size=group_size, layout=layout, activation=activation)


@torch.library.register_fake("awq_ext::linear")
def _linear_fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "gemm",
    activation: str = "exact",
) -> Tensor:
    _check_tensors("linear", x=x, qweight=qweight, scales=scales, qzeros=qzeros, bias=bias)
    k_of_x = x.shape[-1] if x.dim() >= 1 else None
    k, n = _check_weight("linear", qweight, scales, qzeros, group_size, layout, k_of_x)
    _check(x.dtype in (*_FLOATS, torch.float64), "linear", "x", "a floating point tensor", x)
    _check(x.dim() >= 1 and x.shape[-1] == k, "linear", "x", f"[..., {k}]", x)
    if layout == "fragments":
        _check(x.device.type != "cpu", "linear", "x", "on CUDA for layout 'fragments' (repack it for a CPU)", x)
    if bias is not None:
        _check(bias.dtype in _FLOATS and bias.dim() == 1 and bias.shape[0] == n, "linear", "bias", f"[{n}]", bias)
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"awq_ext::linear: activation must be 'exact', 'int16' or 'int8', got '{activation}'",
    )
    return x.new_empty((*x.shape[:-1], n))


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "gemm",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight W [n, k] in ``dtype`` (float32, float16 or bfloat16; None: that of scales).

    (q - z) * s is computed in float32 and rounded once to ``dtype``. Arguments as for :func:`linear`, and
    "fragments" on a CPU too. For group_size -1, W has as many in_features as a layout stores: with "strips" whole
    eights, with "fragments" whole 64s.
    """
    return _ops.dequantize(qweight, scales, qzeros, group_size=group_size, layout=layout, dtype=dtype)


@torch.library.register_fake("awq_ext::dequantize")
def _dequantize_fake(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "gemm",
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_tensors("dequantize", qweight=qweight, scales=scales, qzeros=qzeros)
    k, n = _check_weight("dequantize", qweight, scales, qzeros, group_size, layout)
    _check_storage("dequantize", dtype)
    return scales.new_empty((n, k), dtype=dtype or scales.dtype)


def quantize(
    w: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    zero_point: bool = True,
    range: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round w float [n, k] to nearest codes, group by group.

    range float32 [n, G, 2] is the lowest and highest value of each group that codes must reach (widened to include
    zero; None: the group's minimum and maximum); weights outside saturate. With zero_point
    ``s = (hi - lo) / (2^w_bit - 1), z = round(-lo / s)``, else ``z = 2^(w_bit - 1), s = max(-lo, hi) / (z - 1)``. s is
    rounded to ``dtype`` (None: float16) before codes are chosen. An all-zero group has s = 1.

    Returns q uint8 [n, k], scales ``dtype`` [n, G], zeros uint8 [n, G]. On a CPU, weights that are not finite and
    scales that ``dtype`` cannot hold raise RuntimeError; on CUDA (no synchronisation) such a group's scale is NaN.
    Source of the formulas: AutoAWQ ``awq/quantize/quantizer.py pseudo_quantize_tensor``, with a range that always
    includes zero, so that a group of one sign does not saturate.
    """
    return _ops.quantize(w, group_size=group_size, w_bit=w_bit, zero_point=zero_point, range=range, dtype=dtype)


@torch.library.register_fake("awq_ext::quantize")
def _quantize_fake(
    w: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    zero_point: bool = True,
    range: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tensors("quantize", w=w, range=range)
    n, groups = _check_float_weight("quantize", w, group_size)
    _check_rounding("quantize", w_bit, dtype)
    _check_range("quantize", range, n, groups)
    return (
        w.new_empty(w.shape, dtype=torch.uint8),
        w.new_empty((n, groups), dtype=dtype or torch.float16),
        w.new_empty((n, groups), dtype=torch.uint8),
    )


def pack(q: Tensor, *, layout: str = "gemm") -> Tensor:
    """Codes q uint8 [n, k] (0..15) -> the words of a layout, int32 or int16.

    ``layout`` is a name of :func:`awq_ext.layouts.layouts` for a weight (``gemm``: [k, n/8], ``gemv``: [n, k/8],
    ``gptq``: [k/8, n], ``gemv_fast``: int16 [n/4, k] ...), or "<layout>.zeros" for its packed zeros, where q is zeros
    [n, G]. Layouts that pad fill up with 0. Bits above the lowest four of a code raise RuntimeError on a CPU; on CUDA
    (no synchronisation) they are dropped.
    """
    return _ops.pack(q, layout=layout)


@torch.library.register_fake("awq_ext::pack")
def _pack_fake(q: Tensor, *, layout: str = "gemm") -> Tensor:
    _check_tensors("pack", q=q)
    _check(q.dtype == torch.uint8 and q.dim() == 2, "pack", "q", "[out_features, in_features] uint8", q)
    return _new_words("pack", q, q.shape[0], q.shape[1], layout)


def unpack(qweight: Tensor, *, layout: str = "gemm") -> Tensor:
    """Words of ``layout`` -> codes q uint8 [n, k], padding included; the inverse of :func:`pack`."""
    return _ops.unpack(qweight, layout=layout)


@torch.library.register_fake("awq_ext::unpack")
def _unpack_fake(qweight: Tensor, *, layout: str = "gemm") -> Tensor:
    _check_tensors("unpack", qweight=qweight)
    return qweight.new_empty(_code_shape("unpack", qweight, layout), dtype=torch.uint8)


def repack(qweight: Tensor, *, src: str, dst: str) -> Tensor:
    """Words of layout ``src`` -> words of layout ``dst``, holding the same codes; names as for :func:`pack`."""
    return _ops.repack(qweight, src=src, dst=dst)


@torch.library.register_fake("awq_ext::repack")
def _repack_fake(qweight: Tensor, *, src: str, dst: str) -> Tensor:
    _check_tensors("repack", qweight=qweight)
    n, k = _code_shape("repack", qweight, src)
    return _new_words("repack", qweight, n, k, dst)


def search_scale(
    w: Tensor,
    x_mean: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    grid: int = 20,
    duo_scaling: bool = True,
    zero_point: bool = True,
    tie: Tensor | None = None,
    row_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The per-input-channel scale c that makes rounding of ``w * c`` lose least.

    w float [n, k] (the rows of every linear that reads the same input, concatenated); x_mean float32 [k], the mean of
    |x| over tokens; gram float32 [k, k], the mean of x^T x over tokens, or [k], its diagonal where the rest is zero
    (faster by far); tie int64 [k], channels with the same number share one scale (the geometric mean of what each would
    have); row_weight float32 [n], how much the error of each row counts (None: one each).

    Candidates, in this order: the identity; ``x_mean^r`` for r = 1/grid, 2/grid .. 1; with duo_scaling
    ``x_mean^r / (w_mean^(1-r) + 1e-4)`` for the same r, w_mean[k] = mean over rows of |w| / (largest |w| of its
    group + 1e-6); each at least 1e-4, and divided by sqrt(max * min). The loss is the squared error of the output,
    its mean over all tokens, ``sum_rows row_weight d gram d^T`` with ``d = dequantize(quantize(w * c)) / c - w``;
    smallest wins, the first among equals, so it is never worse than round-to-nearest (``losses[0]``).

    Returns scale float32 [k] and losses float64 [1 + grid * (2 if duo_scaling else 1)]; a candidate whose group
    scales ``dtype`` cannot hold has the loss infinity. Inputs that are not finite raise RuntimeError on a CPU; on CUDA
    (no synchronisation) the scale is NaN. There losses are summed in another order, so that candidates whose losses are
    equal to within rounding may change places, and rounding errors take 256 MiB at most.
    Source: AWQ (arXiv 2306.00978) section 3.2 and AutoAWQ ``awq/quantize/quantizer.py``, with the identity and ratio
    1 added to the grid and all tokens in the loss.
    """
    return _ops.search_scale(
        w,
        x_mean,
        gram,
        group_size=group_size,
        w_bit=w_bit,
        grid=grid,
        duo_scaling=duo_scaling,
        zero_point=zero_point,
        tie=tie,
        row_weight=row_weight,
        dtype=dtype,
    )


@torch.library.register_fake("awq_ext::search_scale")
def _search_scale_fake(
    w: Tensor,
    x_mean: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    grid: int = 20,
    duo_scaling: bool = True,
    zero_point: bool = True,
    tie: Tensor | None = None,
    row_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    _check_tensors("search_scale", w=w, x_mean=x_mean, gram=gram, tie=tie, row_weight=row_weight)
    _check_float_weight("search_scale", w, group_size)
    _check_rounding("search_scale", w_bit, dtype)
    candidates, k = _check_candidates("search_scale", w.shape[1], x_mean, grid, duo_scaling, tie)
    _check_gram("search_scale", gram, k, diagonal_allowed=True)
    _check_row_weight("search_scale", row_weight, w.shape[0])
    return w.new_empty((k,), dtype=torch.float32), w.new_empty((candidates,), dtype=torch.float64)


def scale_candidates(
    w: Tensor,
    x_mean: Tensor,
    *,
    group_size: int,
    grid: int = 20,
    duo_scaling: bool = True,
    tie: Tensor | None = None,
) -> Tensor:
    """The scales that :func:`search_scale` tries, in its order: float32 [1 + grid * (2 if duo_scaling else 1), k].

    Arguments are as there. With :func:`scale_losses` they make a search that looks at some rows of a large ``w`` only.
    Inputs that are not finite raise RuntimeError on a CPU; on CUDA (no synchronisation) an x_mean that is not finite,
    or is negative, makes them NaN, and a weight that is not finite is left to its loss.
    """
    return _ops.scale_candidates(w, x_mean, group_size=group_size, grid=grid, duo_scaling=duo_scaling, tie=tie)


@torch.library.register_fake("awq_ext::scale_candidates")
def _scale_candidates_fake(
    w: Tensor,
    x_mean: Tensor,
    *,
    group_size: int,
    grid: int = 20,
    duo_scaling: bool = True,
    tie: Tensor | None = None,
) -> Tensor:
    _check_tensors("scale_candidates", w=w, x_mean=x_mean, tie=tie)
    _check_float_weight("scale_candidates", w, group_size)
    shape = _check_candidates("scale_candidates", w.shape[1], x_mean, grid, duo_scaling, tie)
    return w.new_empty(shape, dtype=torch.float32)


def scale_losses(
    w: Tensor,
    candidates: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    zero_point: bool = True,
    row_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What :func:`search_scale` compares, for given scales: the loss of rounding ``w * c``, by any gram.

    candidates float32 [c, k], all positive; the rest as for :func:`search_scale`, whose losses these are to the bit if
    the candidates are its own. So a scale that was chosen on some tokens can be tried on others.

    Returns losses float64 [c], infinity where ``dtype`` cannot hold the group scales. Candidates that are not finite
    and positive, and a row_weight that is not finite or is negative, raise RuntimeError on a CPU; on CUDA (no
    synchronisation) their losses are NaN.
    """
    return _ops.scale_losses(
        w,
        candidates,
        gram,
        group_size=group_size,
        w_bit=w_bit,
        zero_point=zero_point,
        row_weight=row_weight,
        dtype=dtype,
    )


@torch.library.register_fake("awq_ext::scale_losses")
def _scale_losses_fake(
    w: Tensor,
    candidates: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    zero_point: bool = True,
    row_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_tensors("scale_losses", w=w, candidates=candidates, gram=gram, row_weight=row_weight)
    n, _ = _check_float_weight("scale_losses", w, group_size)
    _check_rounding("scale_losses", w_bit, dtype)
    k = w.shape[1]
    candidates_ok = candidates.dtype == torch.float32 and candidates.dim() == 2 and candidates.shape[1] == k
    _check(candidates_ok, "scale_losses", "candidates", f"[c, {k}] float32", candidates)
    _check_gram("scale_losses", gram, k, diagonal_allowed=True)
    _check_row_weight("scale_losses", row_weight, n)
    return w.new_empty((candidates.shape[0],), dtype=torch.float64)


def search_clip(
    w: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    grid: int = 20,
    max_shrink: float = 0.5,
    zero_point: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The range of each group that loses least when the weights outside it saturate, for :func:`quantize`.

    w float [n, k]; gram float32 [k, k] = mean of x^T x over tokens, or [k], its diagonal where the rest is zero. The
    group's own range [lo, hi] (zero included) is shrunk in ``grid`` steps of max_shrink / grid: both ends together,
    then from the best of those each end alone (zero_point only). The loss of a group is ``d gram_gg d^T`` with gram_gg
    the g x g block on gram's diagonal: the mean squared error of the group's part of the output over all tokens. The
    whole range is a candidate.

    Returns range float32 [n, G, 2]. Inputs that are not finite raise RuntimeError on a CPU; on CUDA (no
    synchronisation) a group whose weights or whose block of gram are not finite gets NaN. Rounding errors take 256 MiB
    there, or what one row needs. Source: AutoAWQ ``awq/quantize/quantizer.py _compute_best_clip``, with all tokens
    instead of 512 and with separate ends.
    """
    return _ops.search_clip(
        w,
        gram,
        group_size=group_size,
        w_bit=w_bit,
        grid=grid,
        max_shrink=max_shrink,
        zero_point=zero_point,
        dtype=dtype,
    )


@torch.library.register_fake("awq_ext::search_clip")
def _search_clip_fake(
    w: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    grid: int = 20,
    max_shrink: float = 0.5,
    zero_point: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_tensors("search_clip", w=w, gram=gram)
    n, groups = _check_float_weight("search_clip", w, group_size)
    _check_rounding("search_clip", w_bit, dtype)
    _check_grid("search_clip", grid)
    torch._check(0 <= max_shrink < 1, lambda: f"awq_ext::search_clip: max_shrink must be in [0, 1), got {max_shrink}")
    _check_gram("search_clip", gram, w.shape[1], diagonal_allowed=True)
    return w.new_empty((n, groups, 2), dtype=torch.float32)


def quantize_compensated(
    w: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    zero_point: bool = True,
    range: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    passes: int = 4,
    refit_scales: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round w float [n, k] to codes that lose little in the output together, where :func:`quantize` rounds each
    weight to nearest.

    gram float32 [k, k] = mean of x^T x over tokens; the loss of a row is ``d gram d^T`` with d = dequantized - w, its
    mean squared error over all tokens. Scales and zeros start as those of :func:`quantize` (range as there). Then

    1. columns are rounded one after another, each to what is best given the errors already made, the later ones
       free: GPTQ, in the order of gram's diagonal, the largest first (``act_order``), or from left to right. gram is
       damped by ``damping`` (0 < damping <= 1) times the mean of its diagonal. Groups stay where they are.
    2. ``passes`` (0..1000) times, each code moves to its best value given all others, and then, with
       ``refit_scales``, the scale of each group, rounded to ``dtype`` (None: float16).
    3. A row that is not better than rounded to nearest, losses summed in float32, is rounded to nearest.

    Returns q uint8 [n, k], scales ``dtype`` [n, G], zeros uint8 [n, G]. CPU only. Raises RuntimeError for inputs that
    are not finite and scales that ``dtype`` cannot hold. Sources: GPTQ (arXiv 2210.17323), whose recursion is done
    without the inverse, as its equal, Babai's nearest plane (arXiv 2507.18553).
    """
    return _ops.quantize_compensated(
        w,
        gram,
        group_size=group_size,
        w_bit=w_bit,
        zero_point=zero_point,
        range=range,
        damping=damping,
        act_order=act_order,
        passes=passes,
        refit_scales=refit_scales,
        dtype=dtype,
    )


@torch.library.register_fake("awq_ext::quantize_compensated")
def _quantize_compensated_fake(
    w: Tensor,
    gram: Tensor,
    *,
    group_size: int,
    w_bit: int = 4,
    zero_point: bool = True,
    range: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    passes: int = 4,
    refit_scales: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_compensated"
    _check_tensors(op, w=w, gram=gram, range=range)
    n, groups = _check_float_weight(op, w, group_size)
    _check_rounding(op, w_bit, dtype)
    _check_gram(op, gram, w.shape[1])
    _check_range(op, range, n, groups)
    torch._check(0 < damping <= 1, lambda: f"awq_ext::{op}: damping must be in (0, 1], got {damping}")
    torch._check(0 <= passes <= 1000, lambda: f"awq_ext::{op}: passes must be 0..1000, got {passes}")
    return (
        w.new_empty(w.shape, dtype=torch.uint8),
        w.new_empty((n, groups), dtype=dtype or torch.float16),
        w.new_empty((n, groups), dtype=torch.uint8),
    )


def add_gram(sums: Tensor, x: Tensor, *, bfloat16: bool = False) -> None:
    """Add ``x.T @ x`` to ``sums`` in place, on and right of the diagonal; what is left of it stays as it is.

    sums float32 [k, k], contiguous; x float32 [t, k], any strides. With ``bfloat16``, x is rounded to bfloat16 (to
    nearest) first, which is several times as fast on a CPU with AVX512-BF16; that one takes subnormal factors and sums
    for zero. Products are summed in float32 (never in TF32), a few hundred rows at a time, in an order that depends on
    t alone. On a CPU needs memory for one more x.
    """
    _ops.add_gram(sums, x, bfloat16=bfloat16)


@torch.library.register_fake("awq_ext::add_gram")
def _add_gram_fake(sums: Tensor, x: Tensor, *, bfloat16: bool = False) -> None:
    _check_tensors("add_gram", sums=sums, x=x)
    sums_ok = sums.dtype == torch.float32 and sums.dim() == 2 and sums.shape[0] == sums.shape[1]
    _check(sums_ok and sums.is_contiguous(), "add_gram", "sums", "a contiguous [k, k] float32", sums)
    k = sums.shape[0]
    x_ok = x.dtype == torch.float32 and x.dim() == 2 and x.shape[1] == k
    _check(x_ok, "add_gram", "x", f"[.., {k}] float32", x)


def _check(condition: bool, op: str, name: str, expected: str, got: Tensor) -> None:
    torch._check(
        condition,
        lambda: (
            f"awq_ext::{op}: {name} must be {expected}, got {list(got.shape)} "
            f"{str(got.dtype).removeprefix('torch.')} on {got.device}"
        ),
    )


def _check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Refuse None where the schema has no default (torch passes it on) and tensors on different devices."""
    first, *_ = tensors
    for name, tensor in tensors.items():
        if tensor is None:
            torch._check(name in _OPTIONAL, lambda name=name: f"awq_ext::{op}: {name} must be a tensor, got None")
        elif (home := tensors[first]) is not None:
            _check(tensor.device == home.device, op, name, f"on the device of {first}, which is {home.device}", tensor)


def _check_grid(op: str, grid: int) -> None:
    torch._check(1 <= grid <= 1000, lambda: f"awq_ext::{op}: grid must be 1..1000, got {grid}")


def _check_candidates(
    op: str, k: int, x_mean: Tensor, grid: int, duo_scaling: bool, tie: Tensor | None
) -> tuple[int, int]:
    """How many candidates there are, and k."""
    _check_grid(op, grid)
    mean_ok = x_mean.dtype == torch.float32 and x_mean.dim() == 1 and x_mean.shape[0] == k
    _check(mean_ok, op, "x_mean", f"[{k}] float32", x_mean)
    if tie is not None:
        tie_ok = tie.dtype == torch.int64 and tie.dim() == 1 and tie.shape[0] == k
        _check(tie_ok, op, "tie", f"[{k}] int64", tie)
    return 1 + grid * (2 if duo_scaling else 1), k


def _check_storage(op: str, dtype: torch.dtype | None) -> None:
    torch._check(
        dtype is None or dtype in _FLOATS,
        lambda: f"awq_ext::{op}: dtype must be float16, bfloat16 or float32, got {dtype}",
    )


def _check_rounding(op: str, w_bit: int, dtype: torch.dtype | None) -> None:
    torch._check(2 <= w_bit <= 8, lambda: f"awq_ext::{op}: w_bit must be 2..8, got {w_bit}")
    _check_storage(op, dtype)


def _group(op: str, group_size: int, k: int) -> int:
    torch._check(
        group_size > 0 or group_size == -1,
        lambda: f"awq_ext::{op}: group_size must be positive, or -1 for one group over in_features; got {group_size}",
    )
    group = max(k, 1) if group_size == -1 else group_size
    torch._check(
        k % group == 0,
        lambda: f"awq_ext::{op}: in_features must be a multiple of group_size, got {k} and group_size {group_size}",
    )
    return group


def _check_float_weight(op: str, w: Tensor, group_size: int) -> tuple[int, int]:
    _check(w.dtype in _FLOATS and w.dim() == 2, op, "w", "a float [out_features, in_features]", w)
    return w.shape[0], w.shape[1] // _group(op, group_size, w.shape[1])


def _check_range(op: str, range: Tensor | None, n: int, groups: int) -> None:
    if range is not None:
        shape_ok = range.dim() == 3 and range.shape[0] == n and range.shape[1] == groups and range.shape[2] == 2
        _check(range.dtype == torch.float32 and shape_ok, op, "range", f"[{n}, {groups}, 2] float32", range)


def _check_gram(op: str, gram: Tensor, k: int, *, diagonal_allowed: bool = False) -> None:
    dimensions = 1 if diagonal_allowed and gram.dim() == 1 else 2
    gram_ok = gram.dtype == torch.float32 and gram.dim() == dimensions and all(size == k for size in gram.shape)
    _check(gram_ok, op, "gram", f"[{', '.join([str(k)] * dimensions)}] float32", gram)


def _check_row_weight(op: str, row_weight: Tensor | None, n: int) -> None:
    if row_weight is not None:
        weight_ok = row_weight.dtype == torch.float32 and row_weight.dim() == 1 and row_weight.shape[0] == n
        _check(weight_ok, op, "row_weight", f"[{n}] float32", row_weight)


def _codes(op: str, layout: str) -> Codes:
    codes = find_codes(layout)
    torch._check(
        codes is not None,
        lambda: (
            f"awq_ext::{op}: unknown layout '{layout}', expected one of {', '.join(every_layout())}, "
            "or '<layout>.zeros' where zeros are packed"
        ),
    )
    assert codes is not None
    return codes


def _new_words(op: str, like: Tensor, n: int, k: int, layout: str) -> Tensor:
    codes = _codes(op, layout)
    torch._check(
        codes.can_hold(n, k),
        lambda: (
            f"awq_ext::{op}: layout '{layout}' needs out_features that are a multiple of {codes.tile[0]} and "
            f"in_features that are a multiple of {codes.tile[1]}, got {n} and {k}"
        ),
    )
    return like.new_empty(codes.word_shape(n, k), dtype=codes.word_dtype)


def _code_shape(op: str, words: Tensor, layout: str) -> tuple[int, int]:
    codes = _codes(op, layout)
    name = str(codes.word_dtype).removeprefix("torch.")
    _check(words.dtype == codes.word_dtype and words.dim() == 2, op, "qweight", f"a matrix of {name} words", words)
    shape = codes.code_shape(words.shape[0], words.shape[1])
    _check(shape is not None, op, "qweight", f"in columns of runs of {codes.tile_words} words", words)
    assert shape is not None
    return shape


def _check_tiled(
    op: str, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, layout: str, k: int | None
) -> tuple[int, int]:
    strips = layout == "strips"
    if strips:
        _check(
            qweight.device.type in ("cpu", "meta"), op, "qweight", "on a CPU for layout 'strips' (repack it)", qweight
        )
    _, most = _code_shape(op, qweight, layout)
    _check(scales.dtype in _FLOATS and scales.dim() == 2, op, "scales", "a float [in_features/group_size, n]", scales)
    groups, n = scales.shape
    # The words say k in whole tiles only, and group_size -1 not at all: so that of x counts, if it can be.
    tile = _codes(op, layout).tile[1]
    if k is None or -(-k // tile) * tile != most or (group_size > 0 and k % group_size):
        k = groups * group_size if group_size > 0 else most
    g = _group(op, group_size, k)
    torch._check(
        not strips or strips_can_have(k, g),
        lambda: (
            f"awq_ext::{op}: layout 'strips' needs a group_size that is a multiple of 8, or one group; "
            f"got {group_size}; keep layout 'gemm'"
        ),
    )
    _check(groups == k // g, op, "scales", f"[{k // g}, {n}] float", scales)
    _check(strips or n % 8 == 0, op, "scales", "of a multiple of 8 out_features for layout 'fragments'", scales)
    for name, words, shape in (("qweight", qweight, (n, k)), ("qzeros", qzeros, (n, groups))):
        if words is not None:
            rows, cols = _codes(op, layout if name == "qweight" else f"{layout}.zeros").word_shape(*shape)
            words_ok = words.dtype == torch.int32 and words.dim() == 2
            words_ok = words_ok and words.shape[0] == rows and words.shape[1] == cols
            _check(words_ok, op, name, f"[{rows}, {cols}] int32", words)
    return k, n


def _check_weight(
    op: str,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    group_size: int,
    layout: str,
    k_of_x: int | None = None,
) -> tuple[int, int]:
    _codes(op, layout)  # an unknown name is told as such
    if layout in ("strips", "fragments"):
        return _check_tiled(op, qweight, scales, qzeros, group_size, layout, k_of_x)
    torch._check(
        layout == "gemm",
        lambda: f"awq_ext::{op}: layout '{layout}' is stored but not computed on; repack it to 'gemm' first",
    )
    n, k = _code_shape(op, qweight, layout)
    groups = k // _group(op, group_size, k)
    scales_ok = scales.dtype in _FLOATS and scales.dim() == 2 and scales.shape[0] == groups and scales.shape[1] == n
    _check(scales_ok, op, "scales", f"[{groups}, {n}] float", scales)
    if qzeros is not None:
        zeros_ok = (
            qzeros.dtype == torch.int32 and qzeros.dim() == 2 and qzeros.shape[0] == groups and qzeros.shape[1] * 8 == n
        )
        _check(zeros_ok, op, "qzeros", f"[{groups}, {n // 8}] int32", qzeros)
    return k, n
