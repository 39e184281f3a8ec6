"""Mutates checkpoint directories and opens them. The one exception allowed is CheckpointError.

A program of its own, so that a crash is seen by whoever started it and memory can be limited::

    python tests/fuzz/fuzzer.py --inputs 1000000 --seed 0 --samples ../shared/data/checkpoints --keep failures

Input number i of seed s is the same on every run: ``--seed s --first i --inputs 1`` repeats it. Several processes with
different seeds do different inputs. The last line on stdout is a JSON object that says what was done.

What is checked for each input: no exception but CheckpointError, whose text is short, printable and names a file; no
more than 64 MiB above the directory's own size, by address space (RLIMIT_AS) at every moment and by resident memory
over each batch; no more than 10 seconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from awq_ext.checkpoint import Checkpoint, QuantConfig
from awq_ext.errors import CheckpointError

MEMORY = 64 * 2**20
BATCH = 500
SECONDS = 10
BOMBS = 0.0005
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIZES = {"I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "U8": 1, "I8": 1, "BOOL": 1, "F64": 8}

# A directory in memory: file name -> content, or what to put there instead of a file.
Files = dict[str, "bytes | Special"]
# A safetensors file in pieces: tensor name -> (dtype, shape, bytes).
Tensors = dict[str, tuple[Any, Any, bytes]]


class Special:
    """Something that is no regular file."""

    def __init__(self, kind: str, target: str = "") -> None:
        self.kind, self.target = kind, target

    def make(self, file: Path) -> None:
        if self.kind == "link":
            file.symlink_to(self.target)
        elif self.kind == "fifo":
            os.mkfifo(file)
        elif self.kind == "directory":
            file.mkdir()
        elif self.kind == "sparse":
            with file.open("wb") as output:
                output.write(struct.pack("<Q", 2**20))
                output.truncate(2**34)
        else:
            raise ValueError(self.kind)


# --- samples --------------------------------------------------------------------------------------------------------


def parse(content: bytes) -> Tensors:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def header_of(tensors: Tensors) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header


def build(tensors: Tensors, header: str | bytes | dict[str, Any] | None = None, length: int | None = None) -> bytes:
    if header is None:
        header = header_of(tensors)
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    prefix = struct.pack("<Q", (len(text) if length is None else length) % 2**64)
    return prefix + text + b"".join(data for _, _, data in tensors.values())


def excerpt(path: Path) -> Files:
    """A genuine checkpoint reduced to two quantized linears and a norm, so that an input takes little time."""
    tensors = parse((path / WEIGHTS).read_bytes())
    owners = ("model.layers.0.self_attn.k_proj.", "model.layers.1.self_attn.v_proj.", "model.norm.")
    files: Files = {WEIGHTS: build({name: t for name, t in tensors.items() if name.startswith(owners)})}
    for name in ("config.json", "quantize_config.json", "quantization_config.json"):
        if (path / name).exists():
            files[name] = (path / name).read_bytes()
    return files


def gemm() -> Files:
    """A made-up checkpoint of one linear in the gemm layout."""
    rng = random.Random(0)
    n, k, g = 16, 64, 32
    scales = struct.pack(f"<{n * k // g}e", *(rng.uniform(0.01, 0.1) for _ in range(n * k // g)))
    tensors: Tensors = {
        "model.a.qweight": ("I32", [k, n // 8], rng.randbytes(k * n // 2)),
        "model.a.qzeros": ("I32", [k // g, n // 8], rng.randbytes(k // g * n // 2)),
        "model.a.scales": ("F16", [k // g, n], scales),
        "model.a.bias": ("F16", [n], bytes(2 * n)),
        "model.b.weight": ("BF16", [4], bytes(8)),
    }
    quant = {"quant_method": "awq", "bits": 4, "group_size": g, "zero_point": True, "version": "gemm"}
    config = {"model_type": "llama", "quantization_config": quant | {"modules_to_not_convert": None}}
    return {"config.json": json.dumps(config).encode(), WEIGHTS: build(tensors)}


def legacy(files: Files) -> Files:
    """The same checkpoint with its quantization config in a file of its own, in the old spelling."""
    config = json.loads(files["config.json"])  # type: ignore[arg-type]
    quant = config.pop("quantization_config")
    old = {"zero_point": True, "q_group_size": quant["group_size"], "w_bit": 4, "version": "GEMM"}
    return {**files, "config.json": json.dumps(config).encode(), "quant_config.json": json.dumps(old).encode()}


def sharded(files: Files) -> Files:
    """The same checkpoint in two shards with an index."""
    content = files[WEIGHTS]
    assert isinstance(content, bytes)
    tensors = parse(content)
    names = list(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    result = {name: content for name, content in files.items() if name != WEIGHTS}
    for shard, half in zip(SHARDS, halves, strict=True):
        result[shard] = build({name: tensors[name] for name in half})
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    result[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return result


def all_samples(directory: Path | None) -> list[Files]:
    made = gemm()
    samples = [made, legacy(made), sharded(made)]
    for path in sorted(directory.iterdir()) if directory is not None else ():
        if (path / WEIGHTS).is_file():
            samples += [excerpt(path), sharded(excerpt(path))]
    return samples


# --- mutations ------------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 100, 128, 255, 256, 1024, 4096, 2**16, 2**31 - 1, 2**31, 2**32, 2**33),
    *(2**48, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, 10**30, -1, -2, -8, -128, -(2**31), -(2**63)),
    *(0.0, 1.0, 4.0, 0.5, -1.0, 1e300, math.nan, math.inf, -math.inf),
)
TEXTS = (
    *("", " ", "4", "128", "awq", "AWQ", "gemm", "GEMM", "gemv", "gemv_fast", "marlin", "gptq", "gptq_v2", "exllama"),
    *("llm-awq", "compressed-tensors", "pack-quantized", "auto-round", "auto_round:auto_gptq", "true", "int", "group"),
    *("channel", "static", "weight", "F16", "BF16", "F32", "I32", "I16", "U8", "F8_E4M3", "F4", "BOOL", "x" * 2000),
    *("\ud800", "\0", "\x1b[31m", "é", "😀", "\n", "../x.safetensors", "/etc/passwd", "model.safetensors", "a\\b"),
    *("%s%n", "{}", "__metadata__", "..", ".", "\u202e", "\x7f"),
)
KEYS = (
    *(
        "quantization_config",
        "quant_method",
        "method",
        "bits",
        "w_bit",
        "group_size",
        "q_group_size",
        "zero_point",
        "sym",
    ),
    *(
        "version",
        "format",
        "checkpoint_format",
        "packing_format",
        "modules_to_not_convert",
        "desc_act",
        "config_groups",
    ),
    *("ignore", "weights", "num_bits", "type", "strategy", "actorder", "symmetric", "backend", "dynamic", "lm_head"),
    *("weight_map", "metadata", "__metadata__", "dtype", "shape", "data_offsets", "text_config", "targets", "group_0"),
)
PARTS = (
    *("qweight", "qzeros", "scales", "bias", "g_idx", "scaled_zeros", "weight_packed", "weight_scale", "weight_shape"),
    *("weight_zero_point", "weight_g_idx", "weight", "act.scales", "inv_freq", ""),
)
FILE_NAMES = (WEIGHTS, INDEX, "config.json", "quant_config.json", "quantize_config.json", *SHARDS)

# What a mutation may meet that finds the work of another one.
SPOILT = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError),
    struct.error,
)


def a_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7 or depth > 3:
        return rng.choice([None, True, False, [], {}])
    if kind == 8:
        return [a_value(rng, depth + 1) for _ in range(rng.choice([1, 2, 3, 20]))]
    return {rng.choice(KEYS + TEXTS): a_value(rng, depth + 1) for _ in range(rng.choice([1, 2, 5]))}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or position) in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from places(inner)


def change_json(rng: random.Random, value: Any) -> Any:
    """The value with one change somewhere; it is changed in place where it can be."""
    found = list(places(value))
    if not found or rng.random() < 0.02:
        return a_value(rng)
    container, key = rng.choice(found)
    kind = rng.randrange(8)
    if kind < 3:
        container[key] = a_value(rng)
    elif kind == 3:
        del container[key]
    elif kind == 4 and isinstance(container, dict):
        container[rng.choice(KEYS + TEXTS)] = container.pop(key) if rng.random() < 0.5 else a_value(rng)
    elif kind == 5:
        other, place = rng.choice(found)
        with contextlib.suppress(KeyError, IndexError):
            container[key] = json.loads(json.dumps(other[place]))
    elif kind == 6 and isinstance(container[key], (int, float)):
        container[key] = container[key] + rng.choice([1, -1, 8, -8]) if rng.random() < 0.7 else -container[key]
    else:
        for _ in range(rng.choice([1, 5, 70])):
            container[key] = [container[key]] if rng.random() < 0.5 else {rng.choice(KEYS): container[key]}
    return value


def dump(rng: random.Random, value: Any) -> bytes:
    """JSON text, now and then with what only a text can have."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, None, 1]))
    if rng.random() < 0.05 and '"' in text:  # a key twice
        pair = re.search(r'"[^"]*": ?("[^"]*"|\d+)', text)
        if pair:
            text = text.replace(pair[0], f"{pair[0]}, {pair[0]}", 1)
    if rng.random() < 0.01:
        text = rng.choice(["[", '{"a":', "[[],"]) * rng.choice([100, 5000, 100_000]) + text
    return text.encode("utf-8", "surrogatepass")


