"""Options of the fuzz tests, known when the directory is named: ``pytest tests/fuzz --fuzz-inputs 1000000``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-inputs", type=int, default=4000, help="mutated checkpoints to open (default: %(default)s)")
    group.addoption("--fuzz-seed", type=int, default=0, help="other inputs for every seed (default: %(default)s)")
    group.addoption("--fuzz-keep", help="directory for inputs that fail (default: the test's own)")
