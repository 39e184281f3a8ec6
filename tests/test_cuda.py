"""The CUDA operators against the CPU ones: equal to the bit, except for linear, which is held to an error bound."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from awq_ext import AwqLinear, _library, explain, functional, ops
from awq_ext.layouts import repack_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        _library.CUDA_LIBRARY not in _library.loaded(),
        reason=f"{_library.CUDA_LIBRARY} is not built, or torch was built without CUDA",
    ),
]

DEVICE = torch.device("cuda")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["gemm", "gemv", "gptq"]
SHAPES = [(8, 8), (64, 64), (8, 200), (328, 136), (1024, 512)]  # n, k: both multiples of eight
ODD_SHAPES = {"gemm": [(72, 1), (264, 131), (0, 3), (8, 0)], "gemv": [(1, 72), (131, 264), (3, 0), (0, 8)]}
ODD_SHAPES["gptq"] = ODD_SHAPES["gemv"]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """The error bound of linear is that of float32 sums; torch may be set to allow less."""
    matmul = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def to(device: torch.device | str, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def on_device(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """op on the device, with the tensors moved there (strides kept) and the results moved back."""
    result = op(*(to(DEVICE, a) for a in args), **{name: to(DEVICE, a) for name, a in kwargs.items()})
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def assert_same(expected: Tensor, got: Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert got.is_contiguous()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert torch.equal(got.view(bits), expected.view(bits))


def codes(n: int, k: int) -> Tensor:
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n * 31 + k))


def floats(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(n: int, k: int, group: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, scales and qzeros of a random weight."""
    groups = k // group if k else 0
    scales = (floats(groups, n).abs() * 0.02 + 1e-3).to(dtype)
    return ops.pack(codes(n, k)), scales, ops.pack(codes(n, groups))


# --- registration and refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("linear", "dequantize", "quantize", "pack", "unpack", "repack"),
        *("search_scale", "scale_candidates", "scale_losses", "search_clip", "quantize_compensated", "add_gram"),
    ],
)
def test_every_operator_has_a_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"awq_ext::{name}", "CUDA")


def test_compensation_says_that_it_runs_on_a_cpu() -> None:
    w, gram = torch.ones(8, 32, device=DEVICE), torch.eye(32, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"awq_ext::quantize_compensated: runs on a CPU.*\.cpu\(\)"):
        ops.quantize_compensated(w, gram, group_size=32)


def test_tensors_on_two_devices_are_refused() -> None:
    qweight, scales, qzeros = packed(64, 128, 32)
    x = floats(2, 128, dtype=torch.float16)
    device = [t.to(DEVICE) for t in (x, qweight, scales, qzeros)]
    for i, name in enumerate(["x", "qweight", "scales", "qzeros"]):
        mixed = [*device[:i], device[i].cpu(), *device[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"on the device of.*{name} |{name} .*on cpu"):
            ops.linear(*mixed, group_size=32)


def test_float64_is_refused() -> None:
    qweight, scales, qzeros = (t.to(DEVICE) for t in packed(8, 32, 32))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        ops.linear(torch.ones(1, 32, dtype=torch.float64, device=DEVICE), qweight, scales, qzeros, group_size=32)


# --- pack, unpack, repack ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_unpack(layout: str) -> None:
    for n, k in SHAPES + ODD_SHAPES[layout]:
        q = codes(n, k)
        words = ops.pack(q, layout=layout)
        assert_same(words, on_device(ops.pack, q, layout=layout))
        assert_same(q, on_device(ops.unpack, words, layout=layout))


@pytest.mark.parametrize("src", LAYOUTS)
@pytest.mark.parametrize("dst", LAYOUTS)
def test_repack(src: str, dst: str) -> None:
    for n, k in SHAPES:
        words = ops.pack(codes(n, k), layout=src)
        assert_same(ops.repack(words, src=src, dst=dst), on_device(ops.repack, words, src=src, dst=dst))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_unpack_of_strided_tensors(layout: str) -> None:
    q = codes(128, 64)
    assert_same(ops.pack(q.t().contiguous(), layout=layout), on_device(ops.pack, q.t(), layout=layout))
    words = ops.pack(q, layout=layout)
    wide = torch.cat([words, words], 1).to(DEVICE)[:, : words.shape[1]]
    assert_same(q, ops.unpack(wide, layout=layout).cpu())


def test_pack_drops_the_upper_bits() -> None:
    q = codes(64, 64)
    assert_same(ops.pack(q), on_device(ops.pack, q | 0xA0))


# --- quantize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("zero_point", "w_bit"), [(True, 4), (False, 4), (True, 3), (False, 8)])
def test_quantize(w_dtype: torch.dtype, dtype: torch.dtype, zero_point: bool, w_bit: int) -> None:
    for n, k, group in [(64, 256, 128), (8, 96, 32), (5, 33, 11), (3, 70, -1), (7, 8, 1), (2, 4096, -1), (0, 32, 32)]:
        w = floats(n, k, dtype=w_dtype)
        w[:, ::7] *= 1e-3
        w[: n // 2] *= 1e-6 if w_dtype != torch.float16 else 1e-2  # scales that float16 holds as subnormals
        if n:
            w[-1] = 0
        groups = 1 if group == -1 else k // group
        spans = torch.stack([-floats(n, groups, seed=1).abs(), floats(n, groups, seed=2)], -1)
        for given in (None, spans):
            options = {"group_size": group, "w_bit": w_bit, "zero_point": zero_point, "range": given, "dtype": dtype}
            for expected, got in zip(ops.quantize(w, **options), on_device(ops.quantize, w, **options), strict=True):
                assert_same(expected, got)


def test_quantize_of_a_strided_weight() -> None:
    w = floats(128, 64)
    for expected, got in zip(
        ops.quantize(w.t(), group_size=32), on_device(ops.quantize, w.t(), group_size=32), strict=True
    ):
        assert_same(expected, got)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e38])
