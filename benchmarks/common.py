"""What every benchmark shares: taking turns, percentiles, and the facts that go into each JSON."""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

import awq_ext

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """What the processor calls itself, with family and model where Linux tells: "AMD EPYC" alone is many machines."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kind = [f"{key.split()[-1]} {told[key]}" for key in ("cpu family", "model") if key in told]
    return ", ".join([told.get("model name", platform.processor()), *kind])


def facts() -> dict[str, object]:
    """Host, versions, date and commit; that is "dirty" with changes in anything but results, which runs write."""
    git = ["git", "-C", str(RESULTS.parent)]
    commit = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=False).stdout.strip()
    changes = [*git, "diff", "--quiet", "HEAD", "--", ":/", f":(exclude){RESULTS.name}"]
    dirty = "-dirty" if commit and subprocess.run(changes, check=False).returncode else ""
    native = awq_ext._library.native()
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": native.build_info()["cpu_kernels"],
        "awq_ext": awq_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit + dirty,
    }


Turn = Callable[[float], float]
"""Measures for about so many seconds, and returns the seconds that one call took."""


def repeat(call: Callable[[int], object]) -> Turn:
    """Turns of a call, with a counter as in `take_turns`. What wakes threads and clocks, 5 ms, is not counted."""
    counter = itertools.count()

    def turn(seconds: float) -> float:
        start, calls, passed = time.perf_counter(), 0, 0.0
        while passed < 0.005:
            call(next(counter))
            calls, passed = calls + 1, time.perf_counter() - start
        if passed < seconds:
            calls = max(1, round(seconds / passed * calls))
            start = time.perf_counter()
            for _ in range(calls):
                call(next(counter))
            passed = time.perf_counter() - start
        return passed / calls

    return turn


def turn_by_turn(turns: dict[str, Turn], rounds: int = 5, seconds: float = 0.05) -> dict[str, dict[str, float]]:
    """What `take_turns` does, for contestants that may be other processes: each has a pause before its turn, in which
    threads of the one before, that wait for work in a loop, go to sleep. Every round begins with another one, and every
    other round runs backwards, so that nobody always follows the same."""
    names = list(turns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        for name in order[:: -1 if i % 2 else 1]:
            time.sleep(0.01)
            times[name].append(turns[name](seconds))
    return {name: percentiles(values) for name, values in times.items()}


def take_turns(
    contestants: dict[str, Callable[[int], object]], rounds: int = 15, seconds: float = 0.05
) -> dict[str, dict[str, float]]:
    """Seconds a call of each contestant, in rotation: median, p10 and p90 over `rounds`.

    A contestant is called with a counter, for it to rotate its weights by. One turn repeats it for about `seconds`.
    """
    for call in contestants.values():
        call(0)
    return turn_by_turn({name: repeat(call) for name, call in contestants.items()}, rounds, seconds)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9)}


def write(name: str, results: object) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"facts": facts(), "results": results}, indent=1) + "\n")
    return path
