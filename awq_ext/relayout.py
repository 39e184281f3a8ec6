"""A checkpoint's tensors as they are in another layout, one by one.

A weight's words are moved by ``_native.repack``, block by block into small buffers, so that what is held at a time is
one tensor and a few megabytes. Scales and zeros, a thirtieth of the weight, go through
:class:`awq_ext.layouts.Groups`. Everything that is not a part of a quantized linear is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from awq_ext import _library
from awq_ext.errors import CheckpointError
from awq_ext.format import Checkpoint
from awq_ext.layouts import SYMMETRIC_ZERO, Layout, write_groups
from awq_ext.progress import Progress
from awq_ext.storage import DTYPES, TensorInfo, bytes_of

PIECE = 2**20  # bytes that are handed on at a time: what is still in a cache when it is written


@dataclass(frozen=True)
class Target:
    """A tensor of the converted checkpoint: what it will be, and the stored tensor whose place in the files it takes.

    ``linear`` is the quantized linear it is a part of, None for one that is copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo
    linear: str | None = None

    @property
    def shard(self) -> str:
        return self.source.shard

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8 if self.linear else self.source.nbytes


class Converted:
    """The tensors of a checkpoint as they are in another layout, computed as they are asked for.

    ``info`` has every tensor by its name, in the order of the files. Where the layout is the checkpoint's own, tensors
    are what is stored.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        """Raises CheckpointError, naming the tensor, if a linear's shape does not fit the layout."""
        self.checkpoint = checkpoint
        self.layout = layout
        self.path, self.config, self.linears = checkpoint.path, checkpoint.config, checkpoint.linears
        self.activations = checkpoint.activations
        self.same = layout is checkpoint.layout
        # Where zeros may be left out, they are if all are 8.
        self._without_zeros = not self.same and layout.zeros_optional and self.symmetric
        self.info: dict[str, Target] = {}
        for name, tensor in sorted(checkpoint.info.items(), key=lambda item: (item[1].shard, item[1].begin)):
            for target in self._targets(name, tensor):
                self.info[target.name] = target

    @cached_property
    def symmetric(self) -> bool:
        """Whether all zeros are 8. Only reading them tells; raises as :meth:`Checkpoint.groups`."""
        return all(bool((self.checkpoint.groups(name).zeros == SYMMETRIC_ZERO).all()) for name in self.linears)

    def _targets(self, name: str, tensor: TensorInfo) -> Iterator[Target]:
        """What comes into the place of a stored tensor."""
        owner, _, part = name.rpartition(".")
        own, layout = self.checkpoint.layout, self.layout
        if self.same or owner not in self.linears or part == "bias":
            yield Target(name, tensor.dtype, tensor.shape, tensor)
            return
        linear = self.linears[owner]
        n, k, g = linear.out_features, linear.in_features, linear.group_size
        reason = layout.why_not(n, k, g)
        if reason is not None:
            raise CheckpointError(f"{tensor}: {reason}; choose another layout")
        scales = self.checkpoint.info[f"{owner}.{own.scales_name}"]
        expected = layout.tensors(n, k, g, (scales.dtype,))
        if self._without_zeros:
            expected.pop(layout.zeros_name)
        replaced = {
            own.weight_name: layout.weight_name,
            own.zeros_name: layout.zeros_name,
            own.scales_name: layout.scales_name,
        }
        mine = [replaced[part]] if replaced.get(part) in expected else []
        if part == own.weight_name:  # with it comes what the source has no place for
            placed = {replaced[p] for p in replaced if f"{owner}.{p}" in self.checkpoint.info}
            mine += [new for new in expected if new not in placed]
        for new in mine:
            yield Target(f"{owner}.{new}", expected[new].dtypes[0], expected[new].shape, tensor, owner)

    def check(self, progress: Progress) -> None:
        """Read scales and zeros of every linear, and raise CheckpointError for what the layout cannot hold."""
        with progress.task("check", len(self.linears)) as task:
            for name in self.linears:
                self._groups(name)
                task.advance(1, note=name)

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU. Raises CheckpointError if it cannot be read, or converted without loss."""
        target = self.info[name]
        if target.linear is None:
            return self.checkpoint.get(name)
        part = name.rpartition(".")[2]
        if part != self.layout.weight_name:
            return self._small(target.linear, part)
        linear = self.linears[target.linear]
        own, shape = self.checkpoint.layout, (linear.out_features, linear.in_features)
        words = target.source.read()
        if own.weight.code_shape(*words.shape) != shape:  # padded: the operators do not know where the padding begins
            q = torch.ops.awq_ext.unpack(words, layout=own.name)[: shape[0], : shape[1]]
            packed: Tensor = torch.ops.awq_ext.pack(q, layout=self.layout.name)
            return packed
        moved: Tensor = torch.ops.awq_ext.repack(words, src=own.name, dst=self.layout.name)
        return moved

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these names, shard by shard."""
        for name in sorted(names, key=lambda name: (self.info[name].shard, name)):
            yield name, self.get(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, front to back, in pieces of a few megabytes.

        A piece keeps its content until the next but one is asked for, so that it can be written while the next is made.
        """
        target = self.info[name]
        part = name.rpartition(".")[2]
        if target.linear is None:
            yield from _copied(target.source)
        elif part != self.layout.weight_name:
            yield bytes_of(self._small(target.linear, part))
        else:
            yield from self._repacked(target)

    def _repacked(self, target: Target) -> Iterator[memoryview]:
        native = _library.native()
        linear = self.linears[str(target.linear)]
        n, k = linear.out_features, linear.in_features
        source = _memory(target.source.nbytes)
        target.source.read_into(source)
        codes = self.layout.weight
        outer, tile = (n, codes.tile[0]) if codes.outer == "out_features" else (k, codes.tile[1])
        row_bytes = target.shape[1] * codes.word_bits // 8
        blocks = -(-outer // native.BLOCK)
        step = max(1, PIECE // (native.BLOCK // tile * row_bytes))
        buffers = [_memory(step * (native.BLOCK // tile) * row_bytes) for _ in range(2)]
        for turn, begin in enumerate(range(0, blocks, step)):
            end = min(begin + step, blocks)
            rows = -(-min(end * native.BLOCK, outer) // tile) - begin * native.BLOCK // tile
            piece = buffers[turn % 2][: rows * row_bytes]
            native.repack(source, piece, self.checkpoint.layout.name, self.layout.name, n, k, begin, end)
            yield piece

    def _small(self, linear: str, part: str) -> Tensor:
        """A tensor of a linear that is not its weight."""
        shape = self.linears[linear]
        if part == "g_idx":
            return torch.arange(shape.in_features, dtype=torch.int32) // shape.group_size
        if part == "weight_shape":
            return torch.tensor([shape.out_features, shape.in_features])
        return self._groups(linear)[part]

    def _groups(self, linear: str) -> dict[str, Tensor]:
        shape = self.linears[linear]
        groups = self.checkpoint.groups(linear)
        weight = self.checkpoint.info[f"{linear}.{self.checkpoint.layout.weight_name}"]
        where = str(weight).rpartition(".")[0]
        return write_groups(self.layout, groups, shape.in_features, shape.group_size, where)


def _copied(tensor: TensorInfo) -> Iterator[memoryview]:
    buffers = [_memory(min(PIECE, tensor.nbytes)) for _ in range(2)]
    for turn, begin in enumerate(range(0, tensor.nbytes, PIECE)):
        piece = buffers[turn % 2][: min(PIECE, tensor.nbytes - begin)]
        tensor.read_into(piece, begin)
        yield piece


def _memory(nbytes: int) -> memoryview:
    """Memory that has not been touched yet: a bytearray would be filled with zeros first."""
    return np.empty(nbytes, np.uint8).data


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread. Scales and zeros are small: waiting for other threads, which takes milliseconds
    where other programs run, would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
