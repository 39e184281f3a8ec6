"""`verify`: sound checkpoints pass, every planted fault is found and named, and nothing hides anything else."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_formats as slow
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq_ext import CheckpointError, cli, quantize, storage
from awq_ext.convert import convert
from awq_ext.format import INDEX, SINGLE, Checkpoint
from awq_ext.reconstruction import undone
from awq_ext.verify import PIECE, VerifyReport, verify

GENUINE = (
    "autoawq-gemm",
    "autoawq-gemv",
    "autoawq-gemv_fast",
    "gptqmodel-awq-gemm",
    "gptqmodel-gptq-v1",
    "llmcompressor-pack-quantized",
    "autoround-awq-gemm",
)
UP, DOWN, OTHER = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
GROUP = 32
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Tensors = dict[str, Tensor]


# --- a small model in any layout, as the slow definition stores it -------------------------------------------------


def quantization(layout: str, group: int, zero_point: bool = True) -> dict[str, Any]:
    if layout == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": not zero_point, "strategy": "group", "group_size": group}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": layout, "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    if layout.startswith("gptq"):
        fields = {"quant_method": "gptq", "checkpoint_format": layout, "desc_act": False, "sym": not zero_point}
        return {"bits": 4, "group_size": group, **fields}
    return {"bits": 4, "group_size": group, "quant_method": "awq", "version": layout, "zero_point": zero_point}


def make(path: Path, layout: str = "gemm", n: int = 64, k: int = 128, group: int = GROUP) -> Path:
    """Three linears of [n, k] with random codes, zeros of 1..15 (8 in marlin) and a bias, and what else a model has."""
    rng = np.random.default_rng(0)
    symmetric = layout == "marlin"
    tensors: Tensors = {}
    for name in (UP, DOWN, OTHER):
        q = rng.integers(0, 16, (n, k), dtype=np.uint8)
        z = None if symmetric else rng.integers(1, 16, (n, k // group), dtype=np.uint8)
        s = rng.uniform(0.5, 1.5, (n, k // group)).astype(np.float16)
        encoded = slow.encode(layout, q, z, s, group)
        tensors |= {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(x)) for part, x in encoded.items()}
    random = {"model.embed_tokens.weight": (40, k), "lm_head.weight": (40, k), f"{UP}.bias": (n,)}
    tensors |= {name: torch.from_numpy(rng.standard_normal(shape)).half() for name, shape in random.items()}
    tensors["model.norm.weight"] = torch.ones(k, dtype=torch.float16)
    path.mkdir()
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    config = {"model_type": "llama", "quantization_config": quantization(layout, group, not symmetric)}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    return path


def edit(path: Path, change: Callable[[Tensors], object], file: str = SINGLE) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
    change(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})


def put(name: str, *place: int, value: float) -> Callable[[Path], None]:
    """A fault: one element of a tensor."""

    def change(path: Path) -> None:
        edit(path, lambda tensors: tensors[name].__setitem__(place, value))

    return change


def configure(path: Path, **values: Any) -> None:
    """Values of None are removed."""
    fields = json.loads((path / "config.json").read_text())
    quant = fields["quantization_config"] | values
    fields["quantization_config"] = {key: value for key, value in quant.items() if value is not None}
    (path / "config.json").write_text(json.dumps(fields))


def split(path: Path) -> Path:
    """In two shards, the first linear in the first."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    places = {name: SHARDS[not name.startswith(UP)] for name in tensors}
    for shard in SHARDS:
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == shard}, path / shard)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def problems(report: VerifyReport) -> list[tuple[str, str]]:
    return [(problem.file, problem.tensor) for problem in report.problems]


# --- sound checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENUINE)
def test_files_of_other_projects_are_sound(shared: Path, name: str) -> None:
    report = verify(shared / "data" / "checkpoints" / name)
    assert report.ok, report.summary()
    assert [warning.what for warning in report.warnings] == [
        "there is no tokenizer beside the weights (tokenizer.json, tokenizer.model ...)"
    ]
    assert report.linears == 14
    assert report.group_size == 64


@pytest.mark.parametrize("layout", slow.LAYOUTS)
def test_every_layout_is_sound_whole_and_in_shards(tmp_path: Path, layout: str) -> None:
    path = make(tmp_path / "model", layout)
    for report in (verify(path), verify(split(path))):
        assert (report.problems, report.warnings) == ((), ()), report.summary()
        assert (report.layout, report.group_size, report.linears) == (layout, GROUP, 3)
        assert report.tensors == len(Checkpoint.open(path).info)


def test_padding_may_be_a_negative_zero(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "gemv_fast")
    put(f"{UP}.qzeros", 20, 3, value=-0.0)(path)
    assert verify(path).problem_count == 0


def test_older_config_file(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 32, "zero_point": true, "version": "GEMM"}')
    report = verify(path)
    assert (report.ok, report.warnings) == (True, ())


# --- one fault, found and named -------------------------------------------------------------------------------------


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda tensors: tensors.__setitem__(new, tensors.pop(old)))


def retype(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda tensors: tensors.__setitem__(name, tensors[name].to(dtype)))


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / file).write_text(text) and None


