"""Converting directories: what is carried along, what is refused, and what is left by a process that dies."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import awq_ext
from awq_ext import CheckpointError, atomic
from awq_ext.atomic import replace_directory
from awq_ext.convert import convert
from awq_ext.format import Checkpoint
from awq_ext.layouts import layouts

MODULE = importlib.import_module("awq_ext.convert")  # the package may have a function of that name
INDEX = "model.safetensors.index.json"
N, K, G = 128, 256, 64
LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
ASIDE = {
    "tokenizer.json": "{}",
    "tokenizer.model": "a tokenizer",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": 2}',
    "LICENSE": "a licence",
    "README.md": "about the model",
    "modeling_own.py": "raise SystemExit('code of the checkpoint was run')",
}
Tensors = dict[str, torch.Tensor]


def make_tensors(seed: int = 0, zeros: int | None = None, dtype: torch.dtype = torch.float16) -> Tensors:
    """A small model in gemm: three linears of [128, 256] with random codes, and what else a model has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors: Tensors = {"model.embed_tokens.weight": torch.randn(40, K).to(dtype)}
        for name in LINEARS:
            codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
            z = torch.randint(1, 16, (N, K // G), dtype=torch.uint8)
            z = z if zeros is None else torch.full_like(z, zeros)
            tensors[f"{name}.qweight"] = torch.ops.awq_ext.pack(codes, layout="gemm")
            tensors[f"{name}.qzeros"] = torch.ops.awq_ext.pack(z, layout="gemm.zeros")
            tensors[f"{name}.scales"] = (torch.rand(K // G, N) + 0.5).to(dtype)
        tensors[f"{LINEARS[0]}.bias"] = torch.randn(N).to(dtype)
        tensors["model.layers.0.mlp.gate.weight"] = torch.randn(8, K).to(dtype)
        tensors["model.norm.weight"] = torch.ones(K).to(dtype)
        tensors["lm_head.weight"] = torch.randn(40, K).to(dtype)
    return tensors


def write_checkpoint(path: Path, tensors: Tensors, shards: int = 1, quant: Any = None, **config: Any) -> Path:
    """As AutoAWQ writes it: each file sorted by dtype, then name; a linear's tensors dealt out to different shards."""
    path.mkdir(parents=True)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, path / file, metadata={"format": "pt"})
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quant = quant or {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}
    config = {"model_type": "llama", "hidden_size": K, "quantization_config": quant} | config
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", make_tensors())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def all_tensors(directory: Path) -> Tensors:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]


def weights(directory: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.weight(name).numpy().tobytes() for name in checkpoint.linears}


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]), name


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["compression_config", "text_config"])
def test_nothing_in_the_config_speaks_of_the_source(key: str, source: Path, tmp_path: Path) -> None:
    config = config_of(source)
    quant = config.pop("quantization_config")
    config[key] = {"quantization_config": quant, "vocab_size": 40} if key == "text_config" else quant
    (source / "config.json").write_text(json.dumps(config))
    found = config_of(convert(source, tmp_path / "there", "gptq_v2"))
    assert found["quantization_config"]["quant_method"] == "gptq" and found["hidden_size"] == K
    assert "compression_config" not in found and found.get("text_config", {}) in ({}, {"vocab_size": 40})


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("to", ["gemv", "llm-awq", "gptq_v2", "compressed-tensors"])
def test_there_and_back(to: str, dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    """Every tensor comes back, whatever shard each part of a linear was in."""
    tensors = make_tensors(dtype=dtype) | {"model.layers.0.mlp.act.scales": torch.rand(K).to(dtype) + 0.5}
    src = write_checkpoint(tmp_path / "source", tensors, shards)
    before = contents(src)
    there = convert(src, tmp_path / "there", to)
    assert contents(src) == before
    found = Checkpoint.open(there)
    assert found.layout.name == to and set(found.linears) == set(LINEARS)
    assert found.activations == {"model.layers.0.mlp.act": K}
    linear_parts = {f"{name}.{part}" for name in LINEARS for part in ("qweight", "qzeros", "scales")}
    plain = tensors.keys() - linear_parts
    got = all_tensors(there)
    assert_same({name: got[name] for name in plain}, {name: tensors[name] for name in plain})
    assert got[f"{LINEARS[0]}.{found.layout.scales_name}"].dtype == dtype
    assert_same(all_tensors(convert(there, tmp_path / "back", "gemm")), tensors)


def test_shards_and_index(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "source", make_tensors(), shards=4)
    out = convert(src, tmp_path / "out", "gptq_v2")
    index = json.loads((out / INDEX).read_text())
    assert {file.name for file in out.glob("*.safetensors")} == {file.name for file in src.glob("*.safetensors")}
    size = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, place in index["weight_map"].items() if place == file.name} == set(opened.keys())
        size += sum(tensor.nbytes for tensor in load_file(file).values())
    assert index["metadata"] == {"total_size": size}
    assert index["weight_map"].keys() == all_tensors(out).keys()


