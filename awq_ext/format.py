"""A quantized checkpoint directory: its files, which layout it is in, and every check on it before use."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq_ext.bounded_json import MAX_KEY, Scanner, loads
from awq_ext.config import QuantConfig
from awq_ext.errors import CheckpointError
from awq_ext.hub import resolve
from awq_ext.layouts import FLOATS, Groups, Layout, check_scales, detect, layouts, read_groups, used_groups
from awq_ext.storage import TensorInfo, read_file, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUANT_KEYS = ("quantization_config", "compression_config")  # the latter in early files of compressed-tensors
LEGACY_QUANT_FILES = ("quant_config.json", "quantize_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MAX_JSON_BYTES = 4 * 2**20  # of a file that is decoded as a whole
MAX_INDEX_BYTES = 100 * 2**20
MAX_INDEX_MEMORY = 60 * 2**20  # bytes of Python objects made of an index: enough for 250,000 tensors

# What is done about a problem: (the error, the file's name, the tensor's name; "" where it is about neither).
Refuse = Callable[[CheckpointError, str, str], None]


def stop(error: CheckpointError, file: str, tensor: str) -> None:
    """The way to refuse of all that goes on to use a checkpoint; :mod:`awq_ext.verify` takes a note instead."""
    raise error


@dataclass(frozen=True)
class LinearInfo:
    """A quantized linear in a checkpoint; group_size is never -1 here."""

    in_features: int
    out_features: int
    group_size: int
    bias: bool


@dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint directory, in any layout, whose every header, name, shape and type has been checked.

    ``config`` is config.json as it is; ``info`` has every stored tensor, ``linears`` every quantized linear by its
    full name; all of them are in ``layout``. Tensor data is read by the methods only.
    """

    path: Path
    config: dict[str, Any]
    quant: QuantConfig
    layout: Layout
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
        pickles only, is in no layout of :func:`awq_ext.layouts.layouts` or in several, or contradicts itself.
        """
        path = resolve(path_or_repo, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        config = read_json(path, "config.json")
        if config is None:
            raise CheckpointError(f"{path} has no config.json, so it is not a model directory, or not a complete one")
        return cls.from_headers(path, config, read_headers(path))

    @classmethod
    def from_headers(cls, path: Path, config: dict[str, Any], info: dict[str, TensorInfo]) -> Checkpoint:
        """The same from what has been read already: a config.json and the headers of tensors. ``path`` is for
        messages, and where a quantization config is looked for that config.json does not have."""
        quant = read_quant_config(path, config, info)
        layout, linears = _read_linears(path, quant, info)
        return cls(path, config, replace(quant, version=layout.name), layout, linears, info)

    @cached_property
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
        owner, _, kind = name.rpartition(".")
        if owner in self.linears and kind == self.layout.scales_name:
            linear = self.linears[owner]
            used = used_groups(self.layout, tensor, linear.in_features // linear.group_size)
            check_scales(str(self.info[name]), used)
        elif owner in self.activations:
            check_scales(str(self.info[name]), tensor)
        return tensor

    def groups(self, linear: str) -> Groups:
        """Scales and zeros of a quantized linear, whatever the layout.

        Raises CheckpointError where :func:`awq_ext.layouts.read_groups` does, and for a ``g_idx`` that is not in order
        of in_features (GPTQ's act-order), which no AWQ layout can hold.
        """
        found, layout = self.linears[linear], self.layout
        n, k, g = found.out_features, found.in_features, found.group_size
        where = str(self.info[f"{linear}.{layout.scales_name}"]).removesuffix(f".{layout.scales_name}")
        if f"{linear}.g_idx" in self.info:
            order = self.info[f"{linear}.g_idx"].read()
            if not torch.equal(order.long(), torch.arange(k) // g):
                raise CheckpointError(
                    f"{where}.g_idx is in act-order (desc_act): its groups are not {g} neighbouring in_features each, "
                    "so only GPTQ's own layout can hold it; take a version of the model without act-order"
                )
        names = [name for name in (layout.scales_name, layout.zeros_name) if f"{linear}.{name}" in self.info]
        stored = {name: self.info[f"{linear}.{name}"].read() for name in names}
        return read_groups(layout, stored, n, k, g, where)

    def weight(self, linear: str) -> Tensor:
        """The weight float32 [n, k] of a quantized linear as its own layout defines it, computed in float32.

        That is ``(q - z) * s``, or ``q * s + scaled_zero`` where zeros are stored scaled. Raises as :meth:`groups`.
        """
        found, layout = self.linears[linear], self.layout
        n, k, g = found.out_features, found.in_features, found.group_size
        groups = self.groups(linear)
        words = self.info[f"{linear}.{layout.weight_name}"].read()
        q = torch.ops.awq_ext.unpack(words, layout=layout.name)[:n, :k].reshape(n, k // g, g)
        scales = groups.scales.float()[..., None]
        if layout.zeros == "scaled":
            offset = used_groups(layout, self.info[f"{linear}.{layout.zeros_name}"].read(), k // g).float()
            return (q.float() * scales + offset[..., None]).reshape(n, k)
        return ((q.float() - groups.zeros.float()[..., None]) * scales).reshape(n, k)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these names (None: all), shard by shard, as :meth:`get` gives them."""
        for name in sorted(self.info if names is None else names, key=lambda name: (self.info[name].shard, name)):
            yield name, self.get(name)


def inside(directory: Path, name: str) -> Path:
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
    file = inside(path, name)
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
    file = inside(path, INDEX)
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
        if not tensor.isprintable():
            raise ValueError(f"names of tensors must be printable, got {tensor!r}")
        file = scanner.value(MAX_KEY)
        if not isinstance(file, str) or os.path.basename(file) != file or not file.isprintable() or "\\" in file:
            raise CheckpointError(f"{index}: {tensor!r} must be in a file of this directory, got {file!r}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {tensor!r} must be in a .safetensors file, got {file!r}")
        if tensor in weight_map:
            raise ValueError(f"duplicate key {tensor!r}")
        memory += 100 + sys.getsizeof(tensor)  # with its place in a dict that has to grow
        memory += 0 if file in files else 100 + sys.getsizeof(file)
        weight_map[tensor] = files.setdefault(file, file)
        if memory > MAX_INDEX_MEMORY:
            raise CheckpointError(f"{index}: has more than {len(weight_map)} tensors, which is more than any model")


def _find_single_file(path: Path) -> str:
    """The one safetensors file of a directory without an index."""
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in files:
        return SINGLE
    if len(files) > 1 or any(re.search(r"-of-0*([2-9]|[1-9]\d+)\.safetensors$", file) for file in files):
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


def read_headers(path: Path, refuse: Refuse = stop) -> dict[str, TensorInfo]:
    """Every tensor of the directory, quantized or not; the index and the files agree on where each one is.

    Where ``refuse`` returns, a shard that cannot be read is left out, and a tensor counts where it was found first.
    """
    weight_map = _read_weight_map(path)
    shards = [_find_single_file(path)] if weight_map is None else sorted(set(weight_map.values()))
    if SINGLE not in shards and (path / SINGLE).exists():
        stale = f"{path} has both {SINGLE} and {INDEX}, which does not mention it; remove the stale one"
        refuse(CheckpointError(stale), SINGLE, "")
    for shard in shards:
        if not os.path.exists(inside(path, shard)):
            missing = f"{path / shard} is missing, though {INDEX} refers to it; get the checkpoint again"
            refuse(CheckpointError(missing), shard, "")
    info: dict[str, TensorInfo] = {}
    read = set()
    for shard in filter(lambda shard: os.path.exists(path / shard), shards):
        file = path / shard
        try:
            tensors = read_header(file).tensors
        except CheckpointError as error:
            refuse(error, shard, "")
            continue
        for name in tensors:
            if weight_map is not None and weight_map.get(name) != shard:
                there = weight_map.get(name, "nowhere")
                refuse(CheckpointError(f"{file}: holds {name}, which {INDEX} has in {there}"), shard, name)
        for name, tensor in tensors.items():
            info.setdefault(name, tensor)
        read.add(shard)
    for name, shard in (weight_map or {}).items():
        if shard in read and name not in info:
            refuse(CheckpointError(f"{path / shard}: has no {name}, which {INDEX} has there"), shard, name)
    return info


def without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The config less these keys, and its part on the language model less them."""
    fields = {key: value for key, value in config.items() if key not in keys}
    if isinstance(fields.get("text_config"), dict):
        fields["text_config"] = {key: value for key, value in fields["text_config"].items() if key not in keys}
    return fields


def stated_quantization(path: Path, config: Mapping[str, Any]) -> tuple[Any, str]:
    """What a model directory says of its quantization, None if nothing; and where: in config.json, there perhaps in the
    part on the language model of a multimodal one, or in an older file beside it."""
    for within in (None, "text_config"):
        fields = config if within is None else config.get(within)
        for key in QUANT_KEYS:
            if isinstance(fields, dict) and fields.get(key) is not None:
                return fields[key], f"{path / 'config.json'}: {'' if within is None else within + ': '}{key}"
    for name in LEGACY_QUANT_FILES:
        found = read_json(path, name)
        if found is not None:
            return found, str(path / name)
    return None, ""


def read_quant_config(path: Path, config: dict[str, Any], info: dict[str, TensorInfo]) -> QuantConfig:
    """The quantization config that `stated_quantization` finds. Raises CheckpointError without one."""
    fields, where = stated_quantization(path, config)
    if fields is None:
        if any(name.endswith((".qweight", ".weight_packed")) for name in info):
            raise CheckpointError(
                f"{path} has quantized weights, but neither config.json has a 'quantization_config' nor is there a "
                f"{' or '.join(LEGACY_QUANT_FILES)}; get the checkpoint again"
            )
        raise CheckpointError(
            f"{path} is not quantized (no 'quantization_config'); quantize it first, or load it with transformers"
        )
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} must be an object, got {fields!r:.200}")
    return QuantConfig.from_dict(fields, where)


def _read_linears(path: Path, quant: QuantConfig, info: dict[str, TensorInfo]) -> tuple[Layout, dict[str, LinearInfo]]:
    """The layout and the quantized linears, from the names, shapes and types of the tensors."""
    found_layout: Layout | None = None
    first = ""  # the linear that told it
    linears: dict[str, LinearInfo] = {}
    for owner, stored in parts_of_linears(info).items():
        found = read_linear(path, quant, owner, stored, info.get(f"{owner}.bias"))
        if found is None:  # never: stop does not return
            continue
        layout, linears[owner] = found
        if not quant.allows(layout.name):
            raise CheckpointError(
                f"{path}: the quantization config says {quant.version!r}, but {owner} is in the layout "
                f"{layout.name}; correct the config if the tensors are right"
            )
        if found_layout is not None and layout is not found_layout:
            raise CheckpointError(
                f"{path}: {owner} is in the layout {layout.name}, but {first} in {found_layout.name}; a "
                "checkpoint must have one layout for all its linears"
            )
        found_layout, first = found_layout or layout, first or owner
    if found_layout is None:
        names = " or ".join(f"*.{weight}" for weight in weight_names())
        raise CheckpointError(f"{path} has a quantization config, but no tensor called {names}")
    return found_layout, linears


def weight_names() -> list[str]:
    """What layouts call the tensor of a linear's codes, behind the linear's name."""
    return sorted({layout.weight_name for layout in layouts().values()})


def parts_of_linears(info: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors that are named as parts of a quantized linear (the bias apart): by the linear, by the last part."""
    table = layouts().values()
    parts = {p for layout in table for p in (layout.weight_name, layout.zeros_name, layout.scales_name)}
    parts |= {layout.extra_name for layout in table}
    owners: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in info.items():
        owner, _, part = name.rpartition(".")
        if part and part in parts:
            owners.setdefault(owner, {})[part] = tensor
    return {owner: stored for owner, stored in owners.items() if not _is_activation(stored)}


def _is_activation(stored: Mapping[str, TensorInfo]) -> bool:
    """Whether these are the scales of an activation: see :mod:`awq_ext.scaled`."""
    if stored.keys() != {"scales"}:
        return False
    return len(stored["scales"].shape) == 1 and stored["scales"].dtype in FLOATS


def read_linear(
    path: Path,
    quant: QuantConfig,
    owner: str,
    stored: Mapping[str, TensorInfo],
    bias: TensorInfo | None,
    refuse: Refuse = stop,
) -> tuple[Layout, LinearInfo] | None:
    """The layout and the shape of one linear from its tensors as :func:`parts_of_linears` has them; None if refused."""
    weights = weight_names()
    tensor = next((stored[weight] for weight in weights if weight in stored), None)
    if tensor is None:
        any_part = next(iter(stored.values()))
        names = " or ".join(f"{owner}.{weight}" for weight in weights)
        refuse(CheckpointError(f"{any_part}: there is no {names} with it"), any_part.shard, any_part.name)
        return None
    where = path / tensor.shard
    found = detect(stored, quant.group_size, quant.version, stored_shape(stored))
    for problem in found.problems:
        refuse(CheckpointError(f"{where}: {owner}.{problem} (layout {found.layout.name})"), tensor.shard, owner)
    if found.problems:
        return None
    if bias is not None and (bias.shape != (found.n,) or bias.dtype not in FLOATS):
        expected = f"[{found.n}] {' or '.join(FLOATS)}"
        error = CheckpointError(f"{bias} must be {expected}, got {list(bias.shape)} {bias.dtype}")
        refuse(error, bias.shard, bias.name)
    return found.layout, LinearInfo(found.k, found.n, found.g, bias is not None)


def stored_shape(stored: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """The out_features and in_features that a weight_shape tensor holds."""
    tensor = stored.get("weight_shape")
    if tensor is None or tensor.shape != (2,) or tensor.dtype not in ("I64", "I32"):
        return None
    n, k = tensor.read().tolist()
    if not (0 < n < 2**31 and 0 < k < 2**31):
        raise CheckpointError(f"{tensor} must hold out_features and in_features, got {n} and {k}")
    return n, k
