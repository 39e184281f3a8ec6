"""The searches and Gram sums of CUDA against those of a CPU: the same choices, but for the order of sums.

On a GPU if there is one; and the operators as they are, with their kernels played on the CPU (tests/simt), which also
watches every access to memory.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import test_cpp
import torch
from test_quantizer import small_model
from torch import Tensor

from awq_ext import _library, ops, quantize

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("search_scale", "scale_candidates", "scale_losses", "search_clip", "quantize_compensated", "add_gram")
BUILD = test_cpp.REPOSITORY / "build" / "cpp-tests-played"
HAS_CUDA = torch.cuda.is_available() and _library.CUDA_LIBRARY in _library.loaded()

Run = Callable[..., Any]
"""run(name, *args, **kwargs): the operator's results, on the CPU."""


def run_on_cuda(name: str, *args: Any, **kwargs: Any) -> Any:
    def move(value: Any) -> Any:
        return value.cuda() if isinstance(value, Tensor) else value

    result = getattr(ops, name)(*map(move, args), **{key: move(value) for key, value in kwargs.items()})
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def run_played(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(torch.ops.awq_played, name)(*args, **kwargs)


@pytest.fixture(scope="session")
def played() -> Run:
    return load_played()


@functools.cache
def load_played() -> Run:
    """The operators torch.ops.awq_played.*, with the schemas of awq_ext's."""
    options = ["-DAWQ_OPS=ON", "-DAWQ_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    test_cpp.compiler()
    test_cpp.build_tests(BUILD, *options, targets=["awq_played"])
    library = torch.library.Library("awq_played", "DEF")
    for name in NAMES:
        schema = str(getattr(torch.ops.awq_ext, name).default._schema)
        library.define(schema.removeprefix("awq_ext::"))
    torch.ops.load_library(str(BUILD / "tests" / "simt" / "libawq_played.so"))
    return functools.partial(run_with, library)


def run_with(library: torch.library.Library, name: str, *args: Any, **kwargs: Any) -> Any:
    """Whoever can call the operators keeps their library."""
    return run_played(name, *args, **kwargs)


@pytest.fixture(
    params=[
        pytest.param("played", marks=pytest.mark.slow),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]),
    ]
)
def run(request: pytest.FixtureRequest) -> Run:
    return run_on_cuda if request.param == "cuda" else request.getfixturevalue("played")


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def statistics(k: int, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """x_mean and gram of inputs with a few loud channels."""
    x = floats(tokens, k, seed=k) / uniform(k, seed=k).clamp(min=0.05)
    return x.abs().mean(0), (x.double().T @ x.double() / tokens).float()


SHAPES = [(1, 8, 8), (20, 96, 32), (5, 300, 100), (9, 264, -1), (140, 24, 12)]  # n, k, group


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_search_scale(run: Run, n: int, k: int, group: int, tied: bool) -> None:
    w = (floats(n, k) * 0.1).to(FLOATS[n % 3])
    x_mean, gram = statistics(k)
    tie = torch.arange(k) % (k // 2) if tied else None
    candidates = ops.scale_candidates(w, x_mean, group_size=group, grid=9, tie=tie)
    got = run("scale_candidates", w, x_mean, group_size=group, grid=9, tie=tie)
    torch.testing.assert_close(got, candidates, rtol=1e-6, atol=0)
    for w_bit, zero_point, row_weight in ((4, True, uniform(n)), (3, False, None)):
        options = {"group_size": group, "w_bit": w_bit, "zero_point": zero_point, "row_weight": row_weight}
        expected = ops.scale_losses(w, candidates, gram, **options)
        got = run("scale_losses", w, candidates, gram, **options)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
        scale, losses = run("search_scale", w, x_mean, gram, grid=9, tie=tie, **options)
        # Where a candidate differs in its last bit, a weight may be rounded otherwise.
        torch.testing.assert_close(losses, expected, rtol=1e-2, atol=0)
        best = int(losses.argmin())
        torch.testing.assert_close(scale, candidates[best], rtol=1e-6, atol=0)
        assert expected[best] <= expected.min() * 1.01


def test_by_a_diagonal(run: Run) -> None:
    w, (x_mean, gram) = floats(30, 96), statistics(96)
    squares = gram.diagonal()
    for group in (32, -1):
        expected = ops.search_scale(w, x_mean, squares, group_size=group)
        for got, want in zip(run("search_scale", w, x_mean, squares, group_size=group), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
        candidates = torch.stack([torch.ones(96), expected[0]])
        got = run("scale_losses", w, candidates, squares, group_size=group)
        torch.testing.assert_close(got, ops.scale_losses(w, candidates, squares, group_size=group), rtol=1e-5, atol=0)
        got = run("search_clip", w, squares, group_size=group, grid=6)
        torch.testing.assert_close(got, ops.search_clip(w, squares, group_size=group, grid=6), rtol=1e-6, atol=0)
    squares = squares.clone()
    squares[40] = float("nan")
    holes = run("search_clip", w, squares, group_size=32, grid=2).isnan()
    assert holes[:, 1].all() and not holes[:, ::2].any()


def test_search_scale_without_duo_scaling(run: Run) -> None:
    w, (x_mean, gram) = floats(30, 64), statistics(64)
    options = {"group_size": 16, "grid": 20, "duo_scaling": False, "dtype": torch.bfloat16}
    for got, expected in zip(
        run("search_scale", w, x_mean, gram, **options), ops.search_scale(w, x_mean, gram, **options), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_what_is_not_finite(run: Run) -> None:
    w, (x_mean, gram) = floats(20, 64), statistics(64)
    w[3, 40] = float("nan")
    scale, losses = run("search_scale", w, x_mean, gram, group_size=32, grid=2)
    assert scale.isnan().all() and losses.isinf().all()
    rows = torch.ones(20)
    rows[3] = 0
    one = torch.ones(1, 64)
    expected = ops.scale_losses(w, one, gram, group_size=32, row_weight=rows)
    got = run("scale_losses", w, one, gram, group_size=32, row_weight=rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    rows[4] = -1
    assert run("scale_losses", w, one, gram, group_size=32, row_weight=rows).isnan().all()
    assert run("scale_losses", floats(20, 64), -one, gram, group_size=32).isnan().all()
    x_mean[5] = -1
    assert run("scale_candidates", floats(20, 64), x_mean, group_size=32, grid=2).isnan().all()


def test_search_of_nothing(run: Run) -> None:
    x_mean, gram = statistics(32)
    scale, losses = run("search_scale", torch.empty(0, 32), x_mean, gram, group_size=16)
    assert (losses == 0).all() and (scale == 1).all()
    assert run("search_clip", torch.empty(0, 32), gram, group_size=16).shape == (0, 2, 2)
    assert run("scale_losses", floats(4, 32), torch.empty(0, 32), gram, group_size=16).shape == (0,)
    scale, losses = run("search_scale", torch.empty(3, 0), torch.empty(0), torch.empty(0, 0), group_size=-1)
    assert scale.shape == (0,) and (losses == 0).all()


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_search_clip(run: Run, n: int, k: int, group: int) -> None:
    w, (_, gram) = floats(n, k) ** 3, statistics(k)
    for w_bit, zero_point, dtype in ((4, True, None), (3, False, torch.float32), (8, True, torch.bfloat16)):
        options = {"group_size": group, "w_bit": w_bit, "zero_point": zero_point, "dtype": dtype, "grid": 6}
        expected, got = ops.search_clip(w, gram, **options), run("search_clip", w, gram, **options)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert (got != expected).any(-1).double().mean() <= 0.02  # losses that are equal but for rounding
    w[0, 0] = float("nan")
    got = run("search_clip", w, gram, group_size=group, grid=1)
    assert got[0, 0].isnan().all() and got.isnan().sum() == 2


@pytest.mark.parametrize("bfloat16", [False, True])
def test_add_gram(run: Run, bfloat16: bool) -> None:
    for t, k in [(0, 8), (1, 1), (7, 100), (1100, 20)]:
        for x in (floats(t, k), floats(k, t).T, floats(2 * t + 1, k + 3)[1::2, :k]):
            sums = floats(k, k, seed=1)
            expected, got = sums.clone(), sums.clone()
            ops.add_gram(expected, x, bfloat16=bfloat16)
            if run is run_on_cuda:
                got = got.cuda()
                ops.add_gram(got, x.cuda(), bfloat16=bfloat16)
                got = got.cpu()
            else:
                run("add_gram", got, x, bfloat16=bfloat16)
            torch.testing.assert_close(got.triu(), expected.triu(), rtol=1e-4, atol=1e-4 * max(t, 1) ** 0.5)
            assert torch.equal(got.tril(-1), sums.tril(-1))


def test_shapes_are_refused_by_name(run: Run) -> None:
    w, (x_mean, gram) = floats(4, 32), statistics(32)
    with pytest.raises(RuntimeError, match=r"awq_ext::search_scale: x_mean must be \[in_features\] = \[32\] float32"):
        run("search_scale", w, x_mean[:-1], gram, group_size=16)
    with pytest.raises(RuntimeError, match=r"awq_ext::search_clip: max_shrink must be in \[0, 1\), got 1"):
        run("search_clip", w, gram, group_size=16, max_shrink=1.0)
    with pytest.raises(RuntimeError, match=r"awq_ext::scale_losses: row_weight must be \[out_features\] = \[4\]"):
        run("scale_losses", w, torch.ones(1, 32), gram, group_size=16, row_weight=torch.ones(5))
    with pytest.raises(RuntimeError, match=r"awq_ext::quantize_compensated: runs on a CPU.*\.cpu\(\)"):
        run("quantize_compensated", w, gram, group_size=16)


def test_quantize_chooses_as_on_a_cpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    calibration = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    options = {"calibration": calibration, "samples": 4, "seq_len": 32, "q_group_size": 16, "method": "awq"}
    expected = quantize(copy.deepcopy(model), **options).state_dict()
    calls = []
    if run is run_on_cuda:
        model = model.cuda()
    else:
        for name in ("scale_candidates", "scale_losses", "search_clip", "add_gram"):
            monkeypatch.setattr(ops, name, lambda *a, name=name, **k: (calls.append(name), run(name, *a, **k))[1])
    got = quantize(model, **options).state_dict()
    assert run is run_on_cuda or set(calls) == {"scale_candidates", "scale_losses", "search_clip", "add_gram"}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        same = got[name].cpu() == tensor if not tensor.is_floating_point() else torch.isclose(got[name].cpu(), tensor)
        assert same.double().mean() >= 0.98, name  # a range may be another one that loses as little


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_many_rows_are_searched_in_parts() -> None:
    n, k, group = 40000, 512, 128  # 40000 x 512 x 21 errors are more than are held at a time
    w, (x_mean, gram) = floats(n, k, dtype=torch.float16).cuda(), (t.cuda() for t in statistics(k))
    whole = ops.search_clip(w, gram, group_size=group)
    assert torch.equal(whole, torch.cat([ops.search_clip(part, gram, group_size=group) for part in w.split(3000)]))
    candidates = ops.scale_candidates(w, x_mean, group_size=group)
    losses = ops.scale_losses(w, candidates, gram, group_size=group)
    parts = torch.stack([ops.scale_losses(part, candidates, gram, group_size=group) for part in w.split(3000)])
    torch.testing.assert_close(losses, parts.sum(0), rtol=1e-12, atol=0)
