"""What the process says of its memory, and when it is given back."""

from __future__ import annotations

import sys

import pytest
import torch

from awq_ext import memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")


@linux
def test_memory_in_use_is_seen_and_the_peak_stays() -> None:
    before = memory.current()
    held = torch.ones(64 << 20)
    with_it = memory.current()
    assert with_it - before > 0.25
    del held
    memory.give_back()
    assert with_it - memory.current() > 0.25
    assert memory.peak() > with_it - 0.001


@pytest.mark.parametrize(
    ("peak", "below", "times"), [(2.0, 0.0, 1), (2.0, 0.9, 1), (2.0, 1.1, 0), (0.99 * memory.SMALL, 0.0, 0)]
)
def test_memory_is_given_back_near_the_peak_only(
    monkeypatch: pytest.MonkeyPatch, peak: float, below: float, times: int
) -> None:
    calls: list[None] = []
    current = peak - below * memory.NEAR
    monkeypatch.setattr(memory, "peak", lambda: peak)
    monkeypatch.setattr(memory, "current", lambda: current)
    monkeypatch.setattr(memory, "give_back", lambda: calls.append(None))
    memory.give_back_near_peak()
    assert len(calls) == times
