"""Every layout into every other and back, and how they are told apart, against the slow definition of the formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_formats as slow
import torch

from awq_ext import cli
from awq_ext.config import QuantConfig
from awq_ext.convert import convert
from awq_ext.errors import CheckpointError
from awq_ext.format import Checkpoint
from awq_ext.layouts import detect, layouts
from awq_ext.storage import NAME_OF, Writer, bytes_of

TRAP = np.array([0, 8, 0, 15, 7, 0, 3, 1], dtype=np.uint8)  # a zero of 0 before others: what a borrow would spoil
GROUP_SIZES = (16, 32, 64, 128, -1)
# (n, k) by group size: the odd ones of each layout, and some that all can hold.
SHAPES = {
    16: [(8, 16), (24, 48), (64, 208), (64, 64)],
    32: [(8, 32), (24, 96), (64, 64), (192, 320)],
    64: [(8, 64), (24, 192), (64, 64), (64, 640), (4, 64)],
    128: [(8, 128), (24, 256), (64, 128), (64, 1152)],
    -1: [(8, 12), (24, 40), (8, 44), (64, 64), (64, 192), (24, 256), (3, 20), (5, 172)],
}


def to_torch(array: slow.Array) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def to_numpy(tensor: torch.Tensor) -> slow.Array:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_checkpoint(path: Path, layout: str, linears: dict[str, slow.Tensors], group_size: int, **config: Any) -> Path:
    """A directory with these linears in one file, and the config that the layout's own project would write."""
    path.mkdir()
    quant = QuantConfig(group_size, version=layout, **config)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quant.to_dict()}))
    tensors = {f"{name}.{part}": to_torch(t) for name, parts in linears.items() for part, t in parts.items()}
    tensors["norm.weight"] = torch.ones(3)
    header = [(name, NAME_OF[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    with Writer(path / "model.safetensors", header, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, bytes_of(tensor))
    return path


def read_checkpoint(path: Path) -> dict[str, slow.Tensors]:
    """The linears of a directory as they are stored."""
    checkpoint = Checkpoint.open(path)
    linears: dict[str, slow.Tensors] = {name: {} for name in checkpoint.linears}
    for name, tensor in checkpoint.info.items():
        owner, _, part = name.rpartition(".")
        if owner in linears:
            linears[owner][part] = to_numpy(tensor.read())
    return linears


def make_linear(n: int, k: int, group_size: int, zeros: str, seed: int) -> tuple[slow.Array, slow.Array, slow.Array]:
    """q, z and s; `zeros` names the pattern of the zeros."""
    rng = np.random.default_rng(seed)
    _, groups = slow.group_count(k, group_size)
    q = rng.integers(0, 16, (n, k), dtype=np.uint8)
    if zeros == "trap":
        z = np.resize(TRAP, n)[:, None].repeat(groups, axis=1)
    elif zeros == "any":
        z = rng.integers(0, 16, (n, groups), dtype=np.uint8)
    else:
        z = np.full((n, groups), int(zeros), dtype=np.uint8)
    s = rng.uniform(0.001, 0.1, (n, groups)).astype(np.float16) * rng.choice([1, -1], (n, groups)).astype(np.float16)
    if seed % 3 == 0:
        s = (slow.to_float32(s).view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
    return q, z, s


def linears_for(src: str, dst: str, group_size: int) -> dict[str, tuple[slow.Array, slow.Array, slow.Array]]:
    """Linears that both layouts can hold, with every pattern of zeros that both can hold."""
    found = {}
    for n, k in SHAPES[group_size]:
        for zeros in ("trap", "any", "0", "15", "8", "1"):
            q, z, s = linear = make_linear(n, k, group_size, zeros, seed=len(found))
            if "gptq" in (src, dst) and zeros == "any":
                z[z == 0] = 1
            try:
                for layout in (src, dst):
                    slow.encode(layout, q, z, s, group_size)
            except ValueError:
                continue
            found[f"model.{n}x{k}.zeros_{zeros}"] = linear
    return found


PADDED = ("gemv", "gemv_fast", "llm-awq")  # not defined for groups of 16
PAIRS = [
    (src, dst, group_size)
    for src in slow.LAYOUTS
    for dst in slow.LAYOUTS
    for group_size in GROUP_SIZES
    if group_size != 16 or (src not in PADDED and dst not in PADDED)
]


@pytest.mark.parametrize(("src", "dst", "group_size"), PAIRS)
def test_every_layout_into_every_other_and_back(src: str, dst: str, group_size: int, tmp_path: Path) -> None:
    linears = linears_for(src, dst, group_size)
    assert linears
    stored = {name: slow.encode(src, *linear, group_size) for name, linear in linears.items()}
    path = write_checkpoint(tmp_path / "src", src, stored, group_size)
    there = read_checkpoint(convert(path, tmp_path / "dst", dst))
    assert there.keys() == linears.keys()
    symmetric = dst == "compressed-tensors" and src != dst and all((z == 8).all() for _, z, _ in linears.values())
    for name, (q, z, s) in linears.items():
        expected = slow.encode(dst, q, None if symmetric else z, s, group_size)
        assert there[name].keys() == expected.keys()
        for part, array in expected.items():
            assert there[name][part].dtype == array.dtype and there[name][part].shape == array.shape
            assert there[name][part].tobytes() == array.tobytes(), f"{name}.{part}"
    back = read_checkpoint(convert(tmp_path / "dst", tmp_path / "back", src))
    if src == "compressed-tensors" and all((z == 8).all() for _, z, _ in linears.values()):
        stored = {name: slow.encode(src, q, None, s, group_size) for name, (q, _, s) in linears.items()}
    for name, parts in stored.items():
        assert back[name].keys() == parts.keys()
        for part, array in parts.items():
            assert back[name][part].tobytes() == array.tobytes(), f"{name}.{part}"


@pytest.mark.parametrize("layout", slow.LAYOUTS)
def test_weights_of_every_layout(layout: str, tmp_path: Path) -> None:
    """Checkpoint.weight is what the tensors define, to the bit."""
    for group_size in GROUP_SIZES:
        linears = linears_for(layout, layout, group_size)
        if not linears:
            continue
        stored = {name: slow.encode(layout, *linear, group_size) for name, linear in linears.items()}
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path / str(group_size), layout, stored, group_size))
        assert checkpoint.layout.name == layout
        for name, parts in stored.items():
            expected = slow.dequantize(layout, parts, group_size)
            got = checkpoint.weight(name).numpy()
            assert got.dtype == np.float32 and (got == expected).all(), name


def test_symmetric_compressed_tensors(tmp_path: Path) -> None:
    linears = {f"l{i}": make_linear(16, 64, 32, "8", i) for i in range(2)}
    stored = {name: slow.encode("compressed-tensors", q, None, s, 32) for name, (q, _, s) in linears.items()}
    path = write_checkpoint(tmp_path / "src", "compressed-tensors", stored, 32, zero_point=False)
    there = read_checkpoint(convert(path, tmp_path / "gemm", "gemm"))
    for name, linear in linears.items():
        for part, array in slow.encode("gemm", *linear, 32).items():
            assert there[name][part].tobytes() == array.tobytes()
    back = convert(tmp_path / "gemm", tmp_path / "back", "compressed-tensors")
    assert all("weight_zero_point" not in parts for parts in read_checkpoint(back).values())
    weights = json.loads((back / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ]
    assert weights["symmetric"] is True


def test_the_exllama_zero_point_trap(tmp_path: Path) -> None:
    """GPTQ v1 stores zeros less one. exllama's repacking sums them as signed numbers, so that a zero of 0 borrows from
    its neighbours and [0, 8, 0, 15, 7, 0, 3, 1] comes back as [0, 7, 0, 14, 7, 0, 2, 1]. Here v1 refuses a zero of 0,
    and gptq_v2 and everything else gives the zeros back."""
    q, _, s = make_linear(8, 128, 128, "8", 1)
    z = TRAP[:, None]
    path = write_checkpoint(tmp_path / "src", "gemm", {"l": slow.encode("gemm", q, z, s, 128)}, 128)
    with pytest.raises(
        CheckpointError, match=r"l: layout gptq \(v1\) cannot store a zero point of 0, found at group 0"
    ):
        convert(path, tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()
    for layout in ("gptq_v2", "gemv", "compressed-tensors"):
        there = Checkpoint.open(convert(path, tmp_path / layout, layout))
        assert there.groups("l").zeros[:, 0].tolist() == TRAP.tolist()

    one_up = np.where(z == 0, 1, z)
    path = write_checkpoint(tmp_path / "up", "gemm", {"l": slow.encode("gemm", q, one_up, s, 128)}, 128)
    there = Checkpoint.open(convert(path, tmp_path / "gptq", "gptq"))
    assert there.groups("l").zeros[:, 0].tolist() == one_up[:, 0].tolist()


def test_gemm_and_gemv_of_square_linears(tmp_path: Path) -> None:
    """With K == N the words of gemm and gemv have the same shape; scales tell them apart, whatever the config says."""
    for layout in ("gemm", "gemv"):
        q, z, s = make_linear(64, 64, 32, "any", 1)
        stored = slow.encode(layout, q, z, s, 32)
        assert stored["qweight"].shape == (64, 8)
        path = write_checkpoint(tmp_path / layout, layout, {"l": stored}, 32)
        checkpoint = Checkpoint.open(path)
        assert checkpoint.layout.name == layout
        assert (checkpoint.weight("l").numpy() == slow.dequantize(layout, stored, 32)).all()

        other = {"gemm": "gemv", "gemv": "gemm"}[layout]
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["version"] = other
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"says '{other}', but l is in the layout {layout}"):
            Checkpoint.open(path)
        del config["quantization_config"]["version"]
        (path / "config.json").write_text(json.dumps(config))
        assert Checkpoint.open(path).layout.name == layout


def test_every_layout_is_told_from_every_other() -> None:
    """Without a hint, all that agrees with a linear's tensors is its own layout, or the other version of GPTQ."""
    for layout in slow.LAYOUTS:
        for group_size in GROUP_SIZES:
            for n, k in [*SHAPES[group_size], (128, 128), (256, 128), (128, 256), (512, 512)]:
                reason = layouts()[layout].why_not(n, k, k if group_size == -1 else group_size)
                if reason is not None:
                    continue
                g = k if group_size == -1 else group_size
                expected = layouts()[layout].tensors(n, k, g, ("F16",))
                headers = {name: Header(tensor.shape, tensor.dtypes[0]) for name, tensor in expected.items()}
                found = detect(headers, group_size, None, (n, k))
                assert not found.problems and (found.n, found.k, found.g) == (n, k, g)
                assert found.layout.name == layout or {layout, found.layout.name} == {"gptq", "gptq_v2"}
                hinted = detect(headers, group_size, layout, (n, k))
                assert hinted.layout.name == layout


class Header:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype


def test_the_command_line_offers_every_layout() -> None:
    assert cli.LAYOUTS == tuple(layouts()) == slow.LAYOUTS


def test_two_layouts_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    linear = make_linear(64, 64, 64, "any", 1)
    stored = {"a": slow.encode("gemm", *linear, 64), "b": slow.encode("gemv", *linear, 64)}
    path = write_checkpoint(tmp_path / "mixed", "gemm", stored, 64)
    with pytest.raises(CheckpointError, match=r"b is in the layout gemv"):
        Checkpoint.open(path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["version"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"b is in the layout gemv, but a in gemm; a checkpoint must have one"):
        Checkpoint.open(path)


def stored_linear(layout: str) -> tuple[slow.Tensors, int]:
    return slow.encode(layout, *make_linear(64, 128, 64, "8", 1), 64), 64


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq", lambda t: t["g_idx"].sort() or t["g_idx"].__setitem__(0, 1), r"l\.g_idx is in act-order"),
        ("gptq", lambda t: t["qzeros"].fill(-1), r"l\.qzeros holds 15 at group 0, output channel 0"),
        (
            "gemv_fast",
            lambda t: t["qzeros"].__setitem__((1, 3), 1.0),
            r"l\.qzeros must be .* group 1, output channel 3",
        ),
        ("llm-awq", lambda t: t["scaled_zeros"].fill(np.nan), r"l\.scaled_zeros must be .* got a zero of nan"),
        (
            "gemv",
            lambda t: t["scales"].__setitem__((5, 1), 0),
            r"scales must be .* got 0.0 at group 1, output channel 5",
        ),
        ("compressed-tensors", lambda t: t["weight_shape"].fill(-1), r"weight_shape must hold out_features"),
        ("compressed-tensors", lambda t: t["weight_scale"].fill(np.inf), r"l\.weight_scale must be finite"),
        ("marlin", lambda t: t["scales"].__setitem__((0, 0), np.nan), r"scales must be finite and not zero, got nan"),
    ],
)
def test_data_that_cannot_be_meant(layout: str, change: Any, message: str, tmp_path: Path) -> None:
    stored, group_size = stored_linear(layout)
    change(stored)
    path = write_checkpoint(tmp_path / "src", layout, {"l": stored}, group_size)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "dst", "gemm" if layout != "gemm" else "gemv")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("dst", "zeros", "shape", "group_size", "message"),
    [
        ("marlin", "any", (64, 128), 64, r"l: layout marlin is symmetric: every zero must be 8, got \d+ at group"),
        ("marlin", "8", (8, 128), 64, r"l\.qweight: out_features 8 is not a multiple of 64, as layout marlin needs"),
        ("gemv_fast", "8", (8, 96), 32, r"l\.qweight: in_features 96 is not a multiple of 64, as layout gemv_fast"),
        ("gemv", "8", (8, 128), 16, r"l\.qweight: layout gemv is not defined for a group_size below 32, got 16"),
        ("gptq_v2", "8", (8, 12), -1, r"l\.qweight: in_features 12 is not a multiple of 8, as layout gptq_v2 needs"),
    ],
)
def test_what_a_target_cannot_hold(
    dst: str, zeros: str, shape: tuple[int, int], group_size: int, message: str, tmp_path: Path
) -> None:
    stored = {"l": slow.encode("gemm", *make_linear(*shape, group_size, zeros, 1), group_size)}
    path = write_checkpoint(tmp_path / "src", "gemm", stored, group_size)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "dst", dst)
    assert [entry.name for entry in tmp_path.iterdir()] == ["src"]


