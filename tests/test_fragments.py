"""Layout fragments without a GPU: its definition, what a CPU does with it, and which CUDA kernels calls would get."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Weight, random_weight
from torch import Tensor, nn

import awq_ext
from awq_ext import AwqLinear, _library, linear, ops
from awq_ext.layouts import every_layout, layouts, repack_scales

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(8, 16, 16), (24, 96, 32), (40, 192, 64), (136, 256, 128), (72, 300, 300), (64, 37, 37), (200, 600, 200)]
IN_MEMORY = ("gemm", "strips", "fragments")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
K, N, GROUP = 160, 72, 32

native = _library.native()


def arguments(w: Weight, group: int, **more: Any) -> dict[str, Any]:
    """A weight's tensors in layout fragments."""
    return {
        "qweight": ops.pack(w.q, layout="fragments"),
        "scales": repack_scales(w.s.t().contiguous(), "gemm", "fragments"),
        "qzeros": ops.pack(w.z, layout="fragments.zeros"),
        "group_size": group,
        "layout": "fragments",
        **more,
    }


def codes(n: int, k: int) -> Tensor:
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n + k))


# --- the layout -----------------------------------------------------------------------------------------------------


def test_the_layout_is_in_no_file() -> None:
    assert "fragments" in every_layout() and "fragments" not in layouts()