@pytest.mark.parametrize("zero_point", [True, False])
def test_quantize_marks_a_group_that_is_not_finite(bad: float, zero_point: bool) -> None:
    w = floats(4, 128)
    expected = ops.quantize(w, group_size=64, zero_point=zero_point)
    w[1, 100] = bad
    got = on_device(ops.quantize, w, group_size=64, zero_point=zero_point)
    assert got[1].isnan().nonzero().tolist() == [[1, 1]]
    assert got[2][1, 1] == (0 if zero_point else 8)
    for a, b in zip(expected, got, strict=True):
        assert_same(a[[0, 2, 3]], b[[0, 2, 3]])


# --- dequantize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for n, k, group in [
        (8, 8, 8),
        (264, 128, 32),
        (1024, 4096, 128),
        (8, 7, 7),
        (64, 96, 12),
        (272, 70, 35),
        (8, 0, 1),
    ]:
        qweight, scales, qzeros = packed(n, k, group, scale_dtype)
        for zeros in (qzeros, None):
            for factor in (1.0, 1e-5, 1e5):  # results that are subnormal in float16, and that overflow it
                args = (qweight, (scales.float() * factor).to(scale_dtype), zeros)
                options = {"group_size": group, "dtype": dtype}
                assert_same(ops.dequantize(*args, **options), on_device(ops.dequantize, *args, **options))


def test_dequantize_of_misaligned_and_strided_scales() -> None:
    qweight, scales, qzeros = packed(64, 128, 128)
    expected = ops.dequantize(qweight, scales, qzeros, group_size=128)
    wide = torch.cat([scales[:, :1], scales], 1).to(DEVICE)
    shifted = wide[:, 1:]  # one group: contiguous, yet two bytes off any alignment
    transposed = scales.t().contiguous().to(DEVICE).t()
    for s in (shifted, transposed):
        assert_same(expected, ops.dequantize(qweight.to(DEVICE), s, qzeros.to(DEVICE), group_size=128).cpu())


# --- linear -----------------------------------------------------------------------------------------------------------


