"""The computed times of the CUDA kernels (`benchmarks/gpu/model.py`) keep the limits they are made from."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


model = load("model")
H200 = model.GPUS["h200"]


def plans() -> list[dict[str, Any]]:
    """One of each kernel, for 8192 rows of W."""
    common = {"splits": 1, "cluster": 1, "stages": 4, "workspace_bytes": 0}
    return [
        {"kernel": "decode", "tile": (16, 8), "grid": (512, 1), "threads": 256} | common,
        {"kernel": "gemm_sm80", "tile": (128, 64), "grid": (64, 1), "threads": 128} | common,
        {"kernel": "gemm_sm90", "tile": (128, 64), "grid": (64, 1), "threads": 384} | common,
        {"kernel": "dequantize"} | common,
    ]


@pytest.mark.parametrize("gpu", model.GPUS.values(), ids=list(model.GPUS))
@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan["kernel"])
def test_nothing_is_faster_than_its_bytes_and_products(gpu: Any, plan: dict[str, Any]) -> None:
    for k in (64, 4096, 11008):
        for m in model.ROWS:
            problem = model.Problem(m, 8192, k)
            seconds = model.predict(problem, gpu, plan).seconds
            assert seconds > model.floor(problem, gpu) >= problem.weight_bytes / gpu.bandwidth
            assert model.dense(problem, gpu).seconds > problem.dense_bytes / gpu.bandwidth
            assert seconds >= problem.flops / gpu.flops


def test_the_floor_is_that_of_bytes_for_few_rows_and_of_products_for_many() -> None:
    one = model.Problem(1, 8192, 8192)
    assert one.weight_bytes == 8192 * 8192 * (0.5 + 2.5 / 128)
    assert model.floor(one, H200) == pytest.approx(8.11e-6, rel=0.01)
    assert model.floor(model.Problem(4096, 8192, 8192), H200) == pytest.approx(2 * 4096 * 8192**2 / 790e12)
    assert model.dense(one, H200).seconds / model.floor(one, H200) > 3.84  # 2 bytes against 0.52


def test_more_bytes_in_flight_are_never_slower_and_stop_to_matter() -> None:
    rates = [model.reading(kib * 1024 * H200.sms, H200) for kib in range(1, 128)]
    assert rates == sorted(rates) and rates[0] < H200.bandwidth / 20 and rates[-1] == H200.bandwidth
    decode = plans()[0]
    problem = model.Problem(1, 8192, 8192)
    times = [model.planned(problem, H200, decode | {"grid": (blocks, 1)}).memory for blocks in (16, 64, 132, 264, 528)]
    assert times == sorted(times, reverse=True) and times[0] > 4 * times[-1] == 4 * times[-2]


def test_sums_that_blocks_share_cost_memory_and_a_launch() -> None:
    problem = model.Problem(64, 4096, 4096)
    alone, shared = plans()[1], plans()[1] | {"splits": 4, "grid": (64, 4), "workspace_bytes": 4 * 64 * 4096 * 4}
    assert model.planned(problem, H200, shared).launch == 2 * model.planned(problem, H200, alone).launch
    in_flight = replace(H200, latency=1e-9)  # so that only bytes count
    assert model.planned(problem, in_flight, shared).memory > model.planned(problem, in_flight, alone).memory


def test_the_table_has_what_plan_cuda_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.json"
    command = ["model.py", "--gpu", "a100", "--shapes", "4096x4096", "--rows", "1", "64", "4096", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    model.main()
    written = json.loads(out.read_text())
    assert written["computed_from"]["name"] == "a100" and [case["m"] for case in written["cases"]] == [1, 64, 4096]
    for case in written["cases"]:
        assert case["seconds"] > case["floor"] and case["plan"]["kernel"] in [*model.KERNELS, "dequantize"]
