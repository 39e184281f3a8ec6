"""Reading and writing AutoAWQ gemm checkpoints: genuine files, round trips, damage, hostility."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import awq_ext
from awq_ext import AwqLinear, CheckpointError, UnsupportedModelError, atomic, load_quantized, save_quantized, storage
from awq_ext import checkpoint as checkpoint_module
from awq_ext.checkpoint import Checkpoint, QuantConfig, is_quantized, resolve
from awq_ext.pretrained import is_quantized_directory

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

GENUINE = (
    "autoawq-gemm",
    "autoawq-gemv",
    "autoround-awq-gemm",
    "gptqmodel-awq-gemm",
    "gptqmodel-gptq-v1",
    "llmcompressor-pack-quantized",
)
LAYER = "model.layers.0.mlp.gate_proj"
IDS = torch.arange(3, 35).view(1, 32)


@pytest.fixture(scope="session")
def model(tiny_llama: Path) -> Any:
    """The tiny Llama rounded to nearest at group size 64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    awq_ext.replace_linears(model, 64)
    return model


@pytest.fixture(scope="session")
def saved(model: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` as a checkpoint of one file; not to be written into."""
    return save_quantized(model, tmp_path_factory.mktemp("saved") / "model", source=tiny_llama)


@pytest.fixture(scope="session")
def sharded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` as a checkpoint of several shards; not to be written into."""
    return save_quantized(model, tmp_path_factory.mktemp("sharded") / "model", max_shard_size=200_000)


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "single"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> np.ndarray:
    return model(ids).logits[0].float().cpu().numpy()


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


# --- an independent reader, from the description of the format alone, code by code ----------------------------------

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def parse_safetensors(file: Path) -> dict[str, np.ndarray]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(raw, {"I32": "<u4", "F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        result[name] = array.reshape(entry["shape"])
    return result


def dequantize_slowly(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """W [n, k] float32: word [row, c], nibble i holds channel n = 8c + ORDER[i]; W = (q - z) * s in float32."""

    def nibbles(words: np.ndarray) -> np.ndarray:
        codes = np.empty((words.shape[0], words.shape[1] * 8), np.float32)
        for row in range(words.shape[0]):
            for c in range(words.shape[1]):
                word = int(words[row, c])
                for i in range(8):
                    codes[row, 8 * c + ORDER[i]] = (word >> (4 * i)) & 15
        return codes

    q, z, s = nibbles(qweight), nibbles(qzeros), scales.astype(np.float32)
    w = np.empty_like(q)
    for k in range(q.shape[0]):
        w[k] = (q[k] - z[k // group]) * s[k // group]
    return np.ascontiguousarray(w.T)


def dequantize_all(directory: Path, group: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= parse_safetensors(file)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {
        name: dequantize_slowly(tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"], tensors[f"{name}.scales"], group)
        for name in names
    }


# --- genuine checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", GENUINE)
def test_genuine_weights_and_logits(shared: Path, writer: str) -> None:
    path = shared / "data" / "checkpoints" / writer
    reference = json.loads((path / "reference.json").read_text())
    model = load_quantized(path, dtype=torch.float32)
    for name, expected in reference["weight_float32_sha256"].items():
        weight = model.get_submodule(name.removesuffix(".weight")).dequantize(torch.float32)
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == expected, name
    assert len(reference["weight_float32_sha256"]) == sum(isinstance(m, AwqLinear) for m in model.modules()) == 14

    # Same weights, same arithmetic, sums of at most 256 products in another order: each of the 14 quantized linears
    # is off by at most 256 u of its terms' magnitude (u = 2^-24), and to first order these errors add up.
    expected_logits = np.load(path / "reference_logits.npy")
    got = logits(model, torch.tensor([reference["input_ids"]]))
    tolerance = 14 * 256 * 2.0**-24 * np.abs(expected_logits).max()
    assert np.abs(got - expected_logits).max() <= tolerance


def test_genuine_gemv_fast(shared: Path) -> None:
    """Its file has -(s * z) rounded to float16; the loaded model has the zeros themselves, as AutoAWQ chose them."""
    path = shared / "data" / "checkpoints" / "autoawq-gemv_fast"
    checkpoint = Checkpoint.open(path)
    reference = json.loads((path / "reference.json").read_text())
    for name, expected in reference["weight_float32_sha256"].items():
        weight = checkpoint.weight(name.removesuffix(".weight"))
        assert hashlib.sha256(weight.numpy().astype("<f4").tobytes()).hexdigest() == expected, name

    model = load_quantized(path, dtype=torch.float32)
    twin = load_quantized(path.with_name("autoawq-gemm"), dtype=torch.float32)  # of the same calibration
    ids = torch.tensor([reference["input_ids"]])
    assert logits(model, ids).tobytes() == logits(twin, ids).tobytes()
    # A weight is off by half a unit in the last place of s * z, so by 2^-11 s * 15 at most, where s * 15 is the range
    # of its group: relative to weights, and thus to each of 7 linears in a row, less than 2^-10 in the mean square.
    expected_logits = np.load(path / "reference_logits.npy")
    error = np.sqrt(((logits(model, ids) - expected_logits) ** 2).mean() / (expected_logits**2).mean())
    assert 0 < error <= 7 * 2.0**-10


def test_dtype_defaults_to_the_config_and_linears_keep_theirs(shared: Path) -> None:
    path = shared / "data" / "checkpoints" / "gptqmodel-awq-gemm"
    stored = load_quantized(path)
    assert stored.dtype == torch.bfloat16
    cast = load_quantized(path, dtype=torch.float16)
    assert cast.model.norm.weight.dtype == torch.float16
    assert cast.model.layers[0].mlp.up_proj.scales.dtype == torch.bfloat16  # a cast would change the weights
    with pytest.raises(ValueError, match="float64"):
        load_quantized(path, dtype=torch.float64)


@pytest.mark.gpu
def test_load_on_cuda(saved: Path, model: Any) -> None:
    loaded = load_quantized(saved, device="cuda", dtype=torch.float16)
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    got, expected = logits(loaded, IDS.cuda()), logits(model)
    # float16 everywhere (u = 2^-11) against float32: two layers of seven linears and their norms.
    assert np.abs(got - expected).max() <= 32 * 2.0**-11 * np.abs(expected).max()


# --- round trips ----------------------------------------------------------------------------------------------------


def test_written_weights_are_those_of_the_model(model: Any, saved: Path) -> None:
    slow = dequantize_all(saved, 64)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, AwqLinear)}
    assert slow.keys() == linears.keys() and len(slow) == 14
    for name, module in linears.items():
        assert slow[name].tobytes() == module.dequantize(torch.float32).numpy().tobytes(), name


@pytest.mark.parametrize("source", ["saved", "sharded"])
def test_a_fresh_process_computes_the_same_bytes(
    model: Any, source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(source)
    script = (
        "import sys, torch, numpy, awq_ext\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "model = awq_ext.load_quantized(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(torch.arange(3, 35).view(1, 32)).logits[0]\n"
        "numpy.save(sys.argv[2], logits.numpy())\n"
    )
    out = tmp_path / "logits.npy"
    subprocess.run([sys.executable, "-c", script, path, out, str(torch.get_num_threads())], check=True)
    assert np.load(out).tobytes() == logits(model).tobytes()


def test_files_names_and_config(saved: Path, sharded: Path, tiny_llama: Path) -> None:
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(saved))
    assert (saved / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 10000.0  # where transformers 4 looks
    tensors = load_file(saved / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors if name.startswith(LAYER)} == {"qweight", "qzeros", "scales"}
    assert tensors[f"{LAYER}.scales"].dtype == torch.float16
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == tensors.keys()
    for file in files:
        with safe_open(sharded / file, framework="pt") as tensors_of_file:
            assert tensors_of_file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_tied_weights_are_written_once_and_stay_tied(tiny_llama: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    awq_ext.replace_linears(model, 64)
    path = save_quantized(model, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    loaded = load_quantized(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert logits(loaded).tobytes() == logits(model).tobytes()

    def other_name_only(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(path / "model.safetensors", other_name_only)
    loaded = load_quantized(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert logits(loaded).tobytes() == logits(model).tobytes()

    edit_tensors(path / "model.safetensors", lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] * 2}))
    with pytest.raises(CheckpointError, match=r"ties .* but their values differ"):
        load_quantized(path)


def test_a_head_that_the_config_ties_in_vain(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers leaves differing weights untied; the written config must not tie them in other readers."""
    config = transformers.AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 128))
    awq_ext.replace_linears(model, 64)
    path = save_quantized(model, tmp_path / "untied")
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False
    assert logits(load_quantized(path)).tobytes() == logits(model).tobytes()


