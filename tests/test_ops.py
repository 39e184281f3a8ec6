"""Every operator against its slow definition in reference.py; what it refuses; determinism; torch's own op checks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from reference import LAYOUTS, Weight, randn, random_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import awq_ext
from awq_ext import _library, ops

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
STORAGE = (F32, F16, BF16)
SHAPES = [  # n, k, group_size: one word, tails after whole vectors, group sizes in use, odd ones, the whole of k
    (8, 16, 16),
    (24, 64, 16),
    (72, 96, 32),
    (128, 192, 64),
    (264, 256, 128),
    (136, 200, -1),
    (64, 60, 4),
    (40, 21, 7),
    (8, 1, 1),
]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 64, 71]


def codes(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def words(rows: int, cols: int) -> Tensor:
    return torch.zeros(rows, cols, dtype=torch.int32)


def strided_views(t: Tensor) -> dict[str, Tensor]:
    """Tensors equal to the matrix t, laid out in memory in every way that a slice or a transpose can give."""
    rows, cols = t.shape

    def inside(shape: tuple[int, int], *index: slice) -> Tensor:
        big = torch.zeros(shape, dtype=t.dtype)
        big[index] = t
        return big[index]

    return {
        "transposed": t.t().contiguous().t(),
        "every second row": inside((2 * rows, cols), slice(None, None, 2), slice(None)),
        "every second column": inside((rows, 2 * cols), slice(None), slice(None, None, 2)),
        "a window": inside((rows + 2, cols + 5), slice(1, 1 + rows), slice(3, 3 + cols)),
        "an odd storage offset": torch.cat([t.new_zeros(1), t.flatten()])[1:].view(rows, cols),
    }


def assert_same(a: Tensor, b: Tensor) -> None:
    """The same dtype, shape and bytes; NaN equals NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    different = (a != b) & ~((a != a) & (b != b))
    assert not different.any(), (
        f"{int(different.sum())} of {a.numel()} differ, first at {different.nonzero()[0].tolist()}"
    )


# --- pack, unpack, repack -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (16, 8), (72, 136), (200, 24)], ids=str)
def test_pack_follows_the_format(layout: str, shape: tuple[int, int]) -> None:
    q = codes(*shape, seed=sum(shape))
    words = ops.pack(q, layout=layout)
    assert_same(words, ref.pack(q, layout))
    assert_same(ops.unpack(words, layout=layout), q)
    assert_same(ref.unpack(words, layout), q)


@pytest.mark.parametrize(
    ("layout", "shape"), [("gemm", (8, 5)), ("gemm", (24, 1)), ("gemv", (5, 8)), ("gptq", (1, 24)), ("gptq", (3, 8))]
)
def test_only_the_packed_axis_must_be_a_multiple_of_eight(layout: str, shape: tuple[int, int]) -> None:
    q = codes(*shape)
    words = ops.pack(q, layout=layout)
    assert_same(words, ref.pack(q, layout))
    assert_same(ops.unpack(words, layout=layout), q)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_has_its_own_nibble(layout: str) -> None:
    """One code at a time: exactly the nibble that the format names is set, sign bit of the word included."""
    n, k = 16, 16
    for row in range(n):
        for col in range(k):
            q = torch.zeros(n, k, dtype=torch.uint8)
            q[row, col] = 15
            words = ops.pack(q, layout=layout)
            i, j, nibble = ref.place(layout, row, col)
            assert (int(words[i, j]) & 0xFFFFFFFF) == 15 << (4 * nibble)
            assert int((words != 0).sum()) == 1


@pytest.mark.parametrize("src", LAYOUTS)
@pytest.mark.parametrize("dst", LAYOUTS)
def test_repack_keeps_the_codes(src: str, dst: str) -> None:
    q = codes(24, 40)
    words = ops.pack(q, layout=src)
    assert_same(ops.repack(words, src=src, dst=dst), ref.pack(q, dst))
    assert_same(ops.repack(ops.repack(words, src=src, dst=dst), src=dst, dst=src), words)


def test_gemm_zeros_are_packed_by_the_same_rule() -> None:
    zeros = codes(32, 3)  # [n, G], G not a multiple of eight
    packed = ops.pack(zeros)
    assert packed.shape == (3, 4)
    assert_same(packed, ref.pack(zeros))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_reads_strided_tensors(layout: str) -> None:
    q = codes(16, 24)
    words = ref.pack(q, layout)
    for name, view in strided_views(q).items():
        assert torch.equal(ops.pack(view, layout=layout), words), name
    for name, view in strided_views(words).items():
        assert torch.equal(ops.unpack(view, layout=layout), q), name
        assert torch.equal(ops.repack(view, src=layout, dst="gemv"), ref.pack(q, "gemv")), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_nothing(layout: str) -> None:
    for shape in ((0, 8), (8, 0), (0, 0)):
        words = ops.pack(torch.empty(shape, dtype=torch.uint8), layout=layout)
        assert words.shape == ref.word_shape(layout, *shape)
        assert ops.unpack(words, layout=layout).shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [16, 128, 255])
def test_pack_refuses_codes_above_fifteen_wherever_they_are(layout: str, bad: int) -> None:
    for place in ((0, 0), (7, 8), (15, 23)):
        q = codes(16, 24)
        q[place] = bad
        with pytest.raises(RuntimeError, match=r"awq_ext::pack: q must hold codes 0\.\.15"):
            ops.pack(q, layout=layout)


# --- dequantize -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("scale_dtype", STORAGE)
def test_dequantize_is_exact_and_rounded_once(n: int, k: int, group: int, scale_dtype: torch.dtype) -> None:
    w = random_weight(n, k, group, scale_dtype, seed=n + k)
    z, s = (t.float().repeat_interleave(w.group, 1) for t in (w.z, w.s))
    exact = (w.q.float() - z) * s
    for dtype in (*STORAGE, None):
        got = ops.dequantize(*w.tensors, group_size=group, dtype=dtype)
        assert_same(got, exact.to(dtype or scale_dtype))
    without = ops.dequantize(w.qweight, w.scales, None, group_size=group, dtype=F32)
    assert_same(without, (w.q.float() - 8) * s)


def test_dequantize_reads_strided_tensors() -> None:
    w = random_weight(16, 24, 8)
    want = ops.dequantize(*w.tensors, group_size=8)
    qweights, scales, qzeros = (strided_views(t) for t in w.tensors)
    for name in qweights:
        assert_same(ops.dequantize(qweights[name], scales[name], qzeros[name], group_size=8), want)


def test_dequantize_at_the_ends_of_float16() -> None:
    q = torch.tensor([[0, 15, 8, 7]], dtype=torch.uint8).repeat(8, 4)
    z = torch.full((8, 1), 8, dtype=torch.uint8)
    for scale, half_values in {
        65504.0: [-float("inf"), float("inf"), 0.0, -65504.0],  # 7 * 65504 is beyond float16
        2.0**-24: [-8 * 2.0**-24, 7 * 2.0**-24, 0.0, -(2.0**-24)],
        2.0**-14: [-8 * 2.0**-14, 7 * 2.0**-14, 0.0, -(2.0**-14)],
    }.items():
        w = Weight(q, torch.full((8, 1), scale, dtype=F16), z, 16)
        half = ops.dequantize(*w.tensors, group_size=16)
        assert half[0, :4].tolist() == half_values
        assert ops.dequantize(*w.tensors, group_size=16, dtype=F32)[0, :4].tolist() == [
            (code - 8) * scale for code in (0, 15, 8, 7)
        ]


def test_dequantize_passes_nan_and_infinite_scales_on_to_their_group_only() -> None:
    w = random_weight(16, 32, 16)
    clean = ops.dequantize(*w.tensors, group_size=16)
    w.scales[1, 3], w.scales[0, 9] = float("nan"), float("inf")
    got = ops.dequantize(*w.tensors, group_size=16)
    assert got[3, 16:].isnan().all()
    assert not got[9, :16].isfinite().any()
    hurt = torch.zeros(16, 32, dtype=torch.bool)
    hurt[3, 16:] = hurt[9, :16] = True
    assert_same(got[~hurt], clean[~hurt])


