"""`benchmarks/gpu/run_all.py` as far as it goes without a GPU: its arguments, its refusal, and what it keeps of steps
that fail, print or take too long. The steps themselves are rehearsed on a CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run benchmarks/gpu/run_all.py")


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import run_all

    return run_all


def test_it_lists_its_steps(run_all: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(run_all.STEPS)
    assert {"build", "check", "sanitize", "bandwidth", "dense", "linear", "stack"} <= set(run_all.STEPS)


def test_an_unknown_step_is_refused(run_all: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_all.main(["--steps", "build,no_such_step"])
    assert ended.value.code == 2 and "no step 'no_such_step'" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [True, False])
def test_without_a_gpu_every_step_says_so(
    dry: bool, run_all: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert run_all.main(["--out", str(out), *(["--dry-run"] if dry else [])]) == 1
    written = json.loads(out.read_text())
    assert list(written["steps"]) == list(run_all.STEPS)
    for entry in written["steps"].values():
        assert entry["status"] == "refused" and entry["why"] == "no CUDA device" and entry["commands"]
    assert written["facts"]["torch"] == torch.__version__
    assert capsys.readouterr().out.count("no CUDA device") == len(run_all.STEPS)


def step(run_all: ModuleType, code: str, limit: float = 60, needs: tuple[str, ...] = ()) -> object:
    return run_all.Step("a step of this test", limit, (("{python}", "-c", code),), needs)


def test_what_steps_print_is_kept(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of one that is stopped at its limit, with the processes it has started; a later run adds to the file."""
    line = "print('{\"m\": 1}', flush=True)"
    steps = {
        "done": step(run_all, f"{line}; {line}; print('a word')"),
        "failed": step(run_all, f"{line}; raise SystemExit(7)"),
        "slow": step(
            run_all, f"{line}; print('{{half', end=''); import subprocess; subprocess.run(['sleep', '600'])", limit=2
        ),
        "refused": step(run_all, "print('not on this GPU'); raise SystemExit(3)"),
        "needy": step(run_all, line, needs=("no-such-program",)),
    }
    monkeypatch.setattr(run_all, "STEPS", steps)
    monkeypatch.setattr(run_all, "why_not", lambda: None)
    out = tmp_path / "gpu.json"
    assert run_all.main(["--out", str(out)]) == 1
    found = json.loads(out.read_text())["steps"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "done": "done",
        "failed": "failed with 7",
        "slow": "stopped at its time limit",
        "refused": "refused",
        "needy": "refused",
    }
    assert found["done"]["results"] == [{"m": 1}] * 2 and found["done"]["log"] == "a word\n"
    assert found["slow"]["results"] == found["failed"]["results"] == [{"m": 1}]
    assert found["slow"]["seconds"] < 60
    assert found["refused"]["why"] == "not on this GPU" and found["needy"]["why"] == "no no-such-program"

    monkeypatch.setitem(steps, "failed", step(run_all, line))
    assert run_all.main(["--out", str(out), "--steps", "failed"]) == 0
    again = json.loads(out.read_text())["steps"]
    assert again["failed"]["status"] == "done" and again["slow"] == found["slow"]
    assert run_all.main(["--out", str(out), "--dry-run", "--steps", "done,needy"]) == 1
    capsys.readouterr()


def rehearsed(name: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    import steps

    grad = torch.is_grad_enabled()
    try:
        steps.main([name, "--device", "cpu", "--rows", "1", "16"])
    finally:
        torch.set_grad_enabled(grad)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_steps_are_rehearsed_on_a_cpu(run_all: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The script's own mistakes show, and its errors against float64 are those of the CPU's products."""
    steps = {name: {"results": rehearsed(name, capsys)} for name in ("dense", "linear", "dequantize", "stack")}
    for name in ("dense", "linear", "dequantize"):
        records = steps[name]["results"]
        assert {(r["dtype"], r["group"]) for r in records} == {
            (d, g) for d in ("float16", "bfloat16") for g in (128, 64, 32)
        }
        assert {r["m"] for r in records} == {1, 16}
        assert all(0 < r["error"] < 8e-3 and r["seconds"]["how"] == "rehearsal" for r in records)
    assert {r["name"] for r in steps["stack"]["results"]} == {"awq_ext", "dense"}
    swept = {"n": 8, "k": 8, "m": 1, "tile_n": 16, "tile_m": 8, "splits": 1, "cluster": 1, "stages": 2}
    steps["decode"] = {
        "results": [
            swept | {"seconds": 2e-6, "bytes_per_second": 1e9},
            swept | {"seconds": 1e-6, "bytes_per_second": 2e9},
        ]
    }
    steps["bandwidth"] = {"results": [{"how": "loads", "bytes_in_flight_per_sm": 4096, "bytes_per_second": 1e12}]}
    run_all.summary.show({"steps": steps})
    printed = capsys.readouterr().out
    assert printed.count("256x128, 128, float16") == 2 and "x dequantize" in printed
    assert "2.0      1.0" in printed and "4 KiB   1.00 TB/s" in printed and "tokens/s" in printed


def test_peers_that_are_not_there_are_absent(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "steps.py"), "marlin", "--device", "cpu", "--peers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3 and done.stdout.startswith("absent: no marlin")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_peers_sh_says_how_it_is_called() -> None:
    done = subprocess.run([FOLDER / "peers.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "peers.sh DIRECTORY\n"
