"""Rows that a model writes itself: drawn from what it predicts, for every architecture, and the same every time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, COMMON, OWN, small_model
from test_quantizer import ids
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from awq_ext import AwqLinear, CalibrationError, generated, load_quantized, precision, quantize
from awq_ext.generated import PROMPT, write_rows
from awq_ext.original import Original, open_original
from awq_ext.pretrained import load_float
from awq_ext.ranks import generator

OPTIONS: dict[str, Any] = {"calibration": ids(), "samples": 4, "seq_len": 32, "q_group_size": 16, "method": "awq+"}
OPTIONS |= {"generated": 3, "tune_steps": 0}


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([[0.0, 2.0, float("-inf"), 1.0, -3.0], [5.0, float("-inf"), 0.0, 0.0, 4.0]])
    count = 200_000
    tokens = generated._draw(logits.repeat_interleave(count, 0), generator(0)).view(2, count)
    for row, shares in zip(tokens, logits.softmax(-1), strict=True):
        found = row.bincount(minlength=5) / count
        assert ((found - shares).abs() <= 4 * (shares * (1 - shares) / count).sqrt()).all(), (found, shares)


def test_no_token_is_drawn_from_what_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        generated._draw(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), generator(0))


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in OWN])
def test_what_is_written_is_what_the_model_predicts_without_a_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: False)
    model, rows = small_model(kind), list(ids(3, 24))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = write_rows(model, [rows[0][:20], *rows[1:]], 4, 24)
    assert [row.shape for row in written] == [(24,)] * 4
    for row, start in zip(written, (*rows, rows[0]), strict=True):
        assert torch.equal(row[:PROMPT], start[:PROMPT])
    ids_, random = torch.stack(written), generator(0, 0, 0)
    with torch.no_grad():
        logits = model(ids_).logits
    for at in range(PROMPT, 24):  # a draw at the edge between two tokens may fall either way
        shares = logits[:, at - 1].softmax(-1).cumsum(-1)
        drawn = torch.rand(4, 1, generator=random)
        low = torch.cat([torch.zeros(4, 1), shares], 1).gather(1, ids_[:, at, None])
        high = shares.gather(1, ids_[:, at, None])
        assert ((low - 1e-4 <= drawn) & (drawn <= high + 1e-4)).all(), at
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_rows_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = small_model("llama"), list(ids())
    first, again, other = (torch.stack(write_rows(model, rows, 6, 32, seed=(seed, 0))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 6  # two rows begin like another


@pytest.mark.parametrize(("limit", "each"), [("CACHED", 32), ("LOGITS", COMMON["vocab_size"])])
def test_as_many_rows_are_written_together_as_memory_is_for(
    monkeypatch: pytest.MonkeyPatch, limit: str, each: int
) -> None:
    model = small_model("llama")
    monkeypatch.setattr(generated, limit, 4 * each + each - 1)
    told: list[int] = []
    assert len(write_rows(model, list(ids()), 6, 32, done=told.append)) == 6
    assert told == [4] * (32 - PROMPT) + [2] * (32 - PROMPT)


def test_files_get_what_memory_gets(tmp_path: Path) -> None:
    small_model("llama").half().save_pretrained(tmp_path / "original")
    original = load_float(tmp_path / "original", "auto")
    in_memory = quantize(copy.deepcopy(original), **OPTIONS)
    report = in_memory.awq_report
    assert report.calibration_tokens == (4 + 3) * 32
    assert "3 rows of 32 tokens that the model wrote itself" in report.calibration
    streamed = quantize(tmp_path / "original", out=tmp_path / "out", **OPTIONS)
    for model in (streamed, load_quantized(tmp_path / "out", dtype=torch.float16)):
        assert_same(in_memory, model)
    # It is as if the rows had been given.
    with Original(original).rounded():
        rows: list[Tensor] = [*ids(), *write_rows(original, list(ids()), 3, 32)]
    given = quantize(original, **{**OPTIONS, "calibration": rows, "samples": 7, "generated": 0})
    assert_same(in_memory, given)


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in OWN])
def test_the_model_that_writes_is_rounded_while_it_does(kind: str, tmp_path: Path) -> None:
    small_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for original in (Original(load_float(tmp_path, "auto")), open_original(tmp_path, None)):
        model, before = original.model, original.model.state_dict()
        with original.rounded():
            layers = [module for module in model.modules() if isinstance(module, AwqLinear)]
            assert layers and all(layer.group_size == 32 for layer in layers)
            assert not any(t.is_meta for t in model.state_dict().values())
            found.append(torch.stack(write_rows(model, list(ids()), 4, 32)))
        for name, tensor in model.state_dict().items():
            assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape), name
            assert tensor.is_meta == (type(original) is not Original), name
            assert tensor.is_meta or torch.equal(tensor, before[name]), name
    assert torch.equal(*found)


def test_what_stops_the_writing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path)
    for original in (Original(load_float(tmp_path, "auto")), open_original(tmp_path, None)):
        with pytest.raises(CalibrationError, match="stop"), original.rounded():
            raise CalibrationError("stop")
        assert not any(isinstance(module, AwqLinear) for module in original.model.modules())
        meta = {t.is_meta for block in original.blocks for t in block.state_dict().values()}
        assert meta == {type(original) is not Original}


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("options", [{"generated": -1}, {"generated": 1, "method": "rtn"}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="generated"):
        quantize(small_model("llama"), **{**OPTIONS, **options})


def test_a_model_of_no_library_writes_nothing() -> None:
    with pytest.raises(CalibrationError, match=r"only a causal language model of transformers.*generated=0"):
        quantize(small_model(next(iter(OWN))), **OPTIONS)


def test_a_model_without_a_cache_writes_nothing() -> None:
    model = small_model("llama")
    forward = model.forward
    model.forward = lambda **options: CausalLMOutput(logits=forward(**options).logits)
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM returns no past_key_values.*generated=0"):
        write_rows(model, list(ids()), 1, 32)
