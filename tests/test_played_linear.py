"""The CUDA operators as they are, on CPU tensors, with their kernels played (tests/simt/played_linear.cpp).

Each call gets its kernel, and each kernel what it can take. The interpreter watches every access to memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import random_weight
from test_cuda import assert_multiplied
from test_cuda_search import BUILD, Run, played  # noqa: F401  # a fixture
from test_fragments import arguments
from torch import Tensor

from awq_ext import _library, ops

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALVES = (F16, BF16)

Linear = Callable[..., tuple[Tensor, str]]
"""linear(x, given, arch): y, and the kernel that made it."""


@pytest.fixture(scope="session")
def linear(played: Run) -> Linear:  # noqa: F811
    schemas = torch.library.Library("awq_played", "FRAGMENT")
    for name in ("linear", "dequantize", "quantize", "pack", "unpack", "repack"):
        schemas.define(str(getattr(torch.ops.awq_ext, name).default._schema).removeprefix("awq_ext::"))
    library = ctypes.CDLL(str(BUILD / "tests" / "simt" / "libawq_played.so"))
    library.awq_played_kernel.restype = ctypes.c_char_p

    def run(x: Tensor, given: dict[str, Any], arch: int = 90, sms: int = 0) -> tuple[Tensor, str]:
        assert schemas is not None and played is not None  # whoever can call the operators keeps their libraries
        library.awq_played_gpu(arch, sms)
        library.awq_played_kernel()
        y = torch.ops.awq_played.linear(x, **given)
        return y, library.awq_played_kernel().decode()

    return run


def randn(*shape: int, dtype: torch.dtype = F16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def planned(x: Tensor, given: dict[str, Any], m: int, n: int, arch: int, sms: int = 0) -> str:
    dtype, scale_dtype = (str(t.dtype).removeprefix("torch.") for t in (x, given["scales"]))
    plan = _library.native().plan_cuda(m, n, x.shape[-1], given["group_size"], dtype, scale_dtype, arch, sms)
    return str(plan["kernel"])


@pytest.mark.parametrize("arch", [75, 80, 89, 90, 120])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(8, 16, 16), (72, 96, 48), (136, 256, 64), (64, 1040, 1040), (24, 40, 40)]
)
def test_each_call_gets_its_kernel(linear: Linear, arch: int, n: int, k: int, group: int) -> None:
    w = random_weight(n, k, group)
    for m in (1, 8, 9, 17, 70):
        for dtype in HALVES:
            x = randn(m, k, dtype=dtype, seed=m)
            bias = randn(n, dtype=F32) if m % 2 else None
            given = arguments(w, group, bias=bias)
            if m == 8:
                given["scales"] = given["scales"].to(dtype)
            y, kernel = linear(x, given, arch)
            assert kernel == planned(x, given, m, n, arch) and y.dtype == dtype
            exact = ops.dequantize(**{name: given[name] for name in given if name != "bias"}, dtype=F32)
            assert_multiplied(y, x, exact, bias)


def test_blocks_share_k_through_a_workspace_of_its_own(linear: Linear) -> None:
    w = random_weight(40, 2048, 128)
    given = arguments(w, 128)
    for arch, m in ((80, 12), (80, 40), (89, 12), (90, 12), (90, 40)):
        x = randn(m, 2048)
        plan = _library.native().plan_cuda(m, 40, 2048, 128, arch=arch)
        assert plan["splits"] > 1 or plan["cluster"] > 1
        y, kernel = linear(x, given, arch)
        assert kernel == plan["kernel"]
        assert_multiplied(y, x, w.dense.float())
        assert torch.equal(y, linear(x, given, arch)[0])


@pytest.mark.parametrize(("m", "arch"), [(1, 80), (5, 90), (20, 80), (20, 90), (20, 75)])
@pytest.mark.parametrize("dtype", HALVES)
def test_x_may_lie_anywhere(linear: Linear, m: int, arch: int, dtype: torch.dtype) -> None:
    w = random_weight(72, 128, 64)
    given = arguments(w, 64)
    wide = randn(2 * m, 600, dtype=dtype)
    wide[:, 128:136] = float("nan")  # beside what is asked for
    ways = [
        wide[:m, :128],
        wide[::2, 136:264],
        wide[:m, 137:265],  # 2 bytes off any alignment
        torch.cat([wide[:m, :128], wide[:m, :1]], 1)[:, :128],  # rows an odd number of elements apart
        wide[:1, :128].expand(m, 128),
        wide[:m, :128].t().contiguous().t(),
        wide[:m, :128].reshape(1, m, 1, 128),
        wide[0, :128],
    ]
    for x in ways:
        y, kernel = linear(x, given, arch)
        assert kernel == planned(x, given, x.numel() // 128, 72, arch)
        assert_multiplied(y, x, w.dense.float())


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros"])
def test_a_weight_may_lie_anywhere(linear: Linear, name: str) -> None:
    w = random_weight(136, 256, 64)
    given = arguments(w, 64)
    x, tensor = randn(3, 256), given[name]
    shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    y, kernel = linear(x, {**given, name: shifted})
    assert kernel == "dequantize"  # which reads word by word
    assert_multiplied(y, x, w.dense.float())
    y, kernel = linear(x, {**given, name: torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]})
    assert kernel == "decode"
    assert_multiplied(y, x, w.dense.float())


def test_zeros_and_bias_may_be_left_out(linear: Linear) -> None:
    w = random_weight(72, 96, 32)
    w.z.fill_(8)
    given = {**arguments(w, 32), "qzeros": None}
    for m, arch in ((2, 90), (20, 90), (20, 80)):
        x = randn(m, 96)
        assert_multiplied(linear(x, given, arch)[0], x, w.dense.float())


def test_what_kernels_do_not_take_torch_multiplies(linear: Linear) -> None:
    w = random_weight(72, 96, 8)
    for x, given, arch in (
        (randn(3, 96), arguments(w, 8), 90),  # groups
        (randn(3, 96, dtype=F32), arguments(random_weight(72, 96, 32), 32), 90),
        (randn(3, 96, dtype=BF16), arguments(random_weight(72, 96, 32), 32), 75),
        (randn(500, 96), arguments(random_weight(72, 96, 32), 32), 80),
    ):
        y, kernel = linear(x, given, arch)
        assert kernel == "dequantize"
        assert_multiplied(y, x, ops.dequantize(**given, dtype=F32))
    gemm = {"qweight": w.qweight, "scales": w.scales, "qzeros": w.qzeros, "group_size": 8}
    y, kernel = linear(randn(3, 96), gemm)
    assert kernel == "dequantize"
    assert_multiplied(y, randn(3, 96), w.dense.float())


def test_empty_calls_are_answered(linear: Linear) -> None:
    given = arguments(random_weight(72, 96, 32), 32)
    for shape in ((0, 96), (3, 0, 96)):
        y, kernel = linear(torch.empty(shape, dtype=F16), given)
        assert y.shape == (*shape[:-1], 72) and kernel == ""


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("layout", ["gemm", "fragments"])
def test_the_other_operators(layout: str) -> None:
    w, cuda = random_weight(72, 96, 32), torch.ops.awq_played
    words = ops.pack(w.q, layout=layout)
    assert torch.equal(cuda.pack(w.q, layout=layout), words)
    assert torch.equal(cuda.unpack(words, layout=layout), ops.unpack(words, layout=layout))
    assert torch.equal(cuda.repack(words, src=layout, dst="strips"), ops.repack(words, src=layout, dst="strips"))
    if layout == "fragments":
        for dtype in (F32, F16, BF16):
            assert torch.equal(cuda.dequantize(**arguments(w, 32), dtype=dtype), w.dense.float().to(dtype))
    expected = ops.quantize(w.dense.float(), group_size=32)
    for a, b in zip(cuda.quantize(w.dense.float(), group_size=32), expected, strict=True):
        assert torch.equal(a, b)
