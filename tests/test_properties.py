"""Properties that hold for every shape, drawn by hypothesis."""

from __future__ import annotations

import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LAYOUTS, UNIT_ROUNDOFF, random_weight
from torch import Tensor

from awq_ext import ops

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def shapes(draw: st.DrawFn, largest_k: int = 200) -> tuple[int, int, int]:
    """n (a multiple of 8, seldom of 64), k and a group size that divides it."""
    group = draw(st.integers(1, 48))
    return 8 * draw(st.integers(1, 24)), group * draw(st.integers(1, max(1, largest_k // group))), group


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """w float32 [n, k] with groups of one sign, of zeros, of one value, with outliers and of very different sizes."""
    n, k, group = draw(shapes(96))
    g = generator(draw(SEEDS))
    w = torch.randn(n, k // group, group, generator=g)
    kind = torch.randint(0, 6, (n, k // group, 1), generator=g)
    w = torch.where(kind == 0, w.abs(), w)
    w = torch.where(kind == 1, -w.abs(), w)
    w = torch.where(kind == 2, torch.zeros_like(w), w)
    w = torch.where(kind == 3, w[..., :1].expand_as(w), w)
    w = torch.where(kind == 4, w**5, w)
    size = 10.0 ** torch.randint(-6, 2, (n, k // group, 1), generator=g)
    return (w * size).reshape(n, k), group


@quick
@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), SEEDS)
def test_packing_loses_nothing(rows: int, cols: int, first: str, second: str, seed: int) -> None:
    q = torch.randint(0, 16, (8 * rows, 8 * cols), dtype=torch.uint8, generator=generator(seed))
    words = ops.pack(q, layout=first)
    assert words.shape == ref.word_shape(first, 8 * rows, 8 * cols)
    assert torch.equal(ops.unpack(words, layout=first), q)
    moved = ops.repack(words, src=first, dst=second)
    assert torch.equal(moved, ops.pack(q, layout=second))
    assert torch.equal(ops.repack(moved, src=second, dst=first), words)


@quick
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(LAYOUTS), SEEDS)
def test_any_words_are_codes(rows: int, cols: int, layout: str, seed: int) -> None:
    """Every int32 matrix is a packed weight: unpack and pack are inverse in this direction too."""
    if layout == "gptq":
        rows, cols = cols, rows
    words = torch.randint(-(2**31), 2**31, (rows, cols), generator=generator(seed)).to(torch.int32)
    assert torch.equal(ops.pack(ops.unpack(words, layout=layout), layout=layout), words)


@quick
@given(weights(), st.booleans(), DTYPES)
def test_rounding_errs_by_half_a_step(case: tuple[Tensor, int], zero_point: bool, dtype: torch.dtype) -> None:
    """|dequantize(quantize(w)) - w| <= s / 2, and a little more where the rounding of s itself shortens the range:
    codes span 15 s (7 s on either side), which may fall short of the range by its unit roundoff."""
    w, group = case
    q, s, z = ops.quantize(w, group_size=group, zero_point=zero_point, dtype=dtype)
    ref.check_quantized(w, q, s, z, group, zero_point)
    back = ops.dequantize(ops.pack(q), s.t().contiguous(), ops.pack(z), group_size=group, dtype=torch.float32)
    steps = s.double().repeat_interleave(group, 1)
    slack = steps * 15 * UNIT_ROUNDOFF[dtype] + w.double().abs() * 2.0**-22
    assert ((back.double() - w.double()).abs() <= steps / 2 + slack).all()


@quick
@given(weights(), st.booleans(), DTYPES)
def test_rounding_twice_changes_nothing(case: tuple[Tensor, int], zero_point: bool, dtype: torch.dtype) -> None:
    """What a packed weight holds is representable: rounding it again to its own range changes nothing."""
    w, group = case
    q, s, z = ops.quantize(w, group_size=group, zero_point=zero_point, dtype=dtype)
    packed = (ops.pack(q), s.t().contiguous(), ops.pack(z))
    once = ops.dequantize(*packed, group_size=group, dtype=torch.float32)
    lowest = z.float() if zero_point else torch.full_like(s, 7, dtype=torch.float32)
    ends = torch.stack([-lowest * s.float(), ((15 if zero_point else 14) - lowest) * s.float()], -1)
    q2, s2, z2 = ops.quantize(once, group_size=group, zero_point=zero_point, dtype=dtype, range=ends)
    twice = ops.dequantize(ops.pack(q2), s2.t().contiguous(), ops.pack(z2), group_size=group, dtype=torch.float32)
    torch.testing.assert_close(twice, once, rtol=2.0**-20, atol=0)


@quick
@given(
    shapes(),
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    DTYPES,
    st.booleans(),
    st.sampled_from([None, *[torch.float32, torch.float16, torch.bfloat16]]),
    st.sampled_from(["contiguous", "transposed", "strided", "shifted"]),
    SEEDS,
)
def test_linear_equals_its_definition(
    shape: tuple[int, int, int],
    leading: list[int],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    zeros: bool,
    bias_dtype: torch.dtype | None,
    memory: str,
    seed: int,
) -> None:
    n, k, group = shape
    w = random_weight(n, k, group, scale_dtype, seed)
    if not zeros:
        w.z = torch.full_like(w.z, 8)
    x = torch.randn(*leading, k, dtype=torch.float64, generator=generator(seed)).to(dtype)
    if memory == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif memory == "strided":
        x = torch.stack([x, x.neg()], -1)[..., 0]
    elif memory == "shifted":
        x = torch.cat([x.new_zeros(*leading, 3), x], -1)[..., 3:]
    bias = None if bias_dtype is None else torch.randn(n, generator=generator(seed)).to(bias_dtype)
    y = ops.linear(x, w.qweight, w.scales, w.qzeros if zeros else None, bias, group_size=group)
    assert y.shape == (*leading, n) and y.dtype == dtype and y.is_contiguous()
    error, bound = ref.linear_bound(x, y, w.dense, bias, w.largest_terms)
    assert (error <= bound).all()


@quick
@given(shapes(), st.lists(st.integers(0, 9), min_size=1, max_size=5), DTYPES, SEEDS)
def test_linear_of_a_batch_is_the_batch_of_linears(
    shape: tuple[int, int, int], parts: list[int], dtype: torch.dtype, seed: int
) -> None:
    """To rounding: few rows and many rows may be summed by different kernels, each within its bound."""
    n, k, group = shape
    w = random_weight(n, k, group, seed=seed)
    x = torch.randn(sum(parts), k, generator=generator(seed)).to(dtype)
    whole = ops.linear(x, *w.tensors, group_size=group)
    apart = torch.cat([ops.linear(rows, *w.tensors, group_size=group) for rows in x.split(parts)])
    _, bound = ref.linear_bound(x, whole, w.dense, None, w.largest_terms)
    assert ((whole.double() - apart.double()).abs() <= 2 * bound).all()
    assert torch.equal(ops.linear(x, *w.tensors, group_size=group), whole)  # but the same call gives the same bytes


@quick
@given(shapes(), st.integers(1, 6), SEEDS)
def test_columns_are_independent(shape: tuple[int, int, int], m: int, seed: int) -> None:
    """A slice of the weight's columns computes that slice of y, bit for bit: nothing leaks between outputs."""
    n, k, group = shape
    w = random_weight(n, k, group, seed=seed)
    x = torch.randn(m, k, generator=generator(seed))
    whole = ops.linear(x, *w.tensors, group_size=group)
    cut = 8 * int(torch.randint(0, n // 8, (), generator=generator(seed)))
    for part in (slice(0, cut), slice(cut, n)):
        words = slice(part.start // 8, part.stop // 8)
        y = ops.linear(x, w.qweight[:, words], w.scales[:, part], w.qzeros[:, words], group_size=group)
        assert torch.equal(y, whole[:, part])


@quick
@given(weights(), st.integers(1, 6), st.floats(0, 0.99), st.booleans(), DTYPES, SEEDS)
def test_clipping_never_loses(
    case: tuple[Tensor, int], grid: int, max_shrink: float, zero_point: bool, dtype: torch.dtype, seed: int
) -> None:
    w, group = case
    n, k = w.shape
    x = torch.randn(3 * k, k, generator=generator(seed)) * torch.rand(k, generator=generator(seed))
    options = {"zero_point": zero_point, "dtype": dtype}
    range = ops.search_clip(w, ref.gram_of(x), group_size=group, grid=grid, max_shrink=max_shrink, **options)

    def losses(ends: Tensor | None) -> Tensor:
        q, s, z = ops.quantize(w, group_size=group, range=ends, **options)
        d = (ref.Weight(q, s, z, group).dense - w.double()).view(n, -1, group)
        return torch.einsum("tgi,ngi->tng", x.double().view(len(x), -1, group), d).square().mean(0)

    # Equal up to the rounding of d and of gram to float32: d is a difference of numbers of the size of w.
    scale = w.double().view(n, -1, group).square().sum(-1) * x.double().square().mean(0).view(-1, group).sum(-1)
    assert (losses(range) <= losses(None) * (1 + 1e-5) + 1e-12 * scale).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights(), st.booleans(), st.booleans(), SEEDS)
def test_scaling_never_loses(case: tuple[Tensor, int], zero_point: bool, duo_scaling: bool, seed: int) -> None:
    w, group = case
    k = w.shape[1]
    x = torch.randn(2 * k, k, generator=generator(seed)) * torch.rand(k, generator=generator(seed)) ** 4
    arguments = (w, x.abs().mean(0), ref.gram_of(x))
    options = {"group_size": group, "grid": 4, "zero_point": zero_point, "duo_scaling": duo_scaling}
    scale, losses = ops.search_scale(*arguments, **options)
    assert scale.isfinite().all() and (scale > 0).all()
    assert losses.min() <= losses[0]
    if losses[0] == losses.min():
        assert (scale == 1).all()  # the first among equals


@quick
@given(st.integers(0, 300), st.integers(1, 150), st.integers(0, 300), st.booleans(), SEEDS)
def test_gram_sums_of_parts_are_those_of_the_whole(first: int, k: int, second: int, bfloat16: bool, seed: int) -> None:
    """Small whole numbers, whose sums are exact in any order."""
    x = torch.randint(-9, 10, (first + second, k), generator=generator(seed)).float()
    sums = torch.zeros(k, k)
    ops.add_gram(sums, x[:first], bfloat16=bfloat16)
    ops.add_gram(sums, x[first:], bfloat16=bfloat16)
    assert torch.equal(sums, (x.T @ x).triu())
