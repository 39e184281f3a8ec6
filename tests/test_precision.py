"""Products of calibration: how exact, when, and that torch's settings come back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from awq_ext.calibrate import Statistics
from awq_ext.precision import bfloat16_is_faster, fast_products, product

PRODUCTS: Any = torch.backends.mkldnn.matmul


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that multiplies bfloat16 numbers, or says that it does."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert PRODUCTS.fp32_precision == "none"
    yield
    assert PRODUCTS.fp32_precision == "none"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("with_bfloat16")
def test_products_are_as_exact_as_bfloat16() -> None:
    x, weight, bias = random(3, 7, 64), random(48, 64), random(48)
    x.requires_grad_()
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    for context_is_open in (False, True):
        if context_is_open:
            with fast_products():
                y = product(weight, bias)(x)
        else:
            y = product(weight, bias)(x)
        assert y.dtype == torch.float32
        error = (y - exact).abs().max() / (x.abs().double() @ weight.abs().double().t()).max()
        assert 1e-6 < error < 2.0**-8  # two factors and the result, each rounded to 8 bits
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, weight.sum(0).expand_as(x), rtol=0.02, atol=0.1)


@pytest.mark.usefixtures("with_bfloat16")
def test_sums_of_products_are_not_rounded() -> None:
    """Small whole numbers are exact in bfloat16, and their sums in float32 only."""
    generator = torch.Generator().manual_seed(0)
    x, difference = torch.randint(-8, 9, (2, 1024, 300), generator=generator).float()
    statistics = Statistics()
    for slot, (one, other) in enumerate(zip(x.split(512), difference.split(512), strict=True)):
        statistics.add(one, slot, one + other)
    _, gram = statistics.result("name")
    assert statistics.drift is not None
    assert torch.equal(gram.double() * 1024, x.double().T @ x.double())
    assert torch.equal(statistics.drift.double() * 1024, x.double().T @ difference.double())


@pytest.mark.usefixtures("with_bfloat16")
def test_a_chosen_precision_stays() -> None:
    x, weight = random(5, 64), random(48, 64)
    PRODUCTS.fp32_precision = "ieee"
    try:
        assert not bfloat16_is_faster()
        with fast_products():
            assert PRODUCTS.fp32_precision == "ieee"
            assert torch.equal(product(weight, None)(x), torch.nn.functional.linear(x, weight))
        assert PRODUCTS.fp32_precision == "ieee"
    finally:
        PRODUCTS.fp32_precision = "none"


@pytest.mark.usefixtures("with_bfloat16")
def test_the_setting_comes_back_after_an_error_and_only_at_the_outermost_end() -> None:
    with pytest.raises(RuntimeError, match="inside"), fast_products():
        with fast_products():
            pass
        assert PRODUCTS.fp32_precision == "bf16" and bfloat16_is_faster()
        raise RuntimeError("inside")


def test_other_cpus_and_other_dtypes_compute_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(5, 64), random(48, 64)
    assert torch.equal(
        product(weight.double(), None)(x.double()), torch.nn.functional.linear(x.double(), weight.double())
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with fast_products():
        assert PRODUCTS.fp32_precision == "none"
    assert torch.equal(product(weight, None)(x), torch.nn.functional.linear(x, weight))
