"""The search for a scale on a sample of rows."""

from __future__ import annotations

from typing import Any

import pytest
import reference as ref
import torch
from torch import Tensor

from awq_ext import ops, search

K, GROUP = 96, 32
ROUNDING: dict[str, Any] = {"w_bit": 4, "zero_point": True, "dtype": torch.float16}
SEARCH: dict[str, Any] = {"group_size": GROUP, "grid": 20, "duo_scaling": True, "tie": None, **ROUNDING}


def case(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, x_mean, gram and row_weight as models have them: loud channels, and few rows that make up most of the loss."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.exp(1.5 * torch.randn(K, generator=generator))
    x = torch.randn(300, K, generator=generator) @ (torch.eye(K) + 0.05 * torch.randn(K, K, generator=generator))
    x = x * loudness
    w = torch.randn(n, K, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))
    row_weight = torch.exp(2 * torch.randn(n, generator=generator))
    return w, x.abs().mean(0), ref.gram_of(x), row_weight


@pytest.mark.parametrize("n", [1, 7, search.ROWS])
def test_few_rows_are_all_looked_at(n: int) -> None:
    w, x_mean, gram, row_weight = case(n)
    scale, losses = ops.search_scale(w, x_mean, gram, row_weight=row_weight, **SEARCH)
    got, best, rtn, loss = search.search_scale(w, x_mean, gram, row_weight, **SEARCH)
    assert torch.equal(got, scale)
    assert (best, rtn, loss) == (int(losses.argmin()), float(losses[0]), float(losses.min()))


@pytest.mark.parametrize("seed", range(8))
def test_what_a_sample_chooses_is_hardly_worse_and_its_losses_are_those_of_all_rows(seed: int) -> None:
    w, x_mean, gram, row_weight = case(2000, seed)
    _, losses = ops.search_scale(w, x_mean, gram, row_weight=row_weight, **SEARCH)
    scale, best, rtn, loss = search.search_scale(w, x_mean, gram, row_weight, **SEARCH)
    assert rtn == float(losses[0]) and loss == float(losses[best])
    assert float(losses.min()) <= loss <= float(losses.min()) + 0.01 * rtn
    assert torch.equal(scale, ops.scale_candidates(w, x_mean, group_size=GROUP)[best])


@pytest.mark.parametrize("seed", range(4))
def test_losses_of_a_sample_estimate_those_of_all_rows(seed: int) -> None:
    w, x_mean, gram, row_weight = case(3000, seed)
    candidates = ops.scale_candidates(w, x_mean, group_size=GROUP, grid=4)
    rows, weight = search.sample(w, gram.diagonal(), row_weight, GROUP)
    assert len(rows) <= search.ROWS and len(rows.unique()) == len(rows)
    estimate = ops.scale_losses(w[rows], candidates, gram, group_size=GROUP, row_weight=weight)
    exact = ops.scale_losses(w, candidates, gram, group_size=GROUP, row_weight=row_weight)
    # Losses near the expected share of each row: rows drawn evenly would be off by far more, see below.
    torch.testing.assert_close(estimate, exact, rtol=0.25, atol=0)
    even = torch.arange(0, 3000, 3000 // search.ROWS)
    weight = row_weight[even] * (3000 / len(even))
    plain = ops.scale_losses(w[even], candidates, gram, group_size=GROUP, row_weight=weight)
    assert (estimate / exact).log().abs().mean() < 0.5 * (plain / exact).log().abs().mean()


def test_the_identity_stays_if_every_scale_is_worse() -> None:
    """Channels with equal inputs and weights on the grid of codes: whatever scales them moves them off it."""
    w = torch.randint(0, 16, (400, K), generator=torch.Generator().manual_seed(0)).float()
    w[:, ::GROUP], w[:, 1::GROUP] = 0.0, 15.0
    x_mean = torch.linspace(1, 3, K)
    scale, best, rtn, loss = search.search_scale(w, x_mean, torch.eye(K), torch.ones(400), **SEARCH)
    assert best == 0 and rtn == loss == 0.0 and torch.equal(scale, torch.ones(K))


def test_rows_that_do_not_matter_and_rows_of_zeros() -> None:
    w, x_mean, gram, row_weight = case(500)
    w[::2] = 0.0
    for weights in (torch.zeros(500), row_weight, torch.nn.functional.one_hot(torch.tensor(77), 500).float()):
        rows, weight = search.sample(w, gram.diagonal(), weights, GROUP)
        assert torch.isfinite(weight).all() and (weight >= 0).all() and len(rows) <= search.ROWS
        _, losses = ops.search_scale(w, x_mean, gram, row_weight=weights, **SEARCH)
        assert search.search_scale(w, x_mean, gram, weights, **SEARCH)[3] <= float(losses[0])
    rows, _ = search.sample(w, gram.diagonal(), torch.nn.functional.one_hot(torch.tensor(77), 500).float(), GROUP)
    assert 77 in rows


def test_what_is_left_of_an_input_is_what_regression_on_the_others_leaves() -> None:
    *_, gram, _ = case(1)
    for ridge in (0.0, 0.3):
        left = search.unpredicted(gram, ridge)
        ridged = gram.double() + ridge * torch.diag(gram.diagonal().double())
        for j in (0, 7, K - 1):
            others = torch.arange(K) != j
            column = ridged[others, j]
            told = column @ torch.linalg.solve(ridged[others][:, others], column)
            torch.testing.assert_close(left[j].double(), ridged[j, j] - told, rtol=1e-3, atol=0)


def test_independent_silent_and_equal_inputs() -> None:
    squares, equal = torch.tensor([4.0, 0.0, 1e-20, 1e6]), torch.ones(3, 3)
    apart = torch.diag(squares)
    torch.testing.assert_close(search.unpredicted(apart, 0.1), 1.1 * squares, rtol=1e-6, atol=0)
    assert torch.equal(search.unpredicted(apart, 0.0), apart) and torch.equal(search.unpredicted(equal, 0.0), equal)
    torch.testing.assert_close(search.unpredicted(equal, 1e-3), torch.full((3,), 1.5e-3), rtol=0.01, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_scales_for_codes_chosen_together(seed: int) -> None:
    """Loud inputs, that are so together: codes chosen together lose less at a scale found by what is left."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.exp(1.5 * torch.randn(K, generator=generator))
    x = torch.randn(2000, 12, generator=generator) @ torch.randn(12, K, generator=generator) * loudness
    x += torch.randn(2000, K, generator=generator)
    w, gram = torch.randn(64, K, generator=generator), ref.gram_of(x)

    def loss(by: Tensor) -> float:
        scale = search.search_scale(w, x.abs().mean(0), by, torch.ones(len(w)), **SEARCH)[0]
        scaled = gram / scale / scale[:, None]
        q, s, z = ops.quantize_compensated(w * scale, scaled, group_size=GROUP, **ROUNDING)
        error = (q.float() - z.repeat_interleave(GROUP, 1)) * s.float().repeat_interleave(GROUP, 1) - w * scale
        return float(((error @ scaled) * error).sum())

    assert loss(search.unpredicted(gram, 0.0)) < 0.95 * loss(gram)
