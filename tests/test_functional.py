"""functional.linear: gradients against torch's own, autocast, training of what stands around a frozen weight."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from reference import Weight, randn, random_weight
from torch import Tensor, nn
from torch.autograd import forward_ad

from awq_ext import AwqLinear, ops
from awq_ext.functional import linear

N, K, GROUP = 24, 32, 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def weight() -> Weight:
    return random_weight(N, K, GROUP)


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 5), (0,)], ids=str)
def test_gradcheck(weight: Weight, leading: tuple[int, ...]) -> None:
    """In float64, where the operator computes in float64 too; the second derivative as well."""
    x = randn(*leading, K, dtype=torch.float64).requires_grad_()
    bias = randn(N, seed=1).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return linear(x, *weight.tensors, bias, group_size=GROUP)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))
    # A bias is float32 at most, too coarse for finite differences; but y is bias plus something, so this is exact.
    (grad,) = torch.autograd.grad(run(x).sum(), bias)
    assert torch.equal(grad, torch.full((N,), float(x[..., 0].numel())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("shape", [(K,), (1, K), (7, K), (2, 3, K)], ids=str)
def test_gradients_are_those_of_the_dense_layer(dtype: torch.dtype, zeros: bool, shape: tuple[int, ...]) -> None:
    w = random_weight(N, K, GROUP)
    if not zeros:
        w = Weight(w.q, w.s, torch.full_like(w.z, 8), GROUP)
    bias_dtype = torch.float32 if dtype == torch.float64 else dtype
    x, bias = (t.requires_grad_() for t in (randn(*shape, dtype=dtype), randn(N, seed=1, dtype=bias_dtype)))
    y = linear(x, w.qweight, w.scales, w.qzeros if zeros else None, bias, group_size=GROUP)
    grad = randn(*shape[:-1], N, seed=2, dtype=dtype)
    y.backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert x.grad.dtype == dtype and x.grad.shape == x.shape
    assert bias.grad.dtype == bias_dtype and bias.grad.shape == (N,)

    # The weight is rounded to dtype, then summed in float32 at least (N terms, c = 2), then the sum is rounded.
    dense, g64 = w.dense, grad.double().reshape(-1, N)
    want, magnitude = (g64 @ dense).view(*shape), (g64.abs() @ dense.abs()).view(*shape)
    unit = ref.UNIT_ROUNDOFF[dtype]
    bound = unit * want.abs() + (unit + 2 * N * min(unit, 2.0**-24)) * magnitude
    assert ((x.grad.double() - want).abs() <= bound).all()
    assert ((bias.grad.double() - g64.sum(0)).abs() <= 2 * len(g64) * max(unit, 2.0**-24) * g64.abs().sum(0)).all()


def test_gradients_of_either_input_alone(weight: Weight) -> None:
    x, bias = randn(3, K), randn(N)
    y = linear(x, *weight.tensors, bias, group_size=GROUP)
    assert not y.requires_grad
    assert torch.equal(y, ops.linear(x, *weight.tensors, bias, group_size=GROUP))
    y = linear(x, *weight.tensors, bias.clone().requires_grad_(), group_size=GROUP)
    assert y.requires_grad
    y = linear(x.clone().requires_grad_(), *weight.tensors, bias, group_size=GROUP)
    assert y.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = linear(x.clone().requires_grad_(), *weight.tensors, bias, group_size=GROUP)
            assert not y.requires_grad


def test_transforms_and_forward_mode(weight: Weight) -> None:
    """All compute what they would of the dense layer, to the bit: it is what they are given."""
    x, tangent, bias = randn(3, K), randn(3, K, seed=1), randn(N, seed=2)
    dense = ops.dequantize(*weight.tensors, group_size=GROUP, dtype=torch.float32)

    def ours(x: Tensor) -> Tensor:
        return linear(x, *weight.tensors, bias, group_size=GROUP)

    def squares(x: Tensor) -> Tensor:
        return ours(x).square().sum()

    y, slope = torch.func.jvp(ours, (x,), (tangent,))
    assert torch.equal(y, F.linear(x, dense, bias)) and torch.equal(slope, tangent @ dense.T)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent)))
        assert dual.tangent is not None and torch.equal(dual.tangent, slope)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.equal(jacobian(ours)(x[0]), dense)
    torch.testing.assert_close(torch.func.hessian(squares)(x[0]), 2 * dense.T @ dense)
    torch.testing.assert_close(torch.func.vmap(ours)(x), ours(x))
    each = torch.func.vmap(torch.func.grad(squares))(x)  # the gradient of every row by itself
    torch.testing.assert_close(each, 2 * ours(x) @ dense)
    assert torch.equal(ours(x), ops.linear(x, *weight.tensors, bias, group_size=GROUP))  # nothing is left under way


def test_the_value_does_not_depend_on_the_gradient(weight: Weight) -> None:
    for dtype in DTYPES:
        x = randn(5, K, dtype=dtype)
        y = linear(x.clone().requires_grad_(), *weight.tensors, group_size=GROUP)
        assert torch.equal(y, ops.linear(x, *weight.tensors, group_size=GROUP))


def test_backward_through_the_raw_operator_is_not_silent(weight: Weight) -> None:
    """torch.ops.awq_ext.linear has no gradient. Torch then warns when backward reaches it, and gives none."""
    x = randn(3, K).requires_grad_()
    y = torch.ops.awq_ext.linear(x, *weight.tensors, None, group_size=GROUP)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y.sum().backward()
        except RuntimeError as error:  # what torch announces for later versions
            assert "awq_ext::linear" in str(error) or "does not require grad" in str(error)
            return
    assert any("awq_ext::linear: an autograd kernel was not registered" in str(warning.message) for warning in caught)
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_casts_as_functional_linear_does(
    weight: Weight, dtype: torch.dtype, autocast_dtype: torch.dtype, grad: bool
) -> None:
    x = randn(3, K, dtype=dtype).requires_grad_(grad)
    dense = weight.dense.to(dtype)
    with torch.autocast("cpu", dtype=autocast_dtype):
        want = F.linear(x, dense)
        y = linear(x, *weight.tensors, group_size=GROUP)
    assert y.dtype == want.dtype
    compute = torch.float64 if dtype == torch.float64 else autocast_dtype
    assert torch.equal(y, ops.linear(x.detach().to(compute), *weight.tensors, group_size=GROUP))
    with torch.autocast("cpu", enabled=False):
        assert linear(x, *weight.tensors, group_size=GROUP).dtype == dtype
    if grad:
        y.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype


def test_autocast_of_a_module(weight: Weight) -> None:
    layer = AwqLinear.from_linear(nn.Linear(K, N), GROUP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(randn(3, K)).dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float16  # scales keep their own


class Adapted(nn.Module):
    """A frozen 4-bit layer with a trainable low-rank correction, as LoRA adds one."""

    def __init__(self, base: AwqLinear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_learn_through_a_frozen_layer(autocast: bool) -> None:
    """Two adapted layers: the lower one learns only through the gradient that the upper frozen weight passes down."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, N))
    model = nn.Sequential(
        Adapted(AwqLinear.from_linear(nn.Linear(K, K), GROUP), 8),
        nn.Tanh(),
        Adapted(AwqLinear.from_linear(nn.Linear(K, N), GROUP), 8),
    )
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)  # so that all that is learnt is learnt below
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    x = torch.randn(64, K)
    want = target(x).detach()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.mse_loss(model(x).float(), want)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, frozen[name]), name