def assert_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """|y - reference| within one rounding of the output and the rounding errors of a float32 sum of k products."""
    x, w = x.double(), w.double()
    reference, magnitude = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        reference, magnitude = reference + bias.double(), magnitude + bias.double().abs()
    k = x.shape[-1]
    eps = torch.finfo(y.dtype).eps
    bound = eps * reference.abs() + 4 * (k + 1) * 2**-24 * magnitude + torch.finfo(y.dtype).smallest_normal * eps
    error = (y.double() - reference).abs()
    assert (error <= bound).all(), f"largest error / bound = {(error / bound).max():.3g}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_linear(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for n, k, group in [(64, 128, 32), (8, 40, 40), (328, 66, 11), (1024, 1024, 128)]:
        qweight, scales, qzeros = packed(n, k, group, scale_dtype)
        for zeros in (qzeros, None):
            w = ops.dequantize(qweight, scales, zeros, group_size=group, dtype=dtype)
            for m in (1, 2, 17, 300):
                x = floats(m, k, dtype=dtype)
                for bias in (None, floats(n, dtype=scale_dtype)):
                    y = on_device(ops.linear, x, qweight, scales, zeros, bias, group_size=group)
                    assert (y.shape, y.dtype) == ((m, n), dtype)
                    assert_close(y, x, w, None if bias is None else bias.to(dtype))


@pytest.mark.parametrize("shape", [(32,), (0, 32), (3, 0, 32), (2, 3, 5, 32)])
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    qweight, scales, qzeros = packed(24, 32, 32)
    x = floats(*shape, dtype=torch.float16)
    y = on_device(ops.linear, x, qweight, scales, qzeros, group_size=32)
    assert y.shape == (*shape[:-1], 24)
    assert_close(y.reshape(-1, 24), x.reshape(-1, 32), ops.dequantize(qweight, scales, qzeros, group_size=32))


def test_linear_of_strided_x() -> None:
    qweight, scales, qzeros = packed(24, 32, 32)
    w = ops.dequantize(qweight, scales, qzeros, group_size=32)
    weight = [t.to(DEVICE) for t in (qweight, scales, qzeros)]
    wide = floats(6, 4, 96, dtype=torch.float16).to(DEVICE)
    for x in (wide[..., 32:64], wide[::2, :, :32], wide[..., :32].transpose(0, 1), wide[0, :, 64:].t()[:32].t()):
        assert_close(ops.linear(x, *weight, group_size=32).cpu().reshape(-1, 24), x.cpu().reshape(-1, 32), w)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_of_empty_weights(with_bias: bool) -> None:
    bias = floats(8, dtype=torch.float16) if with_bias else None
    y = on_device(ops.linear, torch.empty(3, 0).half(), *packed(8, 0, 1), bias, group_size=1)
    assert torch.equal(y, (torch.zeros(8).half() if bias is None else bias).expand(3, 8))
    assert on_device(ops.linear, torch.ones(3, 32).half(), *packed(0, 32, 32), group_size=32).shape == (3, 0)


def test_a_row_that_is_not_finite_touches_no_other() -> None:
    qweight, scales, qzeros = packed(264, 256, 64)
    x = floats(33, 256, dtype=torch.float16)
    x[7, 3], x[20, 9] = float("nan"), float("inf")
    y = on_device(ops.linear, x, qweight, scales, qzeros, group_size=64)
    others = [i for i in range(33) if i not in (7, 20)]
    assert y[7].isnan().all()
    assert_close(y[others], x[others], ops.dequantize(qweight, scales, qzeros, group_size=64))


def test_linear_keeps_the_dtype_of_x_under_autocast() -> None:
    qweight, scales, qzeros = packed(64, 128, 32)
    x = floats(3, 128)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = on_device(ops.linear, x, qweight, scales, qzeros, floats(64), group_size=32)
    assert y.dtype == torch.float32
    assert_close(y, x, ops.dequantize(qweight, scales, qzeros, group_size=32, dtype=torch.float32), floats(64))


def test_the_raw_operator_records_no_gradient_of_its_own() -> None:
    qweight, scales, qzeros = (t.to(DEVICE) for t in packed(64, 128, 32))
    x = floats(3, 128).to(DEVICE).requires_grad_()
    y = ops.linear(x, qweight, scales, qzeros, group_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns here of any operator that has no gradient
        y.sum().backward()
    assert x.grad is None


def test_functional_linear_has_a_gradient() -> None:
    qweight, scales, qzeros = packed(64, 128, 32)
    x, bias = floats(5, 128).to(DEVICE).requires_grad_(), floats(64).to(DEVICE).requires_grad_()
    y = functional.linear(x, qweight.to(DEVICE), scales.to(DEVICE), qzeros.to(DEVICE), bias, group_size=32)
    grad = floats(5, 64, seed=1)
    y.backward(grad.to(DEVICE))
    w = ops.dequantize(qweight, scales, qzeros, group_size=32, dtype=torch.float32)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad.cpu(), grad @ w)
    torch.testing.assert_close(bias.grad.cpu(), grad.sum(0))


