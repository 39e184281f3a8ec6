"""Safetensors files: the same bytes as the safetensors package, and refusals of everything it refuses, and more."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file

from awq_ext import CheckpointError, bounded_json, storage
from awq_ext.storage import DTYPES, NAME_OF, Writer, bytes_of, read_header, write_order

READABLE = [name for name, (_, dtype) in DTYPES.items() if dtype is not None]


def a_tensor(kind: str, *shape: int) -> torch.Tensor:
    """Random bytes as a tensor; NaNs and the like are among them."""
    bits, dtype = DTYPES[kind]
    assert dtype is not None
    raw = torch.randint(0, 2 if kind == "BOOL" else 256, (torch.Size(shape).numel() * bits // 8,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Every dtype that torch has, in several shapes, named so that the order is not that of the names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = {f"{i % 7}.{kind}": a_tensor(kind, 3, 2 + i) for i, kind in enumerate(READABLE)}
        result |= {"empty": a_tensor("F16", 4, 0), "scalar": a_tensor("I64"), 'quo"ted \\ é 😀': a_tensor("I32", 5)}
    return result


def write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    kinds = {name: (NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    order = write_order(kinds)
    with Writer(file, [(name, *kinds[name]) for name in order], metadata) as writer:
        for name in order:
            writer.write(name, bytes_of(tensors[name]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(bytes_of(a)) == bytes(bytes_of(b))


def raw_file(file: Path, header: bytes | dict[str, Any], data: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return file


# --- the same files as the package ----------------------------------------------------------------------------------


def test_written_files_are_those_of_the_package(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_reading_what_the_package_wrote(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file", metadata={"format": "pt", "note": "é"})
    header = read_header(tmp_path / "file")
    assert header.metadata == {"format": "pt", "note": "é"}
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in header.tensors.items():
        assert same(tensor.read(), tensors[name]), name
        assert (tensor.name, tensor.shard, tensor.nbytes) == (name, "file", tensors[name].nbytes)


def test_genuine_files(shared: Path) -> None:
    files = sorted((shared / "data" / "checkpoints").glob("*/*.safetensors"))
    assert len(files) >= 7
    for file in files:
        theirs = load_file(file)
        ours = read_header(file).tensors
        assert ours.keys() == theirs.keys()
        assert all(same(tensor.read(), theirs[name]) for name, tensor in ours.items()), file


def test_a_tensor_is_read_in_ranges(tmp_path: Path) -> None:
    write(tmp_path / "file", {"a": torch.arange(100, dtype=torch.int32), "b": torch.ones(3)})
    tensor = read_header(tmp_path / "file").tensors["a"]
    buffer = bytearray(40)
    for skip in range(0, 400, 40):
        tensor.read_into(buffer, skip)
        assert buffer == struct.pack("<10i", *range(skip // 4, skip // 4 + 10))
    tensor.read_into(bytearray(), 400)
    for skip in (-1, 361):  # before the tensor, and into the next one
        with pytest.raises(ValueError, match="has 400 bytes, asked for 40"):
            tensor.read_into(buffer, skip)


def test_what_is_read_is_memory_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "file", {"a": torch.zeros(1000)})
    tensor = read_header(tmp_path / "file").tensors["a"].read()
    assert tensor.data_ptr() % 16 == 0
    (tmp_path / "file").write_bytes(b"\xff" * 4096)
    tensor += 1
    assert torch.equal(tensor, torch.ones(1000))


def test_bools_are_bools(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "file", {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}})
    with file.open("ab") as output:
        output.write(b"\0\1\7")
    assert read_header(file).tensors["a"].read().int().tolist() == [0, 1, 1]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F128"])
def test_a_dtype_that_torch_has_not_is_refused_when_it_is_read(dtype: str, tmp_path: Path) -> None:
    file = raw_file(
        tmp_path / "file",
        {
            "a": {"dtype": dtype, "shape": [8], "data_offsets": [0, 4 if dtype == "F4" else 6]},
            "b": {"dtype": "U8", "shape": [1], "data_offsets": [4 if dtype == "F4" else 6, 5 if dtype == "F4" else 7]},
        },
        data=5 if dtype == "F4" else 7,
    )
    found = read_header(file).tensors
    assert found["a"].dtype == dtype and found["b"].read().tolist() == [0]
    with pytest.raises(CheckpointError, match=f"file: a: torch has no dtype '{dtype}'"):
        found["a"].read()


# --- writing --------------------------------------------------------------------------------------------------------


def test_writing_in_chunks_takes_no_more_memory_than_a_chunk(tmp_path: Path) -> None:
    chunk = bytes(range(256)) * 1024
    tracemalloc.start()
    try:
        with Writer(tmp_path / "file", [("a", "U8", (128, len(chunk))), ("none", "F32", (0,)), ("b", "I8", (3,))]) as w:
            for _ in range(128):
                w.write("a", chunk)
            w.write("b", b"abc")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    found = load_file(tmp_path / "file")
    assert found["a"].shape == (128, len(chunk)) and bytes(bytes_of(found["a"][127])) == chunk
    assert found["b"].tolist() == [97, 98, 99] and found["none"].shape == (0,)


def test_data_must_fit(tmp_path: Path) -> None:
    tensors = [("a", "I16", (2,)), ("b", "I16", (1,))]
    for number, (parts, message) in enumerate(
        [
            ([("a", 5)], "expected 4 bytes of a at most, got 5 bytes of a"),
            ([("a", 3), ("a", 2)], "expected 1 bytes of a at most, got 2"),
            ([("b", 2)], "expected 4 bytes of a at most, got 2 bytes of b"),
            ([("a", 3), ("b", 2)], "expected 1 bytes of a at most, got 2 bytes of b"),
            ([("a", 4), ("b", 2), ("a", 4)], "expected 0 bytes of nothing more at most, got 4 bytes of a"),
            ([("a", 4), ("b", 1)], "1 bytes of b were not written"),
            ([], "4 bytes of a were not written"),
        ]
    ):
        file = tmp_path / str(number)
        with pytest.raises(CheckpointError, match=message), Writer(file, tensors) as writer:
            for name, size in parts:
                writer.write(name, bytes(size))
        if sum(size for _, size in parts) < 6:
            with pytest.raises(CheckpointError, match="truncated"):
                read_header(file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "F128", (1,))], "cannot be written as 'F128'"),
        ([("a", "F4", (3,))], r"a: \[3\] F4 takes 1.5 bytes"),
        ([("a", "U8", (-1,))], "whole numbers"),
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "must be different"),
        ([("__metadata__", "U8", (1,))], "must hold one text"),
        ([("a\n", "U8", (1,))], "must be printable"),
        ([("\ud800", "U8", (1,))], "surrogates not allowed|invalid continuation byte"),
        ([("a", "U8", (2**60,))], "too large"),
        ([("a", "U8", (1,) * 65)], "64 dimensions at most"),
    ],
)
def test_what_cannot_be_read_is_not_written(
    tensors: list[tuple[str, str, tuple[int, ...]]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Writer(tmp_path / "file", tensors)
    assert not (tmp_path / "file").exists()


def test_nothing_is_overwritten_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "link").symlink_to("new")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            Writer(tmp_path / name, [])
    assert (tmp_path / "file").read_text() == "years of work" and not (tmp_path / "new").exists()
    Writer(tmp_path / "new", []).close()
    (tmp_path / "probe").touch()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    with safe_open(tmp_path / "new", framework="pt") as empty:
        assert list(empty.keys()) == []


# --- damaged headers ------------------------------------------------------------------------------------------------


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


GOOD = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
# What the package refuses and we do, too, or what it lets pass and we do not: (header, bytes of data, message).
BROKEN: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    "empty": (b"", 0, "expected {"),
    "no JSON": (b'{"a"', 0, "expected : "),
    "a list": (b"[]", 0, "expected {"),
    "not UTF-8": (GOOD.replace(b"a", b"\xff", 1), 4, "codec can't decode"),
    "not UTF-8 in an escaped name": (GOOD.replace(b"a", b"\\n\xff", 1), 4, "codec can't decode"),
    "more after the end": (GOOD + b"x", 4, "expected the end"),
    "NUL after the end": (GOOD + b"\0", 4, "expected the end"),
    "twice the same name": (GOOD[:-1] + b"," + GOOD[1:], 4, "a comes twice"),
    "twice, once escaped": (GOOD[:-1] + b"," + GOOD[1:].replace(b"a", b"\\u0061", 1), 4, "a comes twice"),
    "twice the same key": (GOOD.replace(b'"shape":[4]', b'"shape":[5],"shape":[4]'), 4, "duplicate key 'shape'"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "__metadata__ comes twice"),
    "metadata key twice": (b'{"__metadata__":{"a":"1","a":"2"}}', 0, "one text for each key"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "one text for each key, got 1 for 'a'"),
    "metadata of objects": ({"__metadata__": {"a": {"b": "c"}}}, 0, "one text for each key"),
    "metadata is a text": ({"__metadata__": "pt"}, 0, "expected {"),
    "metadata without end": ({"__metadata__": {str(i): "x" * 2**16 for i in range(17)}}, 0, "1048576 bytes at most"),
    "entry is a number": ({"a": 4}, 4, "a must be an object of dtype, shape and data_offsets, got 4"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, "must be an object of dtype, shape"),
    "one key more": ({"a": entry(more=1)}, 4, "must be an object of dtype, shape"),
    "dtype is a number": ({"a": entry(8)}, 4, "dtype must be a text, got 8"),
    "dtype with a line feed": ({"a": entry("U8\n")}, 4, "dtype must be a text"),
    "shape is a number": ({"a": entry(shape=4)}, 4, "shape must be a list of whole numbers, got 4"),
    "shape of texts": ({"a": entry(shape=["4"])}, 4, "shape must be a list of whole numbers"),
    "shape of booleans": ({"a": entry(shape=[4, True])}, 4, "shape must be a list of whole numbers"),
    "nested shape": ({"a": entry(shape=[[4]])}, 4, "shape must be a list of whole numbers"),
    "null in shape": ({"a": entry(shape=[None])}, 4, "shape must be a list of whole numbers"),
    "negative shape": ({"a": entry(shape=[-2, -2])}, 4, "expected whole numbers of up to 19 digits, got -2"),
    "minus zero": (GOOD.replace(b"[0,4]", b"[-0,4]"), 4, "expected whole numbers of up to 19 digits, got -0"),
    "float": ({"a": entry(shape=[4.0])}, 4, "expected whole numbers, got 4.0"),
    "exponent": (GOOD.replace(b"[4]", b"[4e0]"), 4, "expected whole numbers, got 4e0"),
    "infinity": (GOOD.replace(b"[4]", b"[Infinity]"), 4, "expected whole numbers, got Infinity"),
    "huge number": ({"a": entry(shape=[10**100])}, 4, "up to 19 digits"),
    "thousands of digits": (GOOD.replace(b"[4]", b"[" + b"9" * 4000 + b"]"), 4, "up to 19 digits|more than 4096 bytes"),
    "product over 64 bits": ({"a": entry(shape=[2**62, 2**62, 2**62, 2**62])}, 4, "is too large"),
    "product of 2**64": ({"a": entry(shape=[2**32, 2**32])}, 4, "is too large"),
    "nothing of an absurd shape": ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, 0, "is too large"),
    "many dimensions": ({"a": entry(shape=[1] * 64 + [4])}, 4, "64 dimensions at most, got 65"),
    "too few bytes": ({"a": entry(shape=[5])}, 4, r"a: \[5\] U8 takes 5 bytes, but data_offsets \[0, 4\] has 4"),
    "too many bytes": ({"a": entry(shape=[3])}, 4, r"a: \[3\] U8 takes 3 bytes"),
    "half a byte": ({"a": entry("F4", [7])}, 4, r"a: \[7\] F4 takes 3.5 bytes"),
    "three offsets": ({"a": entry(offsets=[0, 2, 4])}, 4, r"must be \[begin, end\]"),
    "offsets in reverse": ({"a": entry(offsets=[4, 0])}, 4, r"must be \[begin, end\]"),
    "gap at the beginning": ({"a": entry(offsets=[1, 5])}, 5, "a leaves a gap after the header: it must begin at 0"),
    "gap": ({"a": entry(), "b": entry(offsets=[5, 9])}, 9, "b leaves a gap after a: it must begin at 4, got 5"),
    "overlap": ({"a": entry(), "b": entry(offsets=[3, 7])}, 7, "b overlaps a: it must begin at 4, got 3"),
    "the same bytes": ({"a": entry(), "b": entry()}, 4, "b overlaps a: it must begin at 4, got 0"),
    "unknown dtypes overlap": ({"a": entry("Q8"), "b": entry("Q8")}, 4, "b overlaps a"),
    "data missing": ({"a": entry()}, 3, "it must have 72 bytes, up to the end of a, got 71"),
    "data left over": ({"a": entry()}, 5, "up to the end of a, got 73"),
    "data without tensors": (b"{}", 1, "it must have 10 bytes, up to the end of the header, got 11"),
    "control character": ({"a\x1b[2J": entry()}, 4, r"must be printable, got 'a\\x1b\[2J'"),
    "half a surrogate pair": (GOOD.replace(b"a", b"\\ud800", 1), 4, "must be printable"),
    "long name": ({"a" * 1025: entry()}, 4, "more than 1024 bytes"),
    "deep": (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", 4, "more than 64 arrays and objects in each other"),
    "very deep": (b'{"a":' + b'{"a":' * 10**6, 4, "more than 64 arrays and objects in each other"),
    "only spaces": (b" " * 1000, 0, "expected {"),
    "unfinished text": (b'{"a', 0, "does not end"),
    "unfinished escape": (b'{"a\\', 0, "does not end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(case: str, tmp_path: Path) -> None:
    header, data, message = BROKEN[case]
    file = raw_file(tmp_path / "file", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 500
    raw_file(file, GOOD, 4)
    assert read_header(file).tensors["a"].read().tolist() == [0] * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: the length of the header must have 8 bytes from byte 0 on, got 0"),
        (b"\1\0\0", "got 3"),
        (struct.pack("<Q", 100) + b"{}", "the header has 100 bytes, expected 2 at most"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "the header has 18446744073709551615 bytes"),
        (struct.pack("<q", -8) + b"{}", "expected 2 at most"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git-lfs .* 'git lfs pull'"),
        (b"PK\3\4" + bytes(100), "a zip file, perhaps a pickle of torch.save"),
        (b"\x80\2}q\0." + bytes(100), "but a pickle"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_broken_beginnings(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "file")


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as output:
        output.write(struct.pack("<Q", 100_000_001))
        output.truncate(200_000_000)  # a hole: it takes no space
    with pytest.raises(CheckpointError, match="has 100000001 bytes, expected 100000000 at most"):
        read_header(tmp_path / "file")


def many(count: int, name: str = "{:x}", entry: str = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}') -> bytes:
    return ("{" + ",".join(f'"{name.format(i)}":{entry}' for i in range(count)) + "}").encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param(many(20_000), "more than .* tensors in one file; split", id="many tensors"),
        pytest.param(many(2000, name="{:x}" + "a" * 400 + "😀"), None, id="wide names"),
        pytest.param(
            many(5000, entry='{"dtype":"U8","shape":[0' + ",999" * 5 + '],"data_offsets":[0,0]}'),
            None,
            id="many dimensions",
        ),
        pytest.param(b'{"a":[' + b"[]," * 300_000 + b"0]}", "more than 4096 bytes", id="brackets"),
        pytest.param(b'{"' + b"\\\\" * 300_000 + b'":0}', "more than 1024 bytes", id="escapes"),
        pytest.param(
            b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(10_000)) + b"}}",
            "65536 bytes at most",
            id="metadata",
        ),
        pytest.param(b"{" + b" " * 10_000_000 + b"}", None, id="spaces"),
    ],
)
def test_memory_is_bounded_whatever_the_header_says(
    header: bytes, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits at a 10th or less, since it takes long to trace allocations; so also the bound of 64 MiB."""
    assert storage.MAX_HEADER_MEMORY == 40 * 2**20 and storage.MAX_METADATA_BYTES == 2**20
    monkeypatch.setattr(storage, "MAX_HEADER_MEMORY", 4 * 2**20)
    monkeypatch.setattr(storage, "MAX_METADATA_BYTES", 2**16)
    file = raw_file(tmp_path / "file", header)
    tracemalloc.start()
    try:
        if message is None:
            read_header(file)
        else:
            with pytest.raises(CheckpointError, match=message):
                read_header(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - len(header) < 64 / 10 * 2**20


# --- files that are no plain files, and files that change -----------------------------------------------------------


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("fifo", "must be a file, got a FIFO"),  # and opening it does not wait for a writer
        (".", "must be a file, got a directory"),
        ("null", "must be a file, got a device"),
        ("zero", "must be a file, got a device"),
        ("dangling", "cannot be opened: .*No such file"),
        ("loop", "cannot be opened: .*symbolic links"),
        ("n" * 300, "cannot be opened: .*too long"),
        ("nul\0", "cannot be opened"),
        ("\ud800", "cannot be opened"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_header(tmp_path / name)


def test_a_file_cut_off_after_its_header_was_read(tmp_path: Path) -> None:
    """Where a map of the file would kill the process."""
    file = raw_file(tmp_path / "file", {"a": entry(shape=[2**20], offsets=[0, 2**20])}, 2**20)
    tensor = read_header(file).tensors["a"]
    os.truncate(file, 5000)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        tensor.read()


def test_a_file_replaced_after_its_header_was_read(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "file", GOOD, 4)
    tensor = read_header(file).tensors["a"]
    os.replace(raw_file(tmp_path / "other", GOOD, 4), file)
    with pytest.raises(CheckpointError, match=r"file: a: the file changed since it was opened"):
        tensor.read()
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        tensor.read()


def test_a_file_cut_off_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = raw_file(tmp_path / "file", {"a": entry(shape=[2**16], offsets=[0, 2**16])}, 2**16)
    tensor, preadv = read_header(file).tensors["a"], os.preadv

    def piecewise(descriptor: int, buffers: list[memoryview], position: int) -> int:
        count = preadv(descriptor, [buffers[0][:30_000]], position)
        os.truncate(file, 50_000)
        return count

    monkeypatch.setattr(os, "preadv", piecewise)
    with pytest.raises(CheckpointError, match=r"truncated: a must have 65536 bytes from byte \d+ on, got 49\d\d\d"):
        tensor.read()


def test_errors_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = raw_file(tmp_path / "file", GOOD, 4)
    tensor = read_header(file).tensors["a"]

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"a cannot be read: .*Input/output error"):
        tensor.read()
    with pytest.raises(CheckpointError, match="the length of the header cannot be read"):
        read_header(file)


def test_more_than_memory_can_hold(tmp_path: Path) -> None:
    size = 2**55  # a tensor in a file with a hole, as far as the header says
    source = storage.Source(tmp_path / "file", ())
    with pytest.raises(CheckpointError, match=f"a: {size} bytes of memory cannot be had"):
        storage.TensorInfo("a", "U8", (size,), 8, 8 + size, source).read()


# --- against the package --------------------------------------------------------------------------------------------


def mutate_json(rng: random.Random, header: dict[str, Any]) -> None:
    """One change of a header's values or names."""
    numbers: list[Any] = [0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 2**31, 2**32, 2**63, 2**64, -1, 1.0, True, None, "4", []]
    values: list[Any] = [*numbers, {}, "U8", "F32", "F4", "f16", "", [[]], {"a": "b"}]
    names = [name for name in header if isinstance(header[name], dict)]
    name = rng.choice(names or [""])
    fields = header.get(name)
    if not fields or rng.random() < 0.1:
        header[rng.choice(["", "a", "__metadata__", "new", *names])] = rng.choice([*values, *header.values()])
        return
    key = rng.choice(list(fields))
    if isinstance(fields[key], list) and rng.random() < 0.7:
        numbers_there = fields[key] = list(fields[key])
        change = rng.randrange(3)
        if change == 0 and numbers_there:
            numbers_there[rng.randrange(len(numbers_there))] = rng.choice(numbers)
        elif change == 1:
            numbers_there.insert(rng.randrange(len(numbers_there) + 1), rng.choice(numbers))
        elif numbers_there:
            numbers_there.pop(rng.randrange(len(numbers_there)))
    elif rng.random() < 0.2:
        del fields[key]
    elif rng.random() < 0.3:
        fields[key + rng.choice(["", "x", " "])] = rng.choice(values)
    else:
        other = header[rng.choice(names)]
        fields[key] = rng.choice([*values, *DTYPES, *(other.values() if isinstance(other, dict) else ())])


def mutate_text(rng: random.Random, text: bytearray) -> None:
    """One change of a header's bytes."""
    at = rng.randrange(len(text) + 1)
    change = rng.randrange(5)
    if change == 0 and at < len(text):
        text[at] = rng.randrange(256)
    elif change == 1 and at < len(text):
        text[at] = rng.choice(b'0123456789"{}[],:-.eE \\')
    elif change == 2:
        text[at:at] = rng.choice([b" ", b"\n", b'"', b",", b"0", b"1", b"-", b"\\", b"\0", b"{", b"[", b"\xff", b"\t"])
    elif change == 3:
        del text[at : at + rng.randint(1, 4)]
    else:
        begin = rng.randrange(len(text) + 1)
        text[at:at] = text[begin : begin + rng.randint(1, 60)]


def test_everything_the_package_refuses_is_refused(tmp_path: Path) -> None:
    """The opposite does not hold: duplicates, control characters, other keys and absurd shapes are refused here."""
    rng = random.Random(0)
    base = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("U8", [4], [24, 28]),
        "c": entry("F4", [2, 2], [28, 30]),
        "d": entry("I64", [], [30, 38]),
        "e": entry("F16", [0, 5], [38, 38]),
    }
    file = tmp_path / "file"
    both, refused, accepted = 0, 0, 0
    for _ in range(6000):
        header = json.loads(json.dumps(base))
        for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
            mutate_json(rng, header)
        text = bytearray(json.dumps(header, separators=rng.choice([(",", ":"), (", ", ": ")])).encode())
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
            mutate_text(rng, text)
        length = len(text) + rng.choice([0] * 50 + [-1, 1, 8, 2**32, 2**63])
        content = struct.pack("<Q", length % 2**64) + bytes(text) + bytes(38 + rng.choice([0] * 50 + [-1, 1]))
        file.write_bytes(content[: rng.choice([len(content)] * 50 + [4, 20])])
        try:
            expected = {name: theirs["shape"] for name, theirs in deserialize(file.read_bytes())}
        except SafetensorError:
            expected = None
        try:
            ours = read_header(file).tensors
            for tensor in ours.values():
                if tensor.dtype not in ("F4", "F6_E2M3", "F6_E3M2"):  # which torch cannot have
                    tensor.read()
        except CheckpointError:
            refused += expected is None
        else:
            assert expected is not None, content
            assert {name: list(tensor.shape) for name, tensor in ours.items()} == expected
            both += 1
            continue
        accepted += expected is not None
    assert refused > 3000 and both > 500, (refused, both, accepted)


