"""Calibration shared among the processes of torch.distributed: the same bytes, however many there are.

Floating point sums depend on their order, so the order is fixed and the processes fit themselves into it. The batches
are divided into eight slots of neighbours. Each slot is summed up in order, and the eight sums by a binary tree: pairs
of neighbours, pairs of pairs, both halves. A process has one subtree's slots, whatever their number, and the levels
above it are added up by exchange; addition is commutative, so both sides of an exchange get the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 8
T = TypeVar("T")


class Ranks:
    """This process among those that calibrate together: all of torch.distributed, or it alone.

    Raises ValueError if their number does not divide 8.
    """

    def __init__(self, *, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        if SLOTS % self.count:
            raise ValueError(f"torch.distributed has {self.count} processes; calibration takes 1, 2, 4 or {SLOTS}")
        each = SLOTS // self.count
        self.slots = range(self.rank * each, (self.rank + 1) * each)

    def batches(self, count: int) -> list[tuple[int, int]]:
        """(batch, its slot) of those of ``count`` batches that are this process's, in order; batch 0 is rank 0's."""
        bounds = [-(-slot * count // SLOTS) for slot in range(SLOTS + 1)]
        return [(batch, slot) for slot in self.slots for batch in range(bounds[slot], bounds[slot + 1])]

    def least(self, number: int) -> int:
        """The smallest of what all processes pass."""
        if self.count == 1:
            return number
        smallest = torch.tensor(number)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, which alone runs it. All processes raise what it raises there."""
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def gather(self, part: list[T]) -> list[T]:
        """What all processes pass, in the order of their ranks."""
        if self.count == 1:
            return part
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part)
        return [item for one in parts for item in one]

    def add_up(self, part: list[Tensor] | None) -> list[Tensor] | None:
        """The sum of all processes' parts, each the sum of a subtree; None has nothing in it."""
        if self.count == 1:
            return part
        kinds: list[Any] = [None] * self.count
        dist.all_gather_object(kinds, None if part is None else [(value.shape, value.dtype) for value in part])
        known = next((kind for kind in kinds if kind is not None), None)
        if known is None:
            return None
        if part is None:  # x + -0 is x, also where x is 0 or -0
            part = [torch.full(shape, -0.0, dtype=dtype) for shape, dtype in known]
        bit = 1
        while bit < self.count:
            part = [value + _exchange(value, self.rank ^ bit) for value in part]
            bit *= 2
        return part


ALONE = Ranks(alone=True)


class SlotSum:
    """Sums of several tensors over batches. What is kept is a sum for each complete subtree, four at most."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._closed = ranks, 0
        self._current: list[Tensor] | None = None
        self._stack: list[list[Tensor] | None] = []

    def of_slot(self, slot: int) -> list[Tensor] | None:
        """What the slot's sums are so far, to be changed in place; None: nothing yet. Slots come in order."""
        while self._ranks.slots.start + self._closed < slot:
            self._close()
        return self._current

    def begin(self, values: list[Tensor]) -> None:
        """The slot's first values; they are taken over."""
        self._current = values

    def _close(self) -> None:
        """Put the slot on the stack; two complete neighbours become one, as carries do in a counter."""
        self._stack.append(self._current)
        self._current = None
        self._closed += 1
        size = self._closed
        while size % 2 == 0:
            right, left = self._stack.pop(), self._stack.pop()
            self._stack.append(right if left is None else left)
            if left is not None and right is not None:
                for a, b in zip(left, right, strict=True):
                    a += b
            size //= 2

    @cached_property
    def total(self) -> list[Tensor] | None:
        """The sums over the batches of all processes, on the CPU; None without any. Nothing may be added any more.

        All processes have to ask for it, in the same order.
        """
        while self._closed < len(self._ranks.slots):
            self._close()
        (part,) = self._stack
        self._stack.clear()
        return self._ranks.add_up(None if part is None else [value.cpu() for value in part])


def _exchange(value: Tensor, peer: int) -> Tensor:
    """Give another process this tensor for its own."""
    other = torch.empty_like(value)
    sending = dist.isend(value, peer)
    dist.recv(other, peer)
    if sending is not None:
        sending.wait()
    return other


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone, so on no order of calls and no number of processes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