def test_module_made_on_the_device_equals_one_made_on_a_cpu() -> None:
    dense = torch.nn.Linear(256, 136)
    expected = AwqLinear.from_linear(dense, 64).state_dict()
    got = AwqLinear.from_linear(dense.to(DEVICE), 64).state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert_same(value, got[name].cpu())


# --- layout fragments: kernels of our own -----------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]
FRAGMENT_SHAPES = [  # n, k, group: tiles that stick out on every side, all kinds of groups, and a common matrix
    (8, 16, 16),
    (24, 40, 40),
    (72, 96, 48),
    (136, 256, 128),
    (200, 330, 330),
    (64, 1024, 64),
    (328, 2080, 32),
    (1000, 1536, 256),
    (4096, 4096, 128),
]
EVERY_KERNEL = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 300, 2100)  # rows, of which each kernel gets some


def fragments(n: int, k: int, group: int, dtype: torch.dtype = torch.float16) -> tuple[dict[str, Any], Tensor]:
    """What linear and dequantize take for a random weight in layout fragments, on the device, and the weight."""
    qweight, scales, qzeros = packed(n, k, group, dtype)
    w = ops.dequantize(qweight, scales, qzeros, group_size=group, dtype=torch.float32)
    tensors = {
        "qweight": ops.repack(qweight.to(DEVICE), src="gemm", dst="fragments"),
        "scales": repack_scales(scales.to(DEVICE), "gemm", "fragments"),
        "qzeros": ops.repack(qzeros.to(DEVICE), src="gemm.zeros", dst="fragments.zeros"),
    }
    return {**tensors, "group_size": group, "layout": "fragments"}, w