def change_bytes(rng: random.Random, content: bytes, most: int | None = None) -> bytes:
    """The content with a few bytes changed within the first ``most``."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(min(len(changed), most or len(changed)) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.choice(b'0123456789"{}[],:-.eE \\\0\xff')
        elif kind == 2:
            changed[at:at] = rng.choice(
                [b" ", b'"', b",", b"0", b"9" * 30, b"-", b"\\", b"\\u0061", b"{", b"\xff", b"}"]
            )
        elif kind == 3:
            del changed[at : at + rng.choice([1, 2, 8, 50])]
        elif kind == 4:
            begin = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + rng.choice([1, 4, 40])]
        else:
            changed[at : at + 4] = rng.choice([b"\0" * 4, b"\xff" * 4, struct.pack("<I", rng.choice(range(200)))])
    return bytes(changed)


def weight_files(files: Files) -> list[str]:
    return [name for name in files if name.endswith(".safetensors") and isinstance(files[name], bytes)]


def json_files(files: Files) -> list[str]:
    return [name for name in files if name.endswith(".json") and isinstance(files[name], bytes)]


def of_weights(change: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, Files], None]:
    def mutate(rng: random.Random, files: Files) -> None:
        names = weight_files(files)
        if names:
            name = rng.choice(names)
            content = files[name]
            assert isinstance(content, bytes)
            with contextlib.suppress(*SPOILT):
                files[name] = change(rng, content)

    return mutate


def header_bytes(rng: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    text = change_bytes(rng, content[8 : 8 + length])
    stated = len(text) if rng.random() < 0.8 else length
    return struct.pack("<Q", stated) + text + content[8 + length :]


def header_structure(rng: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2, 3])):
        header = change_json(rng, header)
    text = dump(rng, header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def header_length(rng: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    number = rng.choice([length + rng.choice([-8, -1, 1, 8]), *(n for n in NUMBERS if isinstance(n, int))])
    return struct.pack("<Q", number % 2**64) + content[8:]


def sized(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
    """A tensor of this shape whose data begins like ``data``, so that the header stays true."""
    size = math.prod(shape) * SIZES[dtype]
    if size > 2**20:
        raise ValueError("a shape that an earlier change made absurd")
    return dtype, shape, (data * (size // max(len(data), 1) + 1))[:size] if data else bytes(size)


def consistent(rng: random.Random, content: bytes) -> bytes:
    """Tensors that are not what they should be, in a file that is true to its header."""
    tensors = parse(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        names = list(tensors)
        if not names:
            break
        name = rng.choice(names)
        dtype, shape, data = tensors[name]
        kind = rng.randrange(9)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            owner = name.rpartition(".")[0]
            tensors[f"{owner}.{rng.choice(PARTS)}"] = tensors.pop(name)
        elif kind == 2:
            tensors[rng.choice(["", "x.", "model."]) + rng.choice(PARTS)] = tensors[name]
        elif kind == 3:
            dtypes = [other for other in SIZES if SIZES[other] == SIZES.get(dtype)]
            tensors[name] = (rng.choice(dtypes or ["F16"]), shape, data)
        elif kind == 4:
            tensors[name] = sized(rng.choice(list(SIZES)), shape, data)
        elif kind == 5:
            shapes = [shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], [0, *shape[1:]], [*shape, 0]]
            shape = rng.choice(shapes)
            tensors[name] = (dtype, shape, data if math.prod(shape) else b"")
        elif kind == 6:
            new = list(shape)
            for _ in range(rng.choice([1, 1, 2])):
                if new:
                    at = rng.randrange(len(new))
                    new[at] = rng.choice(
                        [0, 1, 2, 7, 8, new[at] + 1, new[at] - 1, new[at] * 2, new[at] // 2, new[at] * 8]
                    )
            new = [max(size, 0) for size in new]
            if math.prod(new) < 2**18:
                tensors[name] = sized(dtype, new, data)
        elif kind == 7:
            other = rng.choice(names)
            tensors[name], tensors[other] = tensors[other], tensors[name]
        else:
            tensors[name] = sized(dtype, rng.choice([[], [1], [0], [2], [1, 1], [3, 3, 3]]), data)
    items = list(tensors.items())
    if rng.random() < 0.1:
        rng.shuffle(items)
    return build(dict(items))


def data_values(rng: random.Random, content: bytes) -> bytes:
    """Other values in the tensors: all the bits there are, NaN, infinity, zero."""
    tensors = parse(content)
    for _ in range(rng.choice([1, 2, 5])):
        name = rng.choice(list(tensors))
        dtype, shape, data = tensors[name]
        changed = bytearray(data)
        if not changed:
            continue
        size = SIZES.get(dtype, 1)
        for _ in range(rng.choice([1, 3, 30])):
            at = rng.randrange(len(changed) // size) * size
            value = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size), b"\0" * (size - 1) + b"\x80"])
            changed[at : at + size] = value
        if rng.random() < 0.1:
            changed = bytearray(rng.randbytes(len(changed)))
        tensors[name] = (dtype, shape, bytes(changed))
    return build(tensors)


def cut_or_extend(rng: random.Random, content: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        return content[: rng.choice([0, 1, 7, 8, 9, 16, len(content) - 1, len(content) // 2])]
    if kind == 2:
        return content + rng.randbytes(rng.choice([1, 8, 1000]))
    if kind == 3:
        return rng.randbytes(rng.choice([0, 8, 100, 5000]))
    begin = rng.choice([b"PK\3\4", b"version https://git-lfs", b"<html>", b"\x80\2", b"{}", b"\0" * 8])
    return begin + content[len(begin) :]


def json_structure(rng: random.Random, files: Files) -> None:
    names = json_files(files)
    name = rng.choice(names) if names else "config.json"
    with contextlib.suppress(*SPOILT):
        value = json.loads(files.get(name, b"{}"))  # type: ignore[arg-type]
        for _ in range(rng.choice([1, 1, 2, 3])):
            value = change_json(rng, value)
        files[name] = dump(rng, value)


def quant_keys(rng: random.Random, files: Files) -> None:
    """Other values for keys of the quantization config."""
    with contextlib.suppress(*SPOILT):
        name = rng.choice([file for file in json_files(files) if file != INDEX])
        value = json.loads(files[name])  # type: ignore[arg-type]
        quant = value.get("quantization_config", value)
        for _ in range(rng.choice([1, 1, 2])):
            quant[rng.choice(KEYS[1:])] = a_value(rng)
        files[name] = dump(rng, value)


def json_bytes(rng: random.Random, files: Files) -> None:
    names = json_files(files)
    if names:
        name = rng.choice(names)
        content = files[name]
        assert isinstance(content, bytes)
        files[name] = rng.choice([change_bytes, change_bytes, change_bytes, cut_or_extend])(rng, content)


def index_places(rng: random.Random, files: Files) -> None:
    """An index that sends readers elsewhere."""
    with contextlib.suppress(*SPOILT):
        value = json.loads(files[INDEX])  # type: ignore[arg-type]
        places = value["weight_map"]
        name = rng.choice([*places, *places, "new.weight", "model.a.scales", "", "\ud800", "a\nb"])
        targets = [
            *FILE_NAMES,
            *TEXTS,
            "../" + SHARDS[0],
            "./" + SHARDS[0],
            "n" * 300 + ".safetensors",
            "\0.safetensors",
        ]
        targets += ["\ud800.safetensors", "\x1b[2J.safetensors", ".safetensors", "..safetensors", 3, None, [SHARDS[0]]]
        places[name] = rng.choice(targets)
        if rng.random() < 0.3:
            del places[rng.choice(list(places))]
        files[INDEX] = dump(rng, value)


def directory_entries(rng: random.Random, files: Files) -> None:
    """Files that are missing, doubled, swapped, or no files."""
    name = rng.choice(list(files) or [WEIGHTS])
    other = rng.choice([*FILE_NAMES, "pytorch_model.bin", "other.safetensors", "generation_config.json"])
    kind = rng.randrange(6)
    if kind == 0:
        files.pop(name, None)
    elif kind == 1:
        files[other] = files.get(name, b"")
    elif kind == 2 and name in files:
        files[other] = files.pop(name)
    elif kind == 3:
        files[other], files[name] = files.get(name, b""), files.get(other, b"")
    else:
        special = [Special("fifo"), Special("directory"), Special("sparse")]
        links = [
            name,
            other,
            ".",
            "..",
            "/dev/zero",
            "/dev/null",
            "/etc/passwd",
            "../elsewhere",
            "/proc/self/mem",
            "x" * 300,
        ]
        files[name] = rng.choice(special + [Special("link", target) for target in links])


MUTATIONS: dict[str, tuple[int, Callable[[random.Random, Files], None]]] = {
    "header bytes": (14, of_weights(header_bytes)),
    "header structure": (16, of_weights(header_structure)),
    "header length": (3, of_weights(header_length)),
    "other tensors": (24, of_weights(consistent)),
    "data": (10, of_weights(data_values)),
    "cut or extended": (5, of_weights(cut_or_extend)),
    "JSON structure": (10, json_structure),
    "quantization keys": (12, quant_keys),
    "JSON bytes": (6, json_bytes),
    "index": (6, index_places),
    "directory": (2, directory_entries),
}


def mutated(rng: random.Random, sample: Files) -> tuple[Files, list[str]]:
    files = dict(sample)
    weights = [weight for weight, _ in MUTATIONS.values()]
    kinds = rng.choices(list(MUTATIONS), weights, k=rng.choice([1, 1, 1, 1, 2, 3]))
    for kind in kinds:
        MUTATIONS[kind][1](rng, files)
    return files, kinds


def bomb(rng: random.Random, sample: Files) -> Files:
    """Megabytes in the place of one file: short texts of which much could be made."""
    size = rng.choice([2**18, 2**20, 2**22])
    unit = rng.choice(
        ["[],", "{},", '"",', "0,", '{"":[]},', '"a😀",', "[", '{"a":', '"\\\\\\\\",', " ", "\\", "é", '1e5,"b":']
    )
    text = rng.choice(['{"a":', '{"a":[', '{"', "[", '{"weight_map":{"a":"', '{"__metadata__":{"a":"']) + unit * (
        size // len(unit)
    )
    if rng.random() < 0.5:
        entry = rng.choice(
            ['{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', f'"{SHARDS[0]}"', '"%x.safetensors"', "[]"]
        )
        name = rng.choice(["%x", "%x.qweight", "%x.scales", "model.a%x😀", "x" * 500 + "%x"])
        items = ((name + '": ' + entry).replace("%x", format(i, "x")) for i in range(size // (len(name) + len(entry))))
        begin = rng.choice(["", '"weight_map":{', '"__metadata__":{', '"quantization_config":{'])
        text = "{" + begin + ",".join('"' + item for item in items) + ("}}" if begin else "}")
    content = text.encode()
    name = rng.choice([file for file in sample if file.endswith((".json", ".safetensors"))])
    prefix = struct.pack("<Q", len(content)) if name.endswith(".safetensors") else b""
    return {**sample, name: prefix + content}


# --- running --------------------------------------------------------------------------------------------------------


class Directory:
    """A directory that is brought from one input to the next with as few writes as possible."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.there: Files = {}
        path.mkdir()

    def hold(self, files: Files) -> None:
        for name in [name for name, content in self.there.items() if files.get(name) is not content]:
            self._remove(name)
        for name, content in files.items():
            if name not in self.there:
                file = self.path / name
                file.write_bytes(content) if isinstance(content, bytes) else content.make(file)
                self.there[name] = content

    def _remove(self, name: str) -> None:
        file = self.path / name
        file.rmdir() if os.path.isdir(file) and not os.path.islink(file) else file.unlink()
        del self.there[name]


