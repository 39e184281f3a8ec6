"""Blocks that are read and written one at a time: the bytes are those of the model in memory, the memory is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantizer import ids, small_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from awq_ext import load_quantized, quantize
from awq_ext.original import Original, Streamed, open_original
from awq_ext.pretrained import load_float
from awq_ext.quantizer import quantize_to

OPTIONS: dict[str, Any] = {"calibration": ids(), "samples": 4, "seq_len": 32, "q_group_size": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 96, "n_positions": 64},  # Conv1D, buffers
    "falcon": {  # a Linear of its own, alibi
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 96,
        "alibi": True,
        "new_decoder_architecture": False,
    },
    "mixtral": {  # names in files are others, experts are fused in memory
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    },
}


def model_of(kind: str) -> nn.Module:
    if kind not in OTHERS:
        return small_model(kind, torch.bfloat16)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **OTHERS[kind])
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    return model


def files_of(directory: Path) -> dict[str, bytes]:
    """All files, but the report, which has times in it."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "awq_report.json"}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "awq+"),
        ("llama", "rtn"),
        ("gemma3_text", "awq+"),
        ("gpt2", "gptq"),
        ("falcon", "awq"),
        ("mixtral", "awq"),
    ],
)
def test_the_bytes_are_those_of_the_model_in_memory(kind: str, method: str, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "original")
    assert isinstance(open_original(tmp_path / "original", None), Streamed)
    whole = quantize(load_float(tmp_path / "original", "auto"), out=tmp_path / "whole", method=method, **OPTIONS)
    report = quantize_to(tmp_path / "original", tmp_path / "streamed", method=method, **OPTIONS)
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")
    assert not (tmp_path / ".streamed.blocks").exists()
    assert [x.name for x in report.quantized] == [x.name for x in whole.awq_report.quantized]
    assert [x.candidate for x in report.folds] == [x.candidate for x in whole.awq_report.folds]
    assert report.notes == []


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original")
    small_model("llama", torch.bfloat16).save_pretrained(path)
    return path


def test_what_is_returned_is_complete_whether_saved_or_not(original: Path, tmp_path: Path) -> None:
    in_memory = quantize(original, **OPTIONS)
    saved = quantize(original, out=tmp_path / "out", **OPTIONS)
    loaded = load_quantized(tmp_path / "out")
    expected = loaded.state_dict()
    for model in (in_memory, saved):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        assert len(model.awq_report.quantized) == 14
    with torch.no_grad():
        assert torch.equal(in_memory(ids()).logits, loaded(ids()).logits)


def test_one_block_is_in_memory_at_a_time(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others, and of what is outside the blocks, no weight, whenever one is loaded or its turn is over."""
    loaded: list[int] = []

    def watch(load: Any) -> Any:
        def run(self: Streamed, index: int) -> Any:
            result = load(self, index)
            here = {name for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
            front = {name for name in here if not name.startswith(self.blocks_name)}
            assert all(name.startswith(self.prefix(index)) for name in here - front)
            assert not front or index == 0  # the first block is run together with what is in front of it
            assert "lm_head.weight" not in front
            loaded.append(index)
            return result

        return run

    for method in ("load", "unload", "drop"):
        monkeypatch.setattr(Streamed, method, watch(getattr(Streamed, method)))
    quantize_to(original, tmp_path / "out", method="gptq", **OPTIONS)
    assert loaded.count(0) == 6 and loaded.count(1) == 4


def test_files_with_other_names_are_loaded_whole_and_that_is_told(original: Path, tmp_path: Path) -> None:
    """As by a base model, whose names lack the prefix: transformers finds them all the same."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(3)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = open_original(copy, None)
    assert not isinstance(found, Streamed) and isinstance(found, Original)
    report = quantize_to(copy, tmp_path / "out", method="rtn", q_group_size=16)
    assert "model.extra.weight" in report.notes[0] and "the whole model was loaded" in report.summary()
    want = quantize(original, method="rtn", q_group_size=16).state_dict()
    got = load_quantized(tmp_path / "out").state_dict()
    assert all(torch.equal(value, got[name]) for name, value in want.items())


def test_a_bad_weight_is_found_before_anything_is_quantized(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        quantize_to(copy, tmp_path / "out", method="rtn", q_group_size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


MEMORY = """
import json, re, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from awq_ext.quantizer import quantize_to
def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
quantize_to(sys.argv[1], sys.argv[3], method="rtn", q_group_size=16)  # whatever it takes to import
before = peak()
quantize_to(sys.argv[2], sys.argv[3], method="rtn")
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_a_block_and_not_of_the_model(original: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=1024, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    block = 0
    for name, parameter in model.named_parameters():
        parameter.data.fill_(0.01)
        block += parameter.nbytes if ".layers.0." in name else 0
    model.save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", MEMORY, str(original), str(tmp_path / "large"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # What was read, the same in float32, and what rounding takes; the model has 12 blocks, and 3 in 4 bits.
    assert block < json.loads(done.stdout.splitlines()[-1]) < 6 * block