def assert_multiplied(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """As assert_close, with room for weights that have been rounded to y's dtype."""
    assert y.shape == (*x.shape[:-1], w.shape[0]) and y.is_contiguous()
    got, rows, w = y.cpu().double().reshape(-1, w.shape[0]), x.cpu().double().reshape(-1, w.shape[1]), w.double()
    reference, magnitude = rows @ w.t(), rows.abs() @ w.abs().t()
    if bias is not None:
        reference, magnitude = reference + bias.cpu().double(), magnitude + bias.cpu().double().abs()
    info = torch.finfo(y.dtype)
    bound = info.eps * (reference.abs() + magnitude / 2) + 4 * (w.shape[1] + 8) * 2**-24 * magnitude
    bound += info.smallest_normal * info.eps * (1 + rows.abs().sum(1, keepdim=True))
    error = (got - reference).abs()
    assert (error <= bound).all(), f"largest error / bound = {(error / bound).max():.3g}"


@pytest.mark.parametrize(("n", "k"), [(8, 8), (64, 64), (72, 24), (328, 136), (131, 77)])
def test_fragments_are_packed_as_on_a_cpu(n: int, k: int) -> None:
    q = codes(n, k)
    for layout in ("fragments", "fragments.zeros"):
        words = ops.pack(q, layout=layout)
        assert_same(words, on_device(ops.pack, q, layout=layout))
        assert_same(ops.unpack(words, layout=layout), on_device(ops.unpack, words, layout=layout))
        for other in ("strips", "compressed-tensors"):
            assert_same(ops.repack(words, src=layout, dst=other), on_device(ops.repack, words, src=layout, dst=other))


@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_fragments_are_dequantized_as_on_a_cpu(scale_dtype: torch.dtype) -> None:
    for n, k, group in [*FRAGMENT_SHAPES, (8, 7, 7), (64, 96, 12), (272, 70, 35), (72, 200, 8)]:
        given, w = fragments(n, k, group, scale_dtype)
        for dtype in FLOATS:
            assert_same(w.to(dtype), ops.dequantize(**given, dtype=dtype).cpu())
        symmetric = {**given, "qzeros": None}
        expected = ops.dequantize(**{name: to("cpu", value) for name, value in symmetric.items()})
        assert_same(expected, ops.dequantize(**symmetric).cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize(("n", "k", "group"), FRAGMENT_SHAPES)
def test_linear_in_fragments(n: int, k: int, group: int, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    given, w = fragments(n, k, group, scale_dtype)
    for m in EVERY_KERNEL:
        x = floats(m, k, dtype=dtype, seed=m).to(DEVICE)
        bias = floats(n, dtype=scale_dtype, seed=m).to(DEVICE) if m % 2 else None
        assert_multiplied(ops.linear(x, bias=bias, **given), x, w, bias)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", EVERY_KERNEL)
def test_x_may_lie_anywhere(dtype: torch.dtype, m: int) -> None:
    given, w = fragments(136, 256, 64)
    wide = floats(2 * m, 600, dtype=dtype).to(DEVICE)
    wide[:, 256:264] = float("nan")  # beside what is asked for
    ways = [
        wide[:m, :256],
        wide[::2, 264:520],  # rows further apart
        wide[:m, 265:521],  # 2 bytes off any alignment
        torch.cat([wide[:m, :256], wide[:m, :1]], 1)[:, :256],  # rows an odd number of elements apart
        wide[:1, :256].expand(m, 256),
        wide[:m, :256].t().contiguous().t(),
        wide[:m, :256].reshape(1, m, 1, 256),
    ]
    for x in ways:
        assert_multiplied(ops.linear(x, **given), x, w)


@pytest.mark.parametrize("m", EVERY_KERNEL)
@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros"])
def test_a_weight_may_lie_anywhere(m: int, name: str) -> None:
    """Kernels want multiples of 16 bytes; what lies otherwise, or is strided, is multiplied all the same."""
    given, w = fragments(136, 256, 64)
    x = floats(m, 256, dtype=torch.float16).to(DEVICE)
    tensor = given[name]
    shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:].view(tensor.shape)
    apart = torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    for other in (shifted.copy_(tensor), apart):
        assert_multiplied(ops.linear(x, **{**given, name: other}), x, w)


@pytest.mark.parametrize("m", EVERY_KERNEL)
def test_outputs_end_where_they_should(m: int) -> None:
    """Kernels store in tiles: what lies behind y stays, and no row or column is left out."""
    given, w = fragments(72, 96, 32)
    x = floats(m, 96, dtype=torch.float16).to(DEVICE)
    torch.cuda.empty_cache()
    before = torch.full((m * 72 + 4096,), 7.0, dtype=torch.float16, device=DEVICE)
    del before  # the allocator gives its place to y, mostly: unwritten outputs would be 7
    y = ops.linear(x, **given)
    after = torch.full((4096,), 7.0, dtype=torch.float16, device=DEVICE)
    assert_multiplied(y, x, w)
    assert_multiplied(ops.linear(x, **given), x, w)
    assert (after == 7).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [m for m in EVERY_KERNEL if m > 1])
def test_in_fragments_a_row_that_is_not_finite_touches_no_other(dtype: torch.dtype, m: int) -> None:
    given, w = fragments(264, 256, 64)
    x = floats(m, 256, dtype=dtype)
    x[m // 2, 3], x[0, 9] = float("nan"), float("inf")
    y = ops.linear(x.to(DEVICE), **given).cpu()
    others = [i for i in range(m) if i not in (0, m // 2)]
    assert y[m // 2].isnan().all()
    assert_multiplied(y[others], x[others], w)


@pytest.mark.parametrize("m", EVERY_KERNEL)
def test_in_fragments_sums_may_be_large(m: int) -> None:
    """All-positive x and the largest codes: sums that float16 could not hold on the way."""
    given, _ = fragments(64, 4096, 128)
    given["qweight"].fill_(-1)
    given["qzeros"].zero_()
    given["scales"].fill_(1e-3)
    x = torch.full((m, 4096), 200.0, dtype=torch.float16, device=DEVICE)
    x[:, 1::2] = -199.5
    w = torch.full((64, 4096), 15.0) * given["scales"][0, 0].float().cpu()
    assert_multiplied(ops.linear(x, **given), x, w)


def test_in_fragments_empty_calls_are_answered() -> None:
    given, _ = fragments(72, 96, 32)
    for shape in ((0, 96), (3, 0, 96)):
        assert ops.linear(torch.empty(shape, dtype=torch.float16, device=DEVICE), **given).shape == (*shape[:-1], 72)


@pytest.mark.parametrize("dtype", HALVES)
def test_in_fragments_two_runs_and_a_graph_give_the_same_bytes(dtype: torch.dtype) -> None:
    given, w = fragments(4096, 4096, 128)
    for m in EVERY_KERNEL:
        static = floats(m, 4096, dtype=dtype).to(DEVICE)
        expected = ops.linear(static, **given)
        assert_same(expected.cpu(), ops.linear(static, **given).cpu())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ops.linear(static, **given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.linear(static, **given)
        for seed in (1, 2):
            static.copy_(floats(m, 4096, dtype=dtype, seed=seed).to(DEVICE))
            graph.replay()
            torch.cuda.synchronize()
            assert_same(ops.linear(static, **given).cpu(), got.cpu())
        assert_multiplied(got, static, w)


def test_in_fragments_work_is_ordered_on_the_current_stream() -> None:
    given, w = fragments(264, 1024, 128)
    for m in EVERY_KERNEL:
        source = floats(m, 1024, dtype=torch.float16).to(DEVICE)
        late = torch.zeros_like(source)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(source)
            y = ops.linear(late, **given)
        stream.synchronize()
        assert_multiplied(y, source, w)


def test_layers_change_their_layout_with_the_device() -> None:
    dense = torch.nn.Linear(256, 136)
    layer = AwqLinear.from_linear(dense, 64)
    state, x = layer.state_dict(), floats(5, 256, dtype=torch.float16)
    w = layer.dequantize(torch.float32)
    moved = layer.to(DEVICE)
    assert moved.layout == "fragments" and moved.half().layout == "fragments"
    for name, value in moved.state_dict().items():
        assert_same(state[name].to(value.dtype), value.cpu())
    for m in (1, 5):
        assert_multiplied(moved(x[:m].to(DEVICE)), x[:m], w, state["bias"].half())
    made_there = AwqLinear(256, 136, group_size=64, device=DEVICE)
    made_there.load_state_dict(state)
    assert made_there.layout == "fragments"
    assert moved.to("cpu").layout == "strips"
    for name, value in moved.state_dict().items():
        assert_same(state[name].to(value.dtype), value)


def test_explain_tells_of_the_device() -> None:
    layer = AwqLinear.from_linear(torch.nn.Linear(4096, 4096)).to(DEVICE)
    major, minor = torch.cuda.get_device_capability()
    for m, dtype in ((1, torch.float16), (64, torch.bfloat16), (1 << 20, torch.float16)):
        answer = explain(layer, m, dtype)
        assert f"(sm_{major}{minor})" in answer
        assert answer.split()[0] == explain(layer, m, dtype, gpu=f"sm_{major}{minor}").split()[0]
    assert explain(layer, 1, torch.float32).startswith("dequantize")
    assert "torch multiplies" in explain(layer.repack("gemm"), 1)


# --- streams, graphs, devices, sizes ----------------------------------------------------------------------------------


def every_operator(x: Tensor, w: Tensor, q: Tensor, weight: tuple[Tensor, ...]) -> list[Tensor]:
    """Results of every operator with a CUDA kernel, each as one that reads one of the tensors given."""
    words = ops.pack(q)
    rows = x.float()
    gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    ops.add_gram(gram, rows)
    return [
        ops.linear(x, *weight, group_size=32),
        ops.dequantize(*weight, group_size=32),
        *ops.quantize(w, group_size=32),
        words,
        ops.unpack(words),
        ops.repack(words, src="gemm", dst="gptq"),
        gram,
        *ops.search_scale(w, rows.abs().amax(0), gram, group_size=32),
        ops.search_clip(w, gram, group_size=32),
    ]


def operator_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randint(0, 16, (64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return floats(9, 128, seed=seed).half().to(DEVICE), floats(64, 128, seed=seed + 1).to(DEVICE), q.to(DEVICE)


def test_work_is_ordered_on_the_current_stream() -> None:
    weight = tuple(t.to(DEVICE) for t in packed(64, 128, 32))
    source = operator_inputs(1)
    expected = every_operator(*source, weight)
    late = [torch.zeros_like(t) for t in source]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a producer that any work on another stream would overtake
        for target, value in zip(late, source, strict=True):
            target.copy_(value)
        got = every_operator(*late, weight)
    stream.synchronize()
    for a, b in zip(expected, got, strict=True):
        assert_same(a.cpu(), b.cpu())


def test_graph_capture_and_replay() -> None:
    weight = tuple(t.to(DEVICE) for t in packed(64, 128, 32))
    static = operator_inputs(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the warm-up that capture asks for: cuBLAS allocates at its first call
        every_operator(*static, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = every_operator(*static, weight)
    for seed in (2, 3):
        fresh = operator_inputs(seed)
        for target, value in zip(static, fresh, strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = every_operator(*fresh, weight)
        assert_close(got[0].cpu(), fresh[0].cpu(), expected[1].cpu())
        for a, b in zip(expected[1:], got[1:], strict=True):
            assert_same(a.cpu(), b.cpu())


def test_two_runs_give_the_same_bytes() -> None:
    weight = tuple(t.to(DEVICE) for t in packed(64, 128, 32))
    inputs = operator_inputs(4)
    for a, b in zip(every_operator(*inputs, weight), every_operator(*inputs, weight), strict=True):
        assert_same(a.cpu(), b.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_is_used_and_the_current_one_kept() -> None:
    weight = tuple(t.to("cuda:1") for t in packed(64, 128, 32))
    inputs = tuple(t.to("cuda:1") for t in operator_inputs(5))
    with torch.cuda.device(0):
        got = every_operator(*inputs, weight)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        expected = every_operator(*inputs, weight)
    for a, b in zip(expected, got, strict=True):
        assert b.device == torch.device("cuda:1")
        assert_same(a.cpu(), b.cpu())


def test_more_than_two_to_the_31_elements() -> None:
    n, k = 65544, 32808  # 2 150 367 552 codes
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
    for layout in LAYOUTS:
        words = ops.pack(q, layout=layout)
        assert torch.equal(ops.unpack(words, layout=layout), q)
    words = ops.repack(words, src=LAYOUTS[-1], dst="gemm")
    assert torch.equal(ops.unpack(words), q)
    scales = torch.rand(1, n, device=DEVICE).half()
    w = ops.dequantize(words, scales, group_size=-1)
    tail = (q[-64:].float() - 8) * scales[0, -64:, None].float()
    assert torch.equal(w[-64:], tail.half())
    got, got_scales, got_zeros = ops.quantize(w, group_size=-1)
    expected = ops.quantize(w[-64:].cpu(), group_size=-1)
    for a, b in zip(expected, (got[-64:], got_scales[-64:], got_zeros[-64:]), strict=True):
        assert_same(a, b.cpu())


# --- opcheck ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype: torch.dtype) -> None:
    qweight, scales, qzeros = (t.to(DEVICE) for t in packed(64, 128, 32, dtype))
    x, bias = floats(3, 128, dtype=dtype).to(DEVICE), floats(64, dtype=dtype).to(DEVICE)
    w, q = floats(64, 128, dtype=dtype).to(DEVICE), codes(64, 128).to(DEVICE)
    check, namespace = torch.library.opcheck, torch.ops.awq_ext
    check(namespace.linear.default, (x, qweight, scales, qzeros, bias), {"group_size": 32})
    check(namespace.linear.default, (x[0], qweight, scales), {"group_size": 32})
    given, _ = fragments(64, 128, 32, dtype)
    check(namespace.linear.default, (x,), {**given, "bias": bias})
    check(namespace.dequantize.default, (), {**given, "dtype": torch.bfloat16})
    check(namespace.dequantize.default, (qweight, scales, qzeros), {"group_size": 32, "dtype": torch.bfloat16})
    check(namespace.quantize.default, (w,), {"group_size": 32, "dtype": dtype})
    check(namespace.pack.default, (q,), {"layout": "gptq"})
    check(namespace.unpack.default, (qweight,), {"layout": "gemm"})
    check(namespace.repack.default, (qweight,), {"src": "gemm", "dst": "gemv"})
    candidates, gram = torch.ones(2, 128, device=DEVICE), torch.eye(128, device=DEVICE)
    check(namespace.search_scale.default, (w, candidates[0], gram), {"group_size": 32, "dtype": dtype})
    check(namespace.scale_candidates.default, (w, candidates[0]), {"group_size": 32})
    check(namespace.scale_losses.default, (w, candidates, gram), {"group_size": 32})
    check(namespace.search_clip.default, (w, gram), {"group_size": 32, "zero_point": False})
    check(namespace.add_gram.default, (gram, w.float()), {"bfloat16": True})