def use(path: Path, rng: random.Random) -> None:
    """What a reader does with a checkpoint."""
    checkpoint = Checkpoint.open(path)
    for name, tensor in checkpoint.tensors():
        assert tensor.shape == checkpoint.info[name].shape
    for name in checkpoint.linears:
        checkpoint.groups(name)
    if rng.random() < 0.1:
        for name, linear in checkpoint.linears.items():
            assert checkpoint.weight(name).shape == (linear.out_features, linear.in_features)


def use_config(rng: random.Random, sample: Files) -> None:
    """The quantization config by itself, which takes no file."""
    quant = json.loads(sample["config.json"]).get("quantization_config") or {}  # type: ignore[arg-type]
    for _ in range(rng.choice([1, 2, 3])):
        if rng.random() < 0.5:
            quant[rng.choice(KEYS)] = a_value(rng)
        else:
            changed = change_json(rng, quant)
            quant = changed if isinstance(changed, dict) else {}
    config = QuantConfig.from_dict(quant, "/config.json")
    again = QuantConfig.from_dict(config.to_dict(), "again")
    assert again.group_size == config.group_size and again.zero_point == config.zero_point, (config, again)


def memory_of(field: str) -> int:
    """A field of /proc/self/status (VmSize, VmRSS, VmHWM) in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s*(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def limit_memory(size: int) -> int:
    """From here on at most 64 MiB more than ``size`` and what is there now; the resident memory now."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_of("VmSize") + MEMORY + size, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return memory_of("VmRSS")


