"""Slow definitions to test against: numpy and float64, written from the format's description and not from the kernels.

n = out_features, k = in_features, g = group_size, G = k / g; W[n, k] = (q[n, k] - z[n, k // g]) * s[n, k // g].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

LAYOUTS = ("gemm", "gemv", "gptq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ awq/modules/linear/gemm.py: nibble i of a word is column 8c + order[i]

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST_NORMAL = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}


# --- packing --------------------------------------------------------------------------------------------------------


def word_shape(layout: str, n: int, k: int) -> tuple[int, int]:
    return {"gemm": (k, n // 8), "gemv": (n, k // 8), "gptq": (k // 8, n)}[layout]


def place(layout: str, row: int, col: int) -> tuple[int, int, int]:
    """Row and column of the word, and the nibble in it, that hold q[row, col]."""
    if layout == "gemm":
        return col, row // 8, AWQ_ORDER.index(row % 8)
    if layout == "gemv":
        return row, col // 8, col % 8
    assert layout == "gptq"
    return col // 8, row, col % 8


def pack(q: Tensor, layout: str = "gemm") -> Tensor:
    n, k = q.shape
    words = np.zeros(word_shape(layout, n, k), dtype=np.int64)
    for row in range(n):
        for col in range(k):
            i, j, nibble = place(layout, row, col)
            words[i, j] |= int(q[row, col]) << (4 * nibble)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def unpack(words: Tensor, layout: str = "gemm") -> Tensor:
    rows, cols = words.shape
    n, k = {"gemm": (8 * cols, rows), "gemv": (rows, 8 * cols), "gptq": (cols, 8 * rows)}[layout]
    bits = words.contiguous().numpy().view(np.uint32)
    q = np.zeros((n, k), dtype=np.uint8)
    for row in range(n):
        for col in range(k):
            i, j, nibble = place(layout, row, col)
            q[row, col] = (int(bits[i, j]) >> (4 * nibble)) & 15
    return torch.from_numpy(q)


# --- a packed weight and its products -------------------------------------------------------------------------------


@dataclass
class Weight:
    """Codes q uint8 [n, k], scales s [n, G] and zeros z uint8 [n, G], and the tensors that the operators take."""

    q: Tensor
    s: Tensor
    z: Tensor
    group: int

    @cached_property
    def qweight(self) -> Tensor:
        return torch.ops.awq_ext.pack(self.q)

    @cached_property
    def scales(self) -> Tensor:
        return self.s.t().contiguous()

    @cached_property
    def qzeros(self) -> Tensor:
        return torch.ops.awq_ext.pack(self.z)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qweight, self.scales, self.qzeros

    @cached_property
    def dense(self) -> Tensor:
        """W, exact in float64 (a 5-bit whole number times a scale of at most 24 bits)."""
        z, s = (t.double().repeat_interleave(self.group, dim=1) for t in (self.z, self.s))
        return (self.q.double() - z) * s

    @cached_property
    def largest_terms(self) -> Tensor:
        """max(q, z) * s: the terms of a kernel that sums codes and zeros apart, s (sum q x - z sum x)."""
        z, s = (t.double().repeat_interleave(self.group, dim=1) for t in (self.z, self.s))
        return torch.maximum(self.q.double(), z) * s.abs()


def random_weight(n: int, k: int, group: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    g = k if group == -1 else group
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    z = torch.randint(0, 16, (n, k // g), dtype=torch.uint8, generator=generator)
    s = (torch.rand(n, k // g, generator=generator) * 0.02 + 0.001).to(dtype)
    return Weight(q, s, z, g)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every dtype, but for its rounding."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def digit_rounding(x: Tensor, group: int, limit: float) -> Tensor:
    """The most that x [..., k] is changed by when it becomes integers up to `limit`, by one step for every 128 values
    at most of a row and group (csrc/core/strips.h): float64 [..., k]."""
    segments = [part for whole in x.double().split(group, -1) for part in whole.split(128, -1)]
    return torch.cat([(part.abs().amax(-1, keepdim=True) / limit / 2).expand_as(part) for part in segments], -1)


def linear_bound(
    x: Tensor, y: Tensor, w: Tensor, bias: Tensor | None, terms: Tensor | None = None, rounding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """|y - reference| and the bound it must keep, element by element, both float64 [..., n].

    The bound is u_out |ref| + c (k + 2) u_acc sum |x| |w| plus half the spacing of the output's subnormals: one
    rounding to the output type, and a chain of k + 2 roundings (products, a scale, a bias) in the accumulator, c = 2.
    `terms` [n, k] replaces |w|: kernels may sum codes and zeros apart (Weight.largest_terms), which shows where
    nearly all q equal their z, or where there are too few terms for the factor k + 2 to hide it. `rounding` [..., k] is
    the most that elements of x are changed by before they are multiplied.
    """
    x64, k = x.double(), w.shape[1]
    reference = x64 @ w.t()
    magnitude = x64.abs() @ (w.abs() if terms is None else terms).t()
    if bias is not None:
        reference, magnitude = reference + bias.double(), magnitude + bias.double().abs()
    u_acc = UNIT_ROUNDOFF[torch.float64 if x.dtype == torch.float64 else torch.float32]
    bound = UNIT_ROUNDOFF[y.dtype] * reference.abs() + 2 * (k + 2) * u_acc * magnitude + SMALLEST[y.dtype] / 2
    if rounding is not None:
        bound = bound + rounding @ w.abs().t() * (1 + UNIT_ROUNDOFF[y.dtype])
    return (y.double() - reference).abs(), bound


# --- rounding -------------------------------------------------------------------------------------------------------


def check_quantized(
    w: Tensor,
    q: Tensor,
    s: Tensor,
    z: Tensor,
    group: int,
    zero_point: bool,
    range: Tensor | None = None,
    w_bit: int = 4,
) -> None:
    """Asserts that (q, s, z) is a rounding to nearest of w by the documented rules, in exact arithmetic."""
    n, _ = w.shape
    last, middle = 2**w_bit - 1, 2 ** (w_bit - 1)
    w, dtype = w.double().reshape(n, -1, group), s.dtype
    ends = torch.stack([w.amin(-1), w.amax(-1)], -1) if range is None else range.double()
    lo, hi = ends[..., 0].clamp(max=0), ends[..., 1].clamp(min=0)
    exact = (hi - lo) / last if zero_point else torch.maximum(-lo, hi) / (middle - 1)
    empty = exact == 0
    s, z, q = s.double(), z.double(), q.double().reshape(n, -1, group)
    assert (s[empty] == 1).all()

    # The scale is the nearest of its type (float32 arithmetic may be off by a few 2^-24), and never rounded down where
    # the type is subnormal and "nearest" would lose a large part of it.
    error, unit = (s - exact)[~empty], UNIT_ROUNDOFF[dtype]
    normal = exact[~empty] >= SMALLEST_NORMAL[dtype]
    slack = 4 * 2.0**-24 * exact[~empty]
    assert (error.abs() <= unit * exact[~empty] + slack)[normal].all()
    if dtype != torch.float32:
        assert ((error >= -slack) & (error <= SMALLEST[dtype] + slack))[~normal].all()

    slack = 1e-6 * 2**w_bit
    want_z = (-lo / s).clamp(0, last) if zero_point else torch.full_like(z, middle)
    assert ((z - want_z).abs() <= (0.5 + slack if zero_point else 0))[~empty].all()
    assert ((z >= 0) & (z <= last)).all()
    want_q = (w / s[..., None] + z[..., None]).clamp(0, last)
    assert ((q - want_q).abs() <= 0.5 + slack).all()


def _parameters(lo: Tensor, hi: Tensor, zero_point: bool, dtype: torch.dtype, w_bit: int) -> tuple[Tensor, Tensor]:
    last, middle = 2**w_bit - 1, 2 ** (w_bit - 1)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = (hi / last - lo / last) if zero_point else torch.maximum(-lo, hi) / (middle - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype).float()
    return scale, (-lo / scale).clamp(0, last).round() if zero_point else torch.full_like(scale, middle)


def round_trip(
    groups: Tensor, zero_point: bool, dtype: torch.dtype, ends: Tensor | None = None, w_bit: int = 4
) -> Tensor:
    """dequantize(quantize(w)) in float32, w float32 [..., g], ends [..., 2], for scales in dtype's normal range."""
    lo, hi = (groups.amin(-1), groups.amax(-1)) if ends is None else ends.unbind(-1)
    scale, zero = (t[..., None] for t in _parameters(lo, hi, zero_point, dtype, w_bit))
    return (((groups / scale).round() + zero).clamp(0, 2**w_bit - 1) - zero) * scale


