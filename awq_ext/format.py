"""What an AutoAWQ ``gemm`` checkpoint is: its configuration, its files, and every check on them before use.

A quantized linear of n = out_features, k = in_features and G = k / group_size is stored as ``<name>.qweight`` int32
[k, n/8], ``<name>.qzeros`` int32 [G, n/8], ``<name>.scales`` float [G, n] and, if it has one, ``<name>.bias`` [n].
Source: AutoAWQ ``awq/modules/linear/gemm.py`` (shapes), ``awq/models/_config.py`` (config keys).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq_ext.bounded_json import MAX_KEY, Scanner, loads
from awq_ext.errors import CheckpointError
from awq_ext.hub import resolve
from awq_ext.linear import PACK, W_BIT, why_not
from awq_ext.storage import TensorInfo, read_file, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LEGACY_QUANT_FILES = ("quant_config.json", "quantize_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # by safetensors' names
MAX_JSON_BYTES = 4 * 2**20  # of a file that is decoded as a whole
MAX_INDEX_BYTES = 100 * 2**20
MAX_INDEX_MEMORY = 60 * 2**20  # bytes of Python objects made of an index: enough for 250,000 tensors


@dataclass(frozen=True)
class QuantConfig:
    """The ``quantization_config`` of a checkpoint.

    ``group_size`` -1 means one group over all of in_features. ``modules_to_not_convert`` are substrings of the full
    names of linears that are not quantized; they inform other readers, this one goes by the tensors present.
    """

    group_size: int = 128
    bits: int = W_BIT
    zero_point: bool = True
    version: str = "gemm"
    modules_to_not_convert: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], where: str) -> QuantConfig:
        """Read AutoAWQ's keys and their synonyms in other writers' files; unknown keys are ignored.

        Synonyms: bits | w_bit, group_size | q_group_size, version | format | checkpoint_format, zero_point | not sym.
        What is missing or null has the default. Raises CheckpointError, which names ``where`` and the key.
        """

        def first(*keys: str) -> tuple[str, Any]:
            return next(((key, d[key]) for key in keys if d.get(key) is not None), (keys[0], None))

        def fail(key: str, expected: str, got: object) -> CheckpointError:
            return CheckpointError(f"{where}: '{key}' must be {expected}, got {got!r}")

        key, bits = first("bits", "w_bit")
        if bits is not None and (type(bits) is not int or bits != W_BIT):
            raise fail(key, f"{W_BIT} (the only width that awq_ext computes with)", bits)

        key, group_size = first("group_size", "q_group_size")
        if group_size is None:
            group_size = cls.group_size
        elif type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise fail(key, "a positive integer, or -1 for one group over in_features", group_size)

        key, zero_point = first("zero_point", "sym")
        if zero_point is None:
            zero_point = cls.zero_point
        elif not isinstance(zero_point, bool):
            raise fail(key, "true or false", zero_point)
        elif key == "sym":
            zero_point = not zero_point

        key, version = first("version", "format", "checkpoint_format")
        if version is None:
            version = cls.version
        elif not isinstance(version, str):
            raise fail(key, "a string", version)

        key, skipped = first("modules_to_not_convert")
        if skipped is None:
            skipped = ()
        elif not isinstance(skipped, (list, tuple)) or not all(isinstance(name, str) for name in skipped):
            raise fail(key, "a list of strings", skipped)

        return cls(group_size, W_BIT, zero_point, version.lower(), tuple(skipped))

    def to_dict(self) -> dict[str, Any]:
        """AutoAWQ's ``quantization_config``, as it stands in config.json."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }


@dataclass(frozen=True)
class LinearInfo:
    """A quantized linear in a checkpoint; group_size is never -1 here."""

    in_features: int
    out_features: int
    group_size: int
    bias: bool


