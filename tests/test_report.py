"""The report: losses as defined, on the tokens they are said to be of; what it counts; its JSON; its summary."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ids, small_model
from torch import Tensor, nn

from awq_ext import block, measure, ops, quantize
from awq_ext.calibrate import BATCH, HELD_OUT
from awq_ext.measure import Codes, Measured, dequantize
from awq_ext.report import FoldReport, LinearReport, Loss, Report, UnscaledReport


def inputs(tokens: int, k: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k, generator=g) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]


def gram(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 700])  # of the latter every sixth row is looked at
@pytest.mark.parametrize("scaled_rows", [False, True])
def test_losses_are_those_of_the_outputs(n: int, scaled_rows: bool) -> None:
    """Whatever is folded into the linear, in the units of what it puts out in the original model."""
    k, group = 250, 50
    g = torch.Generator().manual_seed(n)
    w, tokens = torch.randn(n, k, generator=g), [inputs(300, k, 1), inputs(50, k, 2)]
    scale, rows = torch.rand(k, generator=g) + 0.5, torch.rand(n, generator=g) * scaled_rows + 0.1
    nearest = ops.quantize(w, group_size=group)
    measured = Measured(w, tokens[0].abs().mean(0), [gram(x) for x in tokens], nearest)
    folded = w * scale * rows[:, None]
    now = ops.quantize(folded, group_size=group)
    final = ops.quantize_compensated(folded, gram(tokens[0] / scale), group_size=group)
    entry = LinearReport("it", k, n)
    measured.report(entry, folded, scale, [gram(x / scale) for x in tokens], now, final, None, 15)

    looked_at = slice(0, n, 1 if n == 40 else 6)
    salient = tokens[0].abs().mean(0).argsort(descending=True)[:2]
    assert entry.salient == 2
    power = tokens[0].square().mean(0)
    assert entry.salient_power == pytest.approx(float(power[salient].sum() / power.sum()), rel=1e-4)
    weights = [nearest, now, final]
    undone = [torch.ones(n, k), *[scale * rows[:, None]] * 2]
    for loss, codes, factor in zip((entry.rtn, entry.nearest, entry.final), weights, undone, strict=True):
        assert loss is not None
        d = (dequantize(codes) / factor - w)[looked_at].double()
        for got, x in zip((loss.calibration, loss.held_out), tokens, strict=True):
            error, output = x.double() @ d.t(), x.double() @ w[looked_at].double().t()
            assert got == pytest.approx(float(error.square().mean() / output.square().mean()), rel=1e-3)
        error = tokens[0].double() @ d.t()
        part = tokens[0][:, salient].double() @ d[:, salient].t()
        assert loss.salient == pytest.approx(float((part * error).mean() / error.square().mean()), rel=1e-3)


def test_nothing_reaches_a_linear_or_nothing_is_in_it() -> None:
    for w, x in ((torch.zeros(8, 32), inputs(20, 32, 0)), (torch.randn(8, 32), torch.zeros(20, 32))):
        codes = ops.quantize(w, group_size=16)
        entry = LinearReport("it", 32, 8)
        measured = Measured(w, x.abs().mean(0), [gram(x)], codes)
        measured.report(entry, w, torch.ones(32), [gram(x)], codes, codes, None, 15)
        assert entry.rtn == entry.nearest == entry.final == Loss(0.0, None, 0.0)
        assert entry.empty == (16 if not w.any() else 0) and entry.groups == 16


def test_groups_are_counted() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).clamp(-2, 1.75)
    w[:, ::16], w[:, 1::16] = -2, 1.75  # every group spans [-2, 1.75], of which 0 is a step
    w[0] = 0
    w[1, 20:24] = 9.0  # a quarter of one group
    whole = torch.tensor([-2.0, 1.75]).expand(4, 4, 2).clone()
    whole[0] = 0
    whole[1, 1, 1] = 9
    narrow = whole.clone()
    narrow[1, 1, 1] = 1.75
    narrow[2, :2] *= 0.99
    for range, clipped, shrink, saturated in (
        (None, None, None, 0),
        (whole, 0.0, 0.0, 0),
        (narrow, 3 / 16, (7.25 / 11 + 0.01 + 0.01) / 3, 1),
    ):
        codes = ops.quantize(w, group_size=16, range=range)
        entry = LinearReport("it", 64, 4)
        Measured(w, torch.ones(64), [torch.eye(64)], codes).report(
            entry, w, torch.ones(64), [torch.eye(64)], codes, codes, range, 15
        )
        assert entry.clipped == (None if clipped is None else pytest.approx(clipped))
        assert entry.shrink == (None if shrink is None else pytest.approx(shrink, rel=1e-4))
        assert (entry.saturated, entry.empty, entry.groups) == (saturated, 4, 16)


@pytest.mark.parametrize("w_bit", [2, 4, 8])
def test_a_group_that_is_rounded_to_nearest_is_not_saturated(w_bit: int) -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[:8] = w[:8].abs() + 3
    codes: Codes = ops.quantize(w, group_size=16, w_bit=w_bit)
    entry = LinearReport("it", 64, 64)
    measured = Measured(w, torch.ones(64), [torch.eye(64)], codes)
    measured.report(entry, w, torch.ones(64), [torch.eye(64)], codes, codes, None, 2**w_bit - 1)
    assert entry.saturated == 0


# --- a whole run ----------------------------------------------------------------------------------------------------

ROWS: dict[str, Any] = {"calibration": ids(32, 24), "samples": 32, "seq_len": 24, "q_group_size": 16}
IS_HELD_OUT = torch.arange(32) // BATCH % HELD_OUT == HELD_OUT - 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    out = tmp_path_factory.mktemp("report") / "awq"
    return quantize(small_model("llama"), method="awq", out=out, **ROWS), out


def test_a_run_measures_what_it_says_on_the_tokens_it_says(run: tuple[nn.Module, Path]) -> None:
    """The first block's inputs are the same in both models, so its losses can be had by running it."""
    model, _ = run
    report, original = model.awq_report, small_model("llama")
    assert (report.calibration_tokens, report.held_out_tokens) == (32 * 24, 4 * 24)
    entries = {x.name: x for x in report.linears}
    assert len(report.block_seconds) == 2 and all(0 < s < report.seconds for s in report.block_seconds)
    before, after = original.model.layers[0], model.model.layers[0]
    with torch.no_grad():
        hidden = original.model.embed_tokens(ids(32, 24))
        read, scaled = before.input_layernorm(hidden), after.input_layernorm(hidden)
        for name in ("q_proj", "k_proj"):
            linear, entry = before.self_attn.get_submodule(name), entries[f"model.layers.0.self_attn.{name}"]
            rounded = dequantize(ops.quantize(linear.weight, group_size=16))
            for rows, which in ((~IS_HELD_OUT, "calibration"), (IS_HELD_OUT, "held_out")):
                y = linear(read[rows])
                for got, error in (
                    (entry.rtn, read[rows] @ rounded.t() - y),
                    (entry.final, after.self_attn.get_submodule(name)(scaled[rows]) - y),
                ):
                    assert got is not None
                    want = float(error.square().mean() / y.square().mean())
                    assert getattr(got, which) == pytest.approx(want, rel=1e-2)
            assert (entry.tokens, entry.producer) == (28 * 24, "model.layers.0.input_layernorm")
            assert entry.nearest == entry.final and entry.unscaled is None
    folds = {(fold.producer, fold.candidate) for fold in report.folds}
    assert all((x.producer, x.scale) in folds for x in report.quantized)
    assert all(x.error == x.final.calibration < x.error_rtn == x.rtn.calibration for x in report.quantized)