@pytest.mark.parametrize(("n", "k"), [(8, 8), (64, 64), (72, 24), (136, 200), (5, 13), (300, 264)])
def test_words_are_the_registers_of_matrix_units(n: int, k: int) -> None:
    """A strip of 16 n to a warp; lane 4 r + t has rows r and r + 8, of every 16 k the pairs 2 t and 2 t + 8."""
    q = codes(n, k)
    panels, steps = -(-n // 64), -(-k // 64)
    whole = torch.zeros(64 * panels, 64 * steps, dtype=torch.uint8)
    whole[:n, :k] = q
    axes = whole.view(panels, 4, 2, 8, steps, 4, 2, 4, 2)  # panel, strip, h, r; step, j, g, t, odd
    words = axes.permute(0, 4, 1, 3, 7, 5, 8, 6, 2).flatten(6)  # panel, step, strip, r, t, j; odd, g, h
    expected = (words[..., 0::2] | words[..., 1::2] << 4).contiguous().view(torch.int32).view(panels, -1)
    packed = ops.pack(q, layout="fragments")
    assert torch.equal(packed, expected)
    assert torch.equal(ops.unpack(packed, layout="fragments"), whole)

    halves = whole.view(panels, 4, 2, 8, -1).permute(0, 4, 1, 3, 2)  # panel, group, strip, r, h
    expected = (halves[..., 0] | halves[..., 1] << 4).contiguous().view(panels, -1).view(torch.int32)
    zeros = ops.pack(whole, layout="fragments.zeros")
    assert torch.equal(zeros, expected)
    assert torch.equal(ops.unpack(zeros, layout="fragments.zeros"), whole)


@pytest.mark.parametrize("other", [*layouts(), "strips", "gemm.zeros", "strips.zeros", "fragments.zeros"])
def test_repack_from_and_to_every_layout(other: str) -> None:
    q = codes(320, 384)
    words, fragments = ops.pack(q, layout=other), ops.pack(q, layout="fragments")
    assert torch.equal(ops.repack(words, src=other, dst="fragments"), fragments)
    assert torch.equal(ops.repack(fragments, src="fragments", dst=other), words)


@pytest.mark.parametrize(("n", "groups"), [(8, 1), (16, 3), (24, 2), (64, 1), (72, 3), (88, 2), (200, 4)])
def test_scales_panel_after_panel(n: int, groups: int) -> None:
    scales = torch.arange(groups * n, dtype=F32).view(groups, n)
    ordered = repack_scales(scales, "gemm", "fragments")
    expected = []
    for first in range(0, n, 64):
        for g in range(groups):
            for strip in range(first, min(first + 64, n), 16):
                rows = range(8) if strip + 16 <= n else ()
                columns = [strip + r + h for r in rows for h in (0, 8)] or list(range(strip, n))
                expected += [g * n + column for column in columns]
    assert ordered.shape == scales.shape and ordered.flatten().tolist() == expected


@pytest.mark.parametrize("n", [8, 24, 64, 136])
def test_scales_go_from_every_layout_into_every_other(n: int) -> None:
    scales = torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(BF16)
    forms = {layout: repack_scales(scales, "gemm", layout) for layout in IN_MEMORY}
    for src, values in forms.items():
        for dst, expected in forms.items():
            assert torch.equal(repack_scales(values, src, dst), expected)


# --- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_dequantize_on_a_cpu(n: int, k: int, group: int) -> None:
    w = random_weight(n, k, group)
    for dtype in (F32, F16, BF16, None):
        dense = ops.dequantize(**arguments(w, group, dtype=dtype))
        assert torch.equal(dense, w.dense.float().to(dtype or F16))
    symmetric = Weight(w.q, w.s, torch.full_like(w.z, 8), w.group)
    given = arguments(symmetric, group)
    assert torch.equal(ops.dequantize(**{**given, "qzeros": None}), ops.dequantize(**given))


def test_one_group_of_all_is_as_wide_as_the_words() -> None:
    w = random_weight(24, 40, 40)
    dense = ops.dequantize(**arguments(w, -1, dtype=F32))
    assert dense.shape == (24, 64) and torch.equal(dense[:, :40], w.dense.float())


def test_a_cpu_refuses_to_multiply_and_says_what_to_do() -> None:
    given = arguments(random_weight(72, 128, 32), 32)
    with pytest.raises(RuntimeError, match=r"'fragments' is for CUDA.*repack qweight.*repack_scales"):
        ops.linear(torch.ones(2, 128), **given)
    with pytest.raises(RuntimeError, match=r"[Ff]ragments.*CUDA|CUDA.*fragments"):
        torch.compile(ops.linear, backend="eager", fullgraph=True)(torch.ones(2, 128), **given)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda t: t[:1], "qweight must be .*fragments"),
        ("qweight", lambda t: t[:, :-512], "qweight must be .*fragments"),
        ("qweight", lambda t: t[:, :-1], "columns in runs of 512"),
        ("qzeros", lambda t: t[:, :-8], "qzeros must be .*fragments.zeros"),
        ("scales", lambda t: t[:-2], "qweight must be .*fragments"),
        ("scales", lambda t: t[:, :-4], "out_features that are a multiple of 8"),
        ("scales", lambda t: t.double(), "scales must be"),
    ],
)
def test_wrong_tensors_are_refused(name: str, change: Any, message: str) -> None:
    given = arguments(random_weight(72, 128, 32), 32)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=message):
        ops.dequantize(**given)
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError, match=r"qweight|qzeros|scales"):
        ops.dequantize(**on_meta)
    with pytest.raises(RuntimeError, match=r"x must be|qweight|qzeros|scales"):
        ops.linear(torch.empty(3, 128, device="meta"), **on_meta)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_shapes_are_known_without_data(n: int, k: int, group: int) -> None:
    given = arguments(random_weight(n, k, group), group)
    torch.library.opcheck(torch.ops.awq_ext.dequantize.default, (), given)
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    y = ops.linear(torch.empty(3, 5, k, dtype=BF16, device="meta"), **on_meta)
    assert (y.shape, y.dtype) == ((3, 5, n), BF16)
    assert ops.repack(on_meta["qweight"], src="fragments", dst="strips").device.type == "meta"


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Layers choose their layout as they would on CUDA."""
    monkeypatch.setitem(_library._loaded, _library.CUDA_LIBRARY, Path())
    choose = linear.best_layout
    monkeypatch.setattr(linear, "best_layout", lambda group_size, k, device: choose(group_size, k, "cuda"))
    yield monkeypatch


def make(seed: int = 0, n: int = N) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, n)


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_the_layout_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_library._loaded, _library.CUDA_LIBRARY, Path())
    for group_size in (16, 32, 48, 64, 128, 160):
        assert native.fragments_can_have(160, group_size) and linear.best_layout(group_size, 160, "cuda") == "fragments"
        assert linear.best_layout(group_size, 160, "cpu") == "strips"
    assert linear.best_layout(20, 20, "cuda") == "fragments"
    assert linear.best_layout(8, 160, "cuda") == linear.best_layout(20, 160, "cuda") == "gemm"
    assert linear.best_layout(128, 256, "meta") == linear.best_layout(128, 256, "several") == "gemm"
    monkeypatch.delitem(_library._loaded, _library.CUDA_LIBRARY)
    assert linear.best_layout(128, 256, "cuda") == "gemm"  # there is nobody to repack


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_a_layer_in_fragments_speaks_gemm(group_size: int) -> None:
    layer = AwqLinear.from_linear(make(), group_size)
    assert layer.layout == "fragments" and layer.qweight.shape == (2, 3 * 512)
    gemm = copy.deepcopy(layer).repack("gemm")
    assert gemm.layout == "gemm" and gemm.qweight.shape == (K, N // 8)
    assert equal_states(layer, gemm) and torch.equal(layer.dequantize(), gemm.dequantize())
    for path in (("strips", "fragments"), ("gemm", "fragments"), ("strips", "gemm", "strips", "fragments")):
        other = copy.deepcopy(layer)
        for layout in path:
            other.repack(layout)
            assert other.layout == layout and equal_states(other, layer)
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), layer.buffers(), strict=True))


@pytest.mark.usefixtures("as_on_cuda")
def test_what_layers_go_through() -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    state = layer.state_dict()
    assert copy.deepcopy(layer).layout == "fragments"
    fresh = AwqLinear(K, N, group_size=GROUP)
    assert fresh.layout == "gemm"  # until it is filled
    fresh.load_state_dict(state)
    assert fresh.layout == "fragments" and equal_states(fresh, layer)
    fresh.load_state_dict({"scales": state["scales"] * 2}, strict=False)
    assert torch.equal(fresh.state_dict()["scales"], state["scales"] * 2)
    assert torch.equal(fresh.state_dict()["qweight"], state["qweight"])
    cast = copy.deepcopy(layer).to(BF16)
    assert cast.layout == "fragments" and torch.equal(cast.state_dict()["scales"], state["scales"].to(BF16))
    other = AwqLinear.from_linear(make(1, 136), GROUP)
    both = AwqLinear.concatenate([layer, other])
    assert both.layout == "fragments"
    assert torch.equal(both.dequantize(), torch.cat([layer.dequantize(), other.dequantize()]))


def test_a_layer_that_comes_home_from_cuda_is_in_strips(as_on_cuda: pytest.MonkeyPatch) -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="'fragments' is for CUDA"):
        layer(torch.ones(1, K))
    as_on_cuda.undo()
    assert layer.to("cpu").layout == "strips"
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    expected = AwqLinear.from_linear(make(), GROUP)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), expected.buffers(), strict=True))


# --- the choice of kernels ------------------------------------------------------------------------------------------


def test_plans_for_gpus_that_are_not_here() -> None:
    kernel = {
        arch: [native.plan_cuda(m, 4096, 4096, 128, arch=arch)["kernel"] for m in (1, 16, 17, 64, 1 << 16)]
        for arch in ARCHITECTURES
    }
    assert kernel[75] == ["decode", "decode", "dequantize", "dequantize", "dequantize"]
    assert kernel[90] == ["decode", "decode", "gemm_sm90", "gemm_sm90", "dequantize"]
    for arch in (80, 86, 89, 100, 120):
        assert kernel[arch] == ["decode", "decode", "gemm_sm80", "gemm_sm80", "dequantize"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_plan_can_be_launched(arch: int, dtype: str) -> None:
    for m in (0, 1, 7, 16, 33, 257, 5000):
        for n, k, group in ((0, 64, 64), (8, 64, 64), (136, 11008, 128), (57344, 8192, 32), (64, 72, 24)):
            plan = native.plan_cuda(m, n, k, group, dtype, "bfloat16", arch)
            assert plan["why"]
            if m == 0 or n == 0 or dtype in ("float32", "float64"):
                assert plan["kernel"] == "dequantize"
            if plan["kernel"] != "dequantize":
                (rows, tokens), (x, y) = plan["tile"], plan["grid"]
                assert rows > 0 and tokens > 0 and 0 < x < 2**31 and 0 < y < 2**16
                assert 0 < plan["threads"] <= 1024 and plan["shared_bytes"] <= 227 << 10
            fewer = native.plan_cuda(m, n, k, group, dtype, "bfloat16", arch, sms=1)
            assert fewer["grid"] <= plan["grid"] or fewer["kernel"] != plan["kernel"]


def test_a_plan_that_makes_no_sense_is_refused() -> None:
    for change, message in (
        ({"m": -1}, "negative"),
        ({"group_size": 48}, "multiple"),
        ({"group_size": 0}, "multiple"),
        ({"dtype": "int8"}, "got int8"),
        ({"arch": 33}, "sms and shared_bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            native.plan_cuda(**{"m": 1, "n": 64, "k": 64, "group_size": 64, **change})
    assert native.plan_cuda(1, 64, 64, 64, arch=87, sms=16, shared_bytes=163 << 10)["kernel"] == "decode"


def test_explain_answers_for_a_gpu_that_is_not_here() -> None:
    layer = AwqLinear.from_linear(nn.Linear(4096, 4096))
    assert awq_ext.explain(layer, 1).startswith("strips")
    assert awq_ext.explain(layer, 1, gpu="sm_90").startswith("decode on sm_90, ")
    assert awq_ext.explain(layer, 64, gpu="sm_90a").startswith("gemm_sm90 on sm_90a, ")
    assert "parts of in_features" in awq_ext.explain(layer, 64, BF16, gpu="sm_80")
    assert "of them to a cluster" in awq_ext.explain(layer, 16, gpu="sm_90")
    with pytest.raises(TypeError, match="layer must be an AwqLinear, got Linear"):
        awq_ext.explain(nn.Linear(8, 8), 1)  # type: ignore[arg-type]
    answer = awq_ext.explain(layer, 1, F32, gpu="sm_90")
    assert answer.startswith("dequantize on sm_90") and "torch multiplies: the kernels multiply float16" in answer
    with pytest.raises(ValueError, match="'hopper'"):
        awq_ext.explain(layer, 1, gpu="hopper")


def test_explain_asks_the_device_that_a_layer_is_on(as_on_cuda: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(major=9, minor=0, multi_processor_count=2, shared_memory_per_multiprocessor=228 << 10)
    as_on_cuda.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    layer, device = AwqLinear.from_linear(nn.Linear(4096, 4096)), torch.device("cuda:3")
    answer = linear._explain_cuda(layer, 64, F16, device, None)
    assert answer.startswith("gemm_sm90 on cuda:3 (sm_90), ")
    assert answer.split(", ", 1)[1] != awq_ext.explain(layer, 64, F16, gpu="sm_90").split(", ", 1)[1]
    gemm = linear._explain_cuda(layer.repack("gemm"), 64, F16, device, None)
    assert gemm == "gemm on cuda:3: the weight is dequantized to torch.float16, and torch multiplies"