def test_a_scaled_zero_that_overflows_is_refused(tmp_path: Path) -> None:
    q, z, s = make_linear(8, 64, 64, "15", 1)
    s[3] = 5000  # times 15 is more than float16 has
    path = write_checkpoint(tmp_path / "src", "gemm", {"l": slow.encode("gemm", q, z, s, 64)}, 64)
    with pytest.raises(
        CheckpointError, match=r"l: layout llm-awq cannot store -\(scale \* zero\) at group 0, output ch"
    ):
        convert(path, tmp_path / "dst", "llm-awq")


CONFIGS: dict[str, tuple[dict[str, Any], QuantConfig]] = {
    "AutoAWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemv"},
        QuantConfig(64, version="gemv"),
    ),
    "llm-awq": ({"quant_method": "awq", "backend": "llm-awq", "version": "gemv"}, QuantConfig(128, version="gemv")),
    "legacy AWQ": (
        {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True},
        QuantConfig(version="gemm"),
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True, "damp_percent": 0.1},
        QuantConfig(32, zero_point=False, version="gptq"),
    ),
    "legacy GPTQ": ({"bits": 4, "group_size": -1, "desc_act": False, "sym": False}, QuantConfig(-1, version="gptq")),
    "GPTQ v2": ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, QuantConfig(version="gptq_v2")),
    "auto-round": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "sym": True},
        QuantConfig(zero_point=False, version="gptq"),
    ),
    "auto-round, zero points as they are": (
        {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2", "sym": False},
        QuantConfig(version="gptq_v2"),
    ),
    "auto-round, by GPTQModel": (
        {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "sym": False},
        QuantConfig(version="gptq_v2"),
    ),
    "early auto-round": (
        {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2", "sym": True},
        QuantConfig(zero_point=False, version="gptq"),
    ),
    "early auto-round, zero points as they are": (
        {"quant_method": "intel/auto-round", "backend": "autoround:exllamav2", "sym": False},
        QuantConfig(version="gptq_v2"),
    ),
    "auto-round AWQ": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        QuantConfig(version="gemm"),
    ),
    "channel": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "channel", "symmetric": True}}},
            "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        },
        QuantConfig(-1, 4, False, "compressed-tensors", ("lm_head", "model.layers.0.mlp.gate")),
    ),
}


