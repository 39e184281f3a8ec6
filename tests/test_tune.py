"""End-to-end tuning: its gradients, what it changes and what not, and that it is undone where it does not help."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from test_quantizer import SMALL, ids, small_model
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from awq_ext import AwqLinear, CalibrationError, load_quantized, quantize, tune
from awq_ext.calibrate import BATCH, BlockInputs
from awq_ext.generated import write_rows
from awq_ext.pretrained import load_float
from awq_ext.report import Report
from awq_ext.tune import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


OPTIONS: dict[str, Any] = {"calibration": ids(), "samples": 4, "seq_len": 32, "q_group_size": 16}


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    return quantize(copy.deepcopy(model), **{**OPTIONS, "method": "awq+", "tune_steps": 8, **options})


def divergence(model: nn.Module, original: nn.Module) -> float:
    """On rows that the model wrote, others than it was tuned on."""
    rows = torch.stack(write_rows(original, list(ids()), 32, 32, seed=(1, 2)))
    with torch.no_grad():
        own, wanted = (m(rows).logits.float().log_softmax(-1) for m in (model, original))
    return float(nn.functional.kl_div(own, wanted, reduction="sum", log_target=True) / rows.numel())


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 32, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    log = (0.1 * torch.randn(24, 4, dtype=torch.float64)).requires_grad_()

    def multiply(x: Tensor, log: Tensor) -> Tensor:
        product: Tensor = tune._Product.apply(x, tune._scale(weight, log.detach()), bias, log)
        return product

    assert torch.autograd.gradcheck(multiply, (x, log))
    expected = nn.functional.linear(x, weight * log.exp().repeat_interleave(8, 1), bias)
    torch.testing.assert_close(multiply(x, log), expected)


def student_of(kind: str, monkeypatch: pytest.MonkeyPatch, logits: int) -> tuple[tune._Student, Batch]:
    """A quantized model with random factors, and a batch whose targets are random, too."""
    monkeypatch.setattr(tune, "LOGITS", logits)
    model = quantized(small_model(kind), tune_steps=0).float()
    blocks = list(model.model.layers)
    linears = {m.repack("gemm"): m.group_size for m in model.modules() if isinstance(m, AwqLinear)}
    with torch.no_grad():
        inputs = BlockInputs(model, blocks, ids())
        student = tune._Student(model, blocks, linears, inputs.call)
        torch.manual_seed(1)
        for log in student.logs:
            log.copy_(0.1 * torch.randn_like(log))
    return student, Batch(inputs.ids[0], inputs.hidden[0], torch.randn_like(inputs.hidden[0]))


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("kind", ["llama", "llama-mha-bias", "gemma3_text"])
def test_the_gradient_of_all_is_that_of_the_divergence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for logits in (10**9, 7 * BATCH * SMALL["vocab_size"], 1):
        student, batch = student_of(kind, monkeypatch, logits)
        direction = [torch.randn(log.shape, generator=torch.Generator().manual_seed(2)) for log in student.logs]
        values = []
        with torch.no_grad(), student.scaled():
            student.backward(batch)
            slope = sum(float((log.grad * d).sum()) for log, d in zip(student.logs, direction, strict=True))
            for sign in (1, -1):
                for log, d in zip(student.logs, direction, strict=True):
                    log += sign * 1e-3 * d
                values += student.divergences([batch])
                for log, d in zip(student.logs, direction, strict=True):
                    log -= sign * 1e-3 * d
        assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)
        found.append((slope, *values))
    for other in found[1:]:
        assert found[0] == pytest.approx(other, rel=1e-3)  # however many positions at a time


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned_models_are_nearer_to_the_original(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "RATE", 5e-3)
    model = small_model(kind, dtype)
    before, after = quantized(model, tune_steps=0), quantized(model, tune_steps=64)
    assert before.awq_report.tuned is None
    tuned = after.awq_report.tuned
    assert (tuned.steps, tuned.kept) == (64, True)
    assert tuned.kl < tuned.kl_before
    assert divergence(after, model) < 0.98 * divergence(before, model)
    assert f"{tuned.kl:.4f}" in after.awq_report.summary()
    names = dict(before.named_parameters())
    assert all(p.dtype == dtype and p.requires_grad == names[n].requires_grad for n, p in after.named_parameters())
    assert all(p.grad is None for p in after.parameters())
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        free = name.endswith(".scales") or "norm" in name
        assert old.dtype == new.dtype
        assert free or torch.equal(old, new), name
        assert not (name.endswith(".scales") and torch.equal(old, new)), name


def test_what_makes_it_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "RATE", 0.3)
    model = small_model("llama")
    before, after = quantized(model, tune_steps=0), quantized(model, tune_steps=8)
    tuned = after.awq_report.tuned
    assert not tuned.kept and tuned.kl > tuned.kl_before
    assert "undone" in after.awq_report.summary()
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(old, new), name


def test_what_chance_may_do_is_not_undone() -> None:
    before = [0.1, 0.2, 0.3, 0.4]
    for after, grown in (
        ([0.1, 0.2, 0.3, 0.4], False),
        ([0.0, 0.1, 0.2, 0.3], False),
        ([0.3, 0.1, 0.3, 0.3], False),  # by 0 on the average
        ([0.3, 0.2, 0.3, 0.3], False),  # 0.025, of which the standard error is 0.063
        ([0.11, 0.22, 0.31, 0.42], True),  # 0.015, of which it is 0.003
        ([0.1, 0.2, 0.3, float("nan")], True),
        ([0.1, 0.2, 0.3, float("inf")], True),
    ):
        assert tune._grown(before, after) == grown, after


def test_simulated_bits_are_tuned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "RATE", 5e-3)
    model = small_model("llama")
    before, after = (quantized(model, w_bit=3, tune_steps=n) for n in (0, 64))
    assert divergence(after, model) < divergence(before, model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "qwen3_moe", "deepseek_v3"])
def test_files_get_what_memory_gets(kind: str, tmp_path: Path) -> None:
    architectures.small_model(kind).half().save_pretrained(tmp_path / "original")
    in_memory = quantized(load_float(tmp_path / "original", "auto"))
    tuned = in_memory.awq_report.tuned
    assert tuned.steps == 8 and (tuned.kept or kind != "llama")
    streamed = quantize(tmp_path / "original", out=tmp_path / "out", method="awq+", tune_steps=8, **OPTIONS)
    assert streamed.awq_report.tuned == tuned
    for model in (streamed, load_quantized(tmp_path / "out", dtype=torch.float16)):
        for (name, mine), theirs in zip(in_memory.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name
    again = quantize(tmp_path / "original", method="awq+", tune_steps=8, **OPTIONS)
    for (name, mine), theirs in zip(in_memory.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("options", [{"tune_steps": -1}, {"tune_steps": 1, "method": "rtn"}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tune_steps"):
        quantized(small_model("llama"), **options)


class Plain(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        inner = small_model("llama")
        self.model, self.lm_head = inner.model, inner.lm_head

    def forward(self, tokens: torch.Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(tokens).last_hidden_state)
        return logits


def test_other_models_write_nothing_to_tune_them_on() -> None:
    with pytest.raises(CalibrationError, match=r"of transformers can write rows, got a Plain; .*tune_steps=0"):
        quantized(Plain())
    assert quantized(Plain(), tune_steps=0).awq_report.tuned is None


def unasked(model: nn.Module, **options: Any) -> Report:
    report: Report = quantize(model, **{**OPTIONS, **options}).awq_report
    return report


def test_what_is_tuned_without_being_asked() -> None:
    assert quantize.__kwdefaults__["tune_steps"] is None
    tuned = unasked(small_model("llama")).tuned
    assert tuned is not None and tuned.steps == tune.STEPS
    for options in ({"method": "awq"}, {"method": "gptq"}, {"method": "rtn"}, {"tune_steps": 0}):
        report = unasked(small_model("llama"), **options)
        assert report.tuned is None and not report.notes


def test_the_report_says_why_a_model_is_not_tuned() -> None:
    without_cache = small_model("llama")
    forward = without_cache.forward
    without_cache.forward = lambda *args, **options: CausalLMOutput(logits=forward(*args, **options).logits)
    large, asked = small_model("llama"), small_model("llama")
    for model in (large, asked):
        model.resize_token_embeddings(8192, mean_resizing=False)  # type: ignore[operator]
    for model, reason in (
        (Plain(), "only a causal language model of transformers can write rows, got a Plain"),
        (without_cache, "LlamaForCausalLM returns no past_key_values, which it needs to write rows"),
        (large, "the output head has 524,288 weights, more than the 73,728 that are quantized"),
    ):
        report = unasked(model)
        assert report.tuned is None
        assert f"scales and norms were not tuned: {reason}" in report.summary().splitlines()
    tuned = unasked(asked, tune_steps=1).tuned
    assert tuned is not None and tuned.steps == 1
    with pytest.raises(CalibrationError, match=r"got a Plain; pass generated=0 and tune_steps=0"):
        unasked(Plain(), generated=1)