@dataclass(frozen=True)
class Checkpoint:
    """An AutoAWQ ``gemm`` checkpoint directory whose every header, name, shape and type has been checked.

    ``config`` is config.json as it is; ``info`` has every stored tensor, ``linears`` every quantized linear by its
    full name. Tensor data is read by :meth:`get` and :meth:`tensors` only.
    """

    path: Path
    config: dict[str, Any]
    quant: QuantConfig
    linears: dict[str, LinearInfo]
    info: dict[str, TensorInfo]

    @classmethod
    def open(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Open a local directory or a hub repository (arguments as for :func:`awq_ext.hub.resolve`).

        Reads JSON files and safetensors headers, no weights. Raises CheckpointError, naming file, tensor, what was
        expected and what was got, if the directory is incomplete or damaged, refers to files outside itself, holds
        pickles only, is of another layout (gemv, gemv_fast, marlin, GPTQ, compressed-tensors), or contradicts itself.
        """
        path = resolve(path_or_repo, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        config = read_json(path, "config.json")
        if config is None:
            raise CheckpointError(f"{path} has no config.json, so it is not a model directory, or not a complete one")
        info = _read_headers(path)
        _refuse_other_layouts(path, info)
        quant = _read_quant_config(path, config, info)
        return cls(path, config, quant, _read_linears(path, quant, info), info)

    @property
    def activations(self) -> dict[str, int]:
        """The activations whose output is divided by stored scales (:mod:`awq_ext.scaled`): full name -> features."""
        return {
            name.removesuffix(".scales"): tensor.shape[0]
            for name, tensor in self.info.items()
            if name.endswith(".scales") and name.removesuffix(".scales") not in self.linears
        }

    @property
    def shards(self) -> list[str]:
        """Names of the safetensors files, in reading order."""
        return sorted({tensor.shard for tensor in self.info.values()})

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype and memory of its own.

        Raises KeyError for an unknown name, CheckpointError if the data cannot be read or if the scales of a
        quantized linear or an activation are not all finite and non-zero.
        """
        tensor = self.info[name].read()
        if name.endswith(".scales"):
            check_scales(str(self.info[name]), tensor)
        return tensor

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these names (None: all), shard by shard, as :meth:`get` gives them."""
        for name in sorted(self.info if names is None else names, key=lambda name: (self.info[name].shard, name)):
            yield name, self.get(name)


def _inside(directory: Path, name: str) -> Path:
    """directory / name, refused if a symlink leads out of the directory.

    The hub's cache is the exception: there ``snapshots/<revision>/<file>`` is a link into ``blobs``.
    """
    home = directory.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = (directory / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that no file can have
        raise CheckpointError(f"{directory / name} cannot be followed: {error}") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{directory / name} is a link to {target}, outside the checkpoint; copy the file here")
    return directory / name


def read_json(path: Path, name: str) -> dict[str, Any] | None:
    """The object in path/name, or None if there is no such file."""
    file = _inside(path, name)
    if not os.path.lexists(file):
        return None
    try:
        value = loads(read_file(file, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, CheckpointError) else _not_json(file, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def _not_json(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is not readable JSON: {error}")


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index; None if there is no index."""
    file = _inside(path, INDEX)
    if not os.path.lexists(file):
        return None
    weight_map: dict[str, str] = {}
    scanner, keys = Scanner(read_file(file, MAX_INDEX_BYTES)), set()
    try:
        for key in scanner.members():
            if key in keys:
                raise ValueError(f"duplicate key {key!r}")
            keys.add(key)
            if key == "weight_map":
                _read_places(scanner, weight_map, file)
            else:
                scanner.value(MAX_JSON_BYTES)
        scanner.end()
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, CheckpointError) else _not_json(file, error) from error
    if not weight_map:
        raise CheckpointError(f"{file} must hold a non-empty 'weight_map'")
    return weight_map


