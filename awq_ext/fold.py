"""Folds: moving a scale out of the input of linears into the weights in front of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awq_ext.scaled import ScaledActivation


@dataclass(frozen=True, eq=False)
class Fold:
    """Input channel j of every reader is multiplied by a scale, and what the producer writes there is divided by it.

    The block computes the same function if the readers are all who read those channels of the producer, and what is
    between hands on each of them by itself, in proportion. :mod:`awq_ext.trace` finds and proves such folds.
    """

    producer: str
    """The name of a norm, a linear or an activation in the block."""
    readers: tuple[str, ...]
    """The names of linears in the block, and of others with a weight [n, k] that is multiplied by their input [.., k],
    as a mixture's router; in the order they are called."""
    rows: Tensor
    """int64 [k]: the producer's output channel that input channel j of the readers is."""
    plus: float | None = None
    """What a norm adds to its weight before it multiplies by it; None: the producer is no norm."""

    @property
    def tie(self) -> Tensor | None:
        """int64 [k], the same number for channels that must share one scale (query heads that share values)."""
        channels, tie = self.rows.unique(return_inverse=True)
        return None if len(channels) == len(self.rows) else tie


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Fold ``scale`` [k] into the weights of a block, which are float32 or float64, and return what was applied.

    ``dtype`` is what a norm's weight will be stored in; its rounding is undone in the readers (see `divide_norm`). An
    activation, which has no weight, is put into a ScaledActivation with a scale rounded to float16, as files have it.
    """
    producer = block.get_submodule(fold.producer)
    rows = fold.rows.to(scale.device)
    if next(producer.parameters(), None) is None:
        stored = scale.clamp(torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max).half()
        block.set_submodule(
            fold.producer, ScaledActivation(producer, torch.empty_like(stored).scatter_(0, rows, stored))
        )
        scale = stored.to(scale.dtype)
    else:
        weight, bias = producer.get_parameter("weight"), getattr(producer, "bias", None)
        divisor = scale.new_ones(len(weight)).scatter_(0, rows, scale)
        if fold.plus is None:
            weight.data /= divisor[:, None]
        else:
            weight.data, divisor = divide_norm(weight.data, divisor, fold.plus, dtype)
            scale = divisor[rows]
        if bias is not None:
            bias.data /= divisor
    for reader in fold.readers:
        block.get_submodule(reader).get_parameter("weight").data *= scale
    return scale


def divide_norm(weight: Tensor, scale: Tensor, plus: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight of a norm whose output is divided by ``scale``, and the scale that this really divides by.

    ``weight`` and ``scale`` are float32 [k]; the norm multiplies by ``weight + plus``, and its weight will be stored in
    ``dtype``. The readers are to be multiplied by the ratio of the old weight to the stored one, which undoes its
    rounding. A channel whose new weight would vanish or overflow keeps its old one, with a scale of 1.
    """
    old = weight + plus
    stored = (old / scale - plus).to(dtype).float()
    applied = old / (stored + plus)
    # Nothing to undo where float32 is as near as it gets, nor in a channel that is always 0.
    applied = torch.where(((stored + plus) * scale - old).abs() <= 2.0**-22 * old.abs(), scale, applied)
    usable = torch.isfinite(applied) & (applied > 0)
    return torch.where(usable, stored, weight), torch.where(usable, applied, torch.ones_like(applied))


def norm_offset(norm: nn.Module) -> float | None:
    """What the norm adds to its weight before it multiplies by it: 0, or 1 as Gemma's; None if it does neither.

    Found by trying: on a copy, with the weight at 0 and at 1.
    """
    twin = copy.deepcopy(norm).float()
    weight = twin.get_parameter("weight")
    x = torch.linspace(-1, 1, 3 * weight.numel(), device=weight.device).view(3, -1)
    outputs = []
    with torch.no_grad():
        for value in (0.0, 1.0):
            for parameter in twin.parameters():
                parameter.fill_(value if parameter is weight else 0.0)
            try:
                outputs.append(twin(x))
            except Exception:  # it takes something else than one tensor
                return None
    zero, one = outputs
    matching = (plus for plus in (0.0, 1.0) if torch.allclose(zero * (1 + plus), one * plus, rtol=1e-3, atol=0))
    return next(matching, None) if one.any() else None
