"""Directories made to mislead, to hang or to exhaust a reader: refused as a whole, in bounded time and memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from awq_ext import CheckpointError, format
from awq_ext.checkpoint import Checkpoint
from awq_ext.format import INDEX

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TENSORS = {
    "model.a.qweight": torch.zeros(64, 2, dtype=torch.int32),
    "model.a.qzeros": torch.zeros(2, 2, dtype=torch.int32),
    "model.a.scales": torch.ones(2, 16, dtype=torch.float16),
    "model.norm.weight": torch.ones(4),
}
CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One linear and a norm in one file."""
    path = tmp_path / "single"
    path.mkdir()
    save_file(TENSORS, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in two files with an index."""
    path = tmp_path / "shards"
    path.mkdir()
    names = list(TENSORS)
    for shard, half in zip(SHARDS, (names[:2], names[2:]), strict=True):
        save_file({name: TENSORS[name] for name in half}, path / shard)
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_index(path, {name: SHARDS[i // 2] for i, name in enumerate(names)})
    return path


def write_index(path: Path, weight_map: object, **more: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map} | more))


def edit_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    change(weight_map)
    write_index(path, weight_map)


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    text = str(caught.value)
    assert str(path) in text and len(text) < 1500 and text.isprintable(), text


def test_the_samples_are_sound(single: Path, shards: Path) -> None:
    for path in (single, shards):
        checkpoint = Checkpoint.open(path)
        found = dict(checkpoint.tensors())
        assert found.keys() == TENSORS.keys() and list(checkpoint.linears) == ["model.a"]
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


# --- what is no file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "dangling", "loop"])
def test_what_is_no_file_neither_hangs_nor_misleads(single: Path, name: str, kind: str) -> None:
    file = single / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)  # opening it as a file waits for a writer
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": name}[kind])
    refused(
        single,
        {
            "fifo": rf"{name} must be a file, got a FIFO",
            "directory": rf"{name} must be a file, got a directory",
            "device": rf"{name} is a link to /dev/zero, outside the checkpoint",
            "dangling": rf"{name} (cannot be opened|is missing)",
            "loop": rf"{name} (cannot be followed|cannot be opened|is missing)",
        }[kind],
    )


def test_files_that_may_not_be_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_it = os.open
    for name in ("config.json", "model.safetensors"):

        def denied(path: Any, *arguments: Any, name: str = name) -> int:
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", str(path))
            return open_it(path, *arguments)

        monkeypatch.setattr(os, "open", denied)
        refused(single, rf"{name} cannot be opened: .*Permission denied")


# --- links ----------------------------------------------------------------------------------------------------------


def test_links_stay_inside(single: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(single)  # the directory itself may be a link: that is what the user named
    assert Checkpoint.open(tmp_path / "alias").linears
    (single / "model.safetensors").rename(single / "data")
    (single / "model.safetensors").symlink_to("data")
    assert Checkpoint.open(single).linears
    (single / "data").rename(tmp_path / "data")
    for target in ("../data", tmp_path / "data", "../single/../data"):
        (single / "model.safetensors").unlink()
        (single / "model.safetensors").symlink_to(target)
        refused(single, r"model\.safetensors is a link to .*, outside the checkpoint; copy the file here")


def test_a_directory_whose_name_only_begins_alike_is_outside(single: Path, tmp_path: Path) -> None:
    other = tmp_path / "single-secrets"
    other.mkdir()
    shutil.move(single / "config.json", other / "config.json")
    (single / "config.json").symlink_to(other / "config.json")
    refused(single, "outside the checkpoint")


def test_links_of_the_hub_cache_lead_to_blobs_of_the_same_repository(single: Path, tmp_path: Path) -> None:
    repository, other = tmp_path / "models--org--a", tmp_path / "models--org--b"
    snapshot = repository / "snapshots" / "0123"
    for path in (snapshot, repository / "blobs", other / "blobs"):
        path.mkdir(parents=True)
    for file in single.iterdir():
        shutil.copyfile(file, repository / "blobs" / file.name)
        shutil.copyfile(file, other / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert Checkpoint.open(snapshot).linears
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "blobs" / "config.json")
    refused(snapshot, "outside the checkpoint")
    elsewhere = repository / "checkouts" / "0123"  # the rule is for directories in "snapshots" only
    shutil.copytree(snapshot, elsewhere, symlinks=True)
    refused(elsewhere, "outside the checkpoint")


# --- the index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../single/model.safetensors", "must be in a file of this directory"),
        ("./" + SHARDS[0], "must be in a file of this directory"),
        ("sub/" + SHARDS[0], "must be in a file of this directory"),
        ("..", "must be in a .safetensors file"),
        ("", "must be in a .safetensors file"),
        ("\ud800.safetensors", "must be in a file of this directory"),
        ("\x1b[2J.safetensors", "must be in a file of this directory"),
        ("a\n.safetensors", "must be in a file of this directory"),
        ("a.safetensors\0", "must be in a file of this directory"),
        ("n" * 300 + ".safetensors", "is missing"),
        ("n" * 2000 + ".safetensors", "more than 1024 bytes"),
        ("model.safetensors.bin", "must be in a .safetensors file"),
        ("pytorch_model.bin", "must be in a .safetensors file, got 'pytorch_model.bin'"),
        (["a.safetensors"], "must be in a file of this directory"),
        (None, "must be in a file of this directory, got None"),
        (True, "must be in a file of this directory, got True"),
    ],
)
def test_an_index_that_leads_elsewhere(shards: Path, place: object, message: str) -> None:
    edit_index(shards, lambda weight_map: weight_map.update({"model.norm.weight": place}))
    refused(shards, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable JSON"),
        ("[]", "not readable JSON"),
        ("{}", "must hold a non-empty 'weight_map'"),
        ('{"weight_map": {}}', "must hold a non-empty 'weight_map'"),
        ('{"weight_map": null}', "not readable JSON"),
        ('{"weight_map": ["a.safetensors"]}', "not readable JSON"),
        ('{"weight_map": {"a": "a.safetensors"}} {}', "not readable JSON: expected the end"),
        ('{"weight_map": {"a": "a.safetensors"}, "weight_map": {"b": "b.safetensors"}}', "duplicate key 'weight_map'"),
        ('{"weight_map": {"a": "a.safetensors", "\\u0061": "b.safetensors"}}', "duplicate key 'a'"),
        ('{"metadata": {"a": 1, "a": 2}, "weight_map": {"a": "a.safetensors"}}', "duplicate key 'a'"),
        ('{"metadata": ' + "[" * 100_000, "more than 64 arrays"),
        ('{"metadata": [' + "{}," * 600_000 + "1]}", "more than 500000 parts"),
        ('{"weight_map": {"a\\u001b[2J": "a.safetensors"}}', "must be printable"),
        ('{"weight_map": {"' + "a" * 2000 + '": "a.safetensors"}}', "more than 1024 bytes"),
    ],
)
def test_an_index_that_is_none(shards: Path, text: str, message: str) -> None:
    (shards / INDEX).write_text(text)
    refused(shards, message)


def test_an_index_of_more_tensors_than_any_model_has(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit, and so also the bound, at a 20th of what it is, since it takes long to trace allocations."""
    assert format.MAX_INDEX_MEMORY == 60 * 2**20
    monkeypatch.setattr(format, "MAX_INDEX_MEMORY", 3 * 2**20)
    text = '{"weight_map":{' + ",".join(f'"{i:x}":"{i:x}.safetensors"' for i in range(30_000)) + "}}"
    (shards / INDEX).write_text(text)
    tracemalloc.start()
    try:
        refused(shards, r"has more than 9\d{3} tensors, which is more than any model")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - len(text) < 64 / 20 * 2**20


# --- config.json and the quantization config ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "[" * 100_000, "more than 64 arrays"),
        ('{"a": ' + '{"b":' * 100_000, "more than 64 arrays"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "duplicate key 'model_type'"),
        ('{"quantization_config": {"bits": 4, "bits": 8}}', "duplicate key 'bits'"),
        ('{"a": [' + "[]," * 1_000_000 + "1]}", "more than 500000 parts"),
        ('{"a": "' + "x" * 5_000_000 + '"}', "has 5000009 bytes, expected 4194304 at most"),
        ('{"a": ' + "9" * 5000 + "}", "not readable JSON"),
    ],
)
def test_configs_that_are_too_much(single: Path, text: str, message: str) -> None:
    (single / "config.json").write_text(text)
    refused(single, message)