def _read_places(scanner: Scanner, weight_map: dict[str, str], index: Path) -> None:
    files: dict[str, str] = {}  # each name once in memory
    memory = 0
    for tensor in scanner.members():
        file = scanner.value(MAX_KEY)
        if not isinstance(file, str) or os.path.basename(file) != file or not file.isprintable() or "\\" in file:
            raise CheckpointError(f"{index}: {tensor!r} must be in a file of this directory, got {file!r}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {tensor!r} must be in a .safetensors file, got {file!r}")
        if tensor in weight_map:
            raise ValueError(f"duplicate key {tensor!r}")
        weight_map[tensor] = files.setdefault(file, file)
        memory += 100 + sys.getsizeof(tensor)  # with its place in a dict that has to grow
        if memory > MAX_INDEX_MEMORY:
            raise CheckpointError(f"{index}: has more than {len(weight_map)} tensors, which is more than any model")


def _find_single_file(path: Path) -> str:
    """The one safetensors file of a directory without an index."""
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in files:
        return SINGLE
    if len(files) > 1 or any(re.search(r"-of-0*([2-9]|\d{2,})\.safetensors$", file) for file in files):
        raise CheckpointError(f"{path} has {', '.join(files)} but no {INDEX}: it is incomplete; get it again")
    if files:
        return files[0]
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} holds pickles only ({', '.join(pickles)}); awq_ext does not read them, because a pickle can run "
            "any code. If you trust its source, convert it once: safetensors.torch.save_file(torch.load("
            f"'{pickles[0]}', weights_only=True), '{SINGLE}', metadata={{'format': 'pt'}})"
        )
    raise CheckpointError(f"{path} has no *.safetensors file, so the checkpoint is incomplete; get it again")


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the directory; the index and the files agree on where each one is."""
    weight_map = _read_weight_map(path)
    shards = [_find_single_file(path)] if weight_map is None else sorted(set(weight_map.values()))
    if SINGLE not in shards and (path / SINGLE).exists():
        raise CheckpointError(f"{path} has both {SINGLE} and {INDEX}, which does not mention it; remove the stale one")
    for shard in shards:
        if not os.path.exists(_inside(path, shard)):
            raise CheckpointError(f"{path / shard} is missing, though {INDEX} refers to it; get the checkpoint again")
    info: dict[str, TensorInfo] = {}
    for shard in shards:
        file = path / shard
        tensors = read_header(file).tensors
        for name in tensors:
            if weight_map is not None and weight_map.get(name) != shard:
                raise CheckpointError(f"{file}: holds {name}, which {INDEX} has in {weight_map.get(name, 'nowhere')}")
        info |= tensors
    for name, shard in (weight_map or {}).items():
        if name not in info:
            raise CheckpointError(f"{path / shard}: has no {name}, which {INDEX} has there")
    return info


def _refuse_other_layouts(path: Path, info: dict[str, TensorInfo]) -> None:
    """Refuses, by name, what is not AutoAWQ's gemm layout, going by the tensors and never by the config."""

    def refuse(layout: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: this is a {layout} checkpoint (see {name}); awq_ext reads AutoAWQ's gemm layout. Take the "
            "model's gemm version, or quantize the original model with awq_ext"
        )

    for name, tensor in info.items():
        linear, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            raise refuse("compressed-tensors", name)
        if kind == "g_idx":
            raise refuse("GPTQ", name)
        if kind == "scaled_zeros" or (kind == "qweight" and tensor.dtype == "I16"):
            raise refuse("gemv_fast", name)
        if kind != "qweight":
            continue
        # Shapes of qweight, scales and qzeros; what is no matrix is left to the checks of the gemm layout.
        matrices = [info[x].shape for x in (name, f"{linear}.scales", f"{linear}.qzeros") if x in info]
        if not all(len(shape) == 2 for shape in matrices):
            continue
        if len(matrices) == 2 and f"{linear}.scales" in info and matrices[0][1] == 2 * matrices[1][1]:
            raise refuse("marlin", name)
        if len(matrices) == 3:
            (rows, columns), (scale_rows, scale_columns), (zero_rows, _) = matrices
            if rows == scale_rows == zero_rows and columns * PACK != scale_columns:
                raise refuse("gemv", name)
            if columns == scale_columns:
                raise refuse("GPTQ", name)