def test_the_report_lies_beside_the_checkpoint(run: tuple[nn.Module, Path]) -> None:
    model, out = run

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads((out / "awq_report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored == model.awq_report.to_dict()
    assert (stored["format"], stored["w_bit"], stored["method"]) == (1, 4, "awq")

    def check(kind: Any, value: Any) -> None:
        """Names and types are those of the dataclasses."""
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            assert list(value) == list(hints)
            for name, hint in hints.items():
                check(hint, value[name])
        elif typing.get_origin(kind) is list:
            for item in value:
                check(typing.get_args(kind)[0], item)
        elif type(None) in typing.get_args(kind):
            if value is not None:
                check(typing.get_args(kind)[0], value)
        else:
            assert isinstance(value, kind)

    check(Report, stored)


def test_few_batches_leave_none_to_hold_out() -> None:
    report = quantize(small_model("llama"), **{**ROWS, "samples": (HELD_OUT - 1) * BATCH}, tune_steps=0).awq_report
    assert report.held_out_tokens == 0
    assert all(fold.held_out is None and fold.refused is None for fold in report.folds)
    assert all(x.rtn.held_out is None and x.final.held_out is None for x in report.quantized)
    assert "held out" not in report.summary()


def test_codes_chosen_together_are_told_apart_from_the_nearest() -> None:
    report = quantize(small_model("llama"), method="awq+", **ROWS).awq_report
    assert sum(x.final.calibration for x in report.quantized) < 0.8 * sum(
        x.nearest.calibration for x in report.quantized
    )
    assert sum(x.final.held_out for x in report.quantized) < sum(x.nearest.held_out for x in report.quantized)


def test_codes_suit_tokens_that_they_are_not_chosen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens for the linears' inputs: fitted to these alone, the codes would lose more on others."""
    others = torch.randint(0, 96, (64, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = small_model("llama")(others).logits
    fitted, losses = {}, {}
    for ridge in (0.0, block.RIDGE):
        monkeypatch.setattr(block, "RIDGE", ridge)
        model = quantize(small_model("llama"), method="awq+", **{**ROWS, "seq_len": 6})
        fitted[ridge] = sum(x.final.calibration for x in model.awq_report.quantized)
        with torch.no_grad():
            losses[ridge] = float((model.float()(others).logits - wanted).square().mean())
    assert fitted[block.RIDGE] > fitted[0.0] and losses[block.RIDGE] < 0.9 * losses[0.0], (fitted, losses)


def test_a_scale_that_held_out_tokens_do_not_confirm_is_not_used() -> None:
    """Tokens below 48 are loud in other channels than those above, which only held-out batches have."""
    model = small_model("llama")
    loud = torch.ones(96, 64)
    loud[:48, ::2], loud[48:, 1::2] = 30, 30
    model.model.embed_tokens.weight.data *= loud
    norm = model.model.layers[0].input_layernorm.weight.clone()
    rows = ids(32, 24) % 48
    rows[IS_HELD_OUT] += 48
    report = quantize(model, **{**ROWS, "calibration": rows}, tune_steps=0).awq_report
    fold = report.folds[0]
    assert fold.producer == "model.layers.0.input_layernorm"
    assert fold.candidate == "identity" and fold.refused is not None and fold.refused.startswith("x^")
    assert fold.held_out == fold.held_out_rtn and fold.loss == fold.loss_rtn
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    assert all(fold.held_out <= fold.held_out_rtn for fold in report.folds)
    refused = [fold for fold in report.folds if fold.refused is not None]
    assert f"{len(refused)} scales gained nothing on tokens held out" in report.summary()
    assert f"  model.layers.0.input_layernorm: {fold.refused}" in report.summary()
    # What confirms it on other tokens is used.
    assert quantize(small_model("llama"), **ROWS).awq_report.folds[0].candidate != "identity"


# --- text and JSON of any report --------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    report = Report(
        "awq", "llama", 16, True, folds=[FoldReport("norm", ["q"], float("inf"), 1.0, "x^0.5", float("nan"))]
    )
    report.write(tmp_path)
    (fold,) = json.loads((tmp_path / "awq_report.json").read_text())["folds"]
    assert fold["loss_rtn"] is None and fold["held_out_rtn"] is None and fold["loss"] == 1.0


def test_summary() -> None:
    def linear(name: str, rtn: float, final: float) -> LinearReport:
        after = Loss(final, 2 * final, 0.1)
        return LinearReport(
            name, 64, 64, rtn=Loss(rtn, 2 * rtn, 0.5), nearest=after, final=after, salient_power=0.25, groups=100
        )

    linears = [linear("a", 0.02, 0.01), linear("b", 0.04, 0.03), LinearReport("c", 64, 63, kept="odd")]
    linears[0].saturated, linears[1].empty = 3, 4
    report = Report(
        *("awq", "llama", 16, True, 3),
        calibration_tokens=1000,
        held_out_tokens=100,
        calibration="1000 tokens",
        notes=["a note"],
        seconds=12.3,
        linears=linears,
        unscaled=[UnscaledReport(f"layers.{i}.mlp.down", "nothing in front of it") for i in range(3)],
    )
    assert report.summary().splitlines() == [
        "2 linears quantized to 3 bits in groups of 16 (awq), 12 s",
        "calibrated on 1000 tokens",
        "mean output error of a linear on 900 calibration tokens: 3.0000% round-to-nearest, 2.0000% awq",
        "the same on 100 tokens held out: 6.0000% round-to-nearest, 4.0000% awq",
        "largest: b 3.000%, a 1.000%",
        "the salient hundredth of input channels has 25% of the inputs' power and 50% of the error of "
        "round-to-nearest, 10% of that of awq",
        "3 of 200 groups are saturated",
        "4 of 200 groups are empty",
        "3 linears quantized without a scale:",
        "  layers.*.mlp.down (3x): nothing in front of it",
        "a note",
        "1 linears kept as they are:",
        "  c [63, 64]: odd",
    ]


def test_the_constants_are_those_of_the_docstrings() -> None:
    assert (measure.SALIENT, measure.SATURATED) == (100, 16)