def last_nibble(name: str, row: int, col: int) -> Callable[[Path], None]:
    """Sets the highest nibble of a word."""

    def change(tensors: Tensors) -> None:
        tensors[name][row, col] |= 0x30000000

    return lambda path: edit(path, change)


def other_layout(path: Path) -> None:
    """One linear as gemv stores it."""
    there = make(path.parent / "gemv", "gemv")
    moved = {name: tensor for name, tensor in load_file(there / SINGLE).items() if name.startswith(OTHER)}
    edit(path, lambda tensors: tensors.update(moved))


MARLIN_COLUMN = slow.marlin_scale_order(4).index(21)

FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str, str]] = {
    # name: layout, what is done, file, tensor or linear, what the report says
    "scale NaN": ("gemm", put(f"{UP}.scales", 1, 5, value=math.nan), SINGLE, f"{UP}.scales", "got nan at group 1.* 5"),
    "scale 0": ("gptq_v2", put(f"{UP}.scales", 3, 0, value=0), SINGLE, f"{UP}.scales", "not zero, got 0.0 at group 3"),
    "scale inf, permuted": (
        *("marlin", put(f"{UP}.scales", 2, MARLIN_COLUMN, value=math.inf), SINGLE, f"{UP}.scales"),
        "got inf at group 2, output channel 21",
    ),
    "scale 0 in a row's end": (
        *("compressed-tensors", put(f"{UP}.weight_scale", 63, 3, value=0), SINGLE, f"{UP}.weight_scale"),
        "group 3, output channel 63",
    ),
    "bias inf": ("gemm", put(f"{UP}.bias", 63, value=math.inf), SINGLE, f"{UP}.bias", "1 values that are not finite"),
    "norm NaN": ("gemm", put("model.norm.weight", 7, value=math.nan), SINGLE, "model.norm.weight", "not finite"),
    "zero of 16": (
        *("gptq", lambda path: edit(path, lambda t: t[f"{UP}.qzeros"].fill_(-1)), SINGLE, f"{UP}.qzeros"),
        "holds 15 at group 0",
    ),
    "scaled zero not whole": (
        *("gemv_fast", put(f"{UP}.qzeros", 1, 2, value=-1.7), SINGLE, f"{UP}.qzeros", "whole zero within 0..15"),
    ),
    "scaled zero out of range": (
        *("llm-awq", put(f"{UP}.scaled_zeros", 1, 2, value=60), SINGLE, f"{UP}.scaled_zeros", "whole zero within"),
    ),
    "padding of scales": ("gemv", put(f"{UP}.scales", 3, 31, value=1), SINGLE, f"{UP}.scales", "beyond its 4 groups"),
    "padding of zeros": ("gemv", last_nibble(f"{UP}.qzeros", 3, 2), SINGLE, f"{UP}.qzeros", "beyond its 4 groups"),
    "padding of scales, transposed": (
        *("llm-awq", put(f"{UP}.scales", 4, 63, value=1), SINGLE, f"{UP}.scales", "must be 0 beyond its 4 groups"),
    ),
    "padding of scaled zeros": (
        *("gemv_fast", put(f"{UP}.qzeros", 31, 0, value=1), SINGLE, f"{UP}.qzeros", "must be 0 beyond its 4 groups"),
    ),
    "group size": (
        *("gemm", lambda path: configure(path, group_size=64), "config.json", ""),
        "says group size 64, but the tensors have 32",
    ),
    "layout": (
        *("gemv", lambda path: configure(path, version="gemm"), "config.json", ""),
        "says 'gemm', but the linears are in the layout gemv",
    ),
    "symmetry": (
        *("gptq_v2", lambda path: configure(path, sym=True), "config.json", ""),
        "says symmetric, but 3 linears have zeros other than 8",
    ),
    "bits": ("gemm", lambda path: configure(path, bits=8), "config.json", "", "'bits' must be 4"),
    "no quantization config": (
        *("gemm", lambda path: (path / "config.json").write_text("{}"), "config.json", ""),
        "has quantized weights, but neither config.json has a 'quantization_config'",
    ),
    "config.json is no JSON": ("gemm", write("config.json", "{"), "config.json", "", "is not readable JSON"),
    "generation_config.json is no JSON": (
        *("gemm", write("generation_config.json", "["), "generation_config.json", "", "is not readable JSON"),
    ),
    "a linear in another layout": (
        *("gemm", other_layout, SINGLE, OTHER, "is in the layout gemv, but most others in gemm"),
    ),
    "dtype of scales": (
        *("gemm", retype(f"{UP}.scales", torch.float64), SINGLE, UP, r"scales must be \[4, 64\] F16.*got .* F64"),
    ),
    "shape of zeros": (
        *("gemm", lambda path: edit(path, lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:2].clone()})), SINGLE),
        *(UP, r"qzeros must be \[4, 8\] I32, got \[2, 8\]"),
    ),
    "no zeros": ("gemm", lambda path: edit(path, lambda t: t.pop(f"{UP}.qzeros")), SINGLE, UP, "qzeros is missing"),
    "no codes": (
        *("gemm", lambda path: edit(path, lambda t: t.pop(f"{UP}.qweight")), SINGLE, f"{UP}.qzeros"),
        f"there is no {UP}.qweight or",
    ),
    "shape of a bias": (
        *("gemm", lambda path: edit(path, lambda t: t.update({f"{UP}.bias": torch.zeros(65)})), SINGLE, f"{UP}.bias"),
        r"must be \[64\]",
    ),
    "g_idx out of range": ("gptq", put(f"{UP}.g_idx", 5, value=9), SINGLE, f"{UP}.g_idx", "have each group of 0..3"),
    "g_idx of one group": (
        *("gptq", lambda path: edit(path, lambda t: t[f"{UP}.g_idx"].zero_()), SINGLE, f"{UP}.g_idx", "32 times"),
    ),
    "weight_shape": (
        *("compressed-tensors", put(f"{UP}.weight_shape", 1, value=256), SINGLE, UP),
        r"weight_shape holds \[64, 256\], but weight_packed has room for \[64, 128\]",
    ),
    "scale of an activation": (
        *("gemm", lambda path: edit(path, lambda t: t.update({"model.act.scales": torch.zeros(128)})), SINGLE),
        *("model.act.scales", "must be finite and not zero, got 0.0 at channel 0"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(tmp_path: Path, fault: str) -> None:
    layout, damage, file, tensor, message = FAULTS[fault]
    path = make(tmp_path / "model", layout)
    damage(path)
    report = verify(path)
    assert not report.ok
    assert problems(report) == [(file, tensor)], report.summary()
    what = report.problems[0].what
    assert re.search(message, what)
    assert file == "config.json" or file in what
    assert tensor in what
    assert str(tmp_path) + "/model/" not in what  # the summary has the path once


@pytest.mark.parametrize(("part", "row", "col"), [("weight_packed", 59, 12), ("weight_zero_point", 7, 4)])
def test_nibbles_beyond_an_odd_shape(tmp_path: Path, part: str, row: int, col: int) -> None:
    path = make(tmp_path / "model", "compressed-tensors", n=60, k=100, group=20)
    assert verify(path).ok
    last_nibble(f"{DOWN}.{part}", row, col)(path)
    report = verify(path)
    assert problems(report) == [(SINGLE, f"{DOWN}.{part}")]
    assert "got 1 other" in report.problems[0].what


def test_zero_points_that_the_config_promises(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "compressed-tensors")
    edit(path, lambda tensors: [tensors.pop(f"{name}.weight_zero_point") for name in (UP, DOWN)])
    assert verify(path).ok  # of one linear they are there
    edit(path, lambda tensors: tensors.pop(f"{OTHER}.weight_zero_point"))
    report = verify(path)
    assert problems(report) == [("config.json", "")]
    assert "says that there are zero points, but no linear has any" in report.problems[0].what


def test_one_fault_does_not_hide_another(tmp_path: Path) -> None:
    """Faults in the config, in the scales and the zeros of one linear, in its padding, and in other tensors."""
    path = make(tmp_path / "model", "gemv")
    configure(path, version="gemm", group_size=128)
    put(f"{UP}.scales", 1, 1, value=0)(path)
    put(f"{UP}.scales", 1, 20, value=1)(path)
    last_nibble(f"{UP}.qzeros", 0, 1)(path)
    put(f"{OTHER}.scales", 0, 0, value=math.nan)(path)
    put("lm_head.weight", 0, 0, value=math.nan)(path)
    found = problems(verify(path))
    assert sorted(found) == sorted(
        [
            *[("config.json", "")] * 2,
            *[(SINGLE, f"{UP}.scales")] * 2,
            (SINGLE, f"{UP}.qzeros"),
            (SINGLE, f"{OTHER}.scales"),
            (SINGLE, "lm_head.weight"),
        ]
    )


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_tensors_are_checked_without_a_config(tmp_path: Path, text: str | None) -> None:
    path = make(tmp_path / "model")
    put(f"{UP}.scales", 0, 0, value=math.nan)(path)
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_text(text)
    report = verify(path)
    assert (SINGLE, f"{UP}.scales") in problems(report)
    assert {file for file, _ in problems(report)} == {"config.json", SINGLE}
    assert (report.layout, report.group_size) == ("gemm", GROUP)


def test_scales_and_zeros_of_one_linear_are_both_reported(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "gptq")
    put(f"{UP}.scales", 0, 0, value=math.nan)(path)
    put(f"{UP}.qzeros", 0, 0, value=-1)(path)
    assert problems(verify(path)) == [(SINGLE, f"{UP}.scales"), (SINGLE, f"{UP}.qzeros")]


def test_of_many_problems_the_first_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    edit(path, lambda tensors: tensors.update({f"x{i}": torch.tensor([math.nan]) for i in range(60)}))
    report = verify(path)
    assert (len(report.problems), report.problem_count) == (50, 60)
    assert "problem: ... and 10 more" in report.summary()
    assert "60 problems, no warnings" in report.summary()
    assert report.to_dict()["problem_count"] == 60


def test_values_are_looked_at_to_the_last(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    large = torch.ones(PIECE // 2 + 3, dtype=torch.bfloat16)
    for place in (0, PIECE // 2 - 1, PIECE // 2, PIECE // 2 + 2):
        large[place] = math.nan
    edit(path, lambda tensors: tensors.update({"model.large.weight": large}))
    report = verify(path)
    assert [problem.what for problem in report.problems] == [
        f"{SINGLE}: model.large.weight has 4 values that are not finite"
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make(tmp_path / "model")
    edit(path, lambda tensors: tensors.update({"model.x": torch.tensor([1.0, math.nan]).to(dtype)}))
    assert problems(verify(path)) == [(SINGLE, "model.x")]


def test_tensors_that_nothing_here_can_read(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    data = (path / SINGLE).read_bytes().replace(b'"lm_head.weight":{"dtype":"F16"', b'"lm_head.weight":{"dtype":"Q16"')
    (path / SINGLE).write_bytes(data)
    report = verify(path)
    assert problems(report) == [(SINGLE, "lm_head.weight")]
    assert "torch has no dtype 'Q16'" in report.problems[0].what


# --- files ----------------------------------------------------------------------------------------------------------


def reindex(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit_index(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return edit_index


def truncate(path: Path) -> None:
    data = (path / SHARDS[0]).read_bytes()
    (path / SHARDS[0]).write_bytes(data[:-100])


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "truncated shard": (truncate, SHARDS[0], "", "damaged or truncated"),
    "missing shard": (lambda path: (path / SHARDS[0]).unlink(), SHARDS[0], "", "is missing, though .* refers to it"),
    "no safetensors": (write(SHARDS[0], "version https://git-lfs"), SHARDS[0], "", "a pointer of git-lfs"),
    "index names another shard": (
        *(reindex(lambda places: places.update({f"{UP}.scales": SHARDS[1]})), SHARDS[0], f"{UP}.scales"),
        f"holds {UP}.scales, which {INDEX} has in {SHARDS[1]}",
    ),
    "index leaves a tensor out": (
        *(reindex(lambda places: places.pop(f"{UP}.scales")), SHARDS[0], f"{UP}.scales", "has in nowhere"),
    ),
    "index has a tensor that is not there": (
        *(reindex(lambda places: places.update(model=SHARDS[0])), SHARDS[0], "model", "has no model, which"),
    ),
    "index names a file elsewhere": (
        *(reindex(lambda places: places.update(model="../model.safetensors")), INDEX, "", "a file of this directory"),
    ),
    "index is no JSON": (write(INDEX, "{"), INDEX, "", "is not readable JSON"),
    "no index": (lambda path: (path / INDEX).unlink(), "", "", "but no model.safetensors.index.json"),
    "stale single file": (
        *(lambda path: shutil.copy(path / SHARDS[0], path / SINGLE), SINGLE, "", "has both .* remove the stale one"),
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_fault_of_files_is_found_and_hides_nothing(tmp_path: Path, fault: str) -> None:
    damage, file, tensor, message = FILE_FAULTS[fault]
    path = split(make(tmp_path / "model"))
    edit(path, lambda tensors: tensors[f"{OTHER}.scales"].fill_(0), SHARDS[1])
    damage(path)
    report = verify(path)
    assert problems(report) == [(file, tensor), (SHARDS[1], f"{OTHER}.scales")], report.summary()
    assert re.search(message, report.problems[0].what)


def test_files_that_are_not_used_and_a_missing_tokenizer(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    save_file({"x": torch.ones(1)}, path / "adapter.safetensors")
    (path / "tokenizer.json").unlink()
    (path / "config.json").write_text((path / "config.json").read_text().replace('"model_type": "llama", ', ""))
    report = verify(path)
    assert report.ok
    assert [(warning.file, warning.tensor) for warning in report.warnings] == [
        ("config.json", ""),
        ("", ""),
        ("adapter.safetensors", ""),
    ]


def test_a_directory_that_is_not_there_or_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    report = verify(tmp_path / "empty")
    assert [problem.file for problem in report.problems] == ["config.json", ""]
    assert "has no *.safetensors file" in report.problems[1].what
    plain = make(tmp_path / "plain")
    (plain / "config.json").write_text('{"model_type": "llama"}')
    edit(plain, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith((UP, DOWN, OTHER))])
    assert "is not quantized" in verify(plain).problems[0].what


# --- warnings -------------------------------------------------------------------------------------------------------


def test_act_order_is_a_warning(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "gptq")
    edit(path, lambda tensors: tensors.update({f"{UP}.g_idx": tensors[f"{UP}.g_idx"].flip(0)}))
    report = verify(path)
    assert report.ok
    assert [(warning.file, warning.tensor) for warning in report.warnings] == [(SINGLE, f"{UP}.g_idx")]
    assert "act-order" in report.warnings[0].what


@pytest.mark.parametrize(
    ("layout", "listed", "warned"),
    [
        ("gemm", ["lm_head", "model.layers.0.mlp.gate"], []),
        ("gemm", ["gate"], []),
        ("gemm", None, ["model.layers.0.mlp.gate"]),
        ("gemm", ["gate", "layers.1"], [OTHER]),
        ("gemm", ["mlp"], [DOWN, UP, OTHER]),
        ("compressed-tensors", ["model.layers.0.mlp.gate", "mlp"], []),  # full names, no parts
        ("compressed-tensors", ["model.layers.0.mlp.gate", UP], [UP]),
        ("compressed-tensors", ["gate"], ["model.layers.0.mlp.gate"]),
        ("compressed-tensors", ["re:.*gate$"], []),  # a pattern of a checkpoint is not run
    ],
)
def test_linears_that_the_config_has_otherwise(
    tmp_path: Path, layout: str, listed: list[str] | None, warned: list[str]
) -> None:
    path = make(tmp_path / "model", layout)
    edit(path, lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.randn(8, 128)}))
    configure(path, **{"ignore" if layout == "compressed-tensors" else "modules_to_not_convert": listed})
    report = verify(path)
    assert report.ok
    assert [warning.tensor for warning in report.warnings] == warned


def test_more_names_than_can_be_looked_at(tmp_path: Path) -> None:
    path = make(tmp_path / "model")
    configure(path, modules_to_not_convert=[str(i) for i in range(100_000)])
    extra = {f"x{i}": torch.ones(1) for i in range(200)}
    edit(path, lambda tensors: tensors.update(extra))
    report = verify(path)
    assert report.ok
    assert [warning.what for warning in report.warnings] == [
        "config.json: modules_to_not_convert has 100000 names, too many to look at"
    ]


def test_constant_weights_and_groups(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "gemv")

    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.qweight"].fill_(0x33333333)
        tensors[f"{DOWN}.qweight"][40, 4:8] = 0  # group 1 of four
        tensors[f"{DOWN}.qweight"][50, :4] = -1
        tensors["lm_head.weight"].zero_()

    edit(path, change)
    report = verify(path)
    assert report.ok
    assert [warning.what for warning in report.warnings] == [
        f"{SINGLE}: {DOWN}.qweight: 2 of 256 groups have one code everywhere, "
        "the first is group 1 of output channel 40",
        f"{SINGLE}: {UP}.qweight: has the code 3 everywhere; was the file ever filled?",
        f"{SINGLE}: lm_head.weight: is 0 everywhere; was the file ever filled?",
    ]


# --- against the original -------------------------------------------------------------------------------------------

Q, OUT = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Quantized = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The tiny Llama by method (one of `arguments`) and layout; not to be changed."""
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    home = tmp_path_factory.mktemp("quantized")
    arguments: dict[str, dict[str, Any]] = {
        "awq": {"method": "awq", "q_group_size": 32},
        "rtn": {"q_group_size": 64, "method": "rtn"},
        "symmetric": {"q_group_size": 64, "method": "rtn", "zero_point": False},
        "one group": {"q_group_size": -1, "method": "rtn"},
        "gptq": {"q_group_size": 32, "method": "gptq"},
        "awq+": {"q_group_size": 32, "method": "awq+"},
    }
    tokens = torch.randint(3, 320, (4, 64), generator=torch.Generator().manual_seed(0))

    def get(method: str = "awq", layout: str = "gemm") -> Path:
        path = home / f"{method}-{layout}"
        if not path.exists() and layout == "gemm":
            quantize(tiny_llama, calibration=tokens, samples=4, seq_len=64, out=path, **arguments[method])
        elif not path.exists():
            convert(get(method), path, layout)
        return path

    return get


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        *(("awq", layout) for layout in ("gemm", "gemv", "gemv_fast", "llm-awq", "gptq_v2", "compressed-tensors")),
        *(("rtn", layout) for layout in ("gemm", "gemv", "compressed-tensors")),
        *(("symmetric", layout) for layout in ("gemm", "marlin", "gptq", "compressed-tensors")),
        *(("one group", layout) for layout in ("gemm", "gptq_v2")),
        *((method, "gemm") for method in ("gptq", "awq+")),
    ],
)
def test_what_was_quantized_is_in_line(quantized: Quantized, tiny_llama: Path, method: str, layout: str) -> None:
    report = verify(quantized(method, layout), against=tiny_llama)
    assert (report.problems, report.warnings) == ((), ()), report.summary()
    assert len(report.compared) == report.linears == 14
    assert report.compared[0].score == max(comparison.score for comparison in report.compared) < 0.6
    for comparison in report.compared:
        assert 0.2 < comparison.steps < (1.5 if method in ("gptq", "awq+") else 0.4)
        assert comparison.error <= comparison.direct * 1.001
    folded = {comparison.folded for comparison in report.compared}
    assert ("in, out" in folded) == method.startswith("awq")


@pytest.mark.parametrize("layout", ["gemm", "gemv_fast", "marlin"])
def test_the_figures_are_those_of_the_weights(quantized: Quantized, tiny_llama: Path, layout: str) -> None:
    """Held against float64 and the whole weight; nothing is folded here."""
    path = quantized("symmetric", layout)
    checkpoint, original = Checkpoint.open(path), load_file(tiny_llama / SINGLE)
    for comparison in verify(path, against=tiny_llama).compared:
        w, w_q = (x.double() for x in (original[f"{comparison.name}.weight"], checkpoint.weight(comparison.name)))
        s = checkpoint.groups(comparison.name).scales.double()[..., None]
        error = (w_q - w).view(*s.shape[:2], -1)
        assert comparison.direct == pytest.approx((error.norm() / w.norm()).item(), rel=1e-5)
        assert comparison.steps == pytest.approx((error / s).square().mean().sqrt().item(), rel=0.05)
        assert comparison.offset == pytest.approx((error / s).mean(2).abs().median().item(), abs=0.02)
        agreement = torch.cosine_similarity(w, w_q)
        assert comparison.worst_row == pytest.approx(agreement.min().item(), abs=0.01)


@pytest.mark.parametrize("original", ["gptqmodel-gptq-v1", "autoround-awq-gemm"])
@pytest.mark.parametrize("name", GENUINE)
def test_other_projects_agree_about_the_weights(shared: Path, tmp_path: Path, name: str, original: str) -> None:
    """They quantized the same model, so what one of them has is near to what any other has, folded or not."""
    reference = Checkpoint.open(shared / "data" / "checkpoints" / original)
    save_file({f"{linear}.weight": reference.weight(linear) for linear in reference.linears}, tmp_path / SINGLE)
    report = verify(shared / "data" / "checkpoints" / name, against=tmp_path)
    assert report.ok, report.summary()
    assert report.warning_count == 1  # no tokenizer
    assert len(report.compared) == 14
    assert report.compared[0].score < 0.6
    if name == original:
        assert report.compared[0].score < 1e-4
    elif name.startswith(("autoawq", "gptqmodel-awq", "llmcompressor")):  # the others fold nothing
        assert "in, out" in {comparison.folded for comparison in report.compared}


def codes(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """A fault in the codes [n, k] of the query projection of a gemm checkpoint."""

    def edit_words(tensors: Tensors) -> None:
        q = torch.ops.awq_ext.unpack(tensors[f"{Q}.qweight"], layout="gemm")
        tensors[f"{Q}.qweight"] = torch.ops.awq_ext.pack(change(q).contiguous(), layout="gemm")

    return edit_words


def zeros(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit_words(tensors: Tensors) -> None:
        z = torch.ops.awq_ext.unpack(tensors[f"{Q}.qzeros"], layout="gemm.zeros")
        tensors[f"{Q}.qzeros"] = torch.ops.awq_ext.pack(change(z).contiguous(), layout="gemm.zeros")

    return edit_words


def exchange(tensors: Tensors, part: str) -> None:
    tensors[f"{Q}.{part}"], tensors[f"{OUT}.{part}"] = tensors[f"{OUT}.{part}"], tensors[f"{Q}.{part}"]


def permute(q: Tensor, dim: int) -> Tensor:
    """Natural order read as AWQ's."""
    return q.unflatten(dim, (-1, 8)).index_select(dim + 1, torch.tensor(AWQ_ORDER)).flatten(dim, dim + 1)


OUT_OF_LINE: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "nibbles of output channels in another order": (codes(lambda q: permute(q, 0)), [Q]),
    "nibbles of input channels in another order": (codes(lambda q: permute(q, 1)), [Q]),
    "zero points one too large": (zeros(lambda z: (z + 1).clamp(max=15)), [Q]),
    "zero points one too small": (zeros(lambda z: z - 1), [Q]),
    "zero points of 8": (zeros(lambda z: torch.full_like(z, 8)), [Q]),
    "zero points in another order": (zeros(lambda z: permute(z, 0)), [Q]),
    "groups of zero points reversed": (zeros(lambda z: z.flip(1)), [Q]),
    "scales of two linears exchanged": (lambda tensors: exchange(tensors, "scales"), [OUT, Q]),
    "zero points of two linears exchanged": (lambda tensors: exchange(tensors, "qzeros"), [OUT, Q]),
    "two linears exchanged": (
        lambda tensors: [exchange(tensors, part) for part in ("qweight", "scales", "qzeros")],
        [OUT, Q],
    ),
    "scales transposed": (
        lambda tensors: tensors.update({f"{Q}.scales": tensors[f"{Q}.scales"].t().reshape(-1, 128).contiguous()}),
        [Q],
    ),
    "rows rolled": (codes(lambda q: q.roll(1, 0)), [Q]),
    "columns rolled": (codes(lambda q: q.roll(1, 1)), [Q]),
    "columns of a tile lost": (codes(lambda q: torch.cat([torch.zeros_like(q[:, :32]), q[:, 32:]], 1)), [Q]),
    "a row lost": (codes(lambda q: torch.cat([q[:5], q[5:6].flip(1), q[6:]])), [Q]),
    "a tile of other codes": (codes(lambda q: torch.cat([torch.cat([q[64:, :64], q[:64, 64:]], 1), q[64:]])), [Q]),
    "rows of a tile lost": (codes(lambda q: torch.cat([q[:64], torch.zeros_like(q[64:])])), [Q]),
}


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("fault", OUT_OF_LINE)
def test_damage_is_out_of_line(quantized: Quantized, tiny_llama: Path, tmp_path: Path, method: str, fault: str) -> None:
    change, linears = OUT_OF_LINE[fault]
    path = Path(shutil.copytree(quantized(method), tmp_path / "model"))
    edit(path, change)
    report = verify(path, against=tiny_llama)
    assert sorted(problems(report)) == [(SINGLE, name) for name in linears], report.summary()
    assert {comparison.name for comparison in report.compared[: len(linears)]} == {*linears}  # the worst first
    assert all(comparison.score > 1.2 for comparison in report.compared[: len(linears)])
    assert all(comparison.score < 0.6 for comparison in report.compared[len(linears) :])
    assert all("one code everywhere" in warning.what for warning in report.warnings)


@pytest.mark.parametrize(
    ("layout", "hint"),
    [("gemv", "order of codes"), ("gemv_fast", "order of codes"), ("gptq_v2", "zero points"), ("gemm", "scales")],
)
def test_damage_says_where_to_look(
    quantized: Quantized, tiny_llama: Path, tmp_path: Path, layout: str, hint: str
) -> None:
    path = Path(shutil.copytree(quantized("awq", layout), tmp_path / "model"))

    def change(tensors: Tensors) -> None:
        words = tensors[f"{Q}.qweight"]
        if hint == "scales":
            exchange(tensors, "scales")
        elif hint == "zero points":
            configure(path, checkpoint_format="gptq")  # read as stored minus one
        else:
            tensors[f"{Q}.qweight"] = words.view(len(words), -1, 2).flip(2).reshape(words.shape)

    edit(path, change)
    report = verify(path, against=tiny_llama)
    assert (SINGLE, Q) in problems(report)
    assert all(re.search(f"look at the {hint}", problem.what) for problem in report.problems)
    assert len(report.problems) == {"scales": 2, "zero points": 14}.get(hint, 1)


def test_the_original_of_another_model(quantized: Quantized, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    edit(other, lambda tensors: tensors.update({name: torch.randn_like(w) * 0.05 for name, w in tensors.items()}))
    report = verify(quantized(), against=other)
    assert report.problem_count == 14
    assert all(comparison.error > 0.9 for comparison in report.compared)


def test_originals_that_are_missing_or_of_another_shape(quantized: Quantized, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    edit(other, lambda tensors: tensors.pop(f"{Q}.weight"))
    report = verify(quantized(), against=other)
    assert report.ok
    assert [(warning.tensor, len(report.compared)) for warning in report.warnings] == [(Q, 13)]
    assert f"{Q} was not compared" in report.warnings[0].what

    edit(other, lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(128, 64)}))
    report = verify(quantized(), against=other)
    assert problems(report) == [(SINGLE, Q)]
    assert "is it the original of this model?" in report.problems[0].what

    edit(other, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers." in name])
    report = verify(quantized(), against=other)
    assert "no linear could be compared" in report.problems[-1].what
    assert report.warning_count == 14


def test_an_original_in_shards_of_bfloat16(quantized: Quantized, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "original"
    path.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tiny_llama / SINGLE).items()}
    save_file(tensors, path / SINGLE)
    report = verify(quantized(), against=split(path))
    assert (report.problems, report.warnings) == ((), ()), report.summary()


def test_an_original_that_cannot_be_opened(quantized: Quantized, tmp_path: Path) -> None:
    for name, message in (("nowhere", "does not exist"), ("pickle", "holds pickles only")):
        if name == "pickle":
            (tmp_path / name).mkdir()
            (tmp_path / name / "pytorch_model.bin").write_bytes(b"\x80\x02.")
        with pytest.raises(CheckpointError, match=message):
            verify(quantized(), against=tmp_path / name)


def test_an_original_that_is_not_finite(quantized: Quantized, tiny_llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    put(f"{Q}.weight", 3, 4, value=math.nan)(other)
    report = verify(quantized(), against=other)
    assert problems(report) == [(SINGLE, Q)]
    assert report.compared[0].score == math.inf
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.to_dict()["compared"][0]["steps"] is None


def test_linears_in_act_order_are_compared(tiny_llama: Path, tmp_path: Path) -> None:
    """Groups are of columns that are not neighbours: those of a permuted weight, put back in their places."""
    g = 32
    w = load_file(tiny_llama / SINGLE)[f"{Q}.weight"]
    n, k = w.shape
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    grouped = w[:, order].view(n, k // g, g)
    low, high = grouped.amin(2), grouped.amax(2)
    s = ((high - low) / 15).half()
    z = (-low / s.float()).round().clamp(1, 15)
    q = ((grouped / s.float()[..., None]).round() + z[..., None]).clamp(0, 15).view(n, k)
    place = order.argsort()
    encoded = slow.encode("gptq_v2", q[:, place].byte().numpy(), z.byte().numpy(), s.numpy(), g)
    tensors = {f"{Q}.{part}": torch.from_numpy(np.ascontiguousarray(x)) for part, x in encoded.items()}
    tensors[f"{Q}.g_idx"] = (place // g).int()
    path = tmp_path / "model"
    path.mkdir()
    save_file(tensors, path / SINGLE)
    config = {"model_type": "llama", "quantization_config": quantization("gptq_v2", g)}
    (path / "config.json").write_text(json.dumps(config))
    report = verify(path, against=tiny_llama)
    assert report.ok, report.summary()
    assert [warning.tensor for warning in report.warnings] == ["", f"{Q}.g_idx"]
    assert report.compared[0].steps == pytest.approx(0.29, abs=0.02)

    edit(path, lambda tensors: tensors.update({f"{Q}.g_idx": tensors[f"{Q}.g_idx"].roll(1)}))
    assert problems(verify(path, against=tiny_llama)) == [(SINGLE, Q)]


def test_scales_of_one_group_that_nothing_undoes(quantized: Quantized, tiny_llama: Path, tmp_path: Path) -> None:
    """Wrong scales look like a fold there: each is a factor of an output channel. No inputs are scaled in turn."""
    path = Path(shutil.copytree(quantized("one group"), tmp_path / "model"))
    edit(path, lambda tensors: exchange(tensors, "scales"))
    report = verify(path, against=tiny_llama)
    assert sorted(warning.tensor for warning in report.warnings) == [OUT, Q]
    assert all("no other linear that was compared has inputs scaled" in warning.what for warning in report.warnings)


def test_what_undoes_scales_of_outputs() -> None:
    generator = torch.Generator().manual_seed(0)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    values, others = scales(32), scales(32)
    noisy = values * (1 + 0.01 * (scales(32) - 1))
    assert undone(noisy, [others, 1 / values])
    assert undone(noisy, [3 / values])  # up to a factor
    assert not undone(noisy, [])
    assert not undone(noisy, [others, values])
    # Two value heads of 16 channels, each read by three query heads before the second comes.
    repeated = (1 / values).view(2, 1, 16).expand(2, 3, 16).reshape(-1)
    assert undone(noisy, [repeated])
    assert not undone(noisy, [repeated[torch.randperm(96, generator=generator)]])
    # The values are the last outputs of one linear that computes queries and keys, too.
    fused = torch.cat([torch.full((128,), 2.0), noisy])
    assert undone(fused, [repeated])
    assert not undone(torch.cat([scales(128), noisy]), [repeated])


# --- the command line -----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["verify", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_command_line(
    quantized: Quantized, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(quantized(), tmp_path / "model"))
    code, text = run(capsys, path)
    assert code == 0
    assert text.splitlines() == [
        f"{path}: layout gemm, group size 32, 14 quantized linears, 49 tensors",
        "ok, no warnings",
    ]

    code, text = run(capsys, path, "--against", tiny_llama)
    assert code == 0
    assert f"ok, no warnings, 14 linears compared with {tiny_llama}" in text
    assert "OUT OF LINE" not in text
    assert text.count("_proj") == 10  # the worst

    edit(path, zeros(lambda z: (z + 1).clamp(max=15)))
    put("model.norm.weight", 0, value=math.nan)(path)
    code, text = run(capsys, path, "--against", tiny_llama)
    assert code == 1
    assert "problem: model.safetensors: model.norm.weight has 1 values that are not finite" in text
    assert re.search(rf"problem: model.safetensors: {Q} is not the original's weight.*look at the zero points", text)
    assert "2 problems, no warnings" in text
    assert len(re.findall("OUT OF LINE", text)) == 1


def test_json(quantized: Quantized, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(quantized(), tmp_path / "model"))
    code, text = run(capsys, path, "--against", tiny_llama, "--json")
    found = json.loads(text)
    assert (code, found["ok"], found["problems"], found["layout"]) == (0, True, [], "gemm")
    assert len(found["compared"]) == 14
    assert found["compared"][0].keys() >= {"name", "error", "direct", "steps", "offset", "spread", "score", "folded"}

    put(f"{Q}.scales", 0, 1, value=math.nan)(path)
    code, text = run(capsys, path, "--against", tiny_llama, "--json")
    found = json.loads(text, parse_constant=pytest.fail)
    assert (code, found["ok"], found["problem_count"]) == (1, False, 1)
    assert found["problems"][0]["tensor"] == f"{Q}.scales"
    assert len(found["compared"]) == 13  # what cannot be read cannot be compared


def test_a_directory_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path / "nowhere"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("awq-ext: ")


# --- memory ---------------------------------------------------------------------------------------------------------


def test_tensors_are_read_in_pieces(
    quantized: Quantized, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a quantized linear's own tensors: at most 64 rows of an original, and 4 MiB of anything else."""
    path = Path(shutil.copytree(quantized(), tmp_path / "model"))
    edit(path, lambda tensors: tensors.update({"model.large.weight": torch.randn(3 * PIECE // 4, 2)}))
    read: dict[tuple[str, str], int] = {}
    read_into = storage.TensorInfo.read_into

    def watch(self: storage.TensorInfo, buffer: memoryview | bytearray, skip: int = 0) -> None:
        key = self.source.file.parent.name, self.name
        read[key] = max(read.get(key, 0), len(buffer))
        read_into(self, buffer, skip)

    monkeypatch.setattr(storage.TensorInfo, "read_into", watch)
    assert verify(path, against=tiny_llama).ok
    assert read["model", "model.large.weight"] == PIECE
    originals = {name: size for (directory, name), size in read.items() if directory != "model"}
    assert len(originals) == 14
    assert originals[f"{Q}.weight"] == 64 * 128 * 4
    assert originals["model.layers.1.mlp.down_proj.weight"] == 64 * 256 * 4
