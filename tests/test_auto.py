"""AutoAWQ's face, driven as scripts written for AutoAWQ 0.2.9 do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import awq_ext
from awq_ext import AutoAWQForCausalLM, AwqLinear, CheckpointError, UnsupportedModelError, auto
from awq_ext.checkpoint import Checkpoint

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

QUANT_CONFIG = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
TEXT = ["Once upon a time there was a little girl who lived in a house by the sea and ran to the beach."] * 40
IDS = torch.arange(3, 19).view(1, 16)


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The example of AutoAWQ's README: load, quantize, save; the wrapper and the directory it wrote."""
    model = AutoAWQForCausalLM.from_pretrained(str(tiny_llama), low_cpu_mem_usage=True, use_cache=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama, trust_remote_code=True)
    model.quantize(tokenizer, quant_config=QUANT_CONFIG, calib_data=TEXT, max_calib_samples=4, max_calib_seq_len=32)
    path = tmp_path_factory.mktemp("auto") / "quantized"
    model.save_quantized(str(path))
    tokenizer.save_pretrained(str(path))
    return model, path


def test_what_may_be_said_of_a_download(tiny_llama: Path) -> None:
    for load in (AutoAWQForCausalLM.from_pretrained, AutoAWQForCausalLM.from_quantized):
        with pytest.raises(ValueError, match=r"download_kwargs may hold revision, cache_dir, .* got 'token'"):
            load(tiny_llama, download_kwargs={"token": "x", "revision": "main"})


