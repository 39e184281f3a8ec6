"""Where the blocks of a model to be quantized come from: memory, or files that are read one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from awq_ext import llm_awq
from awq_ext.checkpoint import DTYPES, Places, check_filled, skeleton
from awq_ext.errors import CheckpointError, UnsupportedModelError
from awq_ext.experts import open_experts
from awq_ext.format import read_headers, read_json
from awq_ext.precision import embedding_weights, fast_dtype
from awq_ext.pretrained import load_float
from awq_ext.storage import TensorInfo
from awq_ext.trace import find_blocks


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
    def outside(self) -> Iterator[None]:
        """While open, what the model needs to be run up to the last block is in memory."""
        yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While open, all of the model is in memory, to be run."""
        yield

    def load(self, index: int) -> nn.Module:
        """The block, in memory."""
        return self.blocks[index]

    def unload(self, index: int) -> None:
        """The block, which is as it was loaded, is not needed for now."""

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
    def outside(self) -> Iterator[None]:
        head = self.model.get_output_embeddings()
        own = {f"{name}." for name, module in self.model.named_modules() if module is head}
        needed = [
            stored
            for stored in self._outside
            if not all(any(name.startswith(prefix) for prefix in own) for name in self._places.of[stored])
        ]
        self._places.fill(needed)
        yield
        self._places.clear(needed)

    @contextmanager
    def whole(self) -> Iterator[None]:
        every = [*self._outside, *chain.from_iterable(self._in_block)]
        self._places.fill(every)
        embeddings = embedding_weights(self.model)
        for linear in self.model.modules():  # what is read again later need not be kept beside what products are of
            if type(linear) is nn.Linear and linear.weight not in embeddings:
                linear.weight.data = linear.weight.data.to(fast_dtype(linear.weight))
        yield
        self._places.clear(every)

    def load(self, index: int) -> nn.Module:
        self._places.fill(self._in_block[index])
        return self.blocks[index]

    def unload(self, index: int) -> None:
        self._places.clear(self._in_block[index])

    def drop(self, index: int) -> None:
        self.blocks[index].to("meta")

    def read(self, name: str) -> Tensor:
        ((_, value),) = self._places.values([self._stored[name]])
        return value

    def complete(self) -> None:
        tensors = self.model.state_dict()
        self._places.fill(name for name in self._outside if tensors[self._places.of[name][0]].is_meta)
        check_filled(self.model)


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
