"""Seconds of a call on a GPU, without what flatters: weights that a cache still has, zeros, launches from Python."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROTATE_BYTES = 180 << 20
"""Weights rotate through so many bytes: three times the largest second cache."""
REPEATS = 50
"""Times that a median is taken of, at least."""

Call = Callable[[int], Tensor]
"""With the i-th copy of the weight."""


def copies(*tensors: Tensor, least: int = 2) -> list[tuple[Tensor, ...]]:
    """The tensors as often as it takes to push them out of the cache."""
    count = max(least, -(-ROTATE_BYTES // max(1, sum(t.nbytes for t in tensors)))) if tensors[0].is_cuda else least
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def captured(call: Call, count: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one call with each copy; results stay where a replay writes them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(3, count)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(i) for i in range(count)]
    return graph, results


def seconds(call: Call, count: int, device: torch.device, graph: bool = True) -> dict[str, Any]:
    """Median, p10 and p90 of a call, over at least REPEATS rounds of all copies. A round is the replay of a graph or,
    for what cannot be captured, calls from Python; then the time a call takes to be enqueued counts, if it is longer.
    The time of a round is read from the device's events."""
    if device.type == "cpu":  # a rehearsal: no figure
        start = time.perf_counter()
        for i in range(count):
            call(i)
        passed = (time.perf_counter() - start) / count
        return {"median": passed, "p10": passed, "p90": passed, "rounds": 1, "how": "rehearsal"}
    with contextlib.ExitStack() as stack:
        if graph:
            captures, results = captured(call, count)
            stack.callback(results.clear)
            play = captures.replay
        else:

            def play() -> None:
                for i in range(count):
                    call(i)

        for _ in range(5):
            play()
        times = []
        while len(times) < REPEATS:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            play()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / count)
    tenths = statistics.quantiles(times, n=10)
    how = "graph replay" if graph else "events around calls"
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1], "rounds": len(times), "how": how}


def clocks(device: torch.device) -> dict[str, Any]:
    """What the card says of itself now; nothing where NVML's Python package is missing."""
    if device.type != "cuda":
        return {}
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(),
            "watt": torch.cuda.power_draw() / 1e3,
            "celsius": torch.cuda.temperature(),
        }
    except Exception as error:  # torch raises what pynvml, or its absence, raises
        return {"unknown": f"{type(error).__name__}: {error}"[:200]}


def relative_error(y: Tensor, x: Tensor, w: Tensor) -> float:
    """||y - x w^T|| / ||x w^T|| in float64, of at most 16 rows that are spread over y; w a slice of rows at a time."""
    rows = torch.linspace(0, len(x) - 1, min(16, len(x)), device=x.device).long()
    x, y = x[rows].double(), y[rows].double()
    reference = torch.cat([x @ part.double().T for part in w.split(4096)], dim=-1)
    return float((y - reference).norm() / reference.norm())
