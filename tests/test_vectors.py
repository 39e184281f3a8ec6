"""The test vectors: the committed files are the generator's, and awq_ext reads, writes and converts each case."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_formats as slow
import torch
from torch import Tensor

from awq_ext import ops
from awq_ext.layouts import Groups, Layout, layouts, read_groups, write_groups

VECTORS = Path(__file__).resolve().parent / "vectors"
DTYPES = {
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
CASES = {
    (layout, case["name"]): case
    for layout in slow.LAYOUTS
    for case in json.loads((VECTORS / f"{layout}.json").read_text(encoding="utf-8"))["cases"]
}
every_case = pytest.mark.parametrize(("layout", "name"), CASES)


class Linear:
    """One case as torch tensors."""

    def __init__(self, layout: str, name: str) -> None:
        case = CASES[layout, name]
        self.case = case
        self.n, self.k = case["shape"]
        self.g = self.k if case["group_size"] == -1 else case["group_size"]
        self.q, self.z = (
            torch.tensor([[int(digit, 16) for digit in row] for row in case[key]], dtype=torch.uint8)
            for key in ("codes", "zeros")
        )
        self.s = from_hex(case["scales"]["bits"], case["scales"]["dtype"], [self.n, self.k // self.g])
        self.tensors = {
            key: from_hex(entry["data"], entry["dtype"], entry["shape"]) for key, entry in case["tensors"].items()
        }
        self.layout: Layout = layouts()[layout]
        self.where = f"{layout} {name}"


def from_hex(rows: list[str], dtype: str, shape: list[int]) -> Tensor:
    values = [int(x, 16) for row in rows for x in row.split()]
    size = DTYPES[dtype].itemsize
    return torch.from_numpy(np.array(values, dtype=f"u{size}").view(f"i{size}")).view(DTYPES[dtype]).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and as_numpy(a).tobytes() == as_numpy(b).tobytes()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# --- the files ------------------------------------------------------------------------------------------------------


def test_committed_files_are_what_the_generator_writes() -> None:
    files = runpy.run_path(str(VECTORS / "generate.py"))["files"]()
    assert {path.name for path in VECTORS.glob("*.json")} == set(files) == {f"{name}.json" for name in slow.LAYOUTS}
    for name, text in files.items():
        assert (VECTORS / name).read_text(encoding="utf-8") == text, f"{name}: run python tests/vectors/generate.py"


def test_the_example_of_the_readme_runs() -> None:
    text = (VECTORS / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert "tests/vectors/gemm.json" in code
    exec(code.replace("tests/vectors/gemm.json", str(VECTORS / "gemm.json")), {})


@every_case
def test_hashes_are_of_the_bytes_in_a_file(layout: str, name: str) -> None:
    linear = Linear(layout, name)
    for key, tensor in linear.tensors.items():
        assert hashlib.sha256(as_numpy(tensor).tobytes()).hexdigest() == linear.case["tensors"][key]["sha256"], key


def test_every_layout_of_the_table_has_its_vectors() -> None:
    assert set(layouts()) == set(slow.LAYOUTS)


# --- awq_ext --------------------------------------------------------------------------------------------------------


@every_case
def test_words(layout: str, name: str) -> None:
    linear = Linear(layout, name)
    words = linear.tensors[linear.layout.weight_name]
    assert same_bits(ops.pack(linear.q, layout=layout), words)
    codes = ops.unpack(words, layout=layout)
    assert torch.equal(codes[: linear.n, : linear.k], linear.q)
    assert codes[linear.n :].sum() == 0 and codes[:, linear.k :].sum() == 0


@every_case
def test_every_tensor_is_where_the_table_says(layout: str, name: str) -> None:
    """Name, dtype and shape; a tensor that may be left out is left out only in a symmetric case."""
    linear = Linear(layout, name)
    assert linear.layout.why_not(linear.n, linear.k, linear.g) is None
    expected = linear.layout.tensors(linear.n, linear.k, linear.g)
    stored = linear.case["tensors"]
    missing = set(expected) - set(stored)
    assert set(stored) <= set(expected) and missing <= {linear.layout.zeros_name} & linear.layout.optional
    assert not missing or bool((linear.z == 8).all())
    for key, entry in stored.items():
        assert tuple(entry["shape"]) == expected[key].shape and entry["dtype"] in expected[key].dtypes, key


@every_case
def test_groups(layout: str, name: str) -> None:
    """Scales and zeros, read and written."""
    linear = Linear(layout, name)
    groups = read_groups(linear.layout, linear.tensors, linear.n, linear.k, linear.g, linear.where)
    assert same_bits(groups.scales, linear.s) and torch.equal(groups.zeros, linear.z)
    written = write_groups(linear.layout, Groups(linear.s, linear.z), linear.k, linear.g, linear.where)
    for key, tensor in written.items():
        if key in linear.tensors:
            assert same_bits(tensor, linear.tensors[key]), key
        else:
            assert key in linear.layout.optional


@every_case
def test_repack_to_every_layout(layout: str, name: str) -> None:
    linear = Linear(layout, name)
    words = linear.tensors[linear.layout.weight_name]
    for target, other in layouts().items():
        # Padding may be larger in the target: what is there is 0.
        codes = ops.unpack(words, layout=layout)
        if not other.weight.can_hold(*codes.shape):
            continue
        moved = ops.repack(words, src=layout, dst=target)
        assert same_bits(moved, ops.pack(codes, layout=target)), target
        back = ops.unpack(ops.repack(moved, src=target, dst=layout), layout=layout)
        assert torch.equal(back[: linear.n, : linear.k], linear.q), target


@every_case
def test_the_weight(layout: str, name: str) -> None:
    """W by torch's own arithmetic from what read_groups reads, and as the definition dequantizes the tensors."""
    linear = Linear(layout, name)
    stored: dict[str, Any] = {key: as_numpy(tensor) for key, tensor in linear.tensors.items()}
    weight = torch.from_numpy(slow.dequantize(layout, stored, linear.case["group_size"]))
    assert hashlib.sha256(weight.numpy().astype("<f4").tobytes()).hexdigest() == linear.case["weight_float32_sha256"]
    groups = read_groups(linear.layout, linear.tensors, linear.n, linear.k, linear.g, linear.where)
    s, z = (x.float().repeat_interleave(linear.g, dim=1) for x in (groups.scales, groups.zeros))
    exact = (linear.q.float() - z) * s
    if linear.layout.zeros == "scaled":
        unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[groups.scales.dtype]
        assert ((weight - exact).double().abs() <= unit * (z.double() * s.double()).abs()).all()
    else:
        assert torch.equal(weight, exact)