def _read_quant_config(path: Path, config: dict[str, Any], info: dict[str, TensorInfo]) -> QuantConfig:
    fields, where = config.get("quantization_config"), f"{path / 'config.json'}: quantization_config"
    for name in LEGACY_QUANT_FILES:
        if fields is None:
            fields, where = read_json(path, name), str(path / name)
    if fields is None:
        if any(name.endswith(".qweight") for name in info):
            raise CheckpointError(
                f"{path} has quantized weights, but neither config.json has a 'quantization_config' nor is there a "
                f"{' or '.join(LEGACY_QUANT_FILES)}; get the checkpoint again"
            )
        raise CheckpointError(
            f"{path} is not quantized (no 'quantization_config'); quantize it first, or load it with transformers"
        )
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} must be an object, got {fields!r}")
    method = fields.get("quant_method")
    if method is not None and method not in ("awq", "auto-round"):  # auto-round also writes AutoAWQ's layout
        raise CheckpointError(f"{where}: this is a {method!r} checkpoint; awq_ext reads quant_method 'awq'")
    quant = QuantConfig.from_dict(fields, where)
    if method == "awq" and quant.version != "gemm":
        raise CheckpointError(f"{where}: 'version' is {quant.version!r}, but the tensors are in the gemm layout")
    return quant


def _read_linears(path: Path, quant: QuantConfig, info: dict[str, TensorInfo]) -> dict[str, LinearInfo]:
    """The quantized linears, from the shapes and types of their tensors."""

    def expect(name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        tensor = info.get(name)
        expected = f"{list(shape)} {' or '.join(dtypes)}"
        if tensor is None:
            raise CheckpointError(f"{path}: {name} is missing, expected {expected}")
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{path / tensor.shard}: {name} must be {expected}, got {list(tensor.shape)} {tensor.dtype}"
            )

    linears: dict[str, LinearInfo] = {}
    for name, tensor in info.items():
        linear, _, kind = name.rpartition(".")
        if kind in ("scales", "qzeros") and f"{linear}.qweight" not in info:
            if kind == "scales" and len(tensor.shape) == 1:  # an activation's: see awq_ext.scaled
                expect(name, tensor.shape, tuple(FLOATS))
                continue
            raise CheckpointError(f"{path / tensor.shard}: has {name}, but there is no {linear}.qweight")
        if kind != "qweight":
            continue
        if len(tensor.shape) != 2 or tensor.dtype != "I32":
            raise CheckpointError(
                f"{path / tensor.shard}: {name} must be [in_features, out_features/{PACK}] I32, "
                f"got {list(tensor.shape)} {tensor.dtype}"
            )
        in_features, out_features = tensor.shape[0], tensor.shape[1] * PACK
        group_size = in_features if quant.group_size == -1 else quant.group_size
        reason = why_not(in_features, out_features, group_size)
        if reason is not None:
            raise CheckpointError(f"{path / tensor.shard}: {linear}: {reason} (group_size of the quantization config)")
        groups = in_features // group_size
        expect(f"{linear}.scales", (groups, out_features), tuple(FLOATS))
        expect(f"{linear}.qzeros", (groups, out_features // PACK), ("I32",))
        bias = f"{linear}.bias" in info
        if bias:
            expect(f"{linear}.bias", (out_features,), tuple(FLOATS))
        linears[linear] = LinearInfo(in_features, out_features, group_size, bias)
    if not linears:
        raise CheckpointError(f"{path} has a quantization config, but no tensor called *.qweight")
    return linears


def check_scales(where: str, scales: Tensor) -> None:
    bad = ~torch.isfinite(scales) | (scales == 0)
    if bad.any():
        *group, channel = bad.nonzero()[0].tolist()  # an activation's scales have no groups
        place = f"group {group[0]}, output channel {channel}" if group else f"channel {channel}"
        raise CheckpointError(
            f"{where} must be finite and not zero, got {scales[(*group, channel)].item()} at {place}; "
            "the checkpoint is damaged"
        )