def test_linears_with_bias_and_plain_linears(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,  # no multiple of the group size: down_proj stays as it is
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.q_proj.bias)
    awq_ext.replace_linears(model, 64)
    path = save_quantized(model, tmp_path / "qwen2")
    loaded = load_quantized(path)
    assert loaded.model.layers[0].self_attn.q_proj.bias is not None
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, AwqLinear)
    assert type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
    skipped = json.loads((path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["mlp.down_proj"]  # in all blocks, but not the head
    loaded.config.quantization_config["modules_to_not_convert"] = ["down", "lm_head"]  # as an older file says it
    again = json.loads((save_quantized(loaded, tmp_path / "again") / "config.json").read_text())
    assert again["quantization_config"]["modules_to_not_convert"] == [*skipped, "lm_head"]
    assert logits(loaded).tobytes() == logits(model).tobytes()

    edit_tensors(path / "model.safetensors", lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"lacks tensors .*model\.layers\.1\.self_attn\.k_proj\.bias"):
        load_quantized(path)


def test_loaded_models_are_saved_and_generate(saved: Path, tmp_path: Path) -> None:
    loaded = load_quantized(saved)
    assert not loaded.training and is_quantized(loaded) and not is_quantized(torch.nn.Linear(8, 8))
    assert loaded.config.quantization_config["group_size"] == 64
    again = save_quantized(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    tokens = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > IDS.shape[1]


def test_loading_allocates_only_what_is_stored(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    swap = checkpoint_module._swap_linears

    def spy(checkpoint: Checkpoint, model: torch.nn.Module, fused: dict[str, str]) -> None:
        seen.extend(model.parameters())
        swap(checkpoint, model, fused)

    monkeypatch.setattr(checkpoint_module, "_swap_linears", spy)
    load_quantized(saved)
    assert seen and all(parameter.is_meta for parameter in seen)


def test_group_size_of_all_inputs(tiny_llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    awq_ext.replace_linears(model, -1)
    path = save_quantized(model, tmp_path / "channelwise")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["group_size"] == -1
    assert logits(load_quantized(path)).tobytes() == logits(model).tobytes()


def test_loaded_linears_are_in_the_layout_of_the_cpu(saved: Path) -> None:
    linears = [m for m in load_quantized(saved).modules() if isinstance(m, AwqLinear)]
    assert linears and {m.layout for m in linears} == {"strips"}


def test_float32_scales_are_written_as_float16_only_where_exact(saved: Path, tmp_path: Path) -> None:
    loaded = load_quantized(saved).float()
    path = save_quantized(loaded, tmp_path / "exact")
    assert load_file(path / "model.safetensors")[f"{LAYER}.scales"].dtype == torch.float16
    loaded.get_submodule(LAYER).scales[0, 0] *= 1 + 2.0**-20
    path = save_quantized(loaded, tmp_path / "inexact")
    assert torch.equal(load_file(path / "model.safetensors")[f"{LAYER}.scales"], loaded.state_dict()[f"{LAYER}.scales"])
    assert logits(load_quantized(path)).tobytes() == logits(loaded).tobytes()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_is_written_for_transformers_4_and_5(rope: dict[str, Any], tmp_path: Path) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("rope_parameters came with transformers 5")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=dict(rope),
    )
    model = transformers.LlamaForCausalLM(config).eval()
    awq_ext.replace_linears(model, 64)
    path = save_quantized(model, tmp_path / "rope")
    fields = json.loads((path / "config.json").read_text())
    assert fields["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] != "default":
        assert fields["rope_scaling"].items() == {k: v for k, v in rope.items() if k != "rope_theta"}.items()
    loaded = load_quantized(path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert logits(loaded).tobytes() == logits(model).tobytes()


# --- older and hub-shaped directories -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_legacy_quant_config_file(model: Any, single: Path, name: str) -> None:
    edit_json(single / "config.json", lambda c: c.pop("quantization_config"))
    (single / name).write_text('{"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}')
    assert Checkpoint.open(single).quant == QuantConfig(group_size=64, version="gemm")
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


def test_stored_rotary_frequencies_are_ignored(model: Any, single: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(single / "model.safetensors", lambda t: t.update({name: torch.full((16,), 7.0)}))
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


def test_one_file_of_another_name(model: Any, single: Path) -> None:
    (single / "model.safetensors").rename(single / "awq_model_w4_g64.safetensors")
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


@pytest.fixture
def hub_cache(sharded: Path, tmp_path: Path) -> Path:
    """A hub cache that holds `sharded` as org/tiny, laid out by huggingface_hub's rules."""
    repo, revision = tmp_path / "hub" / "models--org--tiny", "0123456789" * 4
    snapshot = repo / "snapshots" / revision
    for directory in (snapshot, repo / "refs", repo / "blobs"):
        directory.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for file in sharded.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, repo / "blobs" / digest)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest))
    return tmp_path / "hub"


def test_hub_cache_by_name_and_offline(model: Any, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_quantized("org/tiny", cache_dir=hub_cache, local_files_only=True)
    assert logits(loaded).tobytes() == logits(model).tobytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (
        Checkpoint.open("org/tiny", cache_dir=hub_cache).linears.keys()
        == Checkpoint.open(resolve("org/tiny", cache_dir=hub_cache, revision="main")).linears.keys()
    )
    with pytest.raises(CheckpointError, match=r"'org/other' is neither a directory here nor in the hub's cache"):
        resolve("org/other", cache_dir=hub_cache)
    with pytest.raises(CheckpointError, match="at revision 'v2'"):
        resolve("org/tiny", revision="v2", cache_dir=hub_cache)


def test_hub_cache_links_lead_to_blobs_only(hub_cache: Path, tmp_path: Path) -> None:
    config = next(hub_cache.glob("*/snapshots/*/config.json"))
    shutil.copyfile(config, tmp_path / "elsewhere.json")
    config.unlink()
    config.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        Checkpoint.open("org/tiny", cache_dir=hub_cache, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/directory", "does not exist"),
        ("./no-such-directory", "does not exist"),
        ("a/b/c", "does not exist"),
        (Path("org/name"), "does not exist"),
        ("", "is empty"),
        ("org/na me", "nor a valid repository name"),
    ],
)
def test_names_that_cannot_be_resolved(name: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(name, local_files_only=True)


def test_a_file_is_not_a_checkpoint(single: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        load_quantized(single / "model.safetensors")


# --- QuantConfig ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, QuantConfig()),
        ({"bits": 4, "group_size": 32, "version": "GEMM"}, QuantConfig(32, version="gemm")),
        ({"w_bit": 4, "q_group_size": -1, "format": "Gemm"}, QuantConfig(-1, version="gemm")),
        ({"checkpoint_format": "gemm", "sym": True, "unheard": [1]}, QuantConfig(zero_point=False, version="gemm")),
        ({"sym": False, "version": None}, QuantConfig()),
        ({"zero_point": True, "sym": True}, QuantConfig()),
        ({"modules_to_not_convert": ["lm_head"]}, QuantConfig(modules_to_not_convert=("lm_head",))),
        ({"version": "gemv_fast"}, QuantConfig(version="gemv_fast")),
    ],
)
def test_quant_config_synonyms(fields: dict[str, Any], expected: QuantConfig) -> None:
    config = QuantConfig.from_dict(fields, "here")
    assert config == expected
    assert QuantConfig.from_dict(config.to_dict(), "there") == replace(config, version=config.version or "gemm")


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 8},
        {"w_bit": "4"},
        {"bits": 4.0},
        {"bits": True},
        {"group_size": 0},
        {"group_size": -2},
        {"q_group_size": "128"},
        {"group_size": True},
        {"zero_point": 1},
        {"sym": "no"},
        {"version": 2},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
    ],
)
def test_quant_config_nonsense_names_file_and_key(fields: dict[str, Any]) -> None:
    (key,) = fields
    with pytest.raises(CheckpointError, match=f"some/file.json: '{key}' must be"):
        QuantConfig.from_dict(fields, "some/file.json")


# --- damage and hostility -------------------------------------------------------------------------------------------


def map_to(value: Any, name: str = f"{LAYER}.qweight") -> Callable[[Path], None]:
    return lambda path: edit_json(
        path / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: value})
    )


