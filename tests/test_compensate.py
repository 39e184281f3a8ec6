"""`quantize_compensated` against a slow reference in float64 that shares nothing with it, and what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from numpy.typing import NDArray
from torch import Tensor

from awq_ext import ops

Matrix = NDArray[np.float64]


def data(n: int, k: int, tokens: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the gram of correlated inputs of which a few are loud."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=g) / k**0.5)
    x *= torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]
    return torch.randn(n, k, generator=g), ref.gram_of(x + 0.05)


def losses(w: Tensor, gram: Tensor, result: tuple[Tensor, Tensor, Tensor]) -> Matrix:
    """d gram d^T of each row, in float64."""
    q, scales, zeros = (t.double().numpy() for t in result)
    group = w.shape[1] // scales.shape[1]
    d = (q - zeros.repeat(group, 1)) * scales.repeat(group, 1) - w.double().numpy()
    return np.asarray(((d @ gram.double().numpy()) * d).sum(1))


def reference(
    w: Tensor,
    gram: Tensor,
    start: tuple[Tensor, Tensor, Tensor],
    damping: float,
    act_order: bool,
    passes: int,
    refit: bool,
    last: int = 15,
) -> tuple[Matrix, Matrix]:
    """Codes and scales by the textbook: GPTQ with Cholesky of the inverse, descent with the whole gradient."""
    weight, h = w.double().numpy(), gram.double().numpy()
    scale, zero = start[1].double().numpy().copy(), start[2].double().numpy()
    n, k = weight.shape
    group = k // scale.shape[1]
    order = np.argsort(-h.diagonal(), kind="stable") if act_order else np.arange(k)
    damped = h[np.ix_(order, order)] + damping * h.diagonal().mean() * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    code = np.zeros((n, k))
    left = weight[:, order].copy()
    for t in range(k):
        g = order[t] // group
        code[:, order[t]] = np.clip(np.rint(left[:, t] / scale[:, g]) + zero[:, g], 0, last)
        error = (left[:, t] - (code[:, order[t]] - zero[:, g]) * scale[:, g]) / upper[t, t]
        left[:, t:] -= error[:, None] * upper[t, t:]
    whole = code - zero.repeat(group, 1)
    for _ in range(passes):
        for g in range(k // group):
            for i in range(g * group, (g + 1) * group):
                d = whole * scale.repeat(group, 1) - weight
                best = weight[:, i] + d[:, i] - d @ h[:, i] / h[i, i]
                whole[:, i] = np.clip(np.rint(best / scale[:, g]) + zero[:, g], 0, last) - zero[:, g]
            if refit:
                part = np.where(np.arange(k) // group == g, whole, 0.0)
                d = whole * scale.repeat(group, 1) - weight
                slope, curvature = (part @ h * d).sum(1), (part @ h * part).sum(1)
                new = (scale[:, g] - slope / curvature).astype(np.float32).astype(np.float16).astype(np.float64)
                step = new - scale[:, g]
                gains = (new > 0) & (2 * step * slope + step**2 * curvature < 0)
                scale[:, g] = np.where(gains, new, scale[:, g])
    return whole + zero.repeat(group, 1), scale


@pytest.mark.parametrize(
    ("n", "k", "group", "options"),
    [
        (24, 96, 32, {}),
        (24, 96, 32, {"act_order": False, "passes": 0, "refit_scales": False}),
        (8, 128, 64, {"passes": 0, "damping": 0.1}),
        (56, 64, -1, {"passes": 2, "refit_scales": False}),
        (8, 80, 16, {"zero_point": False}),
        (8, 33, 11, {"passes": 1, "act_order": False}),
        (24, 64, 32, {"w_bit": 3}),
        (24, 64, 16, {"w_bit": 2, "zero_point": False}),
    ],
)
def test_equals_the_textbook(n: int, k: int, group: int, options: dict[str, object]) -> None:
    w, gram = data(n, k)
    settings = {"damping": 0.01, "act_order": True, "passes": 4, "refit_scales": True} | options
    rounding: dict[str, Any] = {"zero_point": settings.pop("zero_point", True), "w_bit": settings.pop("w_bit", 4)}
    start = ops.quantize(w, group_size=group, **rounding)
    got = ops.quantize_compensated(w, gram, group_size=group, **rounding, **settings)  # type: ignore[arg-type]
    last = 2 ** rounding["w_bit"] - 1
    codes, scales = reference(
        w, gram, start, *(settings[k] for k in ("damping", "act_order", "passes", "refit_scales")), last
    )  # type: ignore[arg-type]
    same = (got[0].numpy() == codes).all(1)
    # A code on the edge between two in one precision may fall on the other side in the other, and then all after it.
    assert same.mean() > 0.85, f"{(~same).sum()} of {n} rows differ"
    assert np.array_equal(got[1].double().numpy()[same], scales[same])
    expected = losses(w, gram, (torch.from_numpy(codes), torch.from_numpy(scales), start[2]))
    assert losses(w, gram, got).sum() == pytest.approx(expected.sum(), rel=0.01)
    assert torch.equal(got[2], start[2])


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("passes", [0, 1, 4])
def test_no_row_loses_more_than_rounded_to_nearest(zero_point: bool, dtype: torch.dtype, passes: int) -> None:
    w, gram = data(40, 96, tokens=30, seed=passes)  # fewer tokens than channels: the gram is singular
    range = ops.search_clip(w, gram, group_size=32, zero_point=zero_point, dtype=dtype)
    options = {"group_size": 32, "zero_point": zero_point, "range": range, "dtype": dtype}
    nearest = losses(w, gram, ops.quantize(w, **options))  # type: ignore[arg-type]
    got = losses(w, gram, ops.quantize_compensated(w, gram, passes=passes, **options))  # type: ignore[arg-type]
    assert (got <= nearest * (1 + 1e-5)).all()
    assert got.sum() < 0.8 * nearest.sum()


def test_each_step_gains() -> None:
    w, gram = data(64, 128)
    total = lambda **options: losses(w, gram, ops.quantize_compensated(w, gram, group_size=32, **options)).sum()  # noqa: E731
    first = total(passes=0)
    descended = [total(passes=passes, refit_scales=False) for passes in (1, 2, 4)]
    assert descended[2] < descended[1] < descended[0] < first
    assert total(passes=4) < descended[2]
    assert first < total(passes=0, act_order=False)


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for gram in (torch.eye(64), torch.diag(torch.logspace(-3, 3, 64)), torch.zeros(64, 64)):
        got = ops.quantize_compensated(w, gram, group_size=16, refit_scales=False)
        for a, b in zip(got, ops.quantize(w, group_size=16), strict=True):
            assert torch.equal(a, b)


def test_dead_channels_are_rounded_to_nearest_and_change_nothing_else() -> None:
    w, gram = data(8, 64)
    dead = [3, 17, 40]
    gram[dead] = 0
    gram[:, dead] = 0
    q, scales, _ = ops.quantize_compensated(w, gram, group_size=16, refit_scales=False)
    nearest = ops.quantize(w, group_size=16)
    assert torch.equal(q[:, dead], nearest[0][:, dead]) and torch.equal(scales, nearest[1])
    other = w.clone()
    other[:, dead] *= 0.5  # inside the group's range still, unless an end of it: then the scales differ
    ends = torch.stack([w.view(8, 4, 16).amin(-1), w.view(8, 4, 16).amax(-1)], -1).contiguous()
    changed = ops.quantize_compensated(other, gram, group_size=16, range=ends, refit_scales=False)[0]
    alive = [i for i in range(64) if i not in dead]
    assert torch.equal(changed[:, alive], q[:, alive])


def test_rows_do_not_depend_on_their_neighbours() -> None:
    w, gram = data(70, 48)
    whole = ops.quantize_compensated(w, gram, group_size=16)
    for rows in (slice(0, 1), slice(5, 22), slice(47, 70)):
        for part, all_rows in zip(ops.quantize_compensated(w[rows], gram, group_size=16), whole, strict=True):
            assert torch.equal(part, all_rows[rows])


def test_nothing_to_round() -> None:
    w, gram = data(8, 32)
    q, scales, zeros = ops.quantize_compensated(w[:0], gram, group_size=16)
    assert (q.shape, scales.shape, zeros.shape) == ((0, 32), (0, 2), (0, 2))
    q, scales, zeros = ops.quantize_compensated(torch.zeros(8, 32), gram, group_size=16)
    assert (q == zeros.repeat_interleave(16, 1)).all() and (scales == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    w, gram = data(8, 32)
    for name in ("w", "gram"):
        given = {"w": w.clone(), "gram": gram.clone()}
        given[name][3, 5] = bad
        with pytest.raises(RuntimeError, match=rf"awq_ext::quantize_compensated: {name} must be finite"):
            ops.quantize_compensated(**given, group_size=16)
    ends = torch.ones(8, 2, 2)
    ends[6, 1, 0] = bad
    with pytest.raises(RuntimeError, match=r"awq_ext::quantize_compensated: row 6 of w \(or of range\)"):
        ops.quantize_compensated(w, gram, group_size=16, range=ends)
    w[5] *= 1e8  # finite, but a float16 cannot hold its scale
    with pytest.raises(RuntimeError, match=r"awq_ext::quantize_compensated: row 5 of w"):
        ops.quantize_compensated(w, gram, group_size=16)
