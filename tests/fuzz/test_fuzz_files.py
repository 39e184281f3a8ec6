"""Mutated checkpoints are read or refused, and nothing else happens; ``fuzzer.py`` says what that means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FUZZER = Path(__file__).with_name("fuzzer.py")
SHARED = Path(os.environ.get("AWQ_SHARED", REPOSITORY.parent / "shared")) / "data" / "checkpoints"


pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux does")


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory in memory, where there is one; removed also after a crash."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


def run(*arguments: object, work: Path, seconds: float) -> tuple[int, dict[str, Any], str]:
    """Exit status, summary and stderr of the fuzzer."""
    command = [sys.executable, str(FUZZER), "--work", str(work), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.mark.timeout(0)  # the fuzzer has a limit for each input, and this test one for the whole run
def test_mutated_checkpoints_are_read_or_refused(pytestconfig: pytest.Config, work: Path, tmp_path: Path) -> None:
    inputs = pytestconfig.getoption("--fuzz-inputs", default=4000)
    seed = pytestconfig.getoption("--fuzz-seed", default=0)
    keep = Path(pytestconfig.getoption("--fuzz-keep", default=None) or tmp_path / "failures").absolute()
    genuine = ["--samples", SHARED] if SHARED.is_dir() else []
    code, summary, errors = run(
        *("--inputs", inputs, "--seed", seed, "--keep", keep, *genuine), work=work, seconds=120 + inputs / 50
    )
    last = (work / "current").read_text().strip() if (work / "current").exists() else "none"
    repeat = f"python {FUZZER} --inputs 1 --seed {seed} --first N {' '.join(map(str, genuine))}"
    assert summary, f"the fuzzer ended with {code} in input {last} (repeat: {repeat}):\n{errors[-5000:]}"
    found = "\n\n".join(f"input {failure['input']}: {failure['what']}" for failure in summary["first_failures"])
    assert summary["failures"] == 0 and code == 0, f"repeat: {repeat}\nkept in {keep}\n{found}"
    print(json.dumps(summary))

    # The mutations are worth something only if both happen, after each kind of change.
    assert summary["opened"] + summary["refused"] == inputs
    if inputs >= 4000:
        assert summary["opened"] > 0.1 * inputs and summary["refused"] > 0.5 * inputs
        assert len(summary["refused_after"]) == 12 and len(summary["opened_after"]) >= 10


# Wrong readers, and one that crashes at last.
WRONG = """
import os, signal, time

def lookup(path, rng):
    {}["wrong"]

def allocate(path, rng):
    bytes(10**8)

def fill(path, rng):
    b"x" * 10**8

def wait(path, rng):
    time.sleep(1)

def draw(path, rng):
    raise fuzzer.CheckpointError("/x: \\x1b[2J")

fuzzer.SECONDS = 0.3
for number, (reader, room) in enumerate({lookup: 64, allocate: 64, fill: 1000, wait: 64, draw: 64}.items()):
    work = os.path.join(sys.argv[1], str(number))
    os.mkdir(work)
    checking = fuzzer.Fuzzer(0, [fuzzer.gemm()], fuzzer.Path(work), None)
    limit = fuzzer.limit_memory
    fuzzer.use, fuzzer.limit_memory = reader, lambda size: limit(size + room * 2**20 - fuzzer.MEMORY)
    signal.signal(signal.SIGALRM, fuzzer.on_alarm)
    checking.run(0, 3)
    fuzzer.limit_memory = limit
    print(fuzzer.json.dumps({"reader": reader.__name__, "failures": checking.failures}), flush=True)

def crash(self, number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGSEGV)

fuzzer.Fuzzer.one = crash
checking.run(0, 10)
"""


def test_the_fuzzer_sees_what_is_wrong(work: Path) -> None:
    script = f"import sys\nsys.path.insert(0, {str(FUZZER.parent)!r})\nimport fuzzer\n{WRONG}"
    done = subprocess.run([sys.executable, "-c", script, work], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert (work / "4" / "current").read_text().strip() == "5"
    seen = {line["reader"]: line["failures"] for line in map(json.loads, done.stdout.splitlines())}
    for reader, what in {
        "lookup": "KeyError: 'wrong'",
        "allocate": "MemoryError",
        "fill": "resident memory grew by",
        "wait": "takes more than",
        "draw": "unprintable",
    }.items():
        assert any(what in failure["what"] for failure in seen[reader]), (reader, seen[reader])
