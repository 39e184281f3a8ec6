"""Every architecture: its folds found and proven, quantized, saved, and loaded again in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, BLOCKS, OWN, QUANTIZE, Traces, logits, small_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq_ext import AwqLinear, load_quantized, quantize
from awq_ext.scaled import ScaledActivation
from awq_ext.swap import as_linear
from awq_ext.trace import prove

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_folds_of_every_architecture(kind: str) -> None:
    """Exactly these, with nothing known of the architecture; every other linear gets a reason."""
    traces = Traces(small_model(kind), BLOCKS.get(kind))
    _, *expected = ARCHITECTURES[kind]
    for index, folds in ((0, expected[0]), (-1, expected[-1])):
        index %= len(traces.blocks)
        traced = traces.trace(index)
        found = {fold.producer: fold for fold in traced.folds}
        assert {name: set(fold.readers) for name, fold in found.items()} == {x[0]: set(x[1]) for x in folds}
        assert len(traced.folds) == len(folds)
        for producer, readers, what in folds:
            fold = found[producer]
            assert len(fold.readers) == len(readers)
            assert fold.plus == (what if isinstance(what, float) else None)
            assert torch.equal(fold.rows, torch.arange(len(fold.rows)) if isinstance(what, float) else what)
        scaled = {reader for fold in traced.folds for reader in fold.readers}
        assert set(traced.refused) == set(traces.linears(index)) - scaled
        assert prove(traces.blocks[index], traced.folds, traces.several(index)) == [None] * len(traced.folds)


class Result:
    """What became of one model; its files are under ``path``."""

    def __init__(self, kind: str, path: Path) -> None:
        self.path, model = path, small_model(kind)
        self.original = logits(model)
        own = kind in OWN
        model = quantize(
            model,
            **QUANTIZE,
            blocks=BLOCKS.get(kind),
            out=None if own else path,
        )
        if own:
            path.mkdir()
            save_file(model.state_dict(), path / "model.safetensors")
        self.logits: Tensor = logits(model)
        self.report = model.awq_report  # type: ignore[attr-defined]
        self.linears = {name for name, module in model.named_modules() if as_linear(module) is not None}
        self.quantized = {name for name, module in model.named_modules() if type(module) is AwqLinear}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All models, quantized and saved; beside each, the logits of what another process has loaded."""
    directory = tmp_path_factory.mktemp("architectures")
    made = {kind: Result(kind, directory / kind) for kind in ARCHITECTURES}
    run = subprocess.run([sys.executable, architectures.__file__, directory], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return made


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_quantized_saved_and_loaded(results: dict[str, Result], kind: str) -> None:
    result = results[kind]
    report = result.report
    assert result.quantized == {x.name for x in report.quantized}
    kept = {x.name for x in report.kept}
    assert result.linears <= kept and "head" in str(kept)
    scaled = {reader for fold in report.folds for reader in fold.readers}
    unscaled = {x.name for x in report.unscaled}
    assert scaled.isdisjoint(unscaled) and scaled | unscaled >= result.quantized
    assert scaled - result.quantized == {x for x in scaled if x.endswith(("mlp.gate", "router", "shared_expert_gate"))}
    assert torch.equal(torch.load(result.path / "reloaded.pt"), result.logits)
    assert float((result.logits - result.original).norm() / result.original.norm()) < 0.5


# What AutoAWQ's own files, and those that vLLM reads, call a linear of an expert, and the routers for a reader to skip.
IN_FILES: dict[str, tuple[str, list[str]]] = {
    "mixtral": ("block_sparse_moe.experts.4.w2", ["block_sparse_moe.gate"]),
    "granitemoe": ("block_sparse_moe.experts.4.w1", ["block_sparse_moe.router.layer"]),
    "qwen2_moe": ("mlp.experts.4.gate_proj", ["mlp.gate", "mlp.shared_expert_gate"]),
    "qwen3_moe": ("mlp.experts.4.up_proj", ["mlp.gate"]),
    # The whole name, since "mlp.gate" is in the name of the dense first block's gate_proj.
    "deepseek_v2": ("mlp.experts.4.down_proj", ["model.layers.1.mlp.gate"]),
    "deepseek_v3": ("mlp.experts.4.down_proj", ["model.layers.1.mlp.gate"]),
}


@pytest.mark.parametrize("kind", IN_FILES)
def test_experts_have_the_names_that_readers_know(results: dict[str, Result], kind: str) -> None:
    linear, skipped = IN_FILES[kind]
    path = results[kind].path
    files = load_file(path / "model.safetensors")
    assert {f"model.layers.1.{linear}.{part}" for part in ("qweight", "qzeros", "scales")} <= files.keys()
    assert not [name for name, tensor in files.items() if tensor.dim() > 2]
    fields: dict[str, Any] = json.loads((path / "config.json").read_text())
    assert fields["quantization_config"]["modules_to_not_convert"] == skipped
    for name in skipped:
        assert [key for key in files if key.endswith(f"{name}.weight")]
    if kind == "qwen3_moe":  # transformers 4 and 5 read one of these each
        assert (fields["num_experts"], fields["num_local_experts"]) == (5, 5)


@pytest.mark.parametrize(
    ("kind", "wanted", "scaled"),
    [
        ("gpt2", None, []),  # no reader of files expects one there
        ("gpt2", True, ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]),
        ("gpt_neox", False, []),
        ("llama", True, []),  # up takes what down needs
        ("own", True, []),
    ],
)
def test_scaled_activations_are_where_they_are_wanted(
    kind: str, wanted: bool | None, scaled: list[str], tmp_path: Path
) -> None:
    model = small_model(kind)
    out = None if kind in OWN else tmp_path / "out"
    quantize(
        model,
        **QUANTIZE,
        blocks=BLOCKS.get(kind),
        scaled_activations=wanted,
        out=out,
    )
    assert [name for name, module in model.named_modules() if isinstance(module, ScaledActivation)] == scaled
    folds = {fold.producer: fold for fold in model.awq_report.folds}
    for name in scaled:
        assert folds[name].readers == [name.replace("act", "c_proj")] and folds[name].loss <= folds[name].loss_rtn
    if out is not None:
        assert torch.equal(logits(load_quantized(out)), logits(model))
