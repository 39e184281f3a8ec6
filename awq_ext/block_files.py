"""Finished blocks on disk: what a quantization that was interrupted goes on from, and a checkpoint is put together of.

They lie in ``.<name>.blocks`` beside the checkpoint ``<name>`` that is to be. Each is a safetensors file, which is
there, whole and synced, or not at all, and a JSON file of what was reported of the block. ``settings.json`` is what
decides their bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext.atomic import sync
from awq_ext.block import BlockReport
from awq_ext.errors import CheckpointError
from awq_ext.linear import PACK, AwqLinear
from awq_ext.scaled import ScaledActivation
from awq_ext.storage import NAME_OF, Header, Writer, bytes_of, read_header


class BlockFiles:
    """The finished blocks of one quantization to ``out``; ``finished`` are the first so many."""

    def __init__(self, out: Path, finished: int = 0) -> None:
        self.directory = out.with_name(f".{out.name}.blocks")
        self.finished = finished
        self._headers: dict[int, Header] = {}

    def open(self, settings: Mapping[str, Any], *, resume: bool) -> int:
        """Find how many blocks are finished, or begin anew. ``settings`` can be written as JSON.

        Raises CheckpointError if it is to be resumed, but was made with other settings; or if it cannot be written.
        """
        file, fields = self.directory / "settings.json", json.loads(json.dumps(settings))
        self.finished = 0
        try:
            if not resume or not file.exists():
                shutil.rmtree(self.directory, ignore_errors=True)
                self.directory.mkdir(parents=True)
                self._put(file, json.dumps(fields, indent=2).encode())
            differing = _differing(json.loads(file.read_text(encoding="utf-8")), fields)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}, for finished blocks, cannot be used: {error}") from error
        if differing:
            raise CheckpointError(
                f"{self.directory} has blocks of a quantization with other settings, which cannot be resumed: "
                f"{'; '.join(differing)}. Give the same settings, or start anew without resume"
            )
        while self._file(self.finished).exists():
            self.finished += 1
        return self.finished

    def _file(self, index: int, suffix: str = "safetensors") -> Path:
        return self.directory / f"block-{index:05d}.{suffix}"

    def _put(self, file: Path, content: bytes) -> None:
        new = file.with_name(f"{file.name}.new")
        new.write_bytes(content)
        self._rename(new, file)

    def _rename(self, new: Path, file: Path) -> None:
        sync(new)
        os.replace(new, file)
        sync(self.directory)

    def write(self, index: int, block: nn.Module, report: BlockReport) -> None:
        """Put a block and its report on the disk. Raises CheckpointError if that fails."""
        tensors = block.state_dict()
        kinds = [(name, NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
        new = self._file(index, "new")
        try:
            self._put(self._file(index, "json"), json.dumps(dataclasses.asdict(report)).encode())
            new.unlink(missing_ok=True)
            with Writer(new, kinds) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, bytes_of(tensor))
            self._rename(new, self._file(index))
        except OSError as error:
            raise CheckpointError(
                f"{self._file(index)} could not be written: {error}. The {index} blocks before it are finished; resume "
                "when that is mended"
            ) from error

    def read(self, index: int, name: str) -> Tensor:
        """A tensor of a finished block, by its name in the block."""
        if index not in self._headers:
            self._headers[index] = read_header(self._file(index))
        return self._headers[index].tensors[name].read()

    def report(self, index: int) -> BlockReport:
        made: BlockReport = _from_json(BlockReport, json.loads(self._file(index, "json").read_text(encoding="utf-8")))
        return made

    def install(self, index: int, block: nn.Module) -> None:
        """Make the original's block the quantized one, or fill that."""
        tensors = {name: tensor.read() for name, tensor in read_header(self._file(index)).tensors.items()}
        for name, scales in tensors.items():
            owner, _, part = name.rpartition(".")
            if part == "scales" and f"{owner}.qweight" in tensors:
                k, words = tensors[f"{owner}.qweight"].shape
                bias, group_size = f"{owner}.bias" in tensors, k // len(scales)
                linear = AwqLinear(k, words * PACK, bias=bias, group_size=group_size, device="meta")
                block.set_submodule(owner, linear.train(block.training))
            elif part == "scales" and not isinstance(block.get_submodule(owner), ScaledActivation):
                block.set_submodule(owner, ScaledActivation(block.get_submodule(owner), torch.empty_like(scales)))
        block.load_state_dict(tensors, assign=True)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _differing(before: Any, now: Any, name: str = "") -> list[str]:
    """What is not the same in two JSON values, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [text for key in keys for text in _differing(before.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if before == now else [f"{name} was {before!r:.100}, is {now!r:.100}"]


def _from_json(kind: Any, value: Any) -> Any:
    """A dataclass from what `dataclasses.asdict` made of it, with the dataclasses in its fields."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_json(hints[name], item) for name, item in value.items()})
    arguments = typing.get_args(kind)
    if isinstance(value, list) and arguments:
        return [_from_json(arguments[0], item) for item in value]
    inner = [argument for argument in arguments if dataclasses.is_dataclass(argument)]
    return _from_json(inner[0], value) if inner and isinstance(value, dict) else value
