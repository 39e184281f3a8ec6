"""Layout strips through the operators: products held to float64 and to layout gemm, threads, errors, export, script."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import UNIT_ROUNDOFF, Weight, randn, random_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from awq_ext import _library, functional, ops
from awq_ext.layouts import every_layout, layouts, repack_scales

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SHAPES = [(8, 16, 16), (24, 96, 32), (40, 192, 64), (136, 256, 128), (72, 300, 300), (5, 37, 37), (33, 600, 200)]
LIMITS = {"int8": 127.0, "int16": 32639.0, "exact": 127.0 * 65536.0}  # exact: of float32


@dataclass
class Strips:
    """A weight's tensors in layout strips."""

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor

    @staticmethod
    def of(w: Weight) -> Strips:
        words, zeros = (ops.pack(q, layout=layout) for q, layout in ((w.q, "strips"), (w.z, "strips.zeros")))
        return Strips(words, repack_scales(w.s.t(), "gemm", "strips"), zeros)

    def arguments(self, group: int, **more: Any) -> dict[str, Any]:
        tensors = {"qweight": self.qweight, "scales": self.scales, "qzeros": self.qzeros}
        return {**tensors, "group_size": group, "layout": "strips", **more}


def check(y: Tensor, x: Tensor, w: Weight, bias: Tensor | None, activation: str) -> None:
    """|y - x W^T - bias| within the bound of csrc/core/strips.h: x rounded to step / 2, sums of float32."""
    k, rows = x.shape[-1], x.double().reshape(-1, x.shape[-1])
    limit = LIMITS["int16" if activation == "exact" and x.dtype != F32 else activation]
    rounding = ref.digit_rounding(rows, w.group, limit)
    reference = rows @ w.dense.t()
    rounded = (rounding + 2.0**-22 * rows.abs()) @ w.dense.abs().t()
    magnitude = (rows.abs() + 2 * rounding) @ w.largest_terms.t() * 2
    if bias is not None:
        reference, magnitude = reference + bias.double(), magnitude + bias.double().abs()
    out = UNIT_ROUNDOFF[y.dtype] * (reference.abs() + rounded) + ref.SMALLEST[y.dtype]
    bound = out + rounded + 2 * (k + 8) * 2.0**-24 * magnitude
    assert ((y.double().reshape(reference.shape) - reference).abs() <= bound).all()


def test_the_layout_is_in_no_file() -> None:
    assert "strips" in every_layout() and "strips" not in layouts()


@pytest.mark.parametrize(("n", "groups"), [(8, 1), (32, 3), (40, 2), (96, 4), (100, 1)])
def test_scales_strip_after_strip(n: int, groups: int) -> None:
    scales = torch.arange(groups * n, dtype=F32).view(groups, n)
    ordered = repack_scales(scales, "gemm", "strips")
    expected = [g * n + c for first in range(0, n, 32) for g in range(groups) for c in range(first, min(first + 32, n))]
    assert ordered.shape == scales.shape and ordered.flatten().tolist() == expected
    assert torch.equal(repack_scales(ordered, "strips", "gemm"), scales)