@pytest.mark.parametrize("to", sorted(layouts()))
def test_files_are_those_that_the_package_writes(to: str, tmp_path: Path) -> None:
    """Byte for byte: so tensors are aligned, and the order is the one that readers are used to."""
    src = write_checkpoint(tmp_path / "source", make_tensors(zeros=8), shards=2)
    out = convert(src, tmp_path / "out", to)
    for file in out.glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "again", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("name", ["gptq_model-4bit-64g.safetensors", "model-00001-of-00001.safetensors"])
def test_a_single_file_gets_the_name_that_readers_look_for(source: Path, name: str, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / name)
    out = convert(source, tmp_path / "out", "gemv")
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    convert(source, source, "gemv")  # and the other one does not stay
    assert contents(source) == contents(out)


def test_a_shard_of_which_nothing_is_left(tmp_path: Path) -> None:
    """Zeros that are all 8 are not stored in a symmetric layout; here they had a file of their own."""
    tensors = make_tensors(zeros=8)
    src = write_checkpoint(tmp_path / "source", tensors, shards=2)
    weight_map = {name: f"model-0000{1 + name.endswith('qzeros')}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, src / file)
    (src / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    out = convert(src, tmp_path / "out", "compressed-tensors")
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert weights(out) == weights(src)


def test_side_files(source: Path, tmp_path: Path) -> None:
    for name, text in ASIDE.items():
        (source / name).write_text(text)
    for name in (
        "pytorch_model.bin", "model.pt", "training_args.bin", "pytorch_model.bin.index.json", "old.safetensors",
        "model.gguf", "tf_model.h5", ".gitattributes",
    ):  # fmt: skip
        (source / name).write_text("not to be copied")
    (source / ".git").mkdir()
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_text("not to be copied")
    os.mkfifo(source / "pipe")
    (source / "link.txt").symlink_to("LICENSE")
    (source / "dangling.txt").symlink_to("nowhere")
    out = convert(source, tmp_path / "out", "gemv")
    expected = ASIDE | {"link.txt": ASIDE["LICENSE"]}
    assert set(os.listdir(out)) == {"config.json", "model.safetensors", *expected}
    assert {name: (out / name).read_text() for name in expected} == expected
    assert not any(file.is_symlink() for file in out.iterdir())


def test_links_of_the_hub_cache_are_followed_others_not(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    shutil.copytree(source, repository / "blobs")
    for name in os.listdir(source):
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
    out = convert(snapshot, tmp_path / "out", "gemv")
    assert contents(out) == contents(convert(source, tmp_path / "plain", "gemv"))
    assert not any(file.is_symlink() for file in out.iterdir())

    (tmp_path / "secret").write_text("a key")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to .*secret, outside the checkpoint"):
        convert(source, tmp_path / "refused", "gemv")
    assert not (tmp_path / "refused").exists() and not leftovers(tmp_path / "refused")


def test_config_keeps_its_other_keys(tmp_path: Path) -> None:
    others = {"rope_scaling": {"type": "linear", "factor": 2.0}, "architectures": ["Own"], "vocab_size": 40}
    src = write_checkpoint(tmp_path / "source", make_tensors(), **others)
    config = config_of(convert(src, tmp_path / "out", "gemv"))
    assert config.pop("quantization_config") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": G,
        "zero_point": True,
        "version": "gemv",
        "modules_to_not_convert": ["model.layers.0.mlp.gate"],
    }
    assert config == {"model_type": "llama", "hidden_size": K} | others


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_older_configs_move_into_config_json(source: Path, name: str, tmp_path: Path) -> None:
    fields = config_of(source)
    del fields["quantization_config"]
    (source / "config.json").write_text(json.dumps(fields))
    (source / name).write_text(json.dumps({"w_bit": 4, "q_group_size": G, "zero_point": True, "version": "GEMM"}))
    out = convert(source, tmp_path / "out", "gemm")
    assert set(os.listdir(out)) == {"config.json", "model.safetensors"}
    assert config_of(out)["quantization_config"]["version"] == "gemm"
    convert(source, source, "gemm")
    assert contents(source) == contents(out)


@pytest.mark.parametrize(
    ("listed", "written"),
    [
        (None, ["model.layers.0.mlp.gate"]),
        (["gate"], ["model.layers.0.mlp.gate"]),
        (["gate", "lm_head"], ["lm_head", "model.layers.0.mlp.gate"]),
    ],
)
def test_what_is_not_quantized_is_written_by_its_full_name(
    listed: list[str] | None, written: list[str], tmp_path: Path
) -> None:
    """The head only if it was listed: no reader of AWQ quantizes it. compressed-tensors' look at it like at any."""
    quant = {"quant_method": "awq", "bits": 4, "group_size": G, "version": "gemm", "modules_to_not_convert": listed}
    src = write_checkpoint(tmp_path / "source", make_tensors(), quant=quant)
    quants = {
        to: config_of(convert(src, tmp_path / to, to))["quantization_config"] for to in layouts().keys() - {"marlin"}
    }
    assert sorted(quants["gemv"]["modules_to_not_convert"]) == written
    assert quants["compressed-tensors"]["ignore"] == sorted({*written, "lm_head"})
    assert set(quants["gptq"]["dynamic"]) == {f"-:^{name.replace('.', chr(92) + '.')}$" for name in written}
    for to in quants:  # and read again
        back = config_of(convert(tmp_path / to, tmp_path / f"{to}-back", "gemm"))["quantization_config"]
        assert set(back["modules_to_not_convert"]) - {"lm_head"} == set(written) - {"lm_head"}


def test_a_quantized_head_is_not_listed_as_plain(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["lm_head.weight"]
    for part in ("qweight", "qzeros", "scales"):
        tensors[f"lm_head.{part}"] = tensors[f"{LINEARS[0]}.{part}"].clone()
    src = write_checkpoint(tmp_path / "source", tensors)
    compressed = config_of(convert(src, tmp_path / "compressed", "compressed-tensors"))["quantization_config"]
    assert compressed["ignore"] == ["model.layers.0.mlp.gate"]
    assert config_of(convert(src, tmp_path / "gptq", "gptq"))["quantization_config"]["lm_head"] is True


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["lm_head.weight"]
    src = write_checkpoint(tmp_path / "source", tensors, tie_word_embeddings=True)
    out = convert(src, tmp_path / "out", "gptq")
    assert "lm_head.weight" not in all_tensors(out) and config_of(out)["tie_word_embeddings"] is True


@pytest.mark.parametrize("zeros", [8, 7])
def test_symmetric_codes_are_called_so(zeros: int, tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "source", make_tensors(zeros=zeros))
    path = src
    for to in ("gptq", "compressed-tensors", "compressed-tensors", "gptq_v2", "gptq_v2", "gemm"):  # twice: into its own
        path = convert(path, tmp_path / f"{len(os.listdir(tmp_path))}-{to}", to)
        quant = config_of(path)["quantization_config"]
        if to == "gemm":
            assert quant["zero_point"] is True  # AutoAWQ's readers look for zeros only then
        elif to == "compressed-tensors":
            assert quant["config_groups"]["group_0"]["weights"]["symmetric"] is (zeros == 8)
            assert (f"{LINEARS[0]}.weight_zero_point" in all_tensors(path)) is (zeros != 8)
        else:
            assert quant["sym"] is (zeros == 8)
        assert weights(path) == weights(src)


@pytest.mark.parametrize("to", sorted(layouts()))
def test_transformers_reads_the_config(to: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("transformers.utils.quantization_config", reason="needs the extra 'hf'")
    src = write_checkpoint(tmp_path / "source", make_tensors(zeros=8))
    quant = config_of(convert(src, tmp_path / "out", to))["quantization_config"]
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        read = quantization.CompressedTensorsConfig.from_dict(quant)
        (scheme,) = read.quantization_config.config_groups.values()
        assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric) == (4, G, True)
        assert read.quantization_config.ignore == ["lm_head", "model.layers.0.mlp.gate"]
    elif to in ("gptq", "gptq_v2"):
        read = quantization.GPTQConfig.from_dict(quant)
        assert (read.bits, read.group_size, read.desc_act, read.sym) == (4, G, False, True)
        assert (getattr(read, "format", None) or read.checkpoint_format) == to
    elif to == "marlin":
        with pytest.raises(ValueError):  # AutoAWQ's own loader alone knows it
            quantization.AwqConfig.from_dict(quant)
    else:
        read = quantization.AwqConfig.from_dict(quant)
        assert (read.bits, read.group_size, read.zero_point) == (4, G, True)
        assert (getattr(read, "format", None) or read.version) == to
        assert read.modules_to_not_convert == ["model.layers.0.mlp.gate"]


@pytest.mark.parametrize("to", ["gemv", "compressed-tensors"])
def test_a_converted_model_computes_the_same_bytes(tiny_llama: Path, to: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    awq_ext.replace_linears(model, 64)
    saved = awq_ext.save_quantized(model, tmp_path / "saved", source=tiny_llama, max_shard_size=200_000)
    there = convert(saved, tmp_path / "there", to)
    back = convert(there, tmp_path / "back", "gemm")
    ids = torch.arange(3, 35).view(1, 32)
    with torch.no_grad():
        logits = [awq_ext.load_quantized(path)(ids).logits.numpy().tobytes() for path in (saved, there, back)]
    assert logits[0] == logits[1] == logits[2]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path)("Once upon").input_ids for path in (saved, back)]
    assert tokenizers[0] == tokenizers[1]


def test_permissions_are_the_usual_ones(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").chmod(0o400)
    (tmp_path / "probe").touch()
    (tmp_path / "probes").mkdir()
    usual, usual_directory = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("probe", "probes"))
    out = convert(source, tmp_path / "out", "gemv")
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {usual}
    assert stat.S_IMODE(out.stat().st_mode) == usual_directory
    out.chmod(0o750)
    assert stat.S_IMODE(convert(source, out, "gemv").stat().st_mode) == 0o750


# --- where it is written --------------------------------------------------------------------------------------------


def test_in_place(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_text("a licence")
    (source / "pytorch_model.bin").write_text("kept, though not copied elsewhere")
    (source / "logs").mkdir()
    (source / "logs" / "train.txt").write_text("kept")
    expected = contents(convert(source, tmp_path / "out", "gptq"))
    kept = {name: (source / name).read_bytes() for name in ("pytorch_model.bin", "logs/train.txt")}
    (tmp_path / "link").symlink_to(source)
    assert convert(tmp_path / "link", source, "gptq") == source
    assert contents(source) == expected | kept and not leftovers(source)


@pytest.mark.parametrize("shards", [1, 3])
def test_an_older_checkpoint_is_replaced(source: Path, shards: int, tmp_path: Path) -> None:
    """Nothing of its weights stays: readers that take every file would mix them."""
    expected = contents(convert(source, tmp_path / "expected", "gemv"))
    out = write_checkpoint(tmp_path / "out", make_tensors(seed=1), shards)
    if shards > 1:  # also files of unusual names
        index = json.loads((out / INDEX).read_text())
        first = "model-00001-of-00003.safetensors"
        (out / first).rename(out / "part-1.safetensors")
        places = {name: place.replace(first, "part-1.safetensors") for name, place in index["weight_map"].items()}
        (out / INDEX).write_text(json.dumps({"weight_map": places}))
    (out / "notes.txt").write_text("mine")
    (out / "adapter.safetensors").write_text("mine, too")
    convert(source, out, "gemv")
    assert contents(out) == expected | {"notes.txt": b"mine", "adapter.safetensors": b"mine, too"}


def test_a_damaged_checkpoint_is_replaced(source: Path, tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", make_tensors(seed=1), shards=3)
    os.truncate(out / "model-00002-of-00003.safetensors", 100)
    assert contents(convert(source, out, "gemv")) == contents(convert(source, tmp_path / "new", "gemv"))


def test_one_directory_inside_the_other(source: Path, tmp_path: Path) -> None:
    expected = contents(convert(source, tmp_path / "expected", "gemv"))
    before = contents(source)
    inner = convert(source, source / "inner", "gemv")
    assert contents(inner) == expected
    assert contents(source) == before | {f"inner/{name}": data for name, data in expected.items()}
    convert(inner, source, "gemv")  # the source is kept as a directory that is no part of the checkpoint
    assert contents(source) == expected | {f"inner/{name}": data for name, data in expected.items()}


def test_places_that_are_refused(source: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    (plain / "config.json").write_text('{"model_type": "llama"}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(source)
    for out, message in (
        (plain, "not quantized, and would be lost"),
        (other, r"holds no config\.json"),
        (tmp_path / "link", "is a link to"),
        (other / "thesis.txt", "is a file"),
        (other / "thesis.txt" / "deeper", "could not be written"),
        (tmp_path / ("x" * 300), "could not be written"),
    ):
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            convert(source, out, "gemv")
        assert contents(tmp_path) == before


def test_unknown_layout(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of gemm, gemv, .*, got 'exl2'") as raised:
        convert(source, tmp_path / "out", "exl2")
    assert not isinstance(raised.value, CheckpointError)


# --- what cannot be converted ---------------------------------------------------------------------------------------


def spoil(part: str, change: Callable[[torch.Tensor], object]) -> Callable[[Tensors], object]:
    return lambda tensors: change(tensors[f"{LINEARS[2]}.{part}"])


NOT_HELD: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "a zero of 0 in gptq": ("gptq", spoil("qzeros", lambda t: t[1].fill_(0x11111101)), "zero point of 0"),
    "zero points in marlin": ("marlin", spoil("qzeros", lambda t: t.fill_(0x11111111)), "every zero must be 8, got 1"),
    "nan": ("gemv", spoil("scales", lambda t: t[1, 5].fill_(torch.nan)), r"scales must be finite .* got nan"),
    "nan in its own layout": ("gemm", spoil("scales", lambda t: t[1, 5].fill_(torch.nan)), "got nan at group 1"),
    "zero scale": ("compressed-tensors", spoil("scales", lambda t: t[0, 9].zero_()), "output channel 9"),
    "overflow": ("gemv_fast", spoil("scales", lambda t: t[0, 0].fill_(65504)), r"cannot store -\(scale \* zero\)"),
}


@pytest.mark.parametrize("case", NOT_HELD)
def test_what_a_target_cannot_hold_is_told_before_anything_is_written(case: str, tmp_path: Path) -> None:
    """The last linear is the one that cannot be held."""
    to, change, message = NOT_HELD[case]
    tensors = make_tensors(zeros=8)
    change(tensors)
    src = write_checkpoint(tmp_path / "source", tensors)
    refuse(src, tmp_path / "out", to, rf"{LINEARS[2]}.*{message}")


def refuse(src: Path, out: Path, to: str, message: str) -> None:
    """Nothing is written, not even beside ``out``."""
    os.utime(out.parent, (0, 0))
    with pytest.raises(CheckpointError, match=message):
        convert(src, out, to)
    assert not out.exists() and out.parent.stat().st_mtime == 0


@pytest.mark.parametrize(
    ("group_size", "shape", "to", "message"),
    [
        (16, (128, 256), "gemv", "not defined for a group_size below 32"),
        (64, (24, 256), "marlin", "out_features 24 is not a multiple of 64"),
        (32, (128, 96), "gemv_fast", "in_features 96 is not a multiple of 64"),
    ],
)
def test_shapes_that_a_target_cannot_hold(
    group_size: int, shape: tuple[int, int], to: str, message: str, tmp_path: Path
) -> None:
    n, k = shape
    tensors = {
        f"{LINEARS[2]}.{part}": torch.zeros(tensor.shape, dtype=torch.int32)
        for part, tensor in layouts()["gemm"].tensors(n, k, group_size).items()
    }
    tensors[f"{LINEARS[2]}.scales"] = torch.ones(k // group_size, n, dtype=torch.float16)
    quant = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    src = write_checkpoint(tmp_path / "source", tensors, quant=quant)
    refuse(src, tmp_path / "out", to, rf"{LINEARS[2]}.*{message}")


@pytest.mark.parametrize("to", ["gemm", "gptq_v2"])
def test_act_order_is_refused(to: str, tmp_path: Path) -> None:
    src = convert(write_checkpoint(tmp_path / "gemm", make_tensors()), tmp_path / "source", "gptq")
    tensors = all_tensors(src)
    tensors[f"{LINEARS[2]}.g_idx"] = tensors[f"{LINEARS[2]}.g_idx"].flip(0)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    refuse(src, tmp_path / "out", to, rf"{LINEARS[2]}\.g_idx is in act-order")


def test_a_dtype_that_nobody_knows(source: Path, tmp_path: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "F12"
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refuse(source, tmp_path / "out", "gemv", r"model\.norm\.weight: dtype 'F12' is unknown")


# --- failures while writing -----------------------------------------------------------------------------------------


def test_too_little_space_is_seen_beforehand(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(MODULE, "Writer", None)  # not come to
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, but .* has 0\.00 GB free"):
        convert(source, tmp_path / "out", "gemv")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")


def failing(error: BaseException, calls: int) -> Callable[..., Any]:
    """A function that works so many times and then raises."""
    left = [calls]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise error
            return function(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize("place", ["Writer.write", "sync", "copyfile", "_write_json", "atomic.sync", "_swap"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), MemoryError("as much cannot be had"), KeyboardInterrupt()],
    ids=["full", "memory", "interrupted"],
)
def test_failures_leave_the_old_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    (source / "LICENSE").write_text("a licence")
    out = write_checkpoint(tmp_path / "out", make_tensors(seed=1), shards=3)
    before = contents(out)
    owner, name, calls = {
        "Writer.write": (MODULE.Writer, "write", 5),  # type: ignore[attr-defined]
        "sync": (MODULE, "sync", 0),
        "copyfile": (shutil, "copyfile", 0),
        "_write_json": (MODULE, "_write_json", 0),
        "atomic.sync": (atomic, "sync", 1),
        "_swap": (atomic, "_swap", 0),
    }[place]
    monkeypatch.setattr(owner, name, failing(error, calls)(getattr(owner, name)))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected, match="is as it was before" if expected is CheckpointError else None):
        convert(source, out, "gemv")
    assert contents(out) == before and not leftovers(out)
    monkeypatch.undo()
    convert(source, out, "gemv")
    assert Checkpoint.open(out).layout.name == "gemv"


def test_a_source_that_changes_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap_it(*args: Any) -> None:
        shutil.copyfile(source / "model.safetensors", source / "copy")
        os.replace(source / "copy", source / "model.safetensors")

    monkeypatch.setattr(MODULE, "_check_space", swap_it)  # after the checks, before the writing
    with pytest.raises(CheckpointError, match="the file changed since it was opened"):
        convert(source, tmp_path / "out", "gemv")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")


def test_one_thread_of_torch_while_it_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    monkeypatch.setattr(MODULE, "_check_space", lambda *args: seen.append(torch.get_num_threads()))
    try:
        convert(source, tmp_path / "out", "gemv")
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- processes that die ---------------------------------------------------------------------------------------------

# Converts in processes that it forks, for imports take seconds. A process is killed `delay` seconds after its
# `kill_at`-th event, where Python's audit events are the moments: every file opened, directory made, name changed.
ZYGOTE = """
import importlib, json, os, resource, signal, sys, threading, time
from awq_ext import relayout
module = importlib.import_module("awq_ext.convert")
relayout.PIECE, module.SYNC_BYTES = 2**13, 2**16  # many moments though the model is small

def die(delay):
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def run(job):
    events = []
    def count(event, args):
        events.append(event)
        if len(events) == job.get("kill_at"):
            if job["delay"] == 0:
                die(0)
            threading.Thread(target=die, args=(job["delay"],)).start()
    if job.get("limit"):  # the kernel refuses to let a file grow further, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    sys.addaudithook(count)
    try:
        module.convert(job["src"], job["dst"], job["to"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"events": events}

for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = json.dumps(run(json.loads(line)))
        with open(writer, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"status": status} | json.loads(said or "{}")), flush=True)
"""


@pytest.fixture(scope="module")
def in_a_process() -> Iterator[Callable[..., dict[str, Any]]]:
    """convert(src, dst, to) in a process of its own; how it ended."""
    with subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as zygote:
        assert zygote.stdin is not None and zygote.stdout is not None

        def run(src: Path, dst: Path, to: str, **job: Any) -> dict[str, Any]:
            zygote.stdin.write(json.dumps({"src": str(src), "dst": str(dst), "to": to} | job).encode() + b"\n")
            zygote.stdin.flush()
            answer: dict[str, Any] = json.loads(zygote.stdout.readline())
            return answer

        yield run
        zygote.stdin.close()


def test_a_full_disk(source: Path, tmp_path: Path, in_a_process: Callable[..., dict[str, Any]]) -> None:
    out = write_checkpoint(tmp_path / "out", make_tensors(seed=1), shards=3)
    before = contents(out)
    for limit in (50_000, 100_000):
        done = in_a_process(source, out, "gemv", limit=limit)
        assert done["error"].startswith("CheckpointError: ") and "is as it was before" in done["error"]
        assert contents(out) == before and not leftovers(out)
    assert "events" in in_a_process(source, out, "gemv", limit=10**9)
    assert Checkpoint.open(out).layout.name == "gemv"


def has_whole_weights(directory: Path, *wholes: dict[str, bytes]) -> bool:
    """Whether the files of weights are those of one of these checkpoints."""
    parts = [{name: data for name, data in files.items() if "safetensors" in name} for files in wholes]
    return {name: data for name, data in contents(directory).items() if "safetensors" in name} in parts


@pytest.mark.parametrize("existing", [True, False], ids=["over an older one", "nothing before"])
def test_killed_at_fifty_moments(existing: bool, tmp_path: Path, in_a_process: Callable[..., dict[str, Any]]) -> None:
    """The target is always the old checkpoint or the new one, to the byte; what lies beside it is never half of one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot exchange two names in one step")
    src = write_checkpoint(tmp_path / "source", make_tensors(), shards=3)
    (src / "tokenizer.json").write_text("{}")
    older = write_checkpoint(tmp_path / "older", make_tensors(seed=1), shards=2)
    (older / "notes.txt").write_text("kept")
    place = tmp_path / "place"
    out = place / "out"

    def start_over() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if existing:
            shutil.copytree(older, out)

    start_over()
    events = in_a_process(src, out, "gemv")["events"]
    old, new = contents(older) if existing else {}, contents(out)
    # It checks, then makes a directory and writes, then syncs, and at the end swaps and removes.
    writes, syncs, swaps = events.index("os.mkdir"), events.index("pathlib.Path.rglob"), len(events) - 10
    random_ = random.Random(4)
    spans = [(1, writes, 5), (writes, syncs, 20), (syncs, swaps, 10), (swaps, len(events), 15)]
    moments = [random_.randint(begin, end) for begin, end, count in spans for _ in range(count)]
    assert len(moments) == 50

    counts = {"killed": 0, "old": 0, "new": 0, "left a directory": 0, "left one that opens": 0}
    for moment in moments:
        start_over()
        done = in_a_process(src, out, "gemv", kill_at=moment, delay=random_.choice([0, 0, 1e-4, 1e-3]))
        assert done["status"] == -signal.SIGKILL or "events" in done, done
        found = contents(out) if out.exists() else {}
        assert found in (old, new), moment
        assert not found or Checkpoint.open(out).layout.name == ("gemv" if found == new else "gemm")
        counts["killed"] += done["status"] == -signal.SIGKILL
        counts["new" if found == new else "old"] += 1
        for partial in leftovers(out):
            counts["left a directory"] += 1
            try:
                Checkpoint.open(partial)
            except CheckpointError:
                continue
            counts["left one that opens"] += 1
            assert has_whole_weights(partial, old, new), moment
    print(counts)  # for a failure's report
    assert counts["killed"] >= 40 and counts["old"] >= 20 and counts["new"] >= 3 and counts["left a directory"] >= 20

    start_over()
    in_a_process(src, out, "gemv", kill_at=syncs, delay=0)
    assert len(leftovers(out)) == 1
    assert "events" in in_a_process(src, out, "gemv")
    assert contents(out) == new and not leftovers(out)


def test_directories_in_use_are_not_taken_for_abandoned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    abandoned = tmp_path / ".out.00000000.partial"
    others = [tmp_path / name for name in (".out.x.partial", ".out.00000000.old", ".output.00000000.partial")]
    for path in (abandoned, *others):
        path.mkdir()
    with replace_directory(out, is_stale=lambda name: True) as first:
        assert not abandoned.exists() and all(path.exists() for path in others)
        (first / "file").write_text("of the first")
        with replace_directory(out, is_stale=lambda name: True) as second:
            (second / "file").write_text("of the second")
        assert (out / "file").read_text() == "of the second"
    assert (out / "file").read_text() == "of the first" and set(leftovers(out)) == set(others[:2])


def test_a_directory_taken_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, times = atomic._lock, []

    def beaten(directory: Path) -> int:
        times.append(directory)
        if len(times) == 1:
            raise BlockingIOError
        if len(times) == 2:
            directory.rmdir()
        return lock(directory)

    monkeypatch.setattr(atomic, "_lock", beaten)
    with replace_directory(tmp_path / "out", is_stale=lambda name: True) as partial:
        (partial / "file").write_text("whole")
    assert len(times) == 3 and (tmp_path / "out" / "file").read_text() == "whole"


def test_filesystems_without_locks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "NFS wants a file that is open for writing")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    (tmp_path / ".out.00000000.partial").mkdir()
    convert(source, tmp_path / "out", "gemv")
    assert [path.name for path in leftovers(tmp_path / "out")] == [".out.00000000.partial"]
