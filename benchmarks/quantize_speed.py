"""Seconds and peak memory of quantizing a model, by this project and by others (`peers/`), on the same windows.

    python benchmarks/quantize_speed.py MODEL --name NAME --calibration c4.txt --group-size 64 [--seeds 0 1 2]
        [--methods awq awq+ awq+untuned] [--peer autoawq=VENV llmcompressor-gptq=VENV] [--keep DIR]

Every run is a process of its own with the same token ids, threads and group size. Ours is timed from the call of
`quantize` on a directory, which begins with importing transformers, to the checkpoint on the disk. A peer has imported
its packages and loaded its model before its time begins, and writes the checkpoint after it has ended, which favours
it. What it compiles on its first use counts: GPTQModel's packing, which a run on any model leaves in ~/.cache, and
auto-round's torch.compile. Each peer stands between two runs of each of our methods, so a machine whose speed drifts
shows in the spread of ours. `--keep` leaves the checkpoints in DIR/VERSION_SEED, where `quality.py --peer
VERSION=DIR/VERSION_SEED` can score them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import write
from peers.run import OUR_METHODS, OURS, PEERS

from awq_ext import windows

RUN = Path(__file__).resolve().parent / "peers" / "run.py"


def order(methods: list[str], peers: Iterable[str], seeds: list[int]) -> Iterator[tuple[str, int]]:
    """Version and seed of every run: ours, peer, ours, peer, ours, for each seed."""
    for seed in seeds:
        for peer in [None, *peers]:
            if peer is not None:
                yield peer, seed
            yield from ((method, seed) for method in methods)


def quantize(args: argparse.Namespace, version: str, ids: Path, out: Path, scratch: str) -> dict[str, Any]:
    """What `peers/run.py` says of one run, or the end of what it said before it failed."""
    ours = version in args.methods
    python = sys.executable if ours else args.peers[version] / "bin" / "python"
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    if not ours:
        environment.pop("PYTHONPATH", None)  # of our packages, not of theirs
    shutil.rmtree(out, ignore_errors=True)
    command = [python, RUN, OURS + version if ours else version, args.model, out, "--windows", ids]
    command += ["--group-size", str(args.group_size), "--threads", str(args.threads)]
    cwd = None if ours else scratch  # GPTQModel leaves logs where it runs
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    facts = [line for line in done.stdout.splitlines() if line.startswith('{"seconds": ')]
    if done.returncode != 0 or not facts:
        return {"exit_code": done.returncode, "error": (done.stdout + done.stderr)[-2000:]}
    return json.loads(facts[-1])


def summary(runs: list[dict[str, Any]], methods: list[str]) -> dict[str, dict[str, Any]]:
    """By version, over its runs; for a peer also how many times as long as each of our methods it takes."""
    found: dict[str, dict[str, Any]] = {}
    for version in dict.fromkeys(run["version"] for run in runs if "seconds" in run):
        of_version = [run for run in runs if run["version"] == version and "seconds" in run]
        seconds = [run["seconds"] for run in of_version]
        found[version] = {
            "runs": len(seconds),
            "seconds": median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "peak_mib": median(run["peak_mib"] for run in of_version),
        }
    for version in found.keys() - methods:
        ratios = {method: found[version]["seconds"] / found[method]["seconds"] for method in methods if method in found}
        found[version]["times_as_long_as"] = ratios
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a model that is not quantized")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="0: the first windows; others draw them")
    parser.add_argument("--methods", nargs="+", choices=OUR_METHODS, default=["awq", "awq+"])
    parser.add_argument("--peer", action="extend", nargs="+", default=[], metavar="NAME=VENV", help=", ".join(PEERS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for the checkpoints and the windows")
    args = parser.parse_args()
    args.peers = {name: Path(venv).absolute() for name, _, venv in (peer.partition("=") for peer in args.peer)}
    args.model = args.model.absolute()
    for name, venv in args.peers.items():
        if name not in PEERS or not (venv / "bin" / "python").exists():
            parser.error(f"--peer {name}={venv}: expected one of {', '.join(PEERS)}, and the environment it is in")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)  # for the facts in the result file
    settings = {name: getattr(args, name) for name in ("group_size", "samples", "seq_len", "threads", "seeds")}
    settings["calibration"] = Path(args.calibration).name
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="quantize-speed-") as scratch:
        folder = (args.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        ids = {seed: folder / f"windows_{seed}.npy" for seed in args.seeds}
        for seed, path in ids.items():
            read = windows.read(
                args.calibration, str(args.model), args.samples, args.seq_len, seed=seed, shuffle=seed != 0, pack=True
            )
            np.save(path, torch.stack(read.rows).numpy())
        for version, seed in order(args.methods, args.peers, args.seeds):
            load = os.getloadavg()[0]
            out = folder / f"{version}_{seed}"
            run = quantize(args, version, ids[seed], out, scratch)
            runs.append({"version": version, "seed": seed, "load_average_before": load, **run})
            said = f"{run['seconds']:.1f} s, {run['peak_mib']:.0f} MiB" if "seconds" in run else run["error"]
            print(f"{version}, seed {seed}: {said}", flush=True)
            if args.keep is None:
                shutil.rmtree(out, ignore_errors=True)
            # After each run: whoever interrupts hours of this keeps what there is.
            found = summary(runs, args.methods)
            path = write(
                f"quantize_speed_{args.name}_g{args.group_size}", {"settings": settings, "runs": runs, "summary": found}
            )
    print(f"{'':20} {'runs':>4} {'seconds':>9} {'(from .. to)':>20} {'peak MiB':>9}  times as long as")
    for version, figures in found.items():
        spread = f"({figures['seconds_min']:.1f} .. {figures['seconds_max']:.1f})"
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in figures.get("times_as_long_as", {}).items())
        seconds, peak = f"{figures['seconds']:.1f}", f"{figures['peak_mib']:.0f}"
        print(f"{version:20} {figures['runs']:4} {seconds:>9} {spread:>20} {peak:>9}  {ratios}")
    for run in runs:
        if "error" in run:
            print(f"{run['version']}, seed {run['seed']}, failed: {run['error'].rstrip().rpartition(chr(10))[2]}")
    print(path)


if __name__ == "__main__":
    main()
