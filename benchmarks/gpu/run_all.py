"""Everything there is to measure on a GPU, in one command:

    python benchmarks/gpu/run_all.py --out h200.json [--steps build,check,linear] [--peers DIR] [--list] [--dry-run]

Each step is a process of its own with a time limit. What it prints as lines of JSON are its results, and the file is
written after each step, or when one is stopped, with all that was measured until then. With an --out that exists,
only the steps that are run are replaced in it. --dry-run walks through the steps and says which could run here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import summary

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
BUILD = REPOSITORY / "build" / "gpu"
REFUSED = 3
"""Exit status of what cannot run here; the last line it printed says why."""
LOG = 4000
"""Characters of a step's other output that are kept, its last."""


@dataclass(frozen=True)
class Step:
    about: str
    limit: float  # seconds
    commands: tuple[tuple[str, ...], ...]  # one after another; {python} and the like are filled in
    needs: tuple[str, ...] = ()  # programs

    def filled(self, **words: str) -> list[list[str]]:
        return [[words.get(word.strip("{}"), word) for word in command] for command in self.commands]


def torch_step(about: str, limit: float, *words: str) -> Step:
    return Step(about, limit, (("{python}", str(HERE / "steps.py"), *words, "--peers", "{peers}"),))


FEW = ("--shapes", "4096x4096", "28672x4096", "8192x8192")
SWEEP = str(BUILD / "awq_gpu_sweep")
SWEPT = ("decode", "gemm_sm80", "gemm_sm90")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def sanitized(tool: str, kernel: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--error-exitcode", "1", "--tool", tool, SWEEP, kernel, "--check")


def sweep(kernel: str, limit: float) -> Step:
    return Step(f"every way to cut {kernel}'s work", limit, ((SWEEP, kernel),), (SWEEP,))


STEPS = {
    "build": Step("the libraries and programs, for this GPU", 600, (("{python}", str(HERE / "build.py")),), ("nvcc",)),
    "check": Step(
        "the tests that need a GPU",
        420,
        (
            (
                "{python}",
                "-m",
                "pytest",
                "-q",
                "-m",
                "gpu",
                "--continue-on-collection-errors",
                str(REPOSITORY / "tests"),
            ),
        ),
    ),
    "sanitize": Step(
        "memory accesses, races and barriers of the linear kernels, on small and odd shapes",
        420,
        tuple(sanitized(tool, kernel) for tool in TOOLS for kernel in SWEPT),
        ("compute-sanitizer", SWEEP),
    ),
    "bandwidth": Step(
        "read-only bandwidth by bytes in flight",
        120,
        ((str(BUILD / "awq_gpu_bandwidth"),),),
        (str(BUILD / "awq_gpu_bandwidth"),),
    ),
    "dense": torch_step("products of 16-bit floats by cuBLAS", 240, "dense", "--groups", "128"),
    "linear": torch_step("awq_ext::linear, as it chooses its kernels", 300, "linear"),
    "dequantize": torch_step("dequantize and multiply by cuBLAS", 240, "dequantize", "--groups", "128"),
    "decode": sweep("decode", 240),
    "gemm_sm90": sweep("gemm_sm90", 420),
    "gemm_sm80": sweep("gemm_sm80", 420),
    "stack": torch_step("a step of decoding through the linears of a 7B model", 120, "stack"),
    "tinygemm": torch_step("torch's _weight_int4pack_mm", 120, "tinygemm", *FEW),
    "marlin": torch_step("IST-DASLab/marlin", 180, "marlin", *FEW),
    "autoawq": torch_step("AutoAWQ_kernels, gemm", 300, "autoawq", *FEW),
    "autoawq-fast": torch_step("AutoAWQ_kernels, gemv_fast", 180, "autoawq-fast", *FEW),
    "gptqmodel": torch_step("GPTQModel's Marlin", 420, "gptqmodel", *FEW),
}


class Watch:
    """What nvidia-smi reads four times a second while a step runs."""

    QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            options = [f"--query-gpu={','.join(self.QUERY)}", "--format=csv,noheader,nounits", "-lms", "250"]
            pipe = subprocess.PIPE
            command = ["nvidia-smi", *options, "-i", "0"]
            self.process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def stop(self) -> dict[str, dict[str, float]]:
        if self.process is None:
            return {}
        self.process.terminate()
        output, _ = self.process.communicate()
        rows = [line.split(",") for line in output.splitlines()]
        found = {}
        for i, name in enumerate(self.QUERY):
            values = []
            for row in rows:
                if len(row) == len(self.QUERY):
                    try:
                        values.append(float(row[i]))
                    except ValueError:  # "[N/A]"
                        continue
            if values:
                found[name] = {"least": min(values), "median": statistics.median(values), "most": max(values)}
        return found


def lines_of(command: list[str], limit: float, environment: dict[str, str], status: list[int]) -> Iterator[str]:
    """The command's lines, as they come; `status` gets its exit status, or -1 if it was stopped at the limit."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        assert process.stdout is not None
        yield from process.stdout
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            stop()
            process.wait()
    status.append(-1 if stopped.is_set() else process.returncode)


def record_of(line: str) -> dict[str, Any] | None:
    """None for what is no line of JSON, or half of one, of a step that was stopped."""
    try:
        return json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:
        return None


def why_not() -> str | None:
    """What is in the way of every step."""
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    return None if found.returncode == 0 else "no CUDA device"


def run(step: Step, words: dict[str, str]) -> dict[str, Any]:
    """What goes into the file: the status, results, clocks, the end of the log."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if (BUILD / "libawq_ops.so").exists():
        environment["AWQ_LIB_DIR"] = str(BUILD)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    results, log, statuses = [], "", []
    watch, start = Watch(), time.monotonic()
    for command in step.filled(**words):
        left, ended = step.limit - (time.monotonic() - start), []
        for line in lines_of(command, max(left, 1.0), environment, ended):
            record = record_of(line)
            if record is None:
                log = (log + line)[-LOG:]
            else:
                results.append(record)
        statuses += ended
        if ended != [0] and ended != [REFUSED]:
            break
    passed = {"seconds": round(time.monotonic() - start, 1), "clocks": watch.stop(), "results": results, "log": log}
    ran = [status for status in statuses if status != REFUSED]  # some of several may not concern this GPU
    last = next((status for status in ran if status), 0) if ran else REFUSED
    name = {0: "done", -1: "stopped at its time limit", REFUSED: "refused"}.get(last, f"failed with {last}")
    why = {"why": (log.strip().splitlines() or ["it does not say why"])[-1]} if last == REFUSED else {}
    return {"status": name, **why, **passed}


def facts() -> dict[str, Any]:
    """GPU, driver, versions, date and commit."""

    def said(*command: str) -> str | None:
        if shutil.which(command[0]) is None:
            return None
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        return done.stdout.strip() or None

    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "gpu": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"),
        "nvcc": (said("nvcc", "--version") or "").partition("release ")[2].partition("\n")[0] or None,
        "torch": version_of("torch"),
        "python": sys.version.split()[0],
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": said("git", "describe", "--always", "--dirty"),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--steps", help="names, with commas (default: all)")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="the directory that peers.sh made")
    parser.add_argument("--list", action="store_true", help="the steps, and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="walk through the steps, measure nothing")
    args = parser.parse_args(words)
    if args.list:
        for name, step in STEPS.items():
            print(f"{name:14} {step.about} (at most {step.limit:.0f} s)")
        return 0
    names = args.steps.split(",") if args.steps else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    whole: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"steps": {}}
    whole["facts"] = facts()
    filled = {"python": sys.executable, "peers": str(args.peers.resolve())}
    refusal = why_not()
    for name in names:
        print(f"{name}: {STEPS[name].about}", flush=True)
        step = STEPS[name]
        missing = [what for what in step.needs if shutil.which(what) is None]
        if refusal is not None or missing:
            entry = {"status": "refused", "why": refusal or f"no {missing[0]}"}
        elif args.dry_run:
            entry = {"status": "could run"}
        else:
            entry = run(step, filled)
        whole["steps"][name] = entry | {"commands": step.filled(**filled)}
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(whole, indent=1) + "\n")
        partial.replace(args.out)
        why = f": {entry['why']}" if "why" in entry else ""
        print(f"  {entry['status']}{why}, {len(entry.get('results', []))} results", flush=True)
        if entry["status"].startswith("failed"):
            print(entry["log"][-1000:])
    summary.show(whole)
    print(args.out)
    return 0 if all(whole["steps"][name]["status"] == "done" for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
