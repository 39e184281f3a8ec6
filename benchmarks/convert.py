"""`convert` of a checkpoint of 1 GB, in a process of its own, against `cp -r` and reading the copy once."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from common import percentiles, write

from awq_ext.layouts import layouts
from awq_ext.storage import Writer

COPY = "cp and read"
TARGETS = ("gemv", "gptq_v2", "gemv_fast", "compressed-tensors")
HIDDEN, FFN, VOCABULARY, GROUP_SIZE = 4096, 11008, 32000, 128  # Llama-2-7B's
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (FFN, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, FFN),
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def tensors_of(blocks: int) -> Tensors:
    """A slice of Llama-2-7B in gemm: embeddings, so many blocks, the head."""
    found: Tensors = {"model.embed_tokens.weight": ("F16", (VOCABULARY, HIDDEN))}
    for block in range(blocks):
        for linear, (n, k) in LINEARS.items():
            for part, tensor in layouts()["gemm"].tensors(n, k, GROUP_SIZE, ("F16",)).items():
                found[f"model.layers.{block}.{linear}.{part}"] = (tensor.dtypes[0], tensor.shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{block}.{norm}.weight"] = ("F16", (HIDDEN,))
    return found | {"model.norm.weight": ("F16", (HIDDEN,)), "lm_head.weight": ("F16", (VOCABULARY, HIDDEN))}


def split(tensors: Tensors, shard_bytes: int) -> Iterator[Tensors]:
    """As huggingface_hub does: in order, a new shard where one would be too large."""
    shard: Tensors = {}
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = (2 if dtype == "F16" else 4) * int(np.prod(shape))
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = (dtype, shape)
        size += nbytes
    yield shard


def make_checkpoint(path: Path, blocks: int, shard_bytes: int) -> int:
    """Random codes, zeros and scales, written and synced; returns the bytes of all files."""
    random = np.random.default_rng(0)
    path.mkdir()
    shards = list(split(tensors_of(blocks), shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        order = sorted(shard, key=lambda name: (shard[name][0] != "I32", name))
        with Writer(path / file, [(name, *shard[name]) for name in order], {"format": "pt"}) as writer:
            for name in order:
                dtype, shape = shard[name]
                if dtype == "I32":
                    data = random.integers(0, 2**32, shape, np.uint32)
                else:
                    data = (random.random(shape, np.float32) * 0.01 + 0.001).astype(np.float16)
                writer.write(name, data.data)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quant = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quant}))
    os.sync()
    return sum(file.stat().st_size for file in path.iterdir())


def forget(path: Path) -> None:
    """Take the files of a directory out of the page cache; they are on the disk already."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sync_all(path: Path) -> float:
    begin = time.perf_counter()
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin


def copy_and_read(source: Path, out: Path) -> dict[str, float]:
    """`cp -r`, then `cat` of all files; and how long a sync of the copy took, which `convert` never leaves out."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    copied = time.perf_counter() - begin
    synced = sync_all(out)
    begin = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        subprocess.run(["cat", *out.iterdir()], check=True, stdout=nothing)
    read = time.perf_counter() - begin
    return {"wall_s": copied + read, "cp_s": copied, "read_s": read, "fsync_s": synced}


def convert(source: Path, out: Path, layout: str) -> dict[str, float]:
    """`awq-ext convert`, and how much of its time is spent in `convert()`; the rest is Python's and torch's start."""
    command = [sys.executable, "-m", "awq_ext", "convert", source, out, "--to", layout, "--json"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, peak_rss(child.pid))
            time.sleep(0.005)
        wall = time.perf_counter() - begin
        assert child.stdout is not None and child.returncode == 0
        own = json.load(child.stdout)["seconds"]
    return {"wall_s": wall, "convert_s": own, "start_and_exit_s": wall - own, "peak_rss_mib": peak}


def peak_rss(process: int) -> float:
    """The high-water mark of resident memory in MiB, page cache apart (Linux); 0 of a process that has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def measure(
    source: Path, scratch: Path, targets: Sequence[str], rounds: int, cold: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds and MiB of `cp` and of each conversion, in rotation; ``cold``: the source is not in the page cache."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in (COPY, *targets):
            if cold:
                forget(source)
            run = copy_and_read(source, scratch) if name == COPY else convert(source, scratch, name)
            found.setdefault(name, []).append(run)
            shutil.rmtree(scratch)
    return {name: {key: percentiles([run[key] for run in runs]) for key in runs[0]} for name, runs in found.items()}


def compare(times: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How much longer each conversion took, of the medians."""
    copied = times[COPY]["wall_s"]["median"]
    synced = copied + times[COPY]["fsync_s"]["median"]
    ratios = {}
    for name in [name for name in times if name != COPY]:
        whole, own = (times[name][key]["median"] for key in ("wall_s", "convert_s"))
        ratios[name] = {
            "process / (cp + read)": whole / copied,
            "process / (cp + fsync + read)": whole / synced,
            "convert() / (cp + read)": own / copied,
            "convert() / (cp + fsync + read)": own / synced,
        }
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=5, help="of the model; 5 make 1.05 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to write; needs 3 GB (default: the temporary directory)")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="convert-") as scratch:
        for shards, shard_bytes, targets in (("of 500 MB", 500 * 10**6, TARGETS), ("one", 10**12, TARGETS[:1])):
            source = Path(scratch) / "source"
            nbytes = make_checkpoint(source, args.blocks, shard_bytes)
            for cold in (False, True):
                load = os.getloadavg()[0]
                times = measure(source, Path(scratch) / "out", targets, args.rounds, cold)
                result = {
                    "bytes": nbytes, "shards": shards, "source_in_page_cache": not cold, "rounds": args.rounds,
                    "load_average": [load, os.getloadavg()[0]], "times": times, "ratios": compare(times),
                }  # fmt: skip
                results.append(result)
                print(f"{nbytes / 1e9:.2f} GB, shards: {shards}, source in page cache: {not cold}; load {load:.1f}")
                for name, run in times.items():
                    print(f"  {name}: " + ", ".join(f"{key} {value['median']:.2f}" for key, value in run.items()))
                for name, ratios in compare(times).items():
                    print(f"  {name}: " + ", ".join(f"{key} = {value:.2f}" for key, value in ratios.items()))
            shutil.rmtree(source)
    print(write("convert", results))


if __name__ == "__main__":
    main()