def test_what_is_no_model_to_quantize(quantized: tuple[Any, Path], tiny_llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(quantized[1], tmp_path / "quantized"))
    config = json.loads((path / "config.json").read_text())
    (path / "quant_config.json").write_text(json.dumps(config.pop("quantization_config")))
    for older in (False, True):
        if older:
            (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="is quantized already; use from_quantized"):
            AutoAWQForCausalLM.from_pretrained(path)
    (path / "quant_config.json").unlink()  # nothing says that it is, but it has other tensors than the model
    with pytest.raises(CheckpointError, match=r"lacks 14 tensors of the model, the first of them model\.layers\.0\."):
        AutoAWQForCausalLM.from_pretrained(path)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_readme_example(quantized: tuple[Any, Path], tiny_llama: Path) -> None:
    model, path = quantized
    assert sum(isinstance(module, AwqLinear) for module in model.modules()) == 14
    assert model.quant_config["group_size"] == 64
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["version"] == "gemm"
    assert config["use_cache"] is True  # loading for quantization does not make later generation slow
    original = json.loads((tiny_llama / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == original.get("dtype", original.get("torch_dtype"))
    assert transformers.AutoTokenizer.from_pretrained(path).vocab_size == 320

    loaded = AutoAWQForCausalLM.from_quantized(str(path), fuse_layers=False, device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.model_type == "llama" and not loaded.training
    tokens = loaded.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, model.model.generate(IDS, max_new_tokens=3, do_sample=False))


def test_quantization_keeps_close_to_the_original(quantized: tuple[Any, Path], tiny_llama: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected, got = logits(original), logits(quantized[0])
    # Rounding to 16 levels a group moves each weight by at most 1/30 of its group's range; all through a random
    # model this stays well under the size of the logits. Lost scales or zeros would not.
    assert (got - expected).norm() < 0.3 * expected.norm()


def test_tokenizer_files_come_along(quantized: tuple[Any, Path], tiny_llama: Path, tmp_path: Path) -> None:
    quantized[0].save_quantized(tmp_path / "out", shard_size="200KB")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert len(Checkpoint.open(tmp_path / "out").shards) > 1


def test_quant_filename_must_be_a_weight_file(quantized: tuple[Any, Path]) -> None:
    path = str(quantized[1])
    assert AutoAWQForCausalLM.from_quantized(path, "model.safetensors", fuse_layers=False).quant_config is not None
    with pytest.raises(CheckpointError, match=r"'other\.safetensors' is not one of its weight files: model\."):
        AutoAWQForCausalLM.from_quantized(path, "other.safetensors", fuse_layers=False)


def test_fused_layers_are_declined_once(quantized: tuple[Any, Path]) -> None:
    auto._say_unfused.cache_clear()
    with pytest.warns(UserWarning, match="results are the same without") as caught:
        model = AutoAWQForCausalLM.from_quantized(str(quantized[1]))
        AutoAWQForCausalLM.from_quantized(str(quantized[1]))
    assert len([w for w in caught if "fuse_layers" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfused = AutoAWQForCausalLM.from_quantized(str(quantized[1]), fuse_layers=False, torch_dtype=torch.float32)
    assert torch.equal(logits(model), logits(unfused))


def test_dtype_and_moving(quantized: tuple[Any, Path]) -> None:
    model = AutoAWQForCausalLM.from_quantized(str(quantized[1]), fuse_layers=False, torch_dtype=torch.bfloat16)
    assert model.model.dtype == torch.bfloat16
    assert model.to("cpu").eval() is model


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_one_device(device_map: Any) -> None:
    assert auto._one_device(device_map, "cpu") == torch.device("cpu")


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "meta"}, {}, "everywhere", 1.5])
def test_no_or_several_devices(quantized: tuple[Any, Path], device_map: Any) -> None:
    with pytest.raises(ValueError, match="device_map must"):
        AutoAWQForCausalLM.from_quantized(str(quantized[1]), fuse_layers=False, device_map=device_map)


def test_what_would_change_results_is_refused(quantized: tuple[Any, Path], tiny_llama: Path, tmp_path: Path) -> None:
    model, path = quantized
    for call, error, message in (
        (lambda: AutoAWQForCausalLM.from_quantized(path, max_memory={0: "1GB"}), ValueError, "on one device"),
        (lambda: AutoAWQForCausalLM.from_quantized(path, offload_folder="x"), ValueError, "on one device"),
        (lambda: AutoAWQForCausalLM.from_quantized(path, safetensors=False), CheckpointError, "pickles"),
        (lambda: AutoAWQForCausalLM.from_pretrained(tiny_llama, safetensors=False), CheckpointError, "pickles"),
        (lambda: model.save_quantized(tmp_path / "out", safetensors=False), CheckpointError, "pickles"),
        (lambda: AutoAWQForCausalLM.from_pretrained(path), CheckpointError, "quantized already; use from_quantized"),
        (lambda: AutoAWQForCausalLM.from_quantized(tiny_llama), CheckpointError, "is not quantized"),
        (lambda: model.quantize(export_compatible=True), ValueError, "export_compatible"),
        (lambda: model.quantize(text_column="body"), ValueError, "text_column 'body'"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(error, match=message):
                call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": "GEMV"}, "GEMV"), ({"w_bit": 3}, "w_bit"), ({"q_group_size": 0}, "q_group_size")],
)
def test_quant_config_is_checked(tiny_llama: Path, change: dict[str, Any], message: str) -> None:
    model = AutoAWQForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match=message):
        model.quantize(None, QUANT_CONFIG | change, calib_data=[[1, 2, 3]])
    assert model.quant_config is None and not any(isinstance(m, AwqLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("source", "expected"), [("pileval", "pileval"), ("org/data", "org/data:validation"), (["text"], ["text"])]
)
def test_calibration_arguments_are_handed_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, source: Any, expected: Any
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("awq_ext.quantizer.quantize", lambda model, tokenizer, **kwargs: seen.update(kwargs))
    model = AutoAWQForCausalLM.from_pretrained(tiny_llama)
    model.quantize("tokenizer", QUANT_CONFIG, source, "validation", duo_scaling=False, max_calib_samples=3, seed=5)
    assert seen == {
        "quant_config": QUANT_CONFIG,
        "calibration": expected,
        "samples": 3,
        "seq_len": 512,
        "duo_scaling": False,
        "apply_clip": True,
        "seed": 5,
    }


def test_models_that_cannot_be_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        AutoAWQForCausalLM.from_pretrained(tmp_path)
    unknown = Path(shutil.copytree(tiny_llama, tmp_path / "unknown"))
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        AutoAWQForCausalLM.from_pretrained(unknown)
    pickled = Path(shutil.copytree(tiny_llama, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        AutoAWQForCausalLM.from_pretrained(pickled)


def test_public_names() -> None:
    assert awq_ext.AutoAWQForCausalLM is AutoAWQForCausalLM
