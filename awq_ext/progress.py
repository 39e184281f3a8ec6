"""Progress bars with an ETA on stderr, and silence where nobody would watch them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Task(Protocol):
    """A running piece of work of known length."""

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        """`steps` more are done; `note` (what was just done, a figure) replaces the text behind the bar."""


class Progress:
    """Shows tasks as bars with elapsed and remaining time.

    Bars go to stderr, so stdout stays free for results, and only if stderr is a terminal. Tasks may be nested::

        with progress.task("quantize blocks", total=30) as task:
            task.advance(1, note="loss 0.012")
    """

    def __init__(self, console: Console | None = None) -> None:
        """`console` is where bars are drawn (None: stderr). Nothing is drawn on one that is not a terminal."""
        console = console or Console(file=sys.stderr)
        self._bars: RichProgress | None = None
        if console.is_terminal:
            self._bars = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=console,
                speed_estimate_period=600,  # seconds; a block of a large model takes longer than rich's default of 30
            )
        self._running = 0

    @classmethod
    def silent(cls) -> Progress:
        """A progress that never draws anything: the default of library functions."""
        return cls(Console(quiet=True, force_terminal=False))

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        """A bar of `total` steps. It disappears when the block ends; an error in the block takes it away too."""
        if self._bars is None:
            yield _Quiet()
            return
        if self._running == 0:
            self._bars.start()
        self._running += 1
        bar = _Bar(self._bars, description, total)
        try:
            yield bar
        finally:
            self._bars.refresh()  # short tasks, too, are seen complete
            self._bars.remove_task(bar.id)
            self._running -= 1
            if self._running == 0:
                self._bars.stop()


class _Quiet:
    def advance(self, steps: float = 1, *, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bars: RichProgress, description: str, total: float) -> None:
        self._bars = bars
        self.id = bars.add_task(description, total=total, note="")

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        self._bars.update(self.id, advance=steps, note=note)
