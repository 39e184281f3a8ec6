"""Folds found by running a block: the right ones in every architecture, proofs that fail where they should."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from architectures import HEADS, UP, Traces, ids, own_model, small_model
from torch import nn

from awq_ext import quantize
from awq_ext.fold import Fold
from awq_ext.trace import Inputs, prove, trace

pytestmark = pytest.mark.usefixtures("one_thread")


# --- proofs that have to fail ---------------------------------------------------------------------------------------


def planted(kind: str, at: int, **wrong: Any) -> tuple[nn.Module, list[Fold], Inputs]:
    """The first block with its folds, one of them changed."""
    traces = Traces(small_model(kind))
    folds = traces.trace(0).folds
    right = folds[at]
    parts = {"producer": right.producer, "readers": right.readers, "rows": right.rows, "plus": right.plus}
    folds[at] = Fold(**{**parts, **wrong})
    return traces.blocks[0], folds, traces.several(0)


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("kind", "at", "wrong"),
    [
        ("llama", 0, {"readers": QKV[1:]}),  # a reader is missing
        ("llama", 2, {"readers": ("mlp.gate_proj",)}),
        ("llama", 0, {"readers": (*QKV, "self_attn.o_proj")}),  # one is not fed by it
        ("llama", 1, {"rows": torch.arange(32).repeat(2)}),  # query heads share values in another way
        ("llama", 3, {"producer": "mlp.gate_proj"}),  # the branch with the activation
        ("phi3", 1, {"rows": 64 + torch.arange(64)}),  # the last 64 rows, which are keys and values
        ("phi3", 3, {"rows": UP}),  # the half that is the gate
        ("gpt_neox", 1, {"rows": 128 + HEADS}),  # as if q, k and v were one after the other
        ("bloom", 1, {"rows": torch.arange(192).view(4, 3, 16)[:, 1].flatten()}),  # keys
        ("gemma3_text", 0, {"plus": 0.0}),  # 1 + w taken as w
        ("llama", 2, {"plus": 1.0}),  # w taken as 1 + w
        ("cohere", 0, {"readers": QKV}),  # the MLP reads the same norm
        ("gemma2", 2, {"producer": "post_attention_layernorm"}),  # the norm behind, not in front
        ("deepseek_v2", 3, {"rows": HEADS}),
    ],
)
def test_a_wrong_fold_is_not_proven(kind: str, at: int, wrong: dict[str, Any]) -> None:
    block, folds, inputs = planted(kind, at, **wrong)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    proofs = prove(block, folds, inputs)
    assert [index for index, reason in enumerate(proofs) if reason is not None] == [at]
    assert "output would change by" in str(proofs[at])
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_a_block_that_has_no_float64_is_not_folded() -> None:
    block, folds, inputs = planted("llama", 0)
    block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(TypeError("no float64")))
    assert all(
        "cannot be run in float64 (TypeError: no float64)" in str(reason) for reason in prove(block, folds, inputs)
    )
    assert trace(block, ["mlp.up_proj"], inputs, inputs).refused.keys() == {"mlp.up_proj"}


# --- blocks of no library -------------------------------------------------------------------------------------------


NOT_SCALED: dict[str, tuple[tuple[str, ...], str]] = {
    "plain": ((), ""),
    "shifted": ((), ""),
    "clamped": ((), ""),
    "functional": (("gate", "up"), "something that is no linear reads norm too"),
    "residual": (("gate", "up"), "something that is no linear reads norm too"),
    "idle": (("qkv", "out", "gate", "up"), "extra might read (ln|qkv|norm) too, but no token reached it"),
}


@pytest.mark.parametrize("kind", NOT_SCALED)
def test_a_model_of_no_library(kind: str) -> None:
    model = own_model(kind)
    with torch.no_grad():
        original = model(ids(2, 24))
    quantize(
        model,
        calibration=ids(4, 32),
        samples=4,
        seq_len=32,
        q_group_size=16,
        blocks="body",
        modules_to_not_convert=["extra"],  # no token reaches it, so it cannot be calibrated
    )
    report = model.awq_report
    assert report.model_type == "Model" and len(report.quantized) == 10
    assert {x.name for x in report.kept} >= {"head", "body.0.direct", "body.1.direct"}
    folds = {tuple(x.removeprefix("body.0.") for x in (f.producer, *f.readers)) for f in report.folds}
    unscaled = {x.name.removeprefix("body.0."): x.reason for x in report.unscaled if x.name.startswith("body.0.")}
    names, reason = NOT_SCALED[kind]
    assert set(unscaled) == set(names)
    for name in names:
        assert re.fullmatch(reason, unscaled[name])
        assert f"body.*.{name} (2x): {unscaled[name]}" in report.summary()
    # ReLU keeps proportions, so both branches could take the scale of down, but for what is done behind them.
    (behind,) = (fold[0] for fold in folds if fold[1] == "down")
    assert behind in {"shifted": ("up",), "clamped": ("gate",)}.get(kind, ("gate", "up"))
    if not names:
        assert folds >= {("ln", "qkv"), ("qkv", "out"), ("norm", "gate", "up")}
    with torch.no_grad():
        assert float((model(ids(2, 24)) - original).norm() / original.norm()) < 0.2


def test_a_fused_linear_splits_by_what_its_rows_become() -> None:
    """[value, query, key] in each of four heads: only the first of the three can take the scale of the output."""
    traced = Traces(own_model("plain"), "body").trace(0)
    (fold,) = [fold for fold in traced.folds if fold.producer == "qkv"]
    assert fold.readers == ("out",) and torch.equal(fold.rows, torch.arange(96).view(4, 3, 8)[:, 0].flatten())