# --- searches -------------------------------------------------------------------------------------------------------


def gram_of(x: Tensor) -> Tensor:
    """mean x^T x over tokens, float32 [k, k]."""
    return (x.double().t() @ x.double() / len(x)).float()


def scale_candidates(w: Tensor, x_mean: Tensor, group: int, grid: int, duo: bool, tie: Tensor | None) -> list[Tensor]:
    n, k = w.shape
    grouped = w.double().abs().reshape(n, -1, group)
    w_mean = (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).mean(0).reshape(k)
    candidates = [torch.ones(k)]
    for with_w in (False, True) if duo else (False,):
        for step in range(1, grid + 1):
            r = step / grid
            c = x_mean.double() ** r / ((w_mean ** (1 - r) + 1e-4) if with_w else 1)
            c = c.clamp(min=1e-4)
            if tie is not None:
                c = torch.stack([c[tie == t].log().mean().exp() for t in tie])
            candidates.append((c / (c.max() * c.min()).sqrt()).float())
    return candidates


def scale_loss(
    w: Tensor,
    scale: Tensor,
    gram: Tensor,
    group: int,
    zero_point: bool,
    dtype: torch.dtype,
    row_weight: Tensor | None,
    w_bit: int = 4,
) -> float:
    """sum over rows of row_weight d gram d^T, d = dequantize(quantize(w * scale)) / scale - w."""
    n, k = w.shape
    rounded = round_trip((w * scale).reshape(n, -1, group), zero_point, dtype, w_bit=w_bit).reshape(n, k)
    d = rounded.double() / scale.double() - w.double()
    loss = ((d @ gram.double()) * d).sum(1)
    return float(loss.sum() if row_weight is None else (row_weight.double() * loss).sum())