# --- JSON -----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_json_is_read_as_by_the_standard_library(value: Any, ascii_only: bool, indent: int | str | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        with pytest.raises(ValueError, match="codec"):
            bounded_json.loads(text)
        return
    assert bounded_json.loads(text) == expected
    if isinstance(value, dict):
        scanner = bounded_json.Scanner(text)
        assert {key: scanner.value(len(text)) for key in scanner.members()} == expected
        scanner.end()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "duplicate key 'b'"),
        (b'[{"a": 1, "\\u0061": 2}]', "duplicate key 'a'"),
        (b"[1] 2", "expected the end"),
        (b"[1}", "Expecting"),
        (b"[1]]", "expected the end"),
        (b"1,2", "expected the end"),
        (b'"\xff"', "codec can't decode"),
        (b'"a', "does not end"),
        (b'{"a" "b"}', "Expecting"),
        (b"[" * 65 + b"]" * 65, "more than 64 arrays"),
        (b"[" + b"{}," * 200_000 + b"{}]", "more than 500000 parts"),
        (b"1" * 5000, "digits"),
    ],
)
def test_json_that_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded_json.loads(text)


def test_a_key_that_comes_twice_is_found_in_one_pass() -> None:
    text = "{" + ",".join(f'"{i}":0' for i in range(150_000)) + ',"149999":0}'  # comparing all pairs takes minutes
    with pytest.raises(ValueError, match="duplicate key '149999'"):
        bounded_json.loads(text.encode())


def test_strings_of_many_escapes_are_strings() -> None:
    value = {"a": '"' * 10_000 + "\\" * 10_001, "b": "[{" * 1000}
    assert bounded_json.loads(json.dumps(value).encode()) == value
    scanner = bounded_json.Scanner(json.dumps(value).encode())
    assert {key: scanner.value(10**6) for key in scanner.members()} == value