# --- quantize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, (3, 512, 512), (5, 300, 300)])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("w_dtype", STORAGE)
def test_quantize_rounds_to_nearest(n: int, k: int, group: int, zero_point: bool, w_dtype: torch.dtype) -> None:
    w = randn(n, k, seed=n, dtype=w_dtype) * 0.05
    group = k if group == -1 else group
    for dtype in (*STORAGE, None):
        q, s, z = ops.quantize(w, group_size=group, zero_point=zero_point, dtype=dtype)
        assert (q.dtype, s.dtype, z.dtype) == (torch.uint8, dtype or F16, torch.uint8)
        assert q.shape == (n, k) and s.shape == z.shape == (n, k // group)
        ref.check_quantized(w, q, s, z, group, zero_point)
    assert_same(
        ops.quantize(w, group_size=-1, zero_point=zero_point)[0],
        ops.quantize(w, group_size=k, zero_point=zero_point)[0],
    )


def test_quantize_groups_of_one_sign_and_of_zeros() -> None:
    """AutoAWQ takes the group's own minimum as the low end; a group of one sign then loses its zero and saturates."""
    w = torch.zeros(4, 16)
    w[1] = torch.linspace(0.5, 1.0, 16)
    w[2] = -torch.linspace(0.5, 1.0, 16)
    w[3] = 0.7  # one value in the whole group
    for zero_point in (True, False):
        q, s, z = ops.quantize(w, group_size=16, zero_point=zero_point, dtype=F32)
        ref.check_quantized(w, q, s, z, 16, zero_point)
        back = (q.double() - z) * s
        assert (back[0] == 0).all() and s[0, 0] == 1
        assert ((back - w).abs() <= s / 2 + 1e-6).all()
        if zero_point:
            assert z.flatten().tolist()[1:] == [0, 15, 0]
    assert ops.quantize(w, group_size=16)[2][0, 0] == 0
    assert ops.quantize(-torch.zeros(1, 16), group_size=16)[1].item() == 1


def test_quantize_to_a_given_range() -> None:
    w = randn(24, 64, seed=3)
    own = torch.stack([w.view(24, 4, 16).amin(-1), w.view(24, 4, 16).amax(-1)], -1)
    whole = ops.quantize(w, group_size=16)
    for zero_point in (True, False):
        for name, range in {
            "its own": own,
            "half": own * 0.5,
            "wide": own * 7,
            "one end": own * torch.tensor([1.0, 0.5]),
            "zero left out": own.abs() + 0.25,  # widened to include zero: the low end becomes 0
            "strided": torch.stack([own, own], 0).permute(1, 2, 3, 0)[..., 1],
        }.items():
            q, s, z = ops.quantize(w, group_size=16, zero_point=zero_point, range=range)
            ref.check_quantized(w, q, s, z, 16, zero_point, range)
            if name in ("its own", "strided") and zero_point:
                for a, b in zip((q, s, z), whole, strict=True):
                    assert_same(a, b)
    q, s, z = ops.quantize(w, group_size=16, range=torch.zeros(24, 4, 2))
    assert (s == 1).all() and (z == 0).all()  # an empty range is that of an all-zero group


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("zero_point", [True, False])
def test_quantize_at_the_ends_of_the_number_range(dtype: torch.dtype, zero_point: bool) -> None:
    """Large, small and subnormal weights and scales: the error stays within half a step of the scale."""
    base = randn(8, 16, seed=5)
    base = base / base.abs().amax()
    for magnitude in (3e38, 1e30, 6e4, 1.0, 1e-3, 6e-5, 1e-6, 1e-8, 1e-12, 1e-30, 1e-37):
        w = (base * magnitude).to(F32)
        bits = 15 if zero_point else 7
        if dtype == F16 and magnitude * 2 / bits > 65504:
            with pytest.raises(RuntimeError, match="awq_ext::quantize: row 0 of w"):
                ops.quantize(w, group_size=16, zero_point=zero_point, dtype=dtype)
            continue
        q, s, z = ops.quantize(w, group_size=16, zero_point=zero_point, dtype=dtype)
        assert s.isfinite().all() and (s > 0).all()
        if magnitude * 1e-3 > ref.SMALLEST_NORMAL[F32]:  # below, w / s itself is rounded coarsely
            ref.check_quantized(w, q, s, z, 16, zero_point)
        error = ((q.double() - z) * s.double() - w.double()).abs()
        assert (error <= s.double() * (0.5 + 16 * ref.UNIT_ROUNDOFF[dtype]) + 2.0**-149 * 8).all(), magnitude


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("dtype", STORAGE)
def test_quantize_weights_too_small_for_a_scale(dtype: torch.dtype, zero_point: bool) -> None:
    """(hi - lo) / 15 of the smallest float32 numbers is zero in float32; a scale of zero would divide by zero."""
    tiny = 2.0**-149
    w = torch.zeros(4, 16)
    w[0], w[1], w[2, ::2], w[3, 0], w[3, 1] = tiny, -tiny, 3 * tiny, tiny, -tiny
    q, s, z = ops.quantize(w, group_size=16, zero_point=zero_point, dtype=dtype)
    assert (s > 0).all()
    assert (q <= 15).all() and (z <= 15).all()
    error = ((q.double() - z) * s.double() - w.double()).abs()
    assert (error <= s.double() / 2 + 4 * tiny).all()


def test_quantize_refuses_what_is_not_finite() -> None:
    clean = randn(40, 64, seed=1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for row, col in ((0, 0), (17, 31), (39, 63)):
            for w_dtype in STORAGE:
                w = clean.to(w_dtype, copy=True)
                w[row, col] = bad
                with pytest.raises(RuntimeError, match=rf"awq_ext::quantize: row {row} of w"):
                    ops.quantize(w, group_size=16)
            range = torch.ones(40, 4, 2)
            range[row, col // 16, 0] = bad
            with pytest.raises(RuntimeError, match=rf"awq_ext::quantize: row {row} of w \(or of range\)"):
                ops.quantize(clean, group_size=16, range=range)
            w = clean.clone()
            w[row, col] = bad
            with pytest.raises(RuntimeError, match=rf"awq_ext::quantize: row {row} of w"):
                ops.quantize(w, group_size=16, range=torch.ones(40, 4, 2))
    clean[5], clean[30, 2] = float("nan"), float("nan")
    with pytest.raises(RuntimeError, match="row 5 of w"):  # the first of several, whatever thread met it
        ops.quantize(clean, group_size=16)


def test_quantize_refuses_scales_that_float16_cannot_hold() -> None:
    w = torch.full((8, 16), 15 * 65504.0)
    assert (ops.quantize(w, group_size=16)[1] == 65504).all()
    with pytest.raises(RuntimeError, match="values too large for a scale"):
        ops.quantize(w * 1.01, group_size=16)
    assert ops.quantize(w * 1.01, group_size=16, dtype=BF16)[1].isfinite().all()


def test_quantize_reads_strided_tensors() -> None:
    w = randn(16, 32)
    want = ops.quantize(w, group_size=16)
    for view in strided_views(w).values():
        for a, b in zip(ops.quantize(view, group_size=16), want, strict=True):
            assert_same(a, b)
    row = randn(1, 32)
    for a, b in zip(
        ops.quantize(row.expand(9, 32), group_size=16), ops.quantize(row.repeat(9, 1), group_size=16), strict=True
    ):
        assert_same(a, b)


def test_quantize_nothing() -> None:
    for n, k in ((0, 16), (8, 0)):
        q, s, z = ops.quantize(torch.empty(n, k), group_size=-1)
        assert q.shape == (n, k) and s.shape == z.shape == (n, 1 if k else 0)


# --- linear ---------------------------------------------------------------------------------------------------------


def check_linear(y: Tensor, x: Tensor, w: Weight, bias: Tensor | None, terms: Tensor | None = None) -> None:
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], w.q.shape[0])
    error, bound = ref.linear_bound(x, y, w.dense, bias, terms)
    ratio = (error / bound).nan_to_num(posinf=float("inf"))  # 0 / 0 where an output is exactly zero
    assert ratio.numel() == 0 or ratio.max() <= 1, f"{float(ratio.max()):.3g} times the bound"


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_linear_keeps_its_error_bound(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    for index, m in enumerate(ROWS):
        scale_dtype, bias_dtype = STORAGE[index % 3], STORAGE[index // 3 % 3]
        w = random_weight(n, k, group, scale_dtype, seed=m)
        symmetric = Weight(w.q, w.s, torch.full_like(w.z, 8), w.group)
        x, bias = randn(m, k, seed=m, dtype=dtype), randn(n, dtype=bias_dtype)
        for weight, qzeros in ((w, w.qzeros), (symmetric, None)):
            terms = weight.largest_terms if k < 8 else None
            for b in (None, bias):
                y = ops.linear(x, weight.qweight, weight.scales, qzeros, b, group_size=group)
                check_linear(y, x, weight, b, terms)


@pytest.mark.parametrize("m", [4, 71])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_linear_errs_little_on_average(m: int, dtype: torch.dtype) -> None:
    """The bound above is a worst case, far above what rounding does on average: this catches a slow loss of accuracy.

    Independent roundings add up like sqrt(k) and not like k, so the mean error over many outputs stays near a third
    of u_out |ref| + u_acc sqrt(k) sqrt(sum (x w)^2); half of it is the limit.
    """
    for n, k, group in ((264, 256, 128), (136, 1024, -1), (64, 60, 4)):
        w = random_weight(n, k, group, seed=k)
        x = randn(m, k, seed=m, dtype=dtype)
        y = ops.linear(x, *w.tensors, group_size=group)
        dense, terms = w.dense, w.largest_terms
        reference = x.double() @ dense.t()
        u_acc = ref.UNIT_ROUNDOFF[F64 if dtype == F64 else F32]
        spread = (x.double().square() @ terms.square().t()).sqrt()
        typical = ref.UNIT_ROUNDOFF[dtype] * reference.abs() + u_acc * k**0.5 * spread
        assert (y.double() - reference).abs().mean() <= 0.5 * typical.mean()


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
@pytest.mark.parametrize("m", [1, 3, 5, 64])
def test_one_hot_rows_give_back_the_columns_of_the_weight(dtype: torch.dtype, m: int) -> None:
    """A single term has no sum to round: linear and dequantize must agree to the last bit."""
    w = random_weight(72, 64, 32)
    dense = w.dense.to(dtype) if dtype == F64 else ops.dequantize(*w.tensors, group_size=32, dtype=dtype)
    for first in range(0, 64, m):
        x = torch.eye(64, dtype=dtype)[first : first + m]
        assert_same(ops.linear(x, *w.tensors, group_size=32), dense.t()[first : first + m])


@pytest.mark.parametrize("m", [2, 9])
def test_linear_where_terms_cancel(m: int) -> None:
    n, k, group = 40, 128, 32
    w = random_weight(n, k, group)
    pairs = Weight(w.q.view(n, -1, 2)[..., :1].expand(n, -1, 2).reshape(n, k), w.s, w.z, group)
    x = randn(m, k // 2, seed=2).repeat_interleave(2, 1) * torch.tensor([1.0, -1.0]).repeat(k // 2)
    for dtype in (F32, F16, BF16, F64):
        half = x.to(dtype)
        assert (half.double() @ pairs.dense.t()).abs().max() < 1e-9  # every term has its negative beside it
        check_linear(ops.linear(half, *pairs.tensors, group_size=group), half, pairs, None, pairs.largest_terms)
    for level in (0, 15):  # q = z everywhere: the weight is zero, whatever the codes
        same = Weight(torch.full_like(w.q, level), w.s, torch.full_like(w.z, level), group)
        x = randn(m, k, seed=4)
        check_linear(ops.linear(x, *same.tensors, group_size=group), x, same, None, same.largest_terms)


@pytest.mark.parametrize("m", [1, 8])
def test_linear_at_the_ends_of_float16(m: int) -> None:
    for scale in (65504.0, 2.0**-14, 2.0**-24):
        w = random_weight(16, 32, 16)
        w = Weight(w.q, torch.full_like(w.s, scale), w.z, 16)
        for dtype in (F32, BF16, F64):
            x = randn(m, 32, dtype=dtype)
            check_linear(ops.linear(x, *w.tensors, group_size=16), x, w, None, w.largest_terms)
    w = random_weight(16, 32, 16)
    tiny = torch.full((m, 32), 2.0**-24, dtype=F16)  # the smallest float16 is not flushed to zero
    check_linear(ops.linear(tiny, *w.tensors, group_size=16), tiny, w, None)
    subnormal = torch.full((m, 32), 2.0**-140, dtype=F32)
    assert ops.linear(subnormal, *w.tensors, group_size=16).count_nonzero() > 0


@pytest.mark.parametrize("m", [1, 8])
def test_linear_overflows_to_infinity_as_the_type_does(m: int) -> None:
    w = Weight(
        torch.full((8, 32), 15, dtype=torch.uint8),
        torch.ones(8, 2, dtype=F16),
        torch.zeros(8, 2, dtype=torch.uint8),
        16,
    )
    x = torch.full((m, 32), 60000.0, dtype=F16)  # 32 * 15 * 60000 is beyond float16, not beyond float32
    y = ops.linear(torch.cat([x, -x]), *w.tensors, group_size=16)
    assert (y[:m] == float("inf")).all() and (y[m:] == -float("inf")).all()
    assert (ops.linear(x.float(), *w.tensors, group_size=16) == 32 * 15 * 60000.0).all()
    for second, want in ((3, 65504.0), (4, float("inf"))):  # 65505 is rounded down, 65520 is the first that is not
        x = torch.zeros(m, 32, dtype=F16)
        x[:, 0], x[:, 17] = 4364, second
        assert (ops.linear(x, *w.tensors, group_size=16) == want).all()


@pytest.mark.parametrize("m", [2, 4, 5, 70])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_a_row_that_is_not_finite_touches_no_other_row(m: int, dtype: torch.dtype) -> None:
    w = random_weight(72, 64, 32)
    x = randn(m, 64, dtype=dtype)
    clean = ops.linear(x, *w.tensors, group_size=32)
    for bad in (float("nan"), float("inf")):
        hurt = x.clone()
        hurt[1, 5] = bad
        y = ops.linear(hurt, *w.tensors, group_size=32)
        keep = torch.arange(m) != 1
        assert_same(y[keep], clean[keep])
        assert not y[1][w.dense[:, 5] != 0].isfinite().any()  # it does not vanish either


@pytest.mark.parametrize("m", [1, 70])
def test_a_scale_that_is_not_finite_touches_no_other_column(m: int) -> None:
    w = random_weight(136, 64, 32)
    x = randn(m, 64)
    clean = ops.linear(x, *w.tensors, group_size=32)
    w.scales[1, 77] = float("nan")
    y = ops.linear(x, *w.tensors, group_size=32)
    keep = torch.arange(136) != 77
    assert_same(y[:, keep], clean[:, keep])
    assert y[:, 77].isnan().all()


@pytest.mark.parametrize("m", [2, 3, 9])
@pytest.mark.parametrize("dtype", [F32, F16, F64])
def test_linear_reads_strided_tensors(m: int, dtype: torch.dtype) -> None:
    w = random_weight(24, 32, 16)
    x, bias = randn(m, 32, dtype=dtype), randn(24)
    want = ops.linear(x, *w.tensors, bias, group_size=16)
    for name, view in strided_views(x).items():
        assert torch.equal(ops.linear(view, *w.tensors, bias, group_size=16), want), name
    weights = [strided_views(t) for t in w.tensors]
    for name in weights[0]:
        got = ops.linear(x, *(views[name] for views in weights), torch.stack([bias, bias], 1)[:, 0], group_size=16)
        assert torch.equal(got, want), name
    row = randn(1, 32, dtype=dtype)
    expanded = row.expand(m, 32)
    assert expanded.stride(0) == 0
    assert_same(
        ops.linear(expanded, *w.tensors, group_size=16), ops.linear(expanded.clone(), *w.tensors, group_size=16)
    )
    overlapping = randn(m + 40, dtype=dtype).as_strided((m, 32), (1, 1))
    assert_same(
        ops.linear(overlapping, *w.tensors, group_size=16), ops.linear(overlapping.clone(), *w.tensors, group_size=16)
    )
    scalar = torch.ones((), dtype=dtype).expand(m, 32)
    assert_same(ops.linear(scalar, *w.tensors, group_size=16), ops.linear(scalar.clone(), *w.tensors, group_size=16))


def test_linear_keeps_leading_dimensions() -> None:
    w = random_weight(16, 32, 16)
    base = randn(2, 3, 5, 32)
    flat = ops.linear(base.view(-1, 32), *w.tensors, group_size=16)
    assert_same(ops.linear(base, *w.tensors, group_size=16), flat.view(2, 3, 5, 16))
    for permuted in (base.transpose(0, 1), base.permute(2, 1, 0, 3), base[:, ::2], base[:, 1:2], base[:, :, -1]):
        assert_same(
            ops.linear(permuted, *w.tensors, group_size=16),
            ops.linear(permuted.contiguous(), *w.tensors, group_size=16),
        )
    vector = base[1, 2, 4]
    assert_same(ops.linear(vector, *w.tensors, group_size=16), ops.linear(vector[None], *w.tensors, group_size=16)[0])
    strided = randn(32, 2)[:, 1]
    assert_same(ops.linear(strided, *w.tensors, group_size=16), ops.linear(strided.clone(), *w.tensors, group_size=16))
    for shape in ((0, 32), (2, 0, 32), (0, 3, 32)):
        assert ops.linear(torch.empty(shape), *w.tensors, group_size=16).shape == (*shape[:-1], 16)


def test_linear_of_nothing() -> None:
    for dtype in (F32, F64):
        empty = ops.linear(
            torch.empty(3, 0, dtype=dtype),
            torch.empty(0, 1, dtype=torch.int32),
            torch.empty(0, 8),
            None,
            torch.arange(8.0),
            group_size=-1,
        )
        assert_same(empty, torch.arange(8.0, dtype=dtype).expand(3, 8))
    no_columns = ops.linear(torch.ones(3, 16), torch.empty(16, 0, dtype=torch.int32), torch.empty(1, 0), group_size=16)
    assert no_columns.shape == (3, 0)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    """Few rows and many rows may take different kernels; each keeps the bound, so they differ by two at most."""
    w = random_weight(72, 128, 32)
    x = randn(70, 128, dtype=dtype)
    whole = ops.linear(x, *w.tensors, group_size=32)
    parts = torch.cat([ops.linear(rows, *w.tensors, group_size=32) for rows in x.split([1, 2, 3, 4, 5, 55])])
    _, bound = ref.linear_bound(x, whole, w.dense, None, w.largest_terms)
    assert ((whole.double() - parts.double()).abs() <= 2 * bound).all()


def test_linear_reads_negated_and_conjugated_views() -> None:
    w = random_weight(16, 32, 16)
    x = torch.complex(randn(3, 32), randn(3, 32, seed=1)).conj().imag
    assert x.is_neg()
    assert_same(ops.linear(x, *w.tensors, group_size=16), ops.linear(x.resolve_neg(), *w.tensors, group_size=16))


# --- search_scale ---------------------------------------------------------------------------------------------------

SEARCH_SHAPES = [(48, 64, 16), (50, 80, 16), (24, 96, -1), (7, 40, 4), (130, 72, 24)]


def calibration(k: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Correlated activations with a few loud channels, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator) / k**0.5
    loudness = torch.exp(1.5 * torch.randn(k, generator=generator))
    return torch.randn(tokens, k, generator=generator) @ mix * loudness


@pytest.mark.parametrize(("n", "k", "group"), SEARCH_SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"duo_scaling": False, "grid": 7},
        {"zero_point": False, "grid": 5},
        {"dtype": BF16, "grid": 4},
        {"dtype": F32, "grid": 1},
        {"tie": True, "grid": 6},
        {"row_weight": True, "grid": 6},
        {"w_bit": 3, "grid": 4},
        {"w_bit": 2, "zero_point": False, "grid": 4},
        {"w_bit": 8, "grid": 2},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_search_scale_equals_its_definition(n: int, k: int, group: int, options: dict[str, Any]) -> None:
    options = dict(options)
    x, w = calibration(k, seed=n), randn(n, k, seed=k) * 0.1
    group = k if group == -1 else group
    if options.pop("tie", False):
        options["tie"] = torch.randint(0, k // 3, (k,), generator=torch.Generator().manual_seed(1))
    if options.pop("row_weight", False):
        options["row_weight"] = torch.rand(n, generator=torch.Generator().manual_seed(2))
    x_mean, gram = x.abs().mean(0), ref.gram_of(x)
    scale, losses = ops.search_scale(w, x_mean, gram, group_size=group, **options)

    grid, duo, tie = options.get("grid", 20), options.get("duo_scaling", True), options.get("tie")
    candidates = ref.scale_candidates(w, x_mean, group, grid, duo, tie)
    want = torch.tensor(
        [
            ref.scale_loss(
                w,
                c,
                gram,
                group,
                options.get("zero_point", True),
                options.get("dtype", F16),
                options.get("row_weight"),
                options.get("w_bit", 4),
            )
            for c in candidates
        ],
        dtype=F64,
    )
    assert scale.dtype == F32 and scale.shape == (k,)
    assert losses.dtype == F64 and losses.shape == want.shape == (1 + grid * (2 if duo else 1),)
    # Of 8 bits the errors are so small that the float32 of w * c / c shows in them.
    torch.testing.assert_close(losses, want, rtol=1e-3 if options.get("w_bit") == 8 else 1e-4, atol=0)
    chosen = int(losses.argmin())
    torch.testing.assert_close(scale, candidates[chosen], rtol=1e-5, atol=0)
    assert want[chosen] <= want.min() * (1 + 1e-3)
    assert losses[chosen] <= losses[0]
    if tie is not None:
        for t in tie.unique():
            assert scale[tie == t].unique().numel() == 1


@pytest.mark.parametrize("w_dtype", STORAGE)
def test_search_scale_starts_from_round_to_nearest_and_never_does_worse(w_dtype: torch.dtype) -> None:
    """Measured on the tokens themselves, through the operators that will be used afterwards."""
    n, k, group = 40, 96, 32
    x, w = calibration(k), (randn(n, k, seed=8) * 0.1).to(w_dtype)
    scale, losses = ops.search_scale(w, x.abs().mean(0), ref.gram_of(x), group_size=group)

    def loss(c: Tensor) -> float:
        q, s, z = ops.quantize(w.float() * c, group_size=group)
        rounded = Weight(q, s, z, group).dense / c.double()
        return float((x.double() @ (rounded - w.double()).t()).square().sum(1).mean())

    assert float(losses[0]) == pytest.approx(loss(torch.ones(k)), rel=1e-4)
    assert float(losses.min()) == pytest.approx(loss(scale), rel=1e-4)
    assert loss(scale) < 0.9 * loss(torch.ones(k))  # activations like these have something to gain
    assert scale.isfinite().all() and (scale > 0).all()


def test_search_scale_with_dead_channels_and_dead_weights() -> None:
    n, k, group = 16, 64, 16
    x, w = calibration(k), randn(n, k)
    x[:, 5] = x[:, 20:30] = 0
    scale, losses = ops.search_scale(w, x.abs().mean(0), ref.gram_of(x), group_size=group)
    assert scale.isfinite().all() and (scale > 0).all() and losses.isfinite().all()
    for weight, tokens in ((w, torch.zeros_like(x)), (torch.zeros_like(w), x)):  # nothing to lose: the identity
        scale, losses = ops.search_scale(weight, tokens.abs().mean(0), ref.gram_of(tokens), group_size=group)
        assert (losses == 0).all() and (scale == 1).all()
    scale, losses = ops.search_scale(w[:0], x.abs().mean(0), ref.gram_of(x), group_size=group)
    assert (losses == 0).all() and (scale == 1).all()


def test_search_scale_of_one_tie_and_of_no_tie() -> None:
    n, k, group = 16, 32, 16
    x, w = calibration(k), randn(n, k)
    arguments = (w, x.abs().mean(0), ref.gram_of(x))
    alone = ops.search_scale(*arguments, group_size=group)
    for a, b in zip(ops.search_scale(*arguments, group_size=group, tie=torch.arange(k)), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    together, losses = ops.search_scale(*arguments, group_size=group, tie=torch.zeros(k, dtype=torch.int64))
    torch.testing.assert_close(together, torch.ones(k))  # one scale for all, divided by sqrt(max * min), is 1
    torch.testing.assert_close(losses, losses[:1].expand_as(losses), rtol=1e-3, atol=0)


def test_search_scale_row_weights() -> None:
    n, k, group = 20, 32, 16
    x, w = calibration(k), randn(n, k)
    arguments = (x.abs().mean(0), ref.gram_of(x))
    alone = ops.search_scale(w[3:4], *arguments, group_size=group, duo_scaling=False)
    one = torch.zeros(n)
    one[3] = 1
    for a, b in zip(
        ops.search_scale(w, *arguments, group_size=group, duo_scaling=False, row_weight=one), alone, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    for a, b in zip(
        ops.search_scale(w, *arguments, group_size=group, row_weight=torch.ones(n)),
        ops.search_scale(w, *arguments, group_size=group),
        strict=True,
    ):
        assert_same(a, b)


@pytest.mark.parametrize("duo", [True, False])
def test_scale_candidates_are_those_of_the_search(duo: bool) -> None:
    n, k, group, grid = 50, 96, 32, 5
    w, x = randn(n, k) * 0.1, calibration(k)
    tie = torch.randint(0, 40, (k,), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"group_size": group, "grid": grid, "duo_scaling": duo, "tie": tie}
    got = ops.scale_candidates(w, x.abs().mean(0), **options)
    want = torch.stack(ref.scale_candidates(w, x.abs().mean(0), group, grid, duo, tie))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    scale, losses = ops.search_scale(w, x.abs().mean(0), ref.gram_of(x), **options)
    assert_same(scale, got[losses.argmin()])
    assert_same(ops.scale_losses(w, got, ref.gram_of(x), group_size=group), losses)
    w[7, 11] = float("nan")
    with pytest.raises(RuntimeError, match="awq_ext::scale_candidates: w must be finite"):
        ops.scale_candidates(w, x.abs().mean(0), **options)


def test_scale_losses_are_those_of_the_search_on_any_tokens() -> None:
    n, k, group = 50, 96, 32
    w, x, other = randn(n, k), calibration(k), calibration(k, seed=7)
    options: dict[str, Any] = {"group_size": group, "w_bit": 3, "row_weight": torch.rand(n), "dtype": BF16}
    scale, losses = ops.search_scale(w, x.abs().mean(0), ref.gram_of(x), grid=5, **options)
    scales = torch.stack([torch.ones(k), scale])
    assert_same(ops.scale_losses(w, scales, ref.gram_of(x), **options), losses[[0, int(losses.argmin())]])
    want = [ref.scale_loss(w, c, ref.gram_of(other), group, True, BF16, options["row_weight"], w_bit=3) for c in scales]
    got = ops.scale_losses(w, scales, ref.gram_of(other), **options)
    torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=1e-4, atol=0)
    assert ops.scale_losses(w, scales[:0], ref.gram_of(x), **options).shape == (0,)


def test_searches_by_a_diagonal_are_those_by_a_matrix_that_is_zero_beside_it() -> None:
    n, k, group = 130, 96, 32
    w, x = randn(n, k), calibration(k)
    x_mean, squares = x.abs().mean(0), ref.gram_of(x).diagonal()  # not contiguous
    scale, losses = ops.search_scale(w, x_mean, squares, group_size=group)
    whole_scale, whole = ops.search_scale(w, x_mean, torch.diag(squares), group_size=group)
    assert_same(scale, whole_scale)
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=0)
    scales = torch.stack([torch.ones(k), scale])
    assert_same(ops.scale_losses(w, scales, squares, group_size=group), losses[[0, int(losses.argmin())]])
    for options in ({"group_size": group}, {"group_size": -1, "zero_point": False}):
        assert_same(ops.search_clip(w, squares, **options), ops.search_clip(w, torch.diag(squares), **options))
    with pytest.raises(RuntimeError, match=r"search_clip: gram must be .*\[96\].*, got .*\[95\]"):
        ops.search_clip(w, squares[1:], group_size=group)
    with pytest.raises(RuntimeError, match=r"quantize_compensated: gram must be"):
        ops.quantize_compensated(w, squares, group_size=group)
    squares = squares.clone()
    squares[50] = float("nan")
    with pytest.raises(RuntimeError, match="search_clip: gram must be finite"):
        ops.search_clip(w, squares, group_size=group)
    with pytest.raises(RuntimeError, match="search_scale: no candidate has a finite loss"):
        ops.search_scale(w, x_mean, squares, group_size=group)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_losses_refuses_scales_that_cannot_be_divided_by(bad: float) -> None:
    scales = torch.ones(2, 32)
    scales[1, 5] = bad
    with pytest.raises(
        RuntimeError, match=r"scale_losses: candidates must be finite and positive, got .* at element 37"
    ):
        ops.scale_losses(randn(8, 32), scales, torch.eye(32), group_size=16)


def test_search_scale_leaves_out_candidates_whose_scales_overflow() -> None:
    """Round-to-nearest of these weights has no float16 scale, but a candidate that shrinks the loud channel has."""
    n, k, group = 8, 32, 16
    w = torch.full((n, k), 100.0)
    w[:, 3] = 2e6
    x = torch.ones(50, k) + 0.1 * randn(50, k)
    x[:, 3] = 1e-6
    scale, losses = ops.search_scale(w, x.abs().mean(0), ref.gram_of(x), group_size=group)
    assert losses[0] == float("inf")
    assert losses.min() < float("inf") and scale[3] < 1e-2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_search_scale_refuses_what_is_not_finite(bad: float) -> None:
    x = calibration(32)
    good = {"w": randn(16, 32), "x_mean": x.abs().mean(0), "gram": ref.gram_of(x)}
    for name in good:
        for index in (0, -1):
            hurt = {key: value.clone() for key, value in good.items()}
            hurt[name].view(-1)[index] = bad
            with pytest.raises(RuntimeError, match=f"awq_ext::search_scale: .*{name}.* must be finite"):
                ops.search_scale(**hurt, group_size=16)
    with pytest.raises(RuntimeError, match="awq_ext::search_scale: x_mean must be finite and not negative"):
        ops.search_scale(good["w"], -good["x_mean"], good["gram"], group_size=16)
    for ties in (torch.full((32,), -1), torch.full((32,), 32)):
        with pytest.raises(RuntimeError, match=r"awq_ext::search_scale: tie must hold numbers 0\.\.31, got (-1|32)"):
            ops.search_scale(**good, group_size=16, tie=ties)
    for value in (bad, -1.0):
        with pytest.raises(RuntimeError, match=r"awq_ext::search_scale: .*row_weight must be finite"):
            ops.search_scale(**good, group_size=16, row_weight=torch.full((16,), value))


# --- search_clip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group"), SEARCH_SHAPES)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("grid", "max_shrink", "dtype"), [(20, 0.5, None), (3, 0.9, BF16), (1, 0.0, F32)])
def test_search_clip_equals_its_definition(
    n: int, k: int, group: int, zero_point: bool, grid: int, max_shrink: float, dtype: torch.dtype | None
) -> None:
    group = k if group == -1 else group
    x, w = calibration(k, seed=n), randn(n, k, seed=k) * 0.1
    gram = ref.gram_of(x)
    range = ops.search_clip(
        w, gram, group_size=group, grid=grid, max_shrink=max_shrink, zero_point=zero_point, dtype=dtype
    )
    assert range.dtype == F32 and range.shape == (n, k // group, 2)
    want = ref.clip_losses(w, gram, group, grid, max_shrink, zero_point, dtype or F16)
    got = ref.group_losses(w, gram, group, zero_point, dtype or F16, range)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-9)
    groups = w.view(n, -1, group)
    lowest = (1 - max_shrink) ** (2 if zero_point else 1) - 1e-6
    for end, whole in ((range[..., 0], groups.amin(-1).clamp(max=0)), (range[..., 1], groups.amax(-1).clamp(min=0))):
        assert ((end / whole)[whole != 0] <= 1).all() and ((end / whole)[whole != 0] >= lowest).all()
        assert (end[whole == 0] == 0).all()


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("w_dtype", STORAGE)
def test_search_clip_never_loses_on_any_group(zero_point: bool, w_dtype: torch.dtype) -> None:
    """Measured on the tokens themselves, through quantize, group by group."""
    n, k, group = 50, 96, 16
    x = calibration(k, tokens=300).double()
    w = (randn(n, k, seed=8) ** 3).to(w_dtype)  # heavy tails: clipping pays
    range = ops.search_clip(w, ref.gram_of(x), group_size=group, zero_point=zero_point)

    def losses(ends: Tensor | None) -> Tensor:
        q, s, z = ops.quantize(w, group_size=group, zero_point=zero_point, range=ends)
        d = (Weight(q, s, z, group).dense - w.double()).view(n, -1, group)
        return torch.einsum("tgi,ngi->tng", x.view(len(x), -1, group), d).square().mean(0)

    clipped, whole = losses(range), losses(None)
    assert (clipped <= whole * (1 + 1e-5)).all()
    assert clipped.sum() < 0.95 * whole.sum()


def test_search_clip_of_zeros_and_of_dead_channels() -> None:
    x, w = calibration(64), randn(16, 64)
    w[2], w[:, :16] = 0, 0
    w[3, 16:32] = w[3, 16:32].abs()
    x[:, 40] = x[:, 48:] = 0
    range = ops.search_clip(w, ref.gram_of(x), group_size=16)
    assert (range[2] == 0).all() and (range[:, 0] == 0).all()
    assert range[3, 1, 0] == 0 and range.isfinite().all()
    whole = torch.stack([w.view(16, 4, 16).amin(-1).clamp(max=0), w.view(16, 4, 16).amax(-1).clamp(min=0)], -1)
    assert_same(range[:, 3], whole[:, 3])  # no loss to save: the first candidate, the whole range
    assert ops.search_clip(w[:0], ref.gram_of(x), group_size=16).shape == (0, 4, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_search_clip_refuses_what_is_not_finite(bad: float) -> None:
    w, gram = randn(16, 32), ref.gram_of(calibration(32))
    hurt = w.clone()
    hurt[9, 20] = bad
    with pytest.raises(RuntimeError, match=r"awq_ext::search_clip: .*w.*finite"):
        ops.search_clip(hurt, gram, group_size=16)
    hurt = gram.clone()
    hurt[20, 20] = bad
    with pytest.raises(RuntimeError, match=r"awq_ext::search_clip: .*gram.*finite"):
        ops.search_clip(w, hurt, group_size=16)


def test_searches_read_strided_tensors() -> None:
    x, w = calibration(32), randn(16, 32)
    x_mean, gram = x.abs().mean(0), ref.gram_of(x)
    scale, losses = ops.search_scale(w, x_mean, gram, group_size=16)
    range = ops.search_clip(w, gram, group_size=16)
    ws, grams = strided_views(w), strided_views(gram)
    for name in ws:
        got = ops.search_scale(ws[name], torch.stack([x_mean, x_mean], 1)[:, 0], grams[name], group_size=16)
        assert torch.equal(got[0], scale) and torch.equal(got[1], losses), name
        assert torch.equal(ops.search_clip(ws[name], grams[name], group_size=16), range), name


# --- add_gram -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize(("t", "k"), [(0, 8), (4, 0), (1, 1), (2, 16), (5, 47), (128, 100), (259, 193), (700, 330)])
def test_add_gram_equals_its_definition(t: int, k: int, bfloat16: bool) -> None:
    """Rounding of t products and sums, in any order: |got - want| <= (t + 1) 2^-23 (|sums| + |x|^T |x|)."""
    x, before = randn(t, k, seed=k), randn(k, k, seed=t) * 50
    sums = before.clone()
    assert ops.add_gram(sums, x, bfloat16=bfloat16) is None
    factors = x.to(BF16).double() if bfloat16 else x.double()
    want = before.double() + (factors.T @ factors).triu()
    size = before.double().abs() + factors.abs().T @ factors.abs()
    assert ((sums - want).abs() <= (t + 1) * 2.0**-23 * size).all()
    assert_same(sums.tril(-1), before.tril(-1))


@pytest.mark.parametrize("bfloat16", [True, False])
def test_add_gram_gives_the_same_bytes_at_any_number_of_threads_for_any_strides(bfloat16: bool, threads: None) -> None:
    x, before = randn(301, 420), randn(420, 420)
    results = []
    for count, view in [(1, x), (2, x), (3, x), *((2, view) for view in strided_views(x).values())]:
        torch.set_num_threads(count)
        sums, given = before.clone(), view.clone()
        ops.add_gram(sums, view, bfloat16=bfloat16)
        assert_same(view, given)
        results.append(sums)
    assert not torch.equal(results[0], before)
    for sums in results[1:]:
        assert_same(sums, results[0])


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_add_gram_passes_what_is_not_finite_on_to_its_row_and_column_only(bad: float, bfloat16: bool) -> None:
    x = randn(9, 150)
    clean, sums = torch.zeros(150, 150), torch.zeros(150, 150)
    ops.add_gram(clean, x, bfloat16=bfloat16)
    x[8, 77] = bad
    ops.add_gram(sums, x, bfloat16=bfloat16)
    hurt = torch.zeros(150, 150, dtype=torch.bool)
    hurt[77, 77:] = hurt[:78, 77] = True
    assert not sums[hurt].isfinite().any()
    assert_same(sums[~hurt], clean[~hurt])


def test_add_gram_refuses_sums_that_are_not_contiguous() -> None:
    for sums in (torch.zeros(8, 16)[:, :8], torch.zeros(16, 8)[::2]):
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(sums)
        for given, x in ((sums, randn(3, 8)), (fake, mode.from_tensor(randn(3, 8)))):
            with pytest.raises(RuntimeError, match=r"awq_ext::add_gram: sums must be a contiguous .*got \[8, 8\]"):
                ops.add_gram(given, x)


def test_add_gram_rounds_only_where_asked() -> None:
    x = torch.tensor([[1.0, 1 + 2.0**-10]])
    for bfloat16, factor in ((True, 1.0), (False, 1 + 2.0**-10)):
        sums = torch.zeros(2, 2)
        ops.add_gram(sums, x, bfloat16=bfloat16)
        assert sums.tolist() == [[1.0, factor], [0.0, factor**2]]


LEVELS = """
import sys, torch
from awq_ext import _library, ops
x, sums = torch.arange(3 * 70.0).reshape(3, 70) % 13, torch.zeros(70, 70)
ops.add_gram(sums, x, bfloat16=True)
assert torch.equal(sums, (x.T @ x).triu())
assert _library.native().build_info()["cpu_kernels"] == sys.argv[1]
"""


LEVEL_NAMES = ["portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"]
LEVEL_NAMES += ["neon_dotprod", "neon_i8mm"]


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_a_level_can_be_asked_for(level: str) -> None:
    if not {"portable": True, **_library.native().cpu_features()}[level]:
        pytest.skip(f"this CPU has no {level}")
    environment = {**os.environ, "AWQ_EXT_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LEVELS, level], env=environment, timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# --- refusals: the same from the operator and from its fake ---------------------------------------------------------

N, K, G = 16, 32, 16


def good(op: str) -> dict[str, Any]:
    """Arguments that `op` accepts."""
    w = random_weight(N, K, G)
    packed = {"qweight": w.qweight, "scales": w.scales, "qzeros": w.qzeros, "group_size": G}
    float_w = {"w": randn(N, K), "group_size": G}
    return {
        "linear": {"x": randn(3, K), "bias": randn(N), **packed},
        "dequantize": packed,
        "quantize": {**float_w, "range": torch.ones(N, K // G, 2)},
        "pack": {"q": codes(N, K)},
        "unpack": {"qweight": w.qweight},
        "repack": {"qweight": w.qweight, "src": "gemm", "dst": "gptq"},
        "search_scale": {
            **float_w,
            "x_mean": torch.ones(K),
            "gram": torch.eye(K),
            "tie": torch.arange(K),
            "row_weight": torch.ones(N),
        },
        "scale_candidates": {**float_w, "x_mean": torch.ones(K), "tie": torch.arange(K)},
        "scale_losses": {
            **float_w,
            "candidates": torch.ones(3, K),
            "gram": torch.eye(K),
            "row_weight": torch.ones(N),
        },
        "search_clip": {**float_w, "gram": torch.eye(K)},
        "quantize_compensated": {**float_w, "gram": torch.eye(K), "range": torch.ones(N, K // G, 2)},
        "add_gram": {"sums": torch.zeros(K, K), "x": randn(3, K)},
    }[op]


OPS = (
    *("linear", "dequantize", "quantize", "pack", "unpack", "repack"),
    *("search_scale", "scale_candidates", "scale_losses", "search_clip", "quantize_compensated", "add_gram"),
)
MUTATING = ("add_gram",)
ROUNDING = ("quantize", "search_scale", "scale_losses", "search_clip", "quantize_compensated")


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.awq_ext, op)(**arguments)


def every_tensor(change: Callable[[Tensor], Tensor], *but: str) -> list[tuple[str, str, Tensor]]:
    return [
        (op, name, change(value))
        for op in OPS
        for name, value in good(op).items()
        if isinstance(value, Tensor) and name not in but
    ]


def another_dtype(t: Tensor) -> Tensor:
    return t.to({torch.int32: torch.int64, torch.uint8: torch.int8, torch.int64: torch.int32}.get(t.dtype, torch.int32))


def describe(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"


BAD_TENSORS: list[tuple[str, str, Tensor]] = [
    *every_tensor(another_dtype),
    *every_tensor(lambda t: t.reshape(1, *t.shape), "x"),  # one dimension too many
    *every_tensor(lambda t: t[0]),  # one too few; for x: [k] would do, so it is cut short below
    *every_tensor(lambda t: t[..., :-1], "w", "q", "qweight"),  # the last dimension one too short
    *every_tensor(lambda t: t[:-1], "x", "w", "q", "qweight", "candidates"),
    *every_tensor(lambda t: t.double() if t.is_floating_point() else t.float(), "x"),
    ("linear", "x", torch.tensor(1.0)),
    ("add_gram", "x", randn(1, 3, K)),
    ("add_gram", "x", randn(3, K).to(BF16)),
    ("linear", "x", randn(3, K).to(torch.complex64)),
    ("linear", "x", randn(3, K + 1)),
    ("linear", "scales", torch.ones(N, K // G)),  # as quantize returns them: not transposed
    ("linear", "qzeros", torch.zeros(N // 8, K // G, dtype=torch.int32).t().contiguous()[:1]),
    ("linear", "qzeros", torch.zeros(K // G, N, dtype=torch.int32)),
    ("linear", "qweight", torch.zeros(K, N // 8, dtype=torch.uint32)),
]
BAD_TENSORS = [case for case in BAD_TENSORS if not (case[1] == "x" and case[2].shape == (K,))]
# Some take a diagonal for the matrix.
BAD_TENSORS = [
    case for case in BAD_TENSORS if case[1] != "gram" or case[2].shape != (K,) or case[0] == "quantize_compensated"
]
# [0]-slices that are still right: none. A strided dtype change of w to another float is right, so those are left out.
BAD_TENSORS = [case for case in BAD_TENSORS if case[1] != "w" or case[2].dtype not in STORAGE or case[2].dim() != 2]

BAD_VALUES: list[tuple[str, dict[str, Any], str, str]] = [  # op, arguments, what is named, what was got
    *[
        (op, {"group_size": size}, "group_size", str(size))
        for op in ("linear", "dequantize", *ROUNDING)
        for size in (0, -2, 24, 64)
    ],
    *[
        (op, {"dtype": dtype}, "dtype must be float16, bfloat16 or float32", "got")
        for op in ("dequantize", *ROUNDING)
        for dtype in (F64, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn)
    ],
    *[(op, {"w_bit": bits}, "w_bit must be 2..8", f"got {bits}") for op in ROUNDING for bits in (-4, 0, 1, 9, 16)],
    *[
        (op, {"layout": layout}, f"unknown layout '{layout}', expected one of gemm, gemv, gemv_fast", layout)
        for op in ("linear", "dequantize", "pack", "unpack")
        for layout in ("", "GEMM", "awq", "marlin.zeros", ".zeros")
    ],
    *[
        (op, {"layout": layout}, f"layout '{layout}' is stored but not computed on", "repack")
        for op in ("linear", "dequantize")
        for layout in ("gemv", "gptq", "gemm.zeros")
    ],
    ("repack", {"src": "awq"}, "unknown layout 'awq'", "gemm, gemv, gemv_fast"),
    ("repack", {"dst": "awq"}, "unknown layout 'awq'", "gemm, gemv, gemv_fast"),
    ("repack", {"qweight": words(5, 2), "dst": "gemv"}, "layout 'gemv' needs", "multiple of 8, got 16 and 5"),
    ("repack", {"qweight": words(5, 2), "src": "gemv", "dst": "gemm"}, "layout 'gemm' needs", "got 5 and 16"),
    ("repack", {"qweight": words(2, 100), "src": "marlin", "dst": "gemm"}, "qweight must", "runs of 128 words"),
    (
        "repack",
        {"qweight": words(2, 64), "src": "gemv_fast", "dst": "gemm"},
        "qweight must be a matrix of int16",
        "got",
    ),
    ("pack", {"q": codes(12, 32)}, "layout 'gemm' needs", "got 12"),
    ("pack", {"q": codes(32, 12), "layout": "gemv"}, "layout 'gemv' needs", "got 32 and 12"),
    ("pack", {"q": codes(32, 12), "layout": "gptq"}, "layout 'gptq' needs", "got 32 and 12"),
    ("pack", {"q": codes(32, 32), "layout": "gemv_fast"}, "multiple of 64", "got 32 and 32"),
    *[
        (op, {"grid": grid}, "grid must be", f"got {grid}")
        for op in ("search_scale", "scale_candidates", "search_clip")
        for grid in (0, -1, 1001)
    ],
    *[("search_clip", {"max_shrink": x}, "max_shrink must be in [0, 1)", "got") for x in (-0.1, 1.0, float("nan"))],
    *[
        ("quantize_compensated", {"damping": x}, "damping must be in (0, 1]", "got")
        for x in (0.0, -0.1, 1.1, float("nan"))
    ],
    *[("quantize_compensated", {"passes": x}, "passes must be 0..1000", f"got {x}") for x in (-1, 1001)],
]


def three_ways(op: str, arguments: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The operator itself, its meta kernel and its fake kernel, on the same arguments."""

    def on_fakes() -> Any:
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            return call(op, fakes)

    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return {"cpu": lambda: call(op, arguments), "meta": lambda: call(op, meta), "fake": on_fakes}


@pytest.mark.parametrize(
    ("op", "name", "tensor"), BAD_TENSORS, ids=[f"{op}-{name}-{describe(t)}" for op, name, t in BAD_TENSORS]
)
def test_bad_tensors_are_refused_alike(op: str, name: str, tensor: Tensor) -> None:
    for way, run in three_ways(op, {**good(op), name: tensor}).items():
        with pytest.raises(RuntimeError) as caught:
            run()
        text = str(caught.value)
        assert f"awq_ext::{op}: " in text, way
        culprits = {"qweight": ("qweight", "scales", "group_size"), "w": ("w", "group_size")}.get(name, (name,))
        assert any(culprit in text for culprit in culprits), (way, text)
        assert " must be " in text and "got " in text, (way, text)
        if len(culprits) == 1:
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert f"got {list(tensor.shape)} " in text, (way, text)
            assert dtype in text or "another dtype" in text, (way, text)


@pytest.mark.parametrize(
    ("op", "change", "named", "got"),
    BAD_VALUES,
    ids=[f"{op}-{list(change.values())[-1]}" for op, change, _, _ in BAD_VALUES],
)
def test_bad_values_are_refused_alike(op: str, change: dict[str, Any], named: str, got: str) -> None:
    for way, run in three_ways(op, {**good(op), **change}).items():
        with pytest.raises(RuntimeError) as caught:
            run()
        text = str(caught.value)
        assert f"awq_ext::{op}: " in text and named in text and got in text, (way, text)


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_accepted_alike_and_shapes_agree(op: str) -> None:
    """The other half of the tests above: what they change is the only thing that is wrong."""
    results = {way: run() for way, run in three_ways(op, good(op)).items()}
    for way in ("meta", "fake"):
        for a, b in zip(as_tuple(results["cpu"]), as_tuple(results[way]), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), way


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in OPS for name, value in good(op).items() if isinstance(value, Tensor)],
    ids=lambda value: value,
)
def test_missing_tensors_and_other_devices_are_refused(op: str, name: str) -> None:
    """Torch passes None for any tensor, and calls the meta kernel if one tensor of several is on the meta device."""
    optional = name in ("qzeros", "bias", "range", "tie", "row_weight")
    arguments = good(op)
    for run in three_ways(op, {**arguments, name: None}).values():
        if optional:
            run()
            continue
        with pytest.raises(RuntimeError) as caught:
            run()
        if sum(isinstance(value, Tensor) for value in arguments.values()) > 1:  # else the dispatcher finds no tensor
            assert f"awq_ext::{op}: {name} must be a tensor, got None" in str(caught.value)
    tensors = [key for key, value in arguments.items() if isinstance(value, Tensor)]
    if len(tensors) > 1:
        with pytest.raises(RuntimeError, match=rf"awq_ext::{op}: \w+ must be on the device of .*meta"):
            call(op, {**arguments, name: arguments[name].to("meta")})
        with (
            FakeTensorMode() as mode,
            pytest.raises(RuntimeError, match=rf"awq_ext::{op}: \w+ must be on the device of "),
        ):
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            call(op, {**fakes, name: torch.empty_like(fakes[name], device="cuda")})


@pytest.mark.parametrize("group_size", [16.0, "16", None])
def test_arguments_of_another_type_are_refused_by_the_schema(group_size: Any) -> None:
    with pytest.raises(RuntimeError, match="'group_size'"):
        call("linear", {**good("linear"), "group_size": group_size})
    with pytest.raises(RuntimeError, match="'layout'"):
        call("linear", {**good("linear"), "layout": None})


def test_wrappers_and_operators_have_the_same_arguments() -> None:
    """Names, order and defaults of awq_ext.ops are those of the schema."""
    import inspect

    for op in OPS:
        schema = getattr(torch.ops.awq_ext, op).default._schema
        parameters = inspect.signature(getattr(ops, op)).parameters
        assert [a.name for a in schema.arguments] == list(parameters)
        for argument in schema.arguments:
            parameter = parameters[argument.name]
            assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
            if argument.has_default_value():
                assert parameter.default == argument.default_value
            else:
                assert parameter.default is inspect.Parameter.empty
        assert schema.is_mutable == (op in MUTATING)


# --- torch.library.opcheck ------------------------------------------------------------------------------------------


def opcheck_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for dtype in (F32, F16, BF16, F64):
        yield "linear", f"x {dtype}", {"x": randn(3, K).to(dtype)}
        yield "linear", f"x {dtype}, no zeros, no bias", {"x": randn(2, 5, K).to(dtype), "qzeros": None, "bias": None}
    for dtype in STORAGE:
        scales = random_weight(N, K, G).scales.to(dtype)
        yield "linear", f"scales {dtype}", {"scales": scales, "bias": randn(N).to(dtype)}
        for out in (*STORAGE, None):
            yield "dequantize", f"{dtype} to {out}", {"scales": scales, "dtype": out}
        for zero_point in (True, False):
            yield (
                "quantize",
                f"{dtype} {zero_point}",
                {"w": randn(N, K).to(dtype), "zero_point": zero_point, "range": None},
            )
            yield "quantize", f"to {dtype} {zero_point}", {"dtype": dtype, "zero_point": zero_point}
        yield "search_scale", str(dtype), {"w": randn(N, K).to(dtype), "dtype": dtype, "grid": 2}
        yield "scale_candidates", str(dtype), {"w": randn(N, K).to(dtype), "tie": None, "grid": 2}
        yield "scale_losses", str(dtype), {"w": randn(N, K).to(dtype), "dtype": dtype, "w_bit": 3}
        yield "search_clip", str(dtype), {"w": randn(N, K).to(dtype), "dtype": dtype, "grid": 2}
        yield "quantize_compensated", str(dtype), {"w": randn(N, K).to(dtype), "dtype": dtype, "range": None}
    yield (
        "search_scale",
        "plain",
        {"tie": None, "row_weight": None, "duo_scaling": False, "zero_point": False, "grid": 2},
    )
    for bfloat16 in (True, False):
        yield "add_gram", f"bfloat16={bfloat16}", {"bfloat16": bfloat16}
    for layout in LAYOUTS:
        yield "pack", layout, {"layout": layout}
        yield "unpack", layout, {"layout": layout}
        for dst in LAYOUTS:
            yield "repack", f"{layout} to {dst}", {"qweight": ref.pack(codes(N, K), layout), "src": layout, "dst": dst}


OPCHECK = list(opcheck_cases())


@pytest.mark.parametrize(
    ("op", "change"), [(op, change) for op, _, change in OPCHECK], ids=[f"{op}-{name}" for op, name, _ in OPCHECK]
)
def test_opcheck(op: str, change: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.library.opcheck(getattr(torch.ops.awq_ext, op).default, (), {**good(op), **change})


# --- determinism and threads ----------------------------------------------------------------------------------------


def large(op: str) -> list[dict[str, Any]]:
    """Arguments of `op` with enough work for several threads."""
    w = random_weight(1032, 512, 64)
    packed = {"qweight": w.qweight, "scales": w.scales, "qzeros": w.qzeros, "group_size": 64}
    x, dense = calibration(256), randn(150, 256) * 0.1
    return {
        "linear": [{"x": randn(m, 512, dtype=d), **packed} for d in (F32, F16, F64) for m in (1, 4, 5, 70)],
        "dequantize": [packed],
        "quantize": [{"w": randn(1032, 512), "group_size": 64}],
        "pack": [{"q": codes(1032, 512), "layout": layout} for layout in LAYOUTS],
        "unpack": [{"qweight": ops.pack(codes(1032, 512), layout=layout), "layout": layout} for layout in LAYOUTS],
        "repack": [{"qweight": w.qweight, "src": "gemm", "dst": "gptq"}],
        "search_scale": [
            {"w": dense, "x_mean": x.abs().mean(0), "gram": ref.gram_of(x), "group_size": 64, "grid": 5},
        ],
        "scale_candidates": [{"w": dense, "x_mean": x.abs().mean(0), "group_size": 64, "grid": 5}],
        "scale_losses": [
            {"w": dense, "candidates": torch.ones(2, 256), "gram": ref.gram_of(x), "group_size": 64},
        ],
        "search_clip": [{"w": dense, "gram": ref.gram_of(x), "group_size": 64, "grid": 5}],
        "quantize_compensated": [{"w": dense, "gram": ref.gram_of(x), "group_size": 64}],
    }[op]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", [op for op in OPS if op not in MUTATING])
def test_the_same_bytes_at_any_number_of_threads_and_no_side_effects(op: str, threads: None) -> None:
    for arguments in large(op):
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
        torch.set_num_threads(1)
        want = as_tuple(call(op, arguments))
        kept = [t.clone() for t in want]
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = as_tuple(call(op, arguments))
            for a, b in zip(got, want, strict=True):
                assert_same(a, b)
                assert a.data_ptr() != b.data_ptr()
        storages = {v.untyped_storage().data_ptr() for v in arguments.values() if isinstance(v, Tensor)}
        for result, copy in zip(want, kept, strict=True):
            assert_same(result, copy)  # later calls did not write into it
            assert result.is_contiguous() and result.untyped_storage().data_ptr() not in storages
        for name, value in before.items():
            assert torch.equal(arguments[name], value), f"{op} wrote into {name}"


def test_repack_to_the_same_layout_is_a_copy() -> None:
    words = ops.pack(codes(16, 32))
    copy = ops.repack(words, src="gemm", dst="gemm")
    assert_same(copy, words)
    assert copy.data_ptr() != words.data_ptr()


def test_two_python_threads_at_once(threads: None) -> None:
    torch.set_num_threads(2)
    jobs = [(op, arguments) for op in ("linear", "quantize", "unpack", "search_clip") for arguments in large(op)[:2]]
    want = [as_tuple(call(op, arguments)) for op, arguments in jobs]
    failures: list[BaseException] = []
    barrier = threading.Barrier(3)

    def work(order: int) -> None:
        try:
            barrier.wait(timeout=60)
            for _ in range(4):
                for index in range(len(jobs))[::order]:
                    for a, b in zip(as_tuple(call(*jobs[index])), want[index], strict=True):
                        assert_same(a, b)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(order,)) for order in (1, -1, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
    assert not failures and not any(worker.is_alive() for worker in workers)


FORK = """
import os, sys, torch
import awq_ext
from awq_ext import ops

torch.manual_seed(0)
torch.set_num_threads(2)
w, x = torch.randn(512, 512), torch.randn(70, 512)
q, s, z = ops.quantize(w, group_size=64)
arguments = (ops.pack(q), s.t().contiguous(), ops.pack(z))
want = ops.linear(x, *arguments, group_size=64)  # the parent's pool of threads is running now
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # a forked child has no pool; one thread is all it can use, as with torch's own operators
    same = torch.equal(ops.linear(x, *arguments, group_size=64), want)
    same = same and torch.equal(ops.quantize(w, group_size=64)[0], q)
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_can_compute() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(awq_ext.__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