@pytest.mark.parametrize(("n", "k"), [(8, 8), (32, 16), (40, 24), (136, 200), (5, 13), (300, 264)])
def test_words_are_where_the_page_says(n: int, k: int) -> None:
    """Column c of a strip is word c of a tile; byte j holds the codes of k = j below and of k = 4 + j above."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(-(-n // 32) * 32, -(-k // 8) * 8, dtype=torch.uint8)
    whole[:n, :k] = q
    tiles = whole.view(-1, 32, whole.shape[1] // 8, 2, 4).permute(0, 2, 1, 4, 3)  # strip, octet, column, byte, half
    expected = (tiles[..., 0] | tiles[..., 1] << 4).contiguous().view(torch.int32).flatten(1)
    words = ops.pack(q, layout="strips")
    assert torch.equal(words, expected)
    assert torch.equal(ops.unpack(words, layout="strips"), whole)

    halves = whole.view(-1, 2, 16, whole.shape[1]).permute(0, 3, 2, 1)  # strip, group, byte, half
    expected = (halves[..., 0] | halves[..., 1] << 4).contiguous().view(torch.int32).flatten(1)
    zeros = ops.pack(whole, layout="strips.zeros")
    assert torch.equal(zeros, expected)
    assert torch.equal(ops.unpack(zeros, layout="strips.zeros"), whole)


@pytest.mark.parametrize("other", [*layouts(), "gemm.zeros", "compressed-tensors.zeros", "strips.zeros"])
def test_repack_from_and_to_every_layout(other: str) -> None:
    q = torch.randint(0, 16, (320, 384), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words, strips = ops.pack(q, layout=other), ops.pack(q, layout="strips")
    assert torch.equal(ops.repack(words, src=other, dst="strips"), strips)
    assert torch.equal(ops.repack(strips, src="strips", dst=other), words)


def test_a_large_matrix_is_like_any_other() -> None:
    """Large ones lie in large pages."""
    words = ops.pack(torch.randint(0, 16, (2048, 6144), dtype=torch.uint8), layout="gemm")
    torch.library.opcheck(torch.ops.awq_ext.repack.default, (words,), {"src": "gemm", "dst": "strips"})
    strips = ops.repack(words, src="gemm", dst="strips")
    assert strips.storage_offset() == 0 and strips.untyped_storage().nbytes() == strips.nbytes
    assert torch.equal(ops.repack(strips, src="strips", dst="gemm"), words)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("activation", LIMITS)
def test_linear_keeps_its_error_bound(n: int, k: int, group: int, dtype: torch.dtype, activation: str) -> None:
    w = random_weight(n, k, group)
    for m in (1, 2, 5, 8, 19, 71):
        x, bias = randn(m, k, seed=m, dtype=dtype), randn(n, dtype=BF16) if m % 2 else None
        y = ops.linear(x, **Strips.of(w).arguments(group, bias=bias, activation=activation))
        assert y.dtype == dtype
        check(y, x, w, bias, activation)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_float64_and_dequantize_are_exact(n: int, k: int, group: int) -> None:
    w = random_weight(n, k, group)
    x = randn(3, k).double()
    y = ops.linear(x, **Strips.of(w).arguments(group))
    assert y.dtype == F64
    torch.testing.assert_close(y, x @ w.dense.t(), rtol=1e-12, atol=1e-12)
    for dtype in (F32, F16, BF16, None):
        dense = ops.dequantize(**Strips.of(w).arguments(group, dtype=dtype))
        assert torch.equal(dense, w.dense.float().to(dtype or F16))


def test_a_symmetric_weight_needs_no_zeros() -> None:
    w = random_weight(72, 256, 128)
    w = Weight(w.q, w.s, torch.full_like(w.z, 8), w.group)
    arguments = Strips.of(w).arguments(128)
    for m in (1, 9):
        x = randn(m, 256)
        assert torch.equal(ops.linear(x, **{**arguments, "qzeros": None}), ops.linear(x, **arguments))
    assert torch.equal(ops.dequantize(**{**arguments, "qzeros": None}), ops.dequantize(**arguments))


def test_activation_is_what_is_asked_for() -> None:
    """Float16 x is exact at 16 bits already; of float32 x each step costs some 8 bits."""
    w = random_weight(64, 1024, 128)
    x = randn(16, 1024)
    arguments = Strips.of(w).arguments(128)
    exact, int16, int8 = (ops.linear(x, **arguments, activation=p) for p in ("exact", "int16", "int8"))
    reference = x.double() @ w.dense.t()
    errors = [((y.double() - reference).norm() / reference.norm()).item() for y in (exact, int16, int8)]
    assert errors[0] < 1e-6 < 1e-5 < errors[1] < 1e-4 < 2e-3 < errors[2] < 2e-2
    assert torch.equal(ops.linear(x.half(), **arguments), ops.linear(x.half(), **arguments, activation="int16"))
    gemm = dict(zip(("qweight", "scales", "qzeros"), w.tensors, strict=True), group_size=128)
    assert torch.equal(ops.linear(x, **gemm, activation="int8"), ops.linear(x, **gemm))


@pytest.mark.usefixtures("matmul_precision")
def test_torch_says_what_float32_needs() -> None:
    arguments = Strips.of(random_weight(64, 256, 128)).arguments(128)
    x = randn(4, 256).requires_grad_()
    exact, int16 = (ops.linear(x.detach(), **arguments, activation=p) for p in ("exact", "int16"))
    assert not torch.equal(exact, int16)
    for setting, expected in (("highest", exact), ("high", int16), ("medium", int16)):
        torch.set_float32_matmul_precision(setting)
        compiled = torch.compile(functional.linear, backend="aot_eager", fullgraph=True)
        for function in (functional.linear, compiled):
            with torch.no_grad():
                assert torch.equal(function(x, **arguments), expected)
                assert torch.equal(function(x, **arguments, activation="exact"), exact)
        y = functional.linear(x, **arguments)
        assert torch.equal(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), x)
        dense = ops.dequantize(**arguments, dtype=F32)
        torch.testing.assert_close(grad, dense.sum(0).expand_as(grad), rtol=1e-4, atol=1e-4)
        torch.compiler.reset()


def inputs_of(kind: str, rows: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator)
    if kind == "student-t":  # of three degrees of freedom: a normal over the root of a mean square of three
        x = x / torch.randn(3, rows, k, generator=generator).square().mean(0).sqrt()
    if kind == "8 channels x 100":
        x[:, torch.randperm(k, generator=generator)[:8]] *= 100
    if kind == "1 channel x 1000":
        x[:, 77] *= 1000
    return x


@pytest.mark.parametrize("kind", ["normal", "student-t", "8 channels x 100", "1 channel x 1000"])
def test_sixteen_bits_lose_less_than_a_result_in_float16(kind: str) -> None:
    x, w = inputs_of(kind, 16, 4096), random_weight(64, 4096, 128)
    want = x.double() @ w.dense.t()
    rms = {
        activation: (ops.linear(x, **Strips.of(w).arguments(128, activation=activation)).double() - want).norm()
        for activation in ("exact", "int16", "int8")
    }
    stored = (want.half().double() - want).norm()
    assert rms["exact"] < rms["int16"] / 50
    assert rms["int16"] < stored / 2
    assert rms["int16"] * 100 < rms["int8"] < 0.05 * want.norm()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_strided_rows_and_leading_dimensions(dtype: torch.dtype) -> None:
    w = random_weight(40, 64, 32)
    arguments = Strips.of(w).arguments(32)
    x = randn(2, 3, 5, 64, dtype=dtype)
    y = ops.linear(x, **arguments)
    assert y.shape == (2, 3, 5, 40)
    flat = x.view(30, 64)
    rows = ops.linear(flat, **arguments)
    assert torch.equal(y.view(30, 40), rows)
    assert torch.equal(ops.linear(flat[7], **arguments), rows[7])
    wide = torch.full((30, 100), float("nan"), dtype=dtype)
    wide[:, 8:72] = flat
    assert torch.equal(ops.linear(wide[:, 8:72], **arguments), rows)
    assert torch.equal(ops.linear(flat.t().contiguous().t(), **arguments), rows)
    assert torch.equal(ops.linear(x.transpose(0, 1), **arguments), y.transpose(0, 1))
    assert torch.equal(ops.linear(flat[::2], **arguments), rows[::2])
    spread = {k: v.repeat_interleave(2, 1)[:, ::2] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    assert torch.equal(ops.linear(flat, **spread), rows)
    assert ops.linear(flat[:0], **arguments).shape == (0, 40)


@pytest.mark.parametrize("activation", LIMITS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bytes_at_any_number_of_threads_and_in_any_batch(
    activation: str, dtype: torch.dtype, threads: None
) -> None:
    w = random_weight(1000, 512, 128)
    arguments = Strips.of(w).arguments(128, bias=randn(1000), activation=activation)
    x = randn(600, 512, dtype=dtype)
    rows = {m: x[:m] for m in (1, 3, 4, 7, 33, 600)}
    expected = None
    for count in (1, 2, 3, 8):  # from 4 on all prepare x together
        torch.set_num_threads(count)
        results = {m: ops.linear(x, **arguments) for m, x in rows.items()}
        expected = expected or results
        assert all(torch.equal(y, expected[m]) for m, y in results.items())
        assert all(torch.equal(y, results[600][:m]) for m, y in results.items())


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_touches_no_other(dtype: torch.dtype, bad: float) -> None:
    arguments = Strips.of(random_weight(40, 256, 64)).arguments(64)
    x = randn(9, 256, dtype=dtype)
    before = ops.linear(x, **arguments)
    x[4, 130] = bad
    after = ops.linear(x, **arguments)
    assert not after[4].isfinite().any() and before.isfinite().all()
    after[4] = before[4]
    assert torch.equal(after, before)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 90),
    st.sampled_from([(8, 5), (16, 3), (32, 9), (64, 5), (128, 3), (256, 2), (77, 1), (144, 3)]),
    st.integers(1, 40),
    st.sampled_from([F32, F16, BF16]),
    st.integers(0, 2**32 - 1),
)
def test_strips_and_gemm_agree(n: int, depth: tuple[int, int], m: int, dtype: torch.dtype, seed: int) -> None:
    group, groups = depth
    n, k = n if groups > 1 else 8 * n, group * groups
    w = random_weight(n, k, group, seed=seed % 2**31)
    x = randn(m, k, seed=seed % 2**31, dtype=dtype)
    y = ops.linear(x, **Strips.of(w).arguments(group))
    check(y, x, w, None, "exact")
    if n % 8 == 0:
        gemm = ops.linear(x, *w.tensors, group_size=group)
        largest = gemm.abs().max().item()
        assert (y - gemm).abs().max().item() <= 4 * max(UNIT_ROUNDOFF[dtype], 2.0**-16) * largest


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("linear", {"x": randn(3, 65)}, "must be", "got"),
    ("linear", {"x": torch.tensor(1.0)}, "x must be", "got []"),
    ("linear", {"qweight": torch.zeros(3, 256, dtype=torch.int32)}, "qweight must be", "got [3, 256] int32"),
    ("linear", {"qweight": torch.zeros(2, 250, dtype=torch.int32)}, "qweight must", "got [2, 250] int32"),
    ("linear", {"qweight": torch.zeros(2, 256)}, "qweight must be", "got [2, 256] float32"),
    ("linear", {"scales": torch.ones(40, 2)}, "scales must be", "got [40, 2] float32"),
    ("linear", {"scales": torch.ones(2, 40).double()}, "scales must be", "got [2, 40] float64"),
    ("linear", {"scales": torch.ones(80)}, "scales must be", "got [80] float32"),
    ("linear", {"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, "qzeros must be", "got [2, 5] int32"),
    ("linear", {"bias": torch.ones(39)}, "bias must be", "got [39] float32"),
    ("linear", {"activation": "float16"}, "activation must be 'exact', 'int16' or 'int8'", "got 'float16'"),
    ("linear", {"group_size": 0}, "group_size must be positive", "got 0"),
    ("dequantize", {"group_size": 24}, "must be", "got"),
    ("linear", {"group_size": 16, "scales": torch.ones(2, 40)}, "scales must be", "got [2, 40] float32"),
    ("linear", {"layout": "strips.zeros"}, "'strips.zeros' is stored but not computed on", "gemm"),
]


@pytest.mark.parametrize(("op", "change", "named", "got"), BAD, ids=[f"{op}-{[*c]}" for op, c, _, _ in BAD])
def test_bad_arguments_are_refused_alike(op: str, change: dict[str, Any], named: str, got: str) -> None:
    good = Strips.of(random_weight(40, 64, 32)).arguments(32)
    if op == "linear":
        good["x"] = randn(3, 64)
    function = getattr(torch.ops.awq_ext, op)
    function(**good)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in {**good, **change}.items()}
    for arguments in ({**good, **change}, meta):
        with pytest.raises(RuntimeError) as caught:
            function(**arguments)
        text = str(caught.value)
        assert f"awq_ext::{op}: " in text and named in text and got in text, text


def test_groups_that_share_a_word_are_refused() -> None:
    scales = torch.ones(5, 8)
    qweight = ops.pack(torch.zeros(8, 60, dtype=torch.uint8), layout="strips")
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=r"multiple of 8, or one group; got 12; keep layout 'gemm'"):
            x = randn(1, 60).to(device)
            ops.linear(x, qweight.to(device), scales.to(device), group_size=12, layout="strips")


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
@pytest.mark.parametrize("activation", LIMITS)
def test_opcheck(dtype: torch.dtype, activation: str) -> None:
    arguments = Strips.of(random_weight(40, 64, 32)).arguments(32)
    x = randn(2, 5, 64).to(dtype)
    torch.library.opcheck(torch.ops.awq_ext.linear.default, (x,), {**arguments, "activation": activation})
    torch.library.opcheck(torch.ops.awq_ext.dequantize.default, (), arguments)


def test_fakes_know_the_shapes() -> None:
    arguments = Strips.of(random_weight(33, 600, 200)).arguments(200)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert ops.linear(mode.from_tensor(randn(2, 3, 600)), **fakes).shape == (2, 3, 33)
        assert ops.dequantize(**fakes).shape == (33, 600)
    one = Strips.of(random_weight(8, 37, 37)).arguments(-1)
    assert ops.dequantize(**one).shape == (8, 40)
    assert ops.dequantize(**{**one, "group_size": 37}).shape == (8, 37)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        strips = Strips.of(random_weight(40, 64, 32))
        self.register_buffer("qweight", strips.qweight)
        self.register_buffer("scales", strips.scales)
        self.register_buffer("qzeros", strips.qzeros)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.awq_ext.linear(
            x, self.qweight, self.scales, self.qzeros, None, group_size=32, layout="strips", activation="int16"
        )


def test_export_and_compile() -> None:
    layer = Layer()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (randn(3, 64),), dynamic_shapes=({0: batch},))
    for m in (2, 17):
        assert torch.equal(program.module()(randn(m, 64)), layer(randn(m, 64)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(randn(5, 64)), layer(randn(5, 64)))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript is not supported on Python 3.14 and later")
def test_script() -> None:
    layer = Layer()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(randn(5, 64)), layer(randn(5, 64)))


def test_plans() -> None:
    native = _library.native()
    plans = [
        native.plan_linear(m, 4096, 4096, dtype, "strips", activation)
        for m, dtype, activation in ((1, "float16", "exact"), (512, "float32", "exact"), (16, "float32", "int8"))
    ]
    many = "strips_matrix" if plans[0]["level"] == "amx_int8" else "strips"
    assert [plan["kernel"] for plan in plans] == ["strips", many, many]
    assert [plan["digits"] for plan in plans] == [2, 3, 1]
    assert all(plan["tiles"] == 128 and plan["why"] for plan in plans)
    assert native.plan_linear(1, 8, 8, "float64", "strips")["kernel"] == "reference"
    with pytest.raises(ValueError, match="got marlin"):
        native.plan_linear(1, 8, 8, "float32", "marlin")
    with pytest.raises(ValueError, match="group_size must be positive"):
        native.plan_linear(1, 8, 8, "float32", "strips", group_size=0)
    with pytest.raises(ValueError, match="got fp8"):
        native.plan_linear(1, 8, 8, "float32", "strips", "fp8")