def test_gradients_under_activation_checkpointing(weight: Weight) -> None:
    from torch.utils.checkpoint import checkpoint

    def run(x: Tensor) -> Tensor:
        return linear(x, *weight.tensors, group_size=GROUP).tanh()

    x = randn(3, K).requires_grad_()
    run(x).sum().backward()
    assert x.grad is not None
    want, x.grad = x.grad, None
    y: Any = checkpoint(run, x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, want)


def test_saved_tensors_are_the_packed_ones(weight: Weight) -> None:
    """Training memory: the graph keeps the words, not x and not a dense copy of the weight."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(randn(3, K).requires_grad_(), *weight.tensors, group_size=GROUP)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in weight.tensors}


def test_integers_and_wrong_shapes_are_refused_with_gradients_too(weight: Weight) -> None:
    with pytest.raises(RuntimeError, match="awq_ext::linear: x must be"):
        linear(torch.ones(3, K, dtype=torch.int64), *weight.tensors, group_size=GROUP)
    with pytest.raises(RuntimeError, match="awq_ext::linear: x must be"):
        linear(randn(3, K + 1).requires_grad_(), *weight.tensors, group_size=GROUP)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="awq_ext::linear: x must be"):
        linear(torch.ones(3, K, dtype=torch.int64), *weight.tensors, group_size=GROUP)
