"""What rounding a linear costs, measured with the Gram matrices of what it reads.

An error d [n, k] of its weight makes a mean squared error of ``sum over rows of d G d^T`` in its output, with G the
mean of x^T x over tokens; with the weight itself for d that is the mean square of the output. Channel j of the input
has the part ``sum over rows of d_j (d G)_j`` in it. The parts of all channels add up to the whole; where errors of
channels cancel each other, one may be negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq_ext.report import LinearReport, Loss

ROWS = 128
"""Losses are measured on so many output channels at most, evenly spaced, which costs little beside the searches."""
SALIENT = 100
"""One input channel in so many, those with the largest mean |x|, counts as salient, but at least one."""
SATURATED = 16
"""A group is saturated if more than one in so many of its weights lies beyond what its codes reach, by half a step."""

Codes = tuple[Tensor, Tensor, Tensor]
"""q uint8 [n, k], scales [n, G] and zeros uint8 [n, G], as :func:`awq_ext.ops.quantize` returns them."""


def dequantize(codes: Codes) -> Tensor:
    """(q - z) * s, float32 [n, k]; exact for scales of 16 bits."""
    q, scales, zeros = codes
    groups = q.view(len(q), scales.shape[1], -1)
    return ((groups.float() - zeros.float()[..., None]) * scales.float()[..., None]).view(q.shape)


class Measured:
    """One linear: first as it was, then as it is rounded. Losses are relative, in the units of the original's output.

    Weights are float32 [n, k] on the CPU; x_mean [k] and grams [k, k] those of what the linear reads, the first gram of
    the calibration tokens, the second, if there is one, of those held out. Nothing is kept but some rows of the weight.
    """

    def __init__(self, weight: Tensor, x_mean: Tensor, grams: list[Tensor], nearest: Codes) -> None:
        """The linear before any scale was folded into it; ``nearest``: its weight rounded to nearest."""
        n, k = weight.shape
        self._rows = slice(0, n, max(1, -(-n // ROWS)))
        self._weight = weight[self._rows].clone()
        self._salient = x_mean.topk(max(1, k // SALIENT)).indices
        self._power = [1.0] * len(grams)
        error = dequantize(self._of_rows(nearest)) - self._weight
        rows = torch.ones(len(error))
        outputs = [self._loss(self._weight, gram, rows) for gram in grams]
        self._power = [power for power, _ in outputs]
        self._rtn = self._losses(error, grams, rows)
        diagonal = grams[0].diagonal()
        self._salient_power = float(diagonal[self._salient].sum() / diagonal.sum().clamp_min(1e-30))

    def report(
        self,
        entry: LinearReport,
        weight: Tensor,
        scale: Tensor,
        grams: list[Tensor],
        nearest: Codes,
        final: Codes,
        range: Tensor | None,
        last: int,
    ) -> None:
        """Fill in what was measured.

        ``weight`` is what was rounded, to ``nearest`` or to ``final`` codes of 0..last within ``range``; ``scale`` [k]
        is what its input channels were multiplied by, and ``grams`` are those of its inputs since.
        """
        # Its rows may have been divided by a scale, too, which the largest weight of each tells.
        place = self._weight.abs().argmax(1, keepdim=True)
        now, before = weight[self._rows].gather(1, place), self._weight.gather(1, place) * scale[place]
        rows = torch.where(before != 0, now / before, 1.0).squeeze(1)
        entry.rtn = self._rtn
        entry.nearest = self._losses(dequantize(self._of_rows(nearest)) - weight[self._rows], grams, rows)
        entry.final = entry.nearest
        if final is not nearest:
            entry.final = self._losses(dequantize(self._of_rows(final)) - weight[self._rows], grams, rows)
        entry.salient, entry.salient_power = len(self._salient), self._salient_power
        entry.groups = final[1].numel()
        _report_groups(entry, weight, final, range, last)

    def _of_rows(self, codes: Codes) -> Codes:
        q, scales, zeros = codes
        return q[self._rows], scales[self._rows], zeros[self._rows]

    def _losses(self, error: Tensor, grams: list[Tensor], rows: Tensor) -> Loss:
        found = [self._loss(error, gram, rows) for gram in grams]
        relative = [loss / power if power > 0 else 0.0 for (loss, _), power in zip(found, self._power, strict=True)]
        total, salient = found[0]
        return Loss(relative[0], relative[1] if len(relative) > 1 else None, salient / total if total > 0 else 0.0)

    def _loss(self, error: Tensor, gram: Tensor, rows: Tensor) -> tuple[float, float]:
        """The loss of all channels, and the part that the salient ones have in it."""
        by_channel = ((error @ gram) * error / rows.square()[:, None]).double().sum(0)
        return float(by_channel.sum()), float(by_channel[self._salient].sum())


def _report_groups(entry: LinearReport, weight: Tensor, codes: Codes, range: Tensor | None, last: int) -> None:
    _, scales, zeros = codes
    groups = weight.view(len(weight), scales.shape[1], -1)
    own = torch.stack([groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)], -1)
    width = own[..., 1] - own[..., 0]
    entry.empty = int((width == 0).sum())
    if range is not None:
        shrunk = 1 - (range[..., 1] - range[..., 0]) / width.clamp_min(torch.finfo(torch.float32).tiny)
        clipped = (range != own).any(-1) & (width > 0)
        entry.clipped = float(clipped.float().mean())
        entry.shrink = float(shrunk[clipped].mean()) if clipped.any() else 0.0
    step, zero = scales.float(), zeros.float()
    middle, reach = (last / 2 - zero) * step, (last + 1) / 2 * step
    beyond = ((groups - middle[..., None]).abs() > reach[..., None]).sum(-1)
    entry.saturated = int((beyond * SATURATED > groups.shape[-1]).sum())
