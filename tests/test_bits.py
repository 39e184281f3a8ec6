"""2 to 8 bits: the operators that choose codes, and models quantized to other than 4 (simulated, never packed)."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from torch import Tensor

from awq_ext import ops

BITS = range(2, 9)


def data(n: int = 24, k: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """w, x_mean and gram, with a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, k, generator=g) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]
    return torch.randn(n, k, generator=g), x.abs().mean(0), ref.gram_of(x)


def loss(w: Tensor, gram: Tensor, codes: tuple[Tensor, Tensor, Tensor]) -> float:
    q, s, z = (part.double() for part in codes)
    g = w.shape[1] // s.shape[1]
    d = (q - z.repeat_interleave(g, 1)) * s.repeat_interleave(g, 1) - w.double()
    return float(((d @ gram.double()) * d).sum())


@pytest.mark.parametrize("w_bit", BITS)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_rounds_to_nearest(w_bit: int, zero_point: bool, dtype: torch.dtype) -> None:
    w, *_ = data()
    w[3, :32] = 0
    w[4] = w[4].abs() + 1
    w[5] = -w[4]
    for range in (None, torch.stack([-0.5 * torch.rand(24, 3), 2 * torch.rand(24, 3)], -1)):
        codes = ops.quantize(w, group_size=32, w_bit=w_bit, zero_point=zero_point, range=range, dtype=dtype)
        ref.check_quantized(w, *codes, 32, zero_point, range, w_bit)
        assert codes[0].max() <= 2**w_bit - 1


@pytest.mark.parametrize("w_bit", BITS)
def test_every_code_is_used_and_comes_back(w_bit: int) -> None:
    """Weights that are whole multiples of a float16 scale are represented exactly, zero points included."""
    last = 2**w_bit - 1
    for zero in (0, 1, last // 2, last):
        w = (torch.arange(last + 1).float() - zero)[None] * 0.25
        q, s, z = ops.quantize(w, group_size=-1, w_bit=w_bit)
        assert (q[0].tolist(), s.item(), z.item()) == (list(range(last + 1)), 0.25, zero)
    middle = 2 ** (w_bit - 1)
    w = (torch.arange(1, 2 * middle).float() - middle)[None] * 0.25
    q, s, z = ops.quantize(w, group_size=-1, w_bit=w_bit, zero_point=False)
    assert (q[0].tolist(), s.item(), z.item()) == (list(range(1, 2 * middle)), 0.25, middle)


@pytest.mark.parametrize("w_bit", BITS)
@pytest.mark.parametrize("zero_point", [True, False])
def test_search_clip_equals_its_definition(w_bit: int, zero_point: bool) -> None:
    w, _, gram = data(n=8)
    range = ops.search_clip(w, gram, group_size=32, w_bit=w_bit, grid=6, zero_point=zero_point)
    got = ref.group_losses(w, gram, 32, zero_point, torch.float16, range, w_bit)
    want = ref.clip_losses(w, gram, 32, 6, 0.5, zero_point, torch.float16, w_bit)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("zero_point", [True, False])
def test_every_bit_lowers_every_loss(zero_point: bool) -> None:
    w, x_mean, gram = data()
    before = [float("inf")] * 4
    for w_bit in BITS:
        options = {"group_size": 32, "w_bit": w_bit, "zero_point": zero_point}
        losses = ops.search_scale(w, x_mean, gram, grid=4, **options)[1]
        range = ops.search_clip(w, gram, **options)
        now = [
            float(losses[0]),
            float(losses.min()),
            loss(w, gram, ops.quantize(w, range=range, **options)),
            loss(w, gram, ops.quantize_compensated(w, gram, range=range, **options)),
        ]
        assert all(a < 0.6 * b for a, b in zip(now, before, strict=True)), (w_bit, now, before)
        nearest = loss(w, gram, ops.quantize(w, **options))
        assert now[0] == pytest.approx(nearest, rel=1e-4)
        assert now[1] <= now[0] and now[2] <= nearest * 1.001 and now[3] <= now[2] * 1.001
        before = now


def test_only_four_bits_can_be_packed() -> None:
    q, _, _ = ops.quantize(torch.randn(8, 32), group_size=32, w_bit=5)
    with pytest.raises(RuntimeError, match=r"awq_ext::pack: q must hold codes 0\.\.15"):
        ops.pack(q)
