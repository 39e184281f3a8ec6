"""The search for a scale: AutoAWQ's candidates on a sample of rows, then each channel's own number."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq_ext import ops

ROWS = 128
"""As many rows at most tell which candidates are good."""

FINALISTS = 4
"""As many of the best, and the identity, are compared on all rows."""

REFINED_ROWS = 1024
"""As many rows at most tell how to refine a scale: each of its numbers counts where its channel is the largest or least
of a group, in one row of 32 at groups of 64."""

STEPS, RATE = 30, 0.1
"""Of the refinement, and of change of a scale's logarithm in one step, at its height. With 60 or 400 steps the losses
of nine scales are lower by 0.001 more, with 15 higher by 0.01 (linears of SmolLM2-135M)."""


class Found(NamedTuple):
    """What :func:`search_scale` chose."""

    scale: Tensor
    candidate: str
    """'identity', 'x^r' or 'x^r / w^(1-r)', and ', refined' if its channels were moved one by one."""
    loss_rtn: float
    """Of the identity, by all rows; `loss` that of the scale."""
    loss: float


def search_scale(
    w: Tensor,
    x_mean: Tensor,
    gram: Tensor,
    row_weight: Tensor,
    *,
    group_size: int,
    grid: int,
    duo_scaling: bool,
    tie: Tensor | None,
    **rounding: Any,
) -> Found:
    """:func:`awq_ext.ops.search_scale`, whose arguments these are, and :func:`refine` from what that finds.

    It costs hardly more for many rows of w than for some. The result is never worse than round-to-nearest.
    """
    candidates = ops.scale_candidates(w, x_mean, group_size=group_size, grid=grid, duo_scaling=duo_scaling, tie=tie)
    finalists = torch.arange(len(candidates), device=w.device)
    squares = gram if gram.dim() == 1 else gram.diagonal()
    if len(w) > ROWS:
        rows, weight = sample(w, squares, row_weight, group_size, ROWS)
        losses = ops.scale_losses(w[rows], candidates, gram, group_size=group_size, row_weight=weight, **rounding)
        finalists = torch.cat([finalists[:1], 1 + losses[1:].argsort(stable=True)[:FINALISTS]])
    tried = candidates[finalists]
    losses = ops.scale_losses(w, tried, gram, group_size=group_size, row_weight=row_weight, **rounding)
    best = int(losses.argmin())
    name = _name(int(finalists[best]), grid)
    # The square root: a few rows would have most of the weight, and on other texts others have. Losses go by all of it.
    rows, weight = sample(w, squares, row_weight.sqrt(), group_size, REFINED_ROWS)
    refined = refine(w[rows], squares, tried[best], weight, group_size, tie=tie, zero_point=rounding["zero_point"])
    # Half the way is never far from the best, where a channel is so loud that others round to zero beside it.
    tried = torch.stack([tried[best], refined, (tried[best] * refined).sqrt()])
    after = ops.scale_losses(w, tried, gram, group_size=group_size, row_weight=row_weight, **rounding)
    moved = int(after.argmin())
    return Found(tried[moved], f"{name}, refined" if moved else name, float(losses[0]), float(after[moved]))


def _name(candidate: int, grid: int) -> str:
    if candidate == 0:
        return "identity"
    duo, step = divmod(candidate - 1, grid)
    ratio = (step + 1) / grid
    return f"x^{ratio:g} / w^{1 - ratio:g}" if duo else f"x^{ratio:g}"


def refine(
    w: Tensor,
    squares: Tensor,
    scale: Tensor,
    row_weight: Tensor,
    group_size: int,
    *,
    tie: Tensor | None,
    zero_point: bool,
) -> Tensor:
    """A scale [k] near ``scale`` by which rounding w [n, k] errs less: each channel's number is moved by itself.

    Rounding to steps of a group's range R errs by R^2 in the mean, up to a constant, in each of its channels, and an
    error in channel j of w times scale counts squares_j / scale_j^2. So what is to be expected is

        sum over rows i, groups g of  row_weight_i  R_ig(scale)^2  sum over j in g of squares_j / scale_j^2

    The candidates of :func:`awq_ext.ops.scale_candidates` are few curves through this landscape. Its logarithm is
    lowered from there by gradient descent (Adam) on the logarithms of the numbers, those that ``tie`` joins together:
    R moves with the group's largest and least channel only. Losses of codes chosen together become 3 % lower, on tokens
    of other texts too (nine linears of SmolLM2-135M; 0 to 10 %).
    """
    size = group_size if group_size > 0 else w.shape[1]
    log, mean, variance = scale.log(), torch.zeros_like(scale), torch.zeros_like(scale)
    decay, decay2 = 0.9, 0.95
    for step in range(STEPS):
        scaled = (w * log.exp()).unflatten(1, (-1, size))
        counted = (squares / (2 * log).exp()).unflatten(0, (-1, size))
        low, high = scaled.aminmax(dim=-1, keepdim=True)
        if zero_point:
            low, high = low.clamp(max=0), high.clamp(min=0)
        else:
            high = torch.maximum(high, -low)
            low = -high
        spread = (high - low) * row_weight[:, None, None]
        square = (spread * (high - low)).sum(0)  # [groups, 1]
        ends = torch.where((scaled == low) | (scaled == high), scaled.abs() * spread, 0.0).sum(0)
        share = 1.0 if zero_point else 2.0  # one end stands for both
        slope = share * ends * counted.sum(-1, keepdim=True) - square * counted
        total = (square * counted).sum()
        slope = (slope / total.clamp(min=1e-30)).flatten()
        if tie is not None:  # on the CPU, as the order of this sum on CUDA is not always the same
            slope = torch.zeros(len(slope)).index_add_(0, tie.cpu(), slope.cpu()).to(slope.device)[tie]
        mean, variance = decay * mean + (1 - decay) * slope, decay2 * variance + (1 - decay2) * slope.square()
        towards = mean / (1 - decay ** (step + 1)) / ((variance / (1 - decay2 ** (step + 1))).sqrt() + 1e-12)
        log = log - RATE * (1 - step / STEPS) * towards
    return log.exp()


def unpredicted(gram: Tensor, ridge: float) -> Tensor:
    """The mean square [k] of what is left of each input after what the other inputs tell about it.

    Where codes are chosen together, others make up for the error of one as far as their inputs tell its own. So the
    loss to be expected is that of errors on inputs as small as what is left, independent of one another: with
    them in place of gram :func:`search_scale` chooses for codes chosen together. They are those of a linear prediction,
    1 / (gram^-1)[j, j], with ``ridge`` times its diagonal added to gram, which it needs if there are few tokens.
    ``gram`` itself [k, k] if it is not positive definite even so.

    By gram itself, as for rounding to nearest, scales come out too strong: with scales by this and ranges by squares
    alone, the divergence of "awq+" without tuning is lower by 4 and 7 %, with other calibration data by 4 and 4 % (on
    two texts, SmolLM2-135M).
    """
    squares = gram.diagonal()
    size = torch.where(squares > 0, squares, 1.0).sqrt()
    correlation = gram / size / size[:, None]
    correlation.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    return gram if failed else squares / torch.cholesky_inverse(factor).diagonal()


def sample(w: Tensor, squares: Tensor, row_weight: Tensor, group_size: int, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` rows of w [n, k]: their numbers, int64, and weights by which their losses add up to all rows'.

    A few rows make up most of a loss, so the chance of a row is its share in the loss that is to be expected: rounding
    to steps of s errs by s^2 / 12 on the average, s is a group's range over the number of codes, and the mean of x^2
    is ``squares`` [k]. One row in ten is drawn whatever its share, for what that leaves out. The rows are taken at even
    steps through the sum of the chances (systematic sampling), a row with more than one step once for each.
    """
    if len(w) <= most:
        return torch.arange(len(w), device=w.device), row_weight
    low, high = w.float().unflatten(1, (-1, group_size if group_size > 0 else w.shape[1])).aminmax(dim=-1)
    spread = (high.clamp(min=0) - low.clamp(max=0)).double()
    share = row_weight * (spread.square() @ squares.double().unflatten(0, (spread.shape[1], -1)).sum(-1))
    chance = 0.9 * share / share.sum().clamp(min=1e-300) + 0.1 / len(w)
    steps = (torch.arange(most, dtype=torch.float64, device=w.device) + 0.5) / most
    chosen = torch.searchsorted(chance.cumsum(0), steps * chance.sum()).clamp(max=len(w) - 1)
    rows, times = chosen.unique(return_counts=True)
    return rows, (row_weight[rows] * times / (most * chance[rows] / chance.sum())).float()
