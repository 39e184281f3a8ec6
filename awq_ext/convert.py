"""`convert`: a checkpoint directory in one layout, and the same in another."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from awq_ext.atomic import replace_directory
from awq_ext.checkpoint import check_replaceable, is_weight_file
from awq_ext.config import QuantConfig
from awq_ext.errors import CheckpointError
from awq_ext.format import INDEX, LEGACY_QUANT_FILES, PICKLES, SINGLE, Checkpoint, inside, read_json
from awq_ext.layouts import Layout, layouts
from awq_ext.pickled import read_state_dict
from awq_ext.progress import Progress, Task
from awq_ext.relayout import Converted, Target
from awq_ext.storage import Writer

# Modules whose weight is a matrix, but no linear's: no reader has to be told that they are not quantized.
NO_LINEAR = re.compile(r"(^|[._])(embed\w*|wte|wpe|\w*norm\w*|ln_\w+)$")


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    config: str | os.PathLike[str] | None = None,
    group_size: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write the checkpoint ``src``, in whatever layout it is, in the layout ``to``; returns the directory ``dst``.

    ``src`` is a directory or a hub repository (further arguments as for :func:`awq_ext.hub.resolve`), ``to`` a name of
    :func:`awq_ext.layouts.layouts`. Codes, scales and zeros are the same afterwards, bit for bit; only
    "gemv_fast" and "llm-awq" store ``-(scale * zero)`` rounded to the type of the scales, from which the zero comes
    back whole. Files keep their names and tensors their order; config.json gets the new quantization_config, and the
    other files (tokenizer, generation_config.json ...) are copied. Memory: the largest tensor of a quantized linear and
    a few megabytes. All is written beside ``dst`` and synced, then put in its place in one step (see
    :func:`awq_ext.atomic.replace_directory`); ``dst`` may be an older checkpoint, also ``src`` itself.

    ``src`` may also be the file that llm-awq's ``--dump_quant`` writes (a ``.pt`` of v2 tensors), read as
    :func:`awq_ext.pickled.read_state_dict` says and only with ``allow_pickle``. Such a file has neither config nor
    tokenizer: ``config`` is the directory of the original model, ``group_size`` that of the file (None: 128).

    Raises CheckpointError, before anything is written, if ``src`` is damaged, if a linear cannot be held by the layout
    (the message names the tensor), or if ``dst`` is something else than a quantized checkpoint; also if writing fails.
    ValueError for an unknown layout.
    """
    layout = layouts().get(to)
    if layout is None:
        raise ValueError(f"to must be one of {', '.join(layouts())}, got {to!r}")
    if Path(src).suffix in (".pt", ".pth", ".bin") and Path(src).is_file():
        checkpoint = _open_pickled(Path(src), config, 128 if group_size is None else group_size, allow_pickle)
    elif config is not None or group_size is not None:
        raise CheckpointError(f"config and group_size are for a .pt file, which has neither; {src} must have its own")
    else:
        checkpoint = Checkpoint.open(src, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    return write_converted(checkpoint, Path(dst), layout, progress or Progress.silent())


def _open_pickled(
    file: Path, directory: str | os.PathLike[str] | None, group_size: int, allow_pickle: bool
) -> Checkpoint:
    header = read_state_dict(file, allow_pickle=allow_pickle)
    if directory is None:
        raise CheckpointError(f"{file} has no config; give the directory of the original model (config=, --config)")
    directory = Path(directory).expanduser()
    config = read_json(directory, "config.json")
    if config is None:
        raise CheckpointError(f"{directory} has no config.json; give the directory of the original model")
    quant = QuantConfig(group_size, version="llm-awq")
    return Checkpoint.from_headers(directory, config | {"quantization_config": quant.to_dict()}, header.tensors)


def write_converted(checkpoint: Checkpoint, out: Path, layout: Layout, progress: Progress) -> Path:
    """:func:`convert` of an open checkpoint; files beside its config.json are copied along."""
    out = out.expanduser().absolute()
    check_replaceable(out)
    converted = Converted(checkpoint, layout)
    converted.check(progress)
    config = checkpoint.config | {"quantization_config": _quant_config(converted)}
    shards: dict[str, list[Target]] = {}
    for target in converted.info.values():
        shards.setdefault(_shard(target), []).append(target)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(target.nbytes for target in converted.info.values())
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise CheckpointError(f"{out} needs {needed / 1e9:.2f} GB, but {out.parent} has {free / 1e9:.2f} GB free")
        with replace_directory(out, is_stale=is_weight_file) as partial:
            for file in _side_files(checkpoint.path):
                shutil.copyfile(file, partial / file.name)
            _write_json(partial / "config.json", config)
            with progress.task(f"convert to {layout.name}", len(converted.info)) as task:
                for shard, targets in shards.items():
                    _write_shard(partial / shard, converted, targets, task)
            if len(shards) > 1:
                _write_json(partial / INDEX, _index(converted))
            Checkpoint.open(partial)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written, and is as it was before: {error}") from error
    return out


def _shard(target: Target) -> str:
    """The file that a tensor goes to: of the same name, but for a pickle."""
    return target.shard if target.shard.endswith(".safetensors") else SINGLE


def _write_shard(file: Path, converted: Converted, targets: list[Target], task: Task) -> None:
    with Writer(file, [(t.name, t.dtype, t.shape) for t in targets], {"format": "pt"}) as writer:
        for target in targets:
            for piece in converted.pieces(target.name):
                writer.write(target.name, piece)
            task.advance(1, note=target.name)


def _index(converted: Converted) -> dict[str, Any]:
    places = {name: _shard(target) for name, target in sorted(converted.info.items())}
    size = sum(target.nbytes for target in converted.info.values())
    return {"metadata": {"total_size": size}, "weight_map": places}


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _side_files(path: Path) -> list[Path]:
    """The files of a checkpoint that are neither weights nor say how the weights are stored."""
    found = []
    for file in sorted(path.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        pickle = any(file.match(pattern) for pattern in PICKLES)
        if file.name.startswith(".") or weights or pickle or file.name in ("config.json", *LEGACY_QUANT_FILES):
            continue
        if inside(path, file.name).is_file():
            found.append(file)
    return found


def _quant_config(converted: Converted) -> dict[str, Any]:
    """The quantization_config that is true of the converted tensors."""
    checkpoint, layout = converted.checkpoint, converted.layout
    sizes = {linear.group_size for linear in checkpoint.linears.values()}
    zero_point = layout.zeros != "none" and not converted.symmetric
    quant = replace(
        checkpoint.quant,
        version=layout.name,
        group_size=-1 if len(sizes) > 1 else checkpoint.quant.group_size,
        zero_point=zero_point,
        modules_to_not_convert=tuple(_plain_linears(checkpoint)),
    )
    return quant.to_dict()


def _plain_linears(checkpoint: Checkpoint) -> list[str]:
    """Full names of the linears that are not quantized; the head, which no AWQ reader quantizes, only if listed."""
    listed = checkpoint.quant.modules_to_not_convert
    names = []
    for name, tensor in checkpoint.info.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(tensor.shape) != 2 or module in checkpoint.linears:
            continue
        by_name = any(entry in module for entry in listed)
        if by_name or not (NO_LINEAR.search(module) or module == "lm_head"):
            names.append(module)
    return names
