"""`resume`: a run that was interrupted, wherever, ends with the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantizer import ids, small_model
from transformers import LlamaConfig, LlamaForCausalLM

from awq_ext import CheckpointError, quantize
from awq_ext.block import BlockQuantizer
from awq_ext.block_files import BlockFiles
from awq_ext.quantizer import quantize_to

KILLS = int(os.environ.get("AWQ_KILLS", "6"))
OPTIONS: dict[str, Any] = {"calibration": ids(), "samples": 4, "seq_len": 32, "q_group_size": 16}
OPTIONS |= {"method": "awq+", "tune_steps": 2, "generated": 2}


def files_of(directory: Path) -> dict[str, bytes]:
    """All files, but the report, which has times in it."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "awq_report.json"}


def untimed(report: Any) -> dict[str, Any]:
    return {key: value for key, value in report.to_dict().items() if "seconds" not in key}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    small_model(request.param, torch.bfloat16).save_pretrained(path)
    return path


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """The run ends when it is about to write this block."""
    write = BlockFiles.write

    def stop(self: BlockFiles, at: int, *rest: Any) -> None:
        if at == index:
            raise Interrupted
        write(self, at, *rest)

    monkeypatch.setattr(BlockFiles, "write", stop)


@pytest.mark.parametrize(("method", "tune_steps"), [("awq", 0), ("awq+", 0), ("awq+", 2), ("gptq", 0), ("rtn", 0)])
def test_the_bytes_and_the_report_are_those_of_one_run(
    original: Path, method: str, tune_steps: int, tmp_path: Path
) -> None:
    options = {**OPTIONS, "method": method, "tune_steps": tune_steps, "generated": 0 if method == "rtn" else 2}
    whole = quantize_to(original, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(Interrupted):
            quantize_to(original, tmp_path / "out", **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.blocks", "whole"]
    with pytest.MonkeyPatch.context() as patch:
        blocks: list[int] = []
        choose = BlockQuantizer.quantize
        patch.setattr(BlockQuantizer, "quantize", lambda self, at, *rest: blocks.append(at) or choose(self, at, *rest))
        resumed = quantize_to(original, tmp_path / "out", resume=True, **options)
        quantize_to(original, tmp_path / "again", **options)
        assert blocks == [1, 0, 1]  # one of the two blocks was not quantized again
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert untimed(resumed) == untimed(whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "out", "whole"]


def test_all_blocks_may_be_finished_and_none(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantize(original, out=tmp_path / "out", resume=True, **OPTIONS)  # nothing is there to go on from
    whole = files_of(tmp_path / "out")
    monkeypatch.setattr(BlockFiles, "remove", lambda self: None)
    quantize_to(original, tmp_path / "out", **OPTIONS)
    assert sorted(file.name for file in (tmp_path / ".out.blocks").iterdir()) == [
        "block-00000.json",
        "block-00000.safetensors",
        "block-00001.json",
        "block-00001.safetensors",
        "settings.json",
    ]
    shutil.rmtree(tmp_path / "out")
    again = quantize(original, out=tmp_path / "out", resume=True, **OPTIONS)
    assert files_of(tmp_path / "out") == whole
    assert untimed(again.awq_report) == untimed(first.awq_report)


@pytest.mark.parametrize("original", ["llama"], indirect=True)
def test_other_settings_are_named(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(Interrupted):
            quantize_to(copy, tmp_path / "out", **OPTIONS)
    kept = {file.name: file.read_bytes() for file in (tmp_path / ".out.blocks").iterdir()}
    for change, message in (
        ({"q_group_size": 32}, "options group_size was 16, is 32"),
        (
            {"method": "gptq", "apply_clip": False},
            r"options method was 'awq\+', is 'gptq'; options apply_clip was True",
        ),
        ({"calibration": ids() + 1}, "calibration tokens was"),
        ({"seq_len": 16, "samples": 8}, "calibration tokens was"),
        ({"seed": 1}, "options seed was 0, is 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            quantize_to(copy, tmp_path / "out", resume=True, **{**OPTIONS, **change})
    os.utime(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"original model\.safetensors was \["):
        quantize_to(copy, tmp_path / "out", resume=True, **OPTIONS)
    assert {file.name: file.read_bytes() for file in (tmp_path / ".out.blocks").iterdir()} == kept
    report = quantize_to(copy, tmp_path / "out", **{**OPTIONS, "q_group_size": 32})  # without resume: anew
    assert report.group_size == 32 and not (tmp_path / ".out.blocks").exists()


@pytest.mark.parametrize("original", ["llama"], indirect=True)
def test_a_full_disk_is_told_and_what_was_written_is_good(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "method": "rtn", "tune_steps": 0, "generated": 0}
    quantize_to(original, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFiles, "_rename", full_at("block-00001.safetensors", BlockFiles._rename))
        with pytest.raises(CheckpointError, match=r"block-00001\.safetensors could not be written: .*No space left"):
            quantize_to(original, tmp_path / "out", **options)
    quantize_to(original, tmp_path / "out", resume=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def full_at(name: str, rename: Callable[..., None]) -> Callable[..., None]:
    def fail(self: BlockFiles, new: Path, file: Path) -> None:
        if file.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(self, new, file)

    return fail


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    model = small_model("llama")
    for wrong in ({"out": tmp_path / "out"}, {}):
        with pytest.raises(ValueError, match="resume takes a model given by its directory, an out"):
            quantize(model, resume=True, **wrong, **OPTIONS)
    with pytest.raises(ValueError, match="resume takes a model given by its directory, an out"):
        quantize(tmp_path, resume=True, **OPTIONS)


# --- SIGKILL --------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """AWQ_KILLS times (6). The process that forks has no threads, and must never have run a gradient."""
    command = [sys.executable, __file__, str(KILLS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == KILLS and result["equal"] == result["finished"] >= 1
    assert result["resumed"] > 0  # some were killed between two blocks, or the test would show nothing


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_and_resume(kills: int, directory: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "original")

    def run(out: Path) -> Callable[[], object]:
        return lambda: quantize_to(directory / "original", out, resume=True, **OPTIONS)

    start = time.perf_counter()
    _, status = os.waitpid(forked(run(directory / "whole")), 0)
    assert status == 0
    length = time.perf_counter() - start
    draw, out, blocks = random.Random(0), directory / "out", directory / ".out.blocks"
    result = {"kills": 0, "finished": 0, "equal": 0, "resumed": 0}
    while result["kills"] < kills or not result["finished"]:
        child = forked(run(out))
        ended, deadline = 0, time.perf_counter() + draw.uniform(0, length)
        while not ended and (result["kills"] >= kills or time.perf_counter() < deadline):
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            result["kills"] += 1
            result["resumed"] += any(blocks.glob("block-*.safetensors"))
            continue
        assert status == 0
        result["finished"] += 1
        result["equal"] += files_of(out) == files_of(directory / "whole") and not blocks.exists()
        shutil.rmtree(out)
    print(json.dumps(result))


if __name__ == "__main__":
    kill_and_resume(int(sys.argv[1]), Path(sys.argv[2]))
