"""Bars where somebody watches, silence elsewhere."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from awq_ext.progress import Progress


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def drawn(console: Console) -> str:
    return console.file.getvalue()


def test_a_terminal_shows_description_count_and_note(terminal):
    with Progress(terminal).task("quantize blocks", total=3) as task:
        task.advance(2, note="error 0.4%")
    assert "quantize blocks" in drawn(terminal)
    assert "2/3" in drawn(terminal)
    assert "error 0.4%" in drawn(terminal)


def test_tasks_nest_and_follow_one_another(terminal):
    progress = Progress(terminal)
    with progress.task("outer", total=2) as outer:
        with progress.task("inner", total=4) as inner:
            inner.advance(4)
        outer.advance()
    with progress.task("next", total=1) as task:
        task.advance()
    for text in ("outer", "inner", "4/4", "1/2", "next", "1/1"):
        assert text in drawn(terminal)


def test_an_error_ends_the_bar_and_passes(terminal):
    progress = Progress(terminal)
    with pytest.raises(ValueError, match="inside"), progress.task("work", total=1):
        raise ValueError("inside")
    assert drawn(terminal).endswith("\x1b[?25h")  # the cursor is shown again
    with progress.task("again", total=1):
        pass
    assert "again" in drawn(terminal)


def test_nothing_is_drawn_where_nobody_watches(capsys, monkeypatch):
    for progress in (Progress.silent(), Progress(Console(file=sys.stderr, force_terminal=False))):
        with progress.task("work", total=1) as task:
            task.advance(note="done")
    assert capsys.readouterr() == ("", "")
