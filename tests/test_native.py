"""`_native`: the layout table, the plans and the facts, held to what the operators really do."""

from __future__ import annotations

import pytest
import torch

from awq_ext import _library, ops

native = _library.native()


@pytest.mark.parametrize("layout", native.layouts(), ids=lambda layout: layout["name"])
def test_the_table_describes_what_pack_writes(layout: dict) -> None:
    """One code set at a time, from the table's fields alone: shape of the words, word and nibble."""
    n, k = 16, 24
    along_n = layout["packed_axis"] == "out_features"
    packed, other = (n, k) if along_n else (k, n)
    shape = (packed // 8, other) if layout["words_by_row"] else (other, packed // 8)
    for row, column in [(0, 0), (3, 17), (9, 8), (15, 23)]:
        q = torch.zeros(n, k, dtype=torch.uint8)
        q[row, column] = 15
        words = ops.pack(q, layout=layout["name"])
        p, o = (row, column) if along_n else (column, row)
        word = (p // 8, o) if layout["words_by_row"] else (o, p // 8)
        assert words.shape == shape
        assert words.nonzero().tolist() == [list(word)]
        assert words[word].item() & 0xFFFFFFFF == 15 << 4 * layout["order"].index(p % 8)


def test_the_fakes_know_the_same_layouts() -> None:
    for layout in native.layouts():
        words = ops.pack(torch.zeros(16, 24, dtype=torch.uint8), layout=layout["name"])
        fake = ops.pack(torch.zeros(16, 24, dtype=torch.uint8, device="meta"), layout=layout["name"])
        assert fake.shape == words.shape and fake.dtype == words.dtype
    with pytest.raises(RuntimeError, match=", ".join(layout["name"] for layout in native.layouts())):
        ops.pack(torch.zeros(16, 24, dtype=torch.uint8), layout="marlin")


def test_plans_say_which_kernel_and_why() -> None:
    few, many, double = (
        native.plan_linear(m, 512, 256, dtype) for m, dtype in ((1, "bfloat16"), (64, "float32"), (1, "float64"))
    )
    assert (few["kernel"], many["kernel"], double["kernel"]) == ("decode", "gemm", "reference")
    assert all(plan["why"] and plan["tiles"] * plan["tile"] >= 512 for plan in (few, many, double))
    with pytest.raises(ValueError, match="got int8"):
        native.plan_linear(1, 8, 8, "int8")
    with pytest.raises(ValueError, match="negative"):
        native.plan_linear(-1, 8, 8)


def test_facts() -> None:
    info, features = native.build_info(), native.cpu_features()
    assert info["torch_target"] == "2.10" and info["version"]
    assert info["cpu_kernels"] in ("portable", *[name for name, there in features.items() if there])