class TooLong(BaseException):
    pass


def on_alarm(*_: object) -> None:
    raise TooLong(f"takes more than {SECONDS} s")


class Fuzzer:
    def __init__(self, seed: int, samples: list[Files], work: Path, keep: Path | None) -> None:
        self.seed, self.samples, self.work, self.keep = seed, samples, work, keep
        self.directories = [Directory(work / str(i)) for i in range(len(samples))]
        (work / "elsewhere").write_text("not to be read")
        self.failures: list[dict[str, Any]] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.opened: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.before = 0  # resident memory when the limit was set last
        self.largest = max(sum(len(c) for c in files.values() if isinstance(c, bytes)) for files in samples)

    def run(self, first: int, count: int) -> None:
        progress = os.open(self.work / "current", os.O_WRONLY | os.O_CREAT, 0o644)
        for batch in range(first, first + count, BATCH):
            self.before = limit_memory(2 * self.largest)
            for number in range(batch, min(batch + BATCH, first + count)):
                os.pwrite(progress, b"%20d" % number, 0)  # for whoever finds a crash
                self.one(number)
            above = memory_of("VmHWM") - self.before
            if above > MEMORY + 2 * self.largest:
                self.fail(batch, f"resident memory grew by {above} bytes in the inputs from here on", {})
        os.close(progress)

    def one(self, number: int) -> None:
        rng = random.Random(f"{self.seed}:{number}")
        at = rng.randrange(len(self.samples))
        files: Files = {}
        kinds = ["config alone"]
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            try:
                share = rng.random()
                if share < BOMBS:
                    kinds = ["bomb"]
                    self.defuse(number, rng, at)
                elif share < 0.1:
                    use_config(rng, self.samples[at])
                else:
                    files, kinds = mutated(rng, self.samples[at])
                    directory = self.directories[at]
                    directory.hold(files)
                    use(directory.path, rng)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except CheckpointError as error:
            text = str(error)
            self.outcomes["refused"] += 1
            self.refused.update(kinds)
            if len(text) > 2000 or ("/" not in text and "again" not in text) or not text.isprintable():
                self.fail(number, f"the message is long, unprintable or names no file: {text[:3000]!r}", files)
            if isinstance(error.__cause__, MemoryError) or "cannot be had" in text:
                self.fail(number, f"an attempt to allocate too much: {text}", files)
        except (Exception, TooLong):
            self.fail(number, traceback.format_exc(), files)
        else:
            self.outcomes["opened"] += 1
            self.opened.update(kinds)

    def defuse(self, number: int, rng: random.Random, at: int) -> None:
        """Makes and opens one directory of megabytes, with a limit of memory of its own."""
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        files, directory = bomb(rng, self.samples[at]), self.directories[at]
        directory.hold(files)
        size = sum(len(content) for content in files.values() if isinstance(content, bytes))
        before = limit_memory(size)
        try:
            use(directory.path, rng)
        finally:
            above = memory_of("VmHWM") - before - size
            if above > MEMORY:
                self.fail(number, f"resident memory grew by {above} bytes more than the files have", files)
            self.before = limit_memory(2 * self.largest)

    def fail(self, number: int, what: str, files: Files) -> None:
        self.failures.append({"seed": self.seed, "input": number, "what": what})
        if self.keep is not None and len(self.failures) <= 100:
            path = self.keep / f"{self.seed}-{number}"
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            (path / "what.txt").write_text(what)
            for name, content in files.items():
                if isinstance(content, bytes):
                    (path / name).write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--samples", type=Path, help="directory of genuine checkpoints to mutate, too")
    parser.add_argument("--keep", type=Path, help="directory for inputs that fail")
    parser.add_argument("--work", type=Path, help="directory to work in (default: a new one in memory)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, on_alarm)
    samples = all_samples(options.samples)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place) as temporary:
        fuzzer = Fuzzer(options.seed, samples, options.work or Path(temporary), options.keep)
        for directory, files in zip(fuzzer.directories, samples, strict=True):  # unharmed, each must open
            directory.hold(files)
            use(directory.path, random.Random(0))
        started = time.monotonic()
        fuzzer.run(options.first, options.inputs)
        seconds = time.monotonic() - started
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result = {
        "inputs": options.inputs,
        "seed": options.seed,
        "samples": len(samples),
        "seconds": round(seconds, 1),
        "failures": len(fuzzer.failures),
        "first_failures": fuzzer.failures[:10],
        **fuzzer.outcomes,
        "opened_after": dict(fuzzer.opened),
        "refused_after": dict(fuzzer.refused),
    }
    print(json.dumps(result))
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
