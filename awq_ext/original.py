"""Where the blocks of a model to be quantized come from: memory, or files that are read one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext import llm_awq
from awq_ext.checkpoint import DTYPES, Places, check_filled, skeleton
from awq_ext.errors import CheckpointError, UnsupportedModelError
from awq_ext.experts import open_experts
from awq_ext.format import read_headers, read_json
from awq_ext.linear import AwqLinear, why_not
from awq_ext.memory import give_back
from awq_ext.precision import fast_dtype
from awq_ext.pretrained import load_float
from awq_ext.storage import TensorInfo
from awq_ext.swap import as_linear
from awq_ext.trace import find_blocks

ROUNDED_GROUP = 32
"""Input channels that share a scale in `Original.rounded`: the fewest that cost no more than 5 bits a weight."""


class Original:
    """A model in memory. ``fused`` are the reasons of :func:`awq_ext.experts.open_experts` for what it left alone."""

    note: str | None = None
    """What is worth telling of how the model was loaded."""

    plan: llm_awq.Plan | None = None
    """Search results that take the place of the search."""

    def __init__(self, model: Any, blocks: str | None = None, plan: llm_awq.Plan | None = None) -> None:
        """``blocks``: the name of the list of decoder blocks, None: found."""
        self.model, self.plan = model, plan
        # Search results are of the linears that there are, and say where the blocks are.
        self.fused = open_experts(model) if plan is None else {}
        self._set_blocks(blocks if plan is None else plan.blocks)

    def _set_blocks(self, name: str | None) -> None:
        self.blocks_name = find_blocks(self.model) if name is None else name
        try:
            found = self.model.get_submodule(self.blocks_name)
        except AttributeError as error:
            raise UnsupportedModelError(f"blocks: {error}") from error
        if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
            raise UnsupportedModelError(f"blocks: {self.blocks_name} must be a list of modules, got {type(found)}")
        self.blocks: list[nn.Module] = list(found)

    def prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.blocks_name}.{index}."

    @contextmanager
    def outside(self, *, head: bool = False) -> Iterator[None]:
        """While open, what the model needs to be run up to the last block, or with its output head, is in memory."""
        yield

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """While open, all of the model is in memory, to be run, the linears of its blocks rounded to 4 bits.

        So it takes about as much memory as the result will. Linears that cannot be rounded are as they are, and what is
        outside the blocks as in `fast_outside`.
        """
        replaced: dict[str, nn.Module] = {}
        with self.outside(head=True), self.fast_outside():
            try:
                for index in range(len(self.blocks)):
                    for name, module in list(self.load(index).named_modules(prefix=f"{self.blocks_name}.{index}")):
                        linear = as_linear(module)
                        if linear is None or why_not(linear.in_features, linear.out_features, ROUNDED_GROUP):
                            continue
                        layer = AwqLinear.from_linear(linear, ROUNDED_GROUP, dtype=torch.float32)
                        self.unload_weight(f"{name}.weight")
                        self.model.set_submodule(name, layer)
                        replaced[name] = module
                give_back()
                yield
            finally:
                for name, module in replaced.items():
                    self.model.set_submodule(name, module)
                for index in range(len(self.blocks)):
                    self.unload(index)

    @contextmanager
    def fast_outside(self) -> Iterator[None]:
        """While open, embeddings and linears outside the blocks are of the dtype in which products are fast.

        So a vocabulary's weights need not be in memory in two.
        """
        old = [(weight, weight.data) for weight in self._vocabulary()]
        for weight, data in old:
            weight.data = data.to(fast_dtype(data))
        try:
            yield
        finally:
            for weight, data in old:
                weight.data = data

    def _vocabulary(self) -> set[nn.Parameter]:
        """The weights of embeddings and linears outside the blocks."""
        inside = {module for block in self.blocks for module in block.modules()}
        outside = [m for m in self.model.modules() if isinstance(m, (nn.Embedding, nn.Linear)) and m not in inside]
        return {module.get_parameter("weight") for module in outside}

    def load(self, index: int) -> nn.Module:
        """The block, in memory."""
        return self.blocks[index]

    def unload(self, index: int) -> None:
        """The block, which is as it was loaded, is not needed for now."""

    def unload_weight(self, name: str) -> None:
        """A tensor of a block, by the model's name for it, is not needed until the block is loaded again."""

    def drop(self, index: int) -> None:
        """The block, whatever has become of it, is not needed any more."""

    def read(self, name: str) -> Tensor:
        """A tensor outside the blocks that is not in memory, by the model's name for it."""
        raise KeyError(name)

    def complete(self) -> None:
        """Load what is outside the blocks and not in memory yet."""