def test_transforms_of_activations_are_refused() -> None:
    fields, expected = CONFIGS["channel"]

    def read(transforms: object) -> QuantConfig:
        return QuantConfig.from_dict(fields | {"transform_config": transforms}, "here")

    def at(*locations: str) -> dict[str, Any]:
        apply = [{"targets": ["Linear"], "location": location} for location in locations]
        return {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}

    for harmless in (None, {}, {"config_groups": {}}, at("weight_input", "weight_output")):
        assert read(harmless) == expected
    with pytest.raises(CheckpointError, match=r"'transform_config' must be without transforms of activations.*'input'"):
        read(at("weight_output", "input"))
    for nonsense in ([1], {"config_groups": [1]}, {"config_groups": {"R1": 1}}):
        with pytest.raises(CheckpointError, match="'transform_config' must be"):
            read(nonsense)


@pytest.mark.parametrize("name", CONFIGS)
def test_dialects_of_the_config(name: str) -> None:
    fields, expected = CONFIGS[name]
    assert QuantConfig.from_dict(fields, "here") == expected


@pytest.mark.parametrize("layout", slow.LAYOUTS)
@pytest.mark.parametrize("group_size", [64, -1])
def test_what_a_config_says_survives_every_dialect(layout: str, group_size: int) -> None:
    skipped = ("lm_head", "model.layers.0.mlp.gate")
    quant = QuantConfig(group_size, 4, layout != "marlin", layout, skipped)
    again = QuantConfig.from_dict(quant.to_dict(), "here")
    if layout.startswith("gptq"):  # there it is a pattern for one reader, not a list
        assert list(quant.to_dict()["dynamic"]) == [r"-:^lm_head$", r"-:^model\.layers\.0\.mlp\.gate$"]
        again = QuantConfig(again.group_size, again.bits, again.zero_point, again.version, skipped)
    assert again == quant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "'format' must be 'pack-quantized'"),
        ({"config_groups": None}, "'config_groups' must be one scheme"),
        ({"config_groups": {"a": {}, "b": {}}}, "'config_groups' must be one scheme"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "'num_bits' must be 4"),
        ({"config_groups": {"a": {"weights": {"type": "float"}}}}, "'type' must be 'int'"),
        ({"config_groups": {"a": {"weights": {"strategy": "block"}}}}, "'strategy' must be"),
        ({"config_groups": {"a": {"weights": {"actorder": "group"}}}}, "'actorder' must be"),
        ({"config_groups": {"a": {"weights": {"symmetric": 1}}}}, "'symmetric' must be"),
        ({"config_groups": {"a": {"weights": {"group_size": 0}}}}, "'group_size' must be"),
        ({"ignore": "lm_head"}, "'ignore' must be a list of strings"),
    ],
)
def test_compressed_configs_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    fields = QuantConfig(version="compressed-tensors").to_dict() | change
    with pytest.raises(CheckpointError, match=message):
        QuantConfig.from_dict(fields, "here")
