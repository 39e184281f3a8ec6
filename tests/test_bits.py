"""2 to 8 bits: the operators that choose codes, and models quantized to other than 4 (simulated, never packed)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference as ref
import torch
from architectures import ids, small_model
from torch import Tensor, nn

from awq_ext import ops, quantize

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


# --- models ---------------------------------------------------------------------------------------------------------


def quantized(method: str, w_bit: int, model: nn.Module | None = None, **options: Any) -> nn.Module:
    rows: dict[str, Any] = {"calibration": ids(32, 16), "samples": 32, "seq_len": 16, "q_group_size": 16}
    model = model or small_model("llama")
    return quantize(model, method=method, w_bit=w_bit, **rows, **options)


def error(model: nn.Module) -> float:
    with torch.no_grad():
        before = small_model("llama")(ids(4, 32)).logits
        return float((model(ids(4, 32)).logits.float() - before).square().mean())


@pytest.mark.parametrize(("w_bit", "zero_point"), [(2, True), (3, False), (8, True)])
def test_a_simulated_linear_has_the_weight_that_its_codes_stand_for(w_bit: int, zero_point: bool) -> None:
    original, model = small_model("llama"), quantized("rtn", w_bit, zero_point=zero_point)
    for name, linear in original.model.layers.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        q, s, z = ops.quantize(linear.weight, group_size=16, w_bit=w_bit, zero_point=zero_point)
        want = (q.view(len(q), -1, 16).double() - z[..., None]) * s.double()[..., None]
        got = model.model.layers.get_submodule(name)
        assert type(got) is nn.Linear and not got.weight.requires_grad
        assert torch.equal(got.weight.double(), want.flatten(1))
        assert (got.bias is None) == (linear.bias is None) and got.training == linear.training
    assert model.awq_report.w_bit == w_bit and "14 linears quantized to" in model.awq_report.summary()
    assert not hasattr(model.config, "quantization_config")
    quantized("rtn", 4, model)  # it is not a quantized model


def test_every_bit_brings_a_model_nearer_and_every_method_gains() -> None:
    rtn = [error(quantized("rtn", w_bit)) for w_bit in (2, 3, 4, 6, 8)]
    assert all(b < 0.5 * a for a, b in itertools.pairwise(rtn)), rtn
    awq, together = quantized("awq", 3), quantized("awq+", 3)
    assert error(together) < error(awq) < rtn[1]
    for model in (awq, together):
        report = model.awq_report
        assert len(report.quantized) == 14 and all(x.final is not None for x in report.quantized)
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                groups = module.weight.view(module.out_features, -1, 16)
                assert all(len(group.unique()) <= 8 for group in groups.flatten(0, 1))


def test_weights_go_back_to_the_dtype_of_the_model() -> None:
    model = quantized("gptq", 5, small_model("llama").bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert error(model) < error(quantized("rtn", 4))