def truncate(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 1)


def spoil_header(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def duplicate_key(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    file.write_text(file.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",'))


def link_out(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        outside = path.parent / "outside"
        file = sorted(path.glob(name))[0]
        shutil.move(file, outside)
        file.symlink_to(outside)

    return change


def link_loop(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    file.unlink()
    file.symlink_to(file)


INDEXED: dict[str, tuple[Callable[[Path], object], str]] = {
    "traversal": (map_to("../model-00001-of-00002.safetensors"), r"of this directory, got '\.\./"),
    "absolute": (map_to("/etc/passwd.safetensors"), "of this directory, got '/etc"),
    "nul byte": (map_to("a\0.safetensors"), "of this directory"),
    "backslash": (map_to("..\\a.safetensors"), "of this directory"),
    "pickle in the index": (map_to("model.bin"), "must be in a .safetensors file, got 'model.bin'"),
    "number": (map_to(3), "of this directory, got 3"),
    "missing shard": (
        lambda path: sorted(path.glob("*.safetensors"))[1].unlink(),
        r"-00002-of-\d+\.safetensors is missing",
    ),
    "no such shard": (map_to("model-9.safetensors"), "model-9.safetensors is missing"),
    "unknown tensor": (map_to("model-00001-of-00004.safetensors", "x.weight"), "has no x.weight|is missing"),
    "unlisted tensor": (
        lambda path: edit_json(
            path / "model.safetensors.index.json", lambda index: index["weight_map"].pop("model.norm.weight")
        ),
        r"holds model\.norm\.weight, which .* has in nowhere",
    ),
    "duplicate key": (duplicate_key, "duplicate key 'lm_head.weight'"),
    "no weight_map": (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "'weight_map'"),
    "no index": (lambda path: (path / "model.safetensors.index.json").unlink(), "no model.safetensors.index.json"),
    "truncated": (truncate, "damaged or truncated"),
    "spoilt header": (spoil_header, "damaged or truncated"),
    "shard is a link to elsewhere": (link_out("*.safetensors"), "outside the checkpoint"),
    "config is a link to elsewhere": (link_out("config.json"), "outside the checkpoint"),
    "link to itself": (link_loop, "is missing|cannot be followed"),
    "stale single file": (
        lambda path: shutil.copyfile(sorted(path.glob("*.safetensors"))[0], path / "model.safetensors"),
        "remove the stale one",
    ),
}


@pytest.mark.parametrize("case", INDEXED)
def test_damaged_index_or_shards(shards: Path, case: str) -> None:
    change, message = INDEXED[case]
    change(shards)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(shards)


def test_tensor_in_two_shards(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    name = next(iter(load_file(files[0])))
    edit_tensors(files[1], lambda t: t.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=rf"{files[1].name}: holds {name}, which .* has in {files[0].name}"):
        Checkpoint.open(shards)


def test_first_shards_only(shards: Path) -> None:
    """What a broken download or a killed writer leaves."""
    (shards / "model.safetensors.index.json").unlink()
    for file in sorted(shards.glob("*.safetensors"))[1:]:
        file.unlink()
    with pytest.raises(CheckpointError, match="it is incomplete"):
        Checkpoint.open(shards)


def config_edit(**fields: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", lambda config: config.update(fields))


def quant_edit(**fields: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", lambda config: config["quantization_config"].update(fields))


def tensor_edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path / "model.safetensors", change)


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return tensor_edit(lambda tensors: tensors.update({name: tensor}))


def to_pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"never opened")


def to_marlin(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        k, words = tensors[name].shape
        tensors[name] = torch.zeros(k // 16, 2 * 8 * words, dtype=torch.int32)
        del tensors[name.replace("qweight", "qzeros")]


def to_gptq_without_g_idx(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".qweight")]:
        k, words = tensors[name].shape
        tensors[name] = torch.zeros(k // 8, 8 * words, dtype=torch.int32)


SINGLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "not readable JSON"),
    "config is binary": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\0"), "not readable JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "config is deep": (lambda path: (path / "config.json").write_text("[" * 100_000), "not readable JSON"),
    "no quantization config": (
        lambda path: edit_json(path / "config.json", lambda config: config.pop("quantization_config")),
        "has quantized weights, but neither config.json",
    ),
    "quantization config is a list": (config_edit(quantization_config=[]), "must be an object"),
    "bits": (quant_edit(bits=3), "'bits' must be 4"),
    "method": (quant_edit(quant_method="gptq"), "says 'gptq', but .* is in the layout gemm"),
    "auto-round without its packing": (quant_edit(quant_method="auto-round", version=None), "'packing_format' must be"),
    "another method": (quant_edit(quant_method="bitsandbytes"), "'quant_method' must be .*, got 'bitsandbytes'"),
    "version": (quant_edit(version="gemv"), "says 'gemv', but .* is in the layout gemm"),
    "group size of other tensors": (quant_edit(group_size=32), r"scales must be .*, got \[\d+, \d+\] F16"),
    "group size that does not divide": (quant_edit(group_size=96), "is not a multiple of group_size 96"),
    "pickles": (to_pickle, r"pickles only \(pytorch_model\.bin\)"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"has no \*\.safetensors file"),
    "truncated": (truncate, "damaged or truncated"),
    "no qzeros": (tensor_edit(lambda t: t.pop(f"{LAYER}.qzeros")), r"qzeros is missing, expected \[2, 32\] I32"),
    "no scales": (tensor_edit(lambda t: t.pop(f"{LAYER}.scales")), rf"{LAYER}\.scales is missing"),
    "no qweight": (tensor_edit(lambda t: t.pop(f"{LAYER}.qweight")), rf"there is no {LAYER}\.qweight"),
    "integer scales": (put(f"{LAYER}.scales", torch.ones(2, 256, dtype=torch.int32)), r"got \[2, 256\] I32"),
    "float zeros": (put(f"{LAYER}.qzeros", torch.ones(2, 32)), r"qzeros must be \[2, 32\] I32, got \[2, 32\] F32"),
    "flat qweight": (put(f"{LAYER}.qweight", torch.ones(64, dtype=torch.int32)), r"matrix of words, got \[64\]"),
    "scalar zeros": (put(f"{LAYER}.qzeros", torch.tensor(1, dtype=torch.int32)), r"got \[\] I32"),
    "long qweight": (put(f"{LAYER}.qweight", torch.ones(128, 32, dtype=torch.int64)), r"got \[128, 32\] I64"),
    "empty qweight": (put(f"{LAYER}.qweight", torch.ones(0, 0, dtype=torch.int32)), "qweight|in_features 0"),
    "wrong bias": (put(f"{LAYER}.bias", torch.ones(255)), r"bias must be \[256\] .*, got \[255\] F32"),
    "scaled activation": (put("model.layers.0.mlp.act.scales", torch.ones(256)), "no module of that name"),
    "llm-awq": (put(f"{LAYER}.scaled_zeros", torch.ones(8, 256)), "does not belong"),
    "marlin": (tensor_edit(to_marlin), "says 'gemm', but .* is in the layout marlin"),
    "gptq without g_idx": (tensor_edit(to_gptq_without_g_idx), "says 'gemm', but .* is in the layout gptq;"),
    "nan scale": (tensor_edit(lambda t: t[f"{LAYER}.scales"][1, 5].fill_(torch.nan)), "got nan at group 1"),
    "infinite scale": (tensor_edit(lambda t: t[f"{LAYER}.scales"][0, 0].fill_(-torch.inf)), "got -inf at group 0"),
    "zero scale": (tensor_edit(lambda t: t[f"{LAYER}.scales"][0, 9].zero_()), r"got 0\.0 at group 0, output channel 9"),
    "missing norm": (tensor_edit(lambda t: t.pop("model.norm.weight")), r"the model needs: model\.norm\.weight"),
    "foreign tensor": (put("model.extra.weight", torch.ones(1)), r"does not know: model\.extra\.weight"),
    "bias the model has not": (put(f"{LAYER}.bias", torch.ones(256)), rf"does not know: {LAYER}\.bias"),
    "norm of another shape": (put("model.norm.weight", torch.ones(64)), r"must be \[128\] .*, got \[64\] F32"),
    "integer norm": (put("model.norm.weight", torch.ones(128, dtype=torch.int32)), r"norm\.weight must be \[128\]"),
    "float8 norm": (put("model.norm.weight", torch.ones(128).to(torch.float8_e4m3fn)), r"got \[128\] F8_E4M3"),
    "in_features of another model": (config_edit(intermediate_size=512), "the model's Linear has in_features"),
    "fewer layers": (config_edit(num_hidden_layers=1), "model has no module there"),
    "endless layers": (config_edit(num_hidden_layers=10**9), "'num_hidden_layers' is 1000000000, but"),
    "nonsense in the config": (config_edit(hidden_size="wide"), "does not describe a 'llama' model"),
    "no model type": (config_edit(model_type=None), "must name a 'model_type'"),
    "generation config": (lambda path: (path / "generation_config.json").write_text("[1]"), "must hold a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("key", ["compression_config", "text_config"])
def test_where_else_a_quantization_config_may_stand(model: Any, single: Path, key: str) -> None:
    def move(config: dict[str, Any]) -> None:
        quant = config.pop("quantization_config")
        config[key] = {"quantization_config": quant} if key == "text_config" else quant

    edit_json(single / "config.json", move)
    assert is_quantized_directory(single)
    assert Checkpoint.open(single).quant == QuantConfig(group_size=64, version="gemm")
    edit_json(single / "config.json", lambda config: config.update({key: None}))
    assert not is_quantized_directory(single)
    with pytest.raises(CheckpointError, match="holds a model that is not quantized"):
        save_quantized(model, single)


def test_weights_for_another_device_do_not_stay_here(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, refs = checkpoint_module.Places.values, list[Any]()

    def watched(self: checkpoint_module.Places, stored: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in values(self, stored):
            refs.append(weakref.ref(value))
            yield name, value
            assert sum(ref() is not None for ref in refs) <= 2  # this one, and perhaps one that is tied

    monkeypatch.setattr(checkpoint_module.Places, "values", watched)
    with pytest.raises(UnsupportedModelError, match="keeps weights outside"):  # it looks for those that are on "meta"
        load_quantized(single, device="meta")
    assert len(refs) > 20


def test_biases_of_zeros_that_the_model_has_not(model: Any, single: Path) -> None:
    for layer in (LAYER, "model.layers.1.mlp.up_proj"):
        put(f"{layer}.bias", torch.zeros(256, dtype=torch.float16))(single)
    loaded = load_quantized(single)
    assert loaded.get_submodule(LAYER).bias is None
    assert logits(loaded).tobytes() == logits(model).tobytes()


def test_quantized_layers_that_the_model_does_without(
    model: Any, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSeek-V3's and GLM-4.5's, which predict several tokens ahead."""

    def add_layer(tensors: dict[str, torch.Tensor]) -> None:
        more = {
            name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors.items() if "layers.1." in name
        }
        tensors |= {name: tensor.clone() for name, tensor in more.items()}

    edit_tensors(single / "model.safetensors", add_layer)
    with pytest.raises(CheckpointError, match="model has no module there"):
        load_quantized(single)
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


@pytest.mark.parametrize("case", SINGLE)
def test_damaged_checkpoint(single: Path, case: str) -> None:
    change, message = SINGLE[case]
    change(single)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(single)


def test_a_model_that_is_not_quantized(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not quantized .* quantize it first"):
        load_quantized(tiny_llama)


@pytest.mark.parametrize(
    ("kind", "what"),
    [("no_such_model", "model of type 'no_such_model'; try a newer one"), ("albert", "causal language model of type")],
)
def test_unknown_architectures(single: Path, kind: str, what: str) -> None:
    edit_json(
        single / "config.json",
        lambda config: config.update(model_type=kind, auto_map={"AutoModelForCausalLM": "evil.Model"}),
    )
    (single / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(UnsupportedModelError, match=f"transformers has no {what}"):
        load_quantized(single)


def test_code_of_the_checkpoint_is_not_run(model: Any, single: Path) -> None:
    edit_json(single / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    (single / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_raises_checkpoint_error_or_nothing(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sharded, path)
    file = path / data.draw(st.sampled_from(sorted(os.listdir(path))))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):  # in the first kilobytes, where JSON and headers are
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        opened = Checkpoint.open(path)
        for name in opened.linears:
            opened.get(f"{name}.scales")
    except CheckpointError as error:
        assert str(path) in str(error)


# --- writing safely -------------------------------------------------------------------------------------------------


def leftovers(out: Path) -> list[str]:
    return [name for name in os.listdir(out.parent) if name.startswith(f".{out.name}.")]


def test_replacing_a_checkpoint_keeps_what_is_not_part_of_it(model: Any, shards: Path) -> None:
    (shards / "README.md").write_text("mine")
    (shards / "logs").mkdir()
    (shards / "logs" / "train.txt").write_text("also mine")
    (shards / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 128}')
    save_quantized(model, shards)
    assert [file.name for file in shards.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (shards / "quant_config.json").exists()
    assert (shards / "README.md").read_text() == "mine"
    assert (shards / "logs" / "train.txt").read_text() == "also mine"
    assert not leftovers(shards)
    assert logits(load_quantized(shards)).tobytes() == logits(model).tobytes()


def test_saving_a_loaded_model_over_its_own_files(model: Any, single: Path) -> None:
    save_quantized(load_quantized(single), single, source=single)
    assert (single / "tokenizer.json").is_file()
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


def test_replacing_without_an_atomic_exchange(model: Any, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On filesystems that cannot exchange two names (NFS) two renames do it; a failing second one is undone."""
    monkeypatch.setattr("awq_ext.atomic._exchange", lambda a, b: False)
    save_quantized(model, single)
    assert not leftovers(single)
    before, rename = contents(single), os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).suffix == ".partial":
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="is as it was before"):
        save_quantized(model, single)
    assert contents(single) == before and not leftovers(single)


def test_a_reader_always_finds_a_whole_checkpoint(model: Any, single: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot exchange two names in one step")
    absent, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            absent.append(not (single / "config.json").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        save_quantized(model, single)
    done.set()
    watcher.join()
    assert absent and not any(absent)


def test_too_little_space_is_seen_beforehand(model: Any, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(single)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB .* has 0\.00 GB free"):
        save_quantized(model, single)
    with pytest.raises(CheckpointError, match="GB free"):
        save_quantized(model, single.parent / "new")
    assert contents(single) == before and not (single.parent / "new").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failing_writes_leave_the_old_checkpoint(
    model: Any, single: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before, calls = contents(single), []

    class OneThenFail(storage.Writer):
        def __init__(self, file: Path, tensors: Any, metadata: Any) -> None:
            calls.append(file)
            if len(calls) > 1:
                raise error
            super().__init__(file, tensors, metadata)

    monkeypatch.setattr(checkpoint_module, "Writer", OneThenFail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save_quantized(model, single, max_shard_size=200_000)
    assert len(calls) == 2 and contents(single) == before and not leftovers(single)


INTERRUPTED = """
import os, resource, signal, sys, awq_ext, awq_ext.checkpoint as checkpoint
model = awq_ext.load_quantized(sys.argv[1])
if sys.argv[2] == "limit":  # the kernel refuses to let a file grow further, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
else:
    checkpoint.Writer.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
try:
    awq_ext.save_quantized(model, sys.argv[1])
except awq_ext.CheckpointError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("how", ["limit", "kill"])
def test_interrupted_processes_leave_the_old_checkpoint(model: Any, single: Path, how: str) -> None:
    before = contents(single)
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, single, how], capture_output=True, text=True)
    if how == "limit":
        assert done.returncode == 1 and "refused" in done.stderr and "is as it was before" in done.stderr, done.stderr
        assert not leftovers(single)
    else:
        assert done.returncode == -signal.SIGKILL
    assert contents(single) == before
    assert logits(load_quantized(single)).tobytes() == logits(model).tobytes()


def test_places_that_are_not_written_to(
    model: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path(shutil.copytree(tiny_llama, tmp_path / "plain"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    for out, message in (
        (plain, "not quantized, and would be lost"),
        (other, "holds no config.json"),
        (link, "is a link to"),
        (other / "thesis.txt", "is a file"),
        (other / "thesis.txt" / "deeper", "could not be written"),
    ):
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            save_quantized(model, out)
        assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="is not a directory"):
        save_quantized(model, tmp_path / "new", source=tmp_path / "nowhere")
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(CheckpointError, match="mount point"):
        save_quantized(model, plain)


def test_models_that_are_not_written(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers model, got Linear"):
        save_quantized(torch.nn.Linear(8, 8), tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(UnsupportedModelError, match="no AwqLinear"):
        save_quantized(plain, tmp_path / "out")
    awq_ext.replace_linears(plain, 64)
    broken = plain.get_submodule(LAYER)
    broken.scales[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.scales must be finite"):
        save_quantized(plain, tmp_path / "out")
    broken.scales[1, 2] = 1
    plain.set_submodule(LAYER, AwqLinear.from_linear(torch.nn.Linear(128, 256, bias=False), 32))
    with pytest.raises(CheckpointError, match=r"one group size for all its linears, the model has \[32, 64\]"):
        save_quantized(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_get_the_usual_permissions(model: Any, tmp_path: Path) -> None:
    (tmp_path / "probe").touch()
    usual = stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    (tmp_path / "probe_directory").mkdir()
    usual_directory = stat.S_IMODE((tmp_path / "probe_directory").stat().st_mode)
    out = save_quantized(model, tmp_path / "out")
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {usual}
    assert stat.S_IMODE(out.stat().st_mode) == usual_directory


def test_tokenizer_is_saved(model: Any, tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    out = save_quantized(model, tmp_path / "out", tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids
    assert again.chat_template == tokenizer.chat_template
