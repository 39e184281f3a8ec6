"""`convert`: a checkpoint directory in one layout, and the same in another."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from awq_ext.atomic import replace_directory, sync
from awq_ext.checkpoint import check_replaceable, is_weight_file
from awq_ext.config import GPTQ, QuantConfig
from awq_ext.errors import CheckpointError
from awq_ext.format import (
    INDEX,
    LEGACY_QUANT_FILES,
    PICKLES,
    QUANT_KEYS,
    SINGLE,
    Checkpoint,
    inside,
    read_json,
    without,
)
from awq_ext.layouts import Layout, layouts
from awq_ext.pickled import read_state_dict
from awq_ext.progress import Progress, Task
from awq_ext.relayout import Converted, Target, one_thread
from awq_ext.storage import DTYPES, Writer, write_order

# Files of weights beside safetensors and pickles: they would not be what config.json says.
WEIGHTS = ("*.safetensors", "*.index.json", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
SYNC_BYTES = 64 * 2**20  # so many are handed to the disk at a time, rather than all at the end
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
    back whole. Shards keep their names (a single file is called model.safetensors), config.json gets the new
    quantization_config, and the other files beside it are copied (tokenizer, generation_config.json, LICENSE ...), but
    no weights in other formats, hidden files or directories. Memory: the largest tensor of a quantized linear and a few
    megabytes.

    ``dst`` may be new or an older checkpoint, also ``src`` itself; it is the old or the new one at every moment, whole
    (see :func:`awq_ext.atomic.replace_directory`). All is written beside it, config.json last: what a killed process
    leaves there, until the next conversion to ``dst`` removes it, does not open as a checkpoint unless complete.

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
    try:
        check_replaceable(out)
        side_files = _side_files(checkpoint.path)
        with one_thread():
            converted = Converted(checkpoint, layout)
            converted.check(progress)
            config = without(checkpoint.config, QUANT_KEYS) | {"quantization_config": _quant_config(converted)}
            shards = _shards(converted)
            with replace_directory(out, is_stale=_stale(out)) as partial:
                _check_space(out, converted)
                for file in side_files:
                    shutil.copyfile(file, partial / file.name)
                with progress.task(f"convert to {layout.name}", len(converted.info)) as task:
                    _write_shards(partial, shards, converted, task)
                if len(shards) > 1:
                    _write_json(partial / INDEX, _index(shards))
                _write_json(partial / "config.json", config)  # last: without it, nothing opens as a checkpoint
                Checkpoint.open(partial)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{out} could not be written, and is as it was before: {error}") from error
    return out


def _check_space(out: Path, converted: Converted) -> None:
    needed = sum(target.nbytes for target in converted.info.values())
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise CheckpointError(f"{out} needs {needed / 1e9:.2f} GB, but {out.parent} has {free / 1e9:.2f} GB free")


def _stale(out: Path) -> Callable[[str], bool]:
    """Tells of the files in ``out`` which the new checkpoint replaces, though it has none of that name."""
    try:
        shards = Checkpoint.open(out).shards if out.exists() else []
    except CheckpointError:
        shards = []  # a damaged one: its shards are known if they have the usual names
    return lambda name: is_weight_file(name) or name in shards


def _shards(converted: Converted) -> dict[str, list[Target]]:
    """What each file will hold, in the order of the format: the source's names, but the usual one for a single file."""
    shards: dict[str, dict[str, Target]] = {}
    for name, target in converted.info.items():
        if target.dtype not in DTYPES:
            raise CheckpointError(f"{target.source}: dtype {target.dtype!r} is unknown, so it cannot be written")
        shards.setdefault(target.shard, {})[name] = target
    if len(shards) == 1:
        shards = {SINGLE: converted.info}
    order = {shard: write_order({n: (t.dtype, t.shape) for n, t in held.items()}) for shard, held in shards.items()}
    return {shard: [held[name] for name in order[shard]] for shard, held in shards.items()}


def _write_shards(partial: Path, shards: dict[str, list[Target]], converted: Converted, task: Task) -> None:
    with ThreadPoolExecutor(1) as syncing:
        synced = []
        for shard, targets in shards.items():
            synced += _write_shard(partial / shard, targets, converted, task, syncing)
        for done in synced:
            done.result()


def _write_shard(
    file: Path, targets: list[Target], converted: Converted, task: Task, syncing: ThreadPoolExecutor
) -> list[Future[None]]:
    """While a piece is written, the next one is made, and what was written before goes to the disk."""
    header = [(target.name, target.dtype, target.shape) for target in targets]
    synced, unsynced = [], 0
    # The pool inside: it has to be done before the file is closed, also after an error.
    with Writer(file, header, {"format": "pt"}) as writer, ThreadPoolExecutor(1) as writing:
        written: Future[None] = writing.submit(lambda: None)
        for target in targets:
            for piece in converted.pieces(target.name):
                written.result()
                written = writing.submit(writer.write, target.name, piece)
                unsynced += len(piece)
                if unsynced >= SYNC_BYTES:
                    synced.append(syncing.submit(sync, file))
                    unsynced = 0
            task.advance(1, note=target.name)
        written.result()
    return [*synced, syncing.submit(sync, file)]


def _index(shards: dict[str, list[Target]]) -> dict[str, Any]:
    places = {target.name: shard for shard, targets in shards.items() for target in targets}
    size = sum(target.nbytes for targets in shards.values() for target in targets)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _side_files(path: Path) -> list[Path]:
    """The files of a checkpoint that are neither weights nor say how the weights are stored."""
    found = []
    for file in sorted(path.iterdir()):
        skipped = any(file.match(pattern) for pattern in (*PICKLES, *WEIGHTS, ".*"))
        if skipped or file.name in ("config.json", *LEGACY_QUANT_FILES) or not os.path.isfile(file):
            continue
        found.append(inside(path, file.name))
    return found


def _quant_config(converted: Converted) -> dict[str, Any]:
    """The quantization_config that is true of the converted tensors."""
    checkpoint, layout = converted.checkpoint, converted.layout
    sizes = {linear.group_size for linear in checkpoint.linears.values()}
    zero_point = any(f"{name}.{layout.zeros_name}" in converted.info for name in converted.linears)
    if layout.name in GPTQ:  # its readers choose faster kernels for a model that is said to be symmetric
        zero_point = not converted.symmetric
    quant = replace(
        checkpoint.quant,
        version=layout.name,
        group_size=-1 if len(sizes) > 1 else checkpoint.quant.group_size,
        zero_point=zero_point,
        modules_to_not_convert=tuple(_plain_linears(checkpoint)),
    )
    fields = quant.to_dict()
    if "ignore" in fields:  # a head is usually not quantized
        fields["ignore"] = [name for name in fields["ignore"] if name not in converted.linears]
    if "lm_head" in fields:
        fields["lm_head"] = "lm_head" in converted.linears
    return fields


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