@dataclass(frozen=True)
class _Files:
    """The tensors of a checkpoint that is not quantized."""

    path: Path
    config: dict[str, Any]
    info: dict[str, TensorInfo]
    linears: tuple[str, ...] = ()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self.info[name].read()


class Streamed(Original):
    """A checkpoint directory, and the model on the meta device: blocks are read when they are loaded."""

    def __init__(self, path: Path, blocks: str | None = None) -> None:
        """Raises CheckpointError or UnsupportedModelError if this directory cannot be read in parts.

        That takes files in which tensors are as in the model, but for their names; a dtype in config.json; and no
        tensor that is both in a block and elsewhere.
        """
        config = read_json(path, "config.json") or {}
        dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
        if dtype is None:
            raise CheckpointError(f"{path / 'config.json'} names no dtype of {', '.join(DTYPES)}")
        files = _Files(path, config, read_headers(path))
        self.model = skeleton(files, dtype)
        self.fused = open_experts(self.model)
        self._places = Places(files, self.model, dtype)
        self._set_blocks(blocks)
        self._stored = {name: stored for stored, names in self._places.of.items() for name in names}
        self._in_block: list[list[str]] = [[] for _ in self.blocks]
        self._outside: list[str] = []
        for stored, names in self._places.of.items():
            homes = {self._home(name) for name in names}
            if len(homes) > 1:
                raise CheckpointError(f"{path}: {', '.join(names)} are one tensor, in several blocks")
            (home,) = homes
            (self._outside if home is None else self._in_block[home]).append(stored)

    def _home(self, name: str) -> int | None:
        rest = name.removeprefix(f"{self.blocks_name}.")
        return None if rest == name else int(rest.partition(".")[0])

    @contextmanager
    def outside(self, *, head: bool = False) -> Iterator[None]:
        left_out = None if head else self.model.get_output_embeddings()
        own = {f"{name}." for name, module in self.model.named_modules() if module is left_out}
        needed = [
            stored
            for stored in self._outside
            if not all(any(name.startswith(prefix) for prefix in own) for name in self._places.of[stored])
        ]
        self._places.fill(needed)
        yield
        self._places.clear(needed)

    @contextmanager
    def fast_outside(self) -> Iterator[None]:
        weights = self._vocabulary()
        stored = [self._stored[name] for name, weight in self.model.named_parameters() if weight in weights]
        for weight in weights:
            weight.data = _converted(weight.data, fast_dtype(weight))
        del weights, weight  # memory that `clear` is to free
        try:
            yield
        finally:
            self._places.clear(stored)
            self._places.fill(stored)

    def load(self, index: int) -> nn.Module:
        self._places.fill(self._in_block[index])
        return self.blocks[index]

    def unload(self, index: int) -> None:
        self._places.clear(self._in_block[index])

    def unload_weight(self, name: str) -> None:
        self._places.clear([self._stored[name]])

    def drop(self, index: int) -> None:
        block = self.blocks[index]
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in block.state_dict().items()}
        block.load_state_dict(tensors, assign=True)

    def read(self, name: str) -> Tensor:
        ((_, value),) = self._places.values([self._stored[name]])
        return value

    def complete(self) -> None:
        tensors = self.model.state_dict()
        self._places.fill(name for name in self._outside if tensors[self._places.of[name][0]].is_meta)
        check_filled(self.model)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor [rows, ...] in a dtype; in its own memory if the dtypes are as large, as it may be most of a model."""
    if tensor.element_size() != dtype.itemsize or tensor.dtype == dtype:
        return tensor.to(dtype)
    result = tensor.view(dtype)
    for old, new in zip(tensor.split(1024), result.split(1024), strict=True):
        new.copy_(old.to(dtype))
    return result


def open_original(path: Path, blocks: str | None) -> Original:
    """The model of a directory, read in parts if that can be done, whole otherwise.

    Raises CheckpointError or UnsupportedModelError as :func:`awq_ext.pretrained.load_float`.
    """
    try:
        return Streamed(path, blocks)
    except (CheckpointError, UnsupportedModelError) as error:
        original = Original(load_float(path, "auto"), blocks)
        original.note = f"the whole model was loaded, because it could not be read block by block: {error}"
        return original