@pytest.mark.parametrize("size", [2**63, 10**400, 10**9, -(2**63), 1e300, True, [64], "64"])
def test_numbers_are_bounded_before_anything_is_made_of_them(single: Path, size: object) -> None:
    (single / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "awq", "group_size": size}})
    )
    refused(single, r"group_size|in_features")


# --- pickles --------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_pickles_are_never_run_whatever_their_name(single: Path, tmp_path: Path) -> None:
    witness = tmp_path / "code was run"
    (single / "model.safetensors").unlink()
    for content, message in (
        (pickle.dumps(Evil(witness), protocol=2), "but a pickle"),
        (b"PK\3\4" + pickle.dumps(Evil(witness)), "a zip file, perhaps a pickle"),
    ):
        (single / "model.safetensors").write_bytes(content)
        refused(single, message)
    torch.save({"a": torch.ones(1)}, single / "model.safetensors")
    refused(single, "a zip file, perhaps a pickle")
    (single / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"):
        (single / name).write_bytes(pickle.dumps(Evil(witness)))
        refused(single, rf"pickles only \({name}\).*convert it once: .*weights_only=True")
        (single / name).unlink()
    assert not witness.exists()
    pickle.loads(pickle.dumps(Evil(witness)))
    assert witness.exists()  # so it would have been