def group_losses(
    w: Tensor, gram: Tensor, group: int, zero_point: bool, dtype: torch.dtype, ends: Tensor | None, w_bit: int = 4
) -> Tensor:
    """d gram_gg d^T of every group, float64 [n, G]."""
    n, k = w.shape
    groups = w.reshape(n, -1, group)
    d = (round_trip(groups, zero_point, dtype, ends, w_bit) - groups).double()
    blocks = torch.stack([gram[i : i + group, i : i + group] for i in range(0, k, group)]).double()
    return torch.einsum("ngi,gij,ngj->ng", d, blocks, d)


def clip_losses(
    w: Tensor,
    gram: Tensor,
    group: int,
    grid: int,
    max_shrink: float,
    zero_point: bool,
    dtype: torch.dtype,
    w_bit: int = 4,
) -> Tensor:
    """The loss that the documented search ends with for every group: both ends together, then each end alone."""
    n, _ = w.shape
    groups = w.reshape(n, -1, group)
    best = torch.stack([groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)], -1)
    loss = group_losses(w, gram, group, zero_point, dtype, best, w_bit)
    for ends in ((1, 1), (1, 0), (0, 1)) if zero_point else ((1, 1),):
        start = best.double()
        for t in range(1, grid + 1):
            factor = 1 - t * max_shrink / grid * torch.tensor(ends, dtype=torch.float64)
            candidate = (start * factor).float()
            new = group_losses(w, gram, group, zero_point, dtype, candidate, w_bit)
            better = new < loss
            best, loss = torch.where(better[..., None], candidate, best), torch.where(better, new, loss)
    return loss
