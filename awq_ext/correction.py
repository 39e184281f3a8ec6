"""What a linear can take back of the errors of what is quantized before it.

For the same tokens, let x be what a linear with weight w [n, k] reads in the original model, and y what it reads behind
quantized layers. Its product y v^T, with v [n, k] to be found, should be

- for a linear whose output is added to hidden states: what makes these the original's, with the errors in them;
- for any other: x w^T.

With t for what y w^T lacks of that, |y (v - w)^T - t|^2 + r |v - w|^2 is least for (v - w)^T = (y^T y + r)^-1 y^T t.
The second case, where t = (x - y) w^T, is that of GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695).

All of it would fit the calibration tokens too closely (as QEP says, arXiv 2504.09629), and every linear behind fits the
same ones again. So tokens that are held out say how much of the solution is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awq_ext.calibrate import Statistics

RIDGE = 5.0
"""RIDGE k / tokens times the mean of its diagonal is added to the diagonal of a Gram matrix [k, k] by which ranges and
codes are chosen, so that they suit more than the tokens that it is of. Of the factors tried, this one loses least on
other tokens of the same text, for 3584 and 14336 tokens and for k = 576 and 1536 (linears of SmolLM2-135M)."""

TIMES = 2.0
"""A correction has a ridge so many times as large."""

SHARE = 0.5
"""How much of a correction is made if no tokens are held out that could tell."""


def with_ridge(gram: Tensor, tokens: int, times: float = 1.0) -> Tensor:
    ridge = times * RIDGE * len(gram) / tokens * float(gram.diagonal().mean())
    return gram + ridge * torch.eye(len(gram))


def corrected(
    gram: Tensor, statistics: Statistics, held_out: Statistics, weights: Sequence[Tensor], added: bool
) -> list[Tensor]:
    """The weights v [n, k] that are best for what is read in the quantized model, for all linears that read the same.

    ``gram`` [k, k] is the mean of y^T y. ``added``: the output of the linear, which is the only one, is added to hidden
    states, and `Statistics.missing` is the mean of y^T t [k, n]; else it is that of y^T (x - y) [k, k]. If that is not
    known, the weights are as they were.
    """
    missing, others = statistics.missing, held_out.missing
    if missing is None:
        return list(weights)
    factor, failed = torch.linalg.cholesky_ex(with_ridge(gram, statistics.tokens, TIMES))
    if failed:
        return list(weights)
    change, share = torch.cholesky_solve(missing, factor), SHARE
    if others is not None:
        # For tokens held out, |y s (v - w)^T - t|^2 is a parabola in the share s.
        errors = change if added else change @ sum(weight.T @ weight for weight in weights)
        slope = float((errors * others).sum())
        curvature = float((errors * (held_out.result("what is held out")[1] @ change)).sum())
        share = min(1.0, max(0.0, slope / curvature)) if curvature > 0 else 0.0
    change *= share
    return [weight + (change.T if added else weight @ change.T) for weight in weights]
