"""AwqLinear as a module: what it computes, and everything that torch does to modules."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import reference as ref
import torch
from reference import randn
from torch import Tensor, nn

import awq_ext
from awq_ext import AwqLinear, ops

K, N, GROUP = 64, 24, 16
BUFFERS = ["qweight", "qzeros", "scales", "bias"]
UNEVEN = 4  # a group size of which strips would put two into a word


def make(bias: bool = True, group_size: int = GROUP, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(K, N, bias=bias).to(dtype)


# --- from_linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_linear_stays_within_half_a_step(zero_point: bool, group_size: int, dtype: torch.dtype) -> None:
    linear = make(dtype=dtype)
    layer = AwqLinear.from_linear(linear, group_size, zero_point=zero_point)
    stored = torch.float16 if dtype == torch.float32 else dtype
    assert layer.scales.dtype == stored and layer.bias is not None and layer.bias.dtype == stored
    group = K if group_size == -1 else group_size
    assert layer.group_size == group and (layer.in_features, layer.out_features) == (K, N)
    assert layer.layout == "strips" and all(buffer.is_contiguous() for buffer in layer.buffers())
    state = layer.state_dict()
    assert state["qweight"].shape == (K, N // 8) and state["qweight"].dtype == torch.int32
    assert state["qzeros"].shape == (K // group, N // 8) and state["qzeros"].dtype == torch.int32
    assert state["scales"].shape == (K // group, N) and state["bias"].shape == (N,)
    assert all(tensor.is_contiguous() for tensor in state.values())

    q, z, s = ref.unpack(state["qweight"]), ref.unpack(state["qzeros"]), state["scales"].t()
    ref.check_quantized(linear.weight.detach(), q, s, z, group, zero_point)
    dense = ref.Weight(q, s, z, group).dense
    assert torch.equal(layer.dequantize(torch.float32).double(), dense)  # float32 holds (q - z) * s of a half exactly
    assert layer.dequantize().dtype == stored
    steps = s.double().repeat_interleave(group, 1)
    assert ((dense - linear.weight.double()).abs() <= steps * (0.5 + 15 * ref.UNIT_ROUNDOFF[stored])).all()

    x = randn(5, K, dtype=dtype)
    y = layer(x)
    rounding = None if dtype == torch.float32 else ref.digit_rounding(x, group, 32639)  # less than x's own type loses
    error, bound = ref.linear_bound(x, y, dense, layer.bias, rounding=rounding)
    assert y.dtype == dtype and (error <= bound).all()
    # and the layer is near the one it stands for: the mean square of rounding errors is s^2 / 12
    off = (y.double() - linear(x).double()).square().mean().sqrt()
    expected = (x.double().square() @ (steps.square() / 12).t()).mean().sqrt()
    assert off < 1.5 * expected + 4 * ref.UNIT_ROUNDOFF[dtype]


def test_from_linear_takes_dtype_and_range() -> None:
    linear = make()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = AwqLinear.from_linear(linear, GROUP, dtype=dtype)
        assert layer.bias is not None and layer.scales.dtype == layer.bias.dtype == dtype
    whole = torch.tensor([-1.0, 1.0]).expand(N, K // GROUP, 2)
    layer = AwqLinear.from_linear(linear, GROUP, range=whole, dtype=torch.float32)
    assert torch.allclose(layer.scales, torch.full((K // GROUP, N), 2 / 15))
    zeros = AwqLinear.from_linear(linear, GROUP, zero_point=False).state_dict()["qzeros"]
    assert (zeros == -0x77777778).all()  # 0x88888888


def test_from_linear_shares_nothing_with_the_linear() -> None:
    linear = make(dtype=torch.float16)
    before = linear.weight.detach().clone()
    layer = AwqLinear.from_linear(linear, GROUP)
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad
    want = layer(randn(2, K))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(layer(randn(2, K)), want)
    assert not want.requires_grad


def test_from_linear_keeps_the_mode_and_the_device() -> None:
    assert AwqLinear.from_linear(make().train(), GROUP).training
    assert not AwqLinear.from_linear(make().eval(), GROUP).training
    meta = AwqLinear.from_linear(make().to("meta"), GROUP)
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}
    assert AwqLinear.from_linear(make(bias=False), GROUP).bias is None


def test_from_linear_refuses() -> None:
    with pytest.raises(ValueError, match="AwqLinear: in_features 64 is not a multiple of group_size 48"):
        AwqLinear.from_linear(make(), 48)
    with pytest.raises(ValueError, match="AwqLinear: out_features 20 is not a multiple of 8"):
        AwqLinear.from_linear(nn.Linear(K, 20), GROUP)
    for bad in (float("nan"), float("inf")):
        linear = make()
        with torch.no_grad():
            linear.weight[3, 7] = bad
        with pytest.raises(RuntimeError, match=r"row 3 of w"):
            AwqLinear.from_linear(linear, GROUP)
    with pytest.raises(RuntimeError, match=r"w must be .*float64"):
        AwqLinear.from_linear(make(dtype=torch.float64), GROUP)
    with pytest.raises(RuntimeError, match="range must be"):
        AwqLinear.from_linear(make(), GROUP, range=torch.ones(N, 2))


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size", "message"),
    [
        (64, 24, 48, "in_features 64 is not a multiple of group_size 48"),
        (64, 24, 128, "in_features 64 is not a multiple of group_size 128"),
        (64, 20, 16, "out_features 20 is not a multiple of 8"),
        (64, 0, 16, "out_features 0 is not a multiple of 8"),
        (0, 24, 16, "in_features 0 is not a multiple of group_size 16"),
        (-16, 24, 16, "in_features -16"),
        (0, 24, -1, "in_features 0"),
        (64, 24, 0, "group_size must be positive, or -1 for one group over in_features, got 0"),
        (64, 24, -2, "group_size must be positive, or -1 for one group over in_features, got -2"),
    ],
)
def test_shapes_that_do_not_fit(in_features: int, out_features: int, group_size: int, message: str) -> None:
    for device in (None, "meta"):
        with pytest.raises(ValueError, match=f"AwqLinear: {message}"):
            AwqLinear(in_features, out_features, group_size=group_size, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"AwqLinear: dtype, that of scales, must be float32, .* got {dtype}"):
        AwqLinear(64, 24, group_size=16, dtype=dtype)


def test_construction_on_the_meta_device() -> None:
    layer = AwqLinear(K, N, group_size=GROUP, device="meta", dtype=torch.bfloat16)
    assert {name: (tuple(b.shape), b.dtype, b.device.type) for name, b in layer.named_buffers()} == {
        "qweight": ((K, N // 8), torch.int32, "meta"),
        "qzeros": ((K // GROUP, N // 8), torch.int32, "meta"),
        "scales": ((K // GROUP, N), torch.bfloat16, "meta"),
        "bias": ((N,), torch.bfloat16, "meta"),
    }
    with torch.device("meta"):  # as transformers and accelerate build their skeletons
        layer = AwqLinear(K, N, bias=False, group_size=-1)
    assert layer.qweight.is_meta and layer.bias is None and layer.group_size == K
    y = layer(torch.empty(2, 3, K, device="meta"))
    assert y.is_meta and y.shape == (2, 3, N)


def test_defaults_are_those_of_autoawq() -> None:
    layer = AwqLinear(256, 16)
    assert layer.group_size == 128 and layer.scales.dtype == torch.float16 and layer.bias is not None


# --- state ----------------------------------------------------------------------------------------------------------


def test_names_and_kinds_of_the_state() -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    assert list(layer.state_dict()) == BUFFERS
    assert list(dict(layer.named_buffers())) == BUFFERS
    assert list(layer.parameters()) == []
    assert list(AwqLinear.from_linear(make(bias=False), GROUP).state_dict()) == BUFFERS[:3]
    model = nn.Sequential(layer)
    assert list(model.state_dict()) == [f"0.{name}" for name in BUFFERS]


def test_load_state_dict() -> None:
    source = AwqLinear.from_linear(make(), GROUP)
    x, state = randn(3, K), source.state_dict()
    want = source(x)

    filled = AwqLinear(K, N, group_size=GROUP)
    assert filled.load_state_dict(state).missing_keys == []
    assert torch.equal(filled(x), want)
    assert filled.qweight.data_ptr() != source.qweight.data_ptr()

    assigned = AwqLinear(K, N, group_size=GROUP, device="meta", dtype=torch.bfloat16)
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(x), want)
    assert assigned.scales.dtype == torch.float16 and assigned.bias is not None and source.bias is not None
    assert assigned.layout == "strips" and assigned.bias.data_ptr() == source.bias.data_ptr()

    cast = AwqLinear(K, N, group_size=GROUP, dtype=torch.float32)  # without assign the buffer keeps its own dtype
    cast.load_state_dict(source.state_dict())
    assert cast.scales.dtype == torch.float32 and torch.equal(cast.scales, source.scales.float())


def test_load_state_dict_refuses_what_does_not_fit() -> None:
    state = AwqLinear.from_linear(make(), GROUP).state_dict()
    without_zeros = {name: value for name, value in state.items() if name != "qzeros"}
    with pytest.raises(RuntimeError, match="qzeros"):
        AwqLinear(K, N, group_size=GROUP).load_state_dict(without_zeros)
    partial = AwqLinear(K, N, group_size=GROUP).load_state_dict(without_zeros, strict=False)
    assert partial.missing_keys == ["qzeros"] and partial.unexpected_keys == []
    with pytest.raises(RuntimeError, match="bias"):
        AwqLinear(K, N, bias=False, group_size=GROUP).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"scales.*\[4, 24\].*\[2, 24\]"):
        AwqLinear(K, N, group_size=2 * GROUP).load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight"):  # a checkpoint that is not quantized
        AwqLinear(K, N, group_size=GROUP).load_state_dict(make().state_dict())


def test_saving_with_torch_and_pickle() -> None:
    layer = AwqLinear.from_linear(make(), GROUP).eval()
    want = layer(randn(3, K))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = AwqLinear(K, N, group_size=GROUP)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(randn(3, K)), want)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(copied(randn(3, K)), want) and not copied.training
        assert copied.qweight.data_ptr() != layer.qweight.data_ptr()
        assert (copied.group_size, copied.in_features, copied.out_features) == (GROUP, K, N)
    shallow = copy.copy(layer)
    assert shallow.qweight.data_ptr() == layer.qweight.data_ptr()


# --- what torch does to modules -------------------------------------------------------------------------------------


def test_casting_touches_scales_and_bias_only() -> None:
    for cast in (
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.to("cpu", torch.bfloat16),
    ):
        layer = AwqLinear.from_linear(make(), GROUP)
        words, zeros = layer.qweight.clone(), layer.qzeros.clone()
        scales = layer.scales.clone()
        assert cast(layer) is layer
        assert layer.scales.dtype == torch.bfloat16 and layer.bias is not None and layer.bias.dtype == torch.bfloat16
        assert torch.equal(layer.scales, scales.bfloat16())
        assert torch.equal(layer.qweight, words) and torch.equal(layer.qzeros, zeros)
        assert layer(randn(2, K)).dtype == torch.float32


def test_float64_layers_are_refused_when_they_compute() -> None:
    layer = AwqLinear.from_linear(make(), GROUP).double()
    with pytest.raises(RuntimeError, match=r"awq_ext::linear: scales must be .*float64"):
        layer(randn(2, K))


def test_moving_to_meta_and_back() -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    state = layer.state_dict()
    layer.to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(randn(2, K)), AwqLinear.from_linear(make(), GROUP)(randn(2, K)))


def test_a_half_loaded_module_is_refused() -> None:
    """A module whose words are still on the meta device must not answer with memory that nobody wrote."""
    layer = AwqLinear.from_linear(make(), GROUP)
    layer.qweight = layer.qweight.to("meta")
    with pytest.raises(RuntimeError, match=r"awq_ext::linear: qweight must be on the device of x"):
        layer(randn(2, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (9, K), (2, 3, K), (2, 1, 3, K)], ids=str)
def test_forward_takes_any_float_and_any_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    x = randn(*shape, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], N)
    error, bound = ref.linear_bound(x, y, layer.dequantize(torch.float32).double(), layer.bias)
    assert (error <= bound).all()


def test_forward_without_zeros_or_bias() -> None:
    layer = AwqLinear.from_linear(make(bias=False), GROUP)
    x = randn(3, K)
    error, bound = ref.linear_bound(x, layer(x), layer.dequantize(torch.float32).double(), None)
    assert (error <= bound).all()


def test_train_and_eval_compute_the_same() -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    assert torch.equal(layer.train()(randn(2, K)), layer.eval()(randn(2, K)))
    assert not layer.training


def test_gradient_flows_through_the_module() -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    x = randn(3, K).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's autograd fallback would warn here
        layer(x).sum().backward()
    want = torch.ones(3, N) @ layer.dequantize(torch.float32)
    assert x.grad is not None and torch.allclose(x.grad, want, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_scripting_and_tracing(bias: bool) -> None:
    layer = AwqLinear.from_linear(make(bias), GROUP)
    x = randn(3, K)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(layer, nn.ReLU())), buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), layer(x).relu())
    assert torch.equal(torch.jit.trace(layer, (x,))(randn(7, K)), layer(randn(7, K)))


def test_repr() -> None:
    layer = AwqLinear.from_linear(make(), GROUP)
    assert repr(layer) == "AwqLinear(in_features=64, out_features=24, bias=True, group_size=16)"
    assert "bias=False" in repr(AwqLinear(K, N, bias=False, group_size=-1, device="meta"))


def test_dequantize_is_what_the_layer_multiplies_with() -> None:
    layer = AwqLinear.from_linear(make(bias=False), GROUP)
    torch.testing.assert_close(layer(torch.eye(K)).t(), layer.dequantize(torch.float32), rtol=1e-6, atol=0)
    state = layer.state_dict()
    assert torch.equal(
        layer.dequantize(torch.float32),
        ops.dequantize(state["qweight"], state["scales"], state["qzeros"], group_size=GROUP, dtype=torch.float32),
    )


def test_parameter_count_tools_see_four_bits() -> None:
    layer = AwqLinear.from_linear(nn.Linear(K, 64, bias=False), GROUP)
    assert layer.layout == "strips"
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) == K * 64 // 2 + (K // GROUP) * 64 * (2 + 0.5)


# --- layouts --------------------------------------------------------------------------------------------------------


def both(bias: bool = True, group_size: int = GROUP) -> tuple[AwqLinear, AwqLinear]:
    """The same layer as a CPU holds it, and in the layout of files."""
    layer = AwqLinear.from_linear(make(bias), group_size)
    return layer, copy.deepcopy(layer).repack("gemm")


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("group_size", [8, 16, 32, -1])
def test_the_layout_is_nobodys_business(group_size: int) -> None:
    strips, gemm = both(group_size=group_size)
    assert (strips.layout, gemm.layout) == ("strips", "gemm") and gemm.qweight.shape == (K, N // 8)
    assert equal_states(strips, gemm) and torch.equal(strips.dequantize(), gemm.dequantize())
    assert equal_states(strips, copy.deepcopy(gemm).repack("strips"))
    x = randn(5, K)
    for layer in (strips, gemm):
        error, bound = ref.linear_bound(x, layer(x), gemm.dequantize(torch.float32).double(), gemm.bias)
        assert (error <= bound).all()
    for dtype in (torch.bfloat16, torch.float32):
        assert equal_states(copy.deepcopy(strips).to(dtype), copy.deepcopy(gemm).to(dtype))


def test_groups_that_strips_cannot_have_stay_as_they_are() -> None:
    layer = AwqLinear.from_linear(make(), UNEVEN)
    assert layer.layout == "gemm" and layer(randn(2, K)).shape == (2, N)
    with pytest.raises(RuntimeError, match=r"strips.*multiple of 8"):
        layer.repack("strips")(randn(2, K))


def test_one_odd_group_is_filled_up() -> None:
    linear = nn.Linear(20, N)
    layer = AwqLinear.from_linear(linear, -1)
    assert layer.layout == "strips" and layer.dequantize().shape == (N, 20)
    assert layer.state_dict()["qweight"].shape == (20, N // 8)
    x = randn(3, 20)
    error, bound = ref.linear_bound(x, layer(x), layer.dequantize(torch.float32).double(), layer.bias)
    assert (error <= bound).all()


def test_a_partial_state_leaves_the_rest() -> None:
    layer, _ = both()
    other = AwqLinear.from_linear(make(seed=1), GROUP)
    before, new = layer.state_dict(), other.state_dict()
    layer.load_state_dict({"scales": new["scales"]}, strict=False)
    after = layer.state_dict()
    assert layer.layout == "strips" and torch.equal(after["scales"], new["scales"])
    assert all(torch.equal(after[name], before[name]) for name in ("qweight", "qzeros", "bias"))


def test_a_skeleton_is_filled_tensor_by_tensor() -> None:
    state = both()[0].state_dict()
    layer = AwqLinear(K, N, group_size=GROUP, device="meta")
    for name in ("qzeros", "bias", "scales"):
        layer.load_state_dict({name: state[name]}, strict=False, assign=True)
        assert layer.layout == "gemm"
    layer.load_state_dict({"qweight": state["qweight"]}, strict=False, assign=True)
    assert layer.layout == "strips" and equal_states(layer, both()[0])


def test_what_leaves_the_cpu_is_gemm() -> None:
    layer = both()[0].to("meta")
    assert layer.layout == "gemm" and layer.qweight.shape == (K, N // 8)
    assert layer.to_empty(device="cpu").layout == "strips"


def test_a_state_dict_is_a_copy_and_a_shared_layer_stays_shared() -> None:
    layer = both()[0]
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert torch.equal(model.state_dict()["a.qweight"], model.state_dict()["b.qweight"])
    state = layer.state_dict()
    state["qweight"].zero_()
    assert layer.state_dict()["qweight"].any()
    layer.share_memory()
    assert layer.layout == "strips" and layer.qweight.is_shared()


# --- activation -----------------------------------------------------------------------------------------------------


def error_of(layer: AwqLinear, x: Tensor) -> float:
    """Root mean square of the error, as a share of that of the result."""
    want = x.double() @ layer.dequantize(torch.float32).double().t()
    return float((layer(x).double() - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.usefixtures("matmul_precision")
def test_activation_says_how_exactly_inputs_are_rounded() -> None:
    layer = AwqLinear.from_linear(nn.Linear(1024, 64, bias=False))
    x = randn(8, 1024)
    exact = error_of(layer, x)
    try:
        awq_ext.set_cpu_activation("int8")
        coarse = error_of(layer, x)
        layer.activation = "int16"  # what the layer says comes first
        middle = error_of(layer, x)
    finally:
        awq_ext.set_cpu_activation("exact")
    assert exact < 1e-6 < 5e-6 < middle < 1e-4 < 3e-3 < coarse < 1.5e-2
    layer.activation = None
    assert error_of(layer, x) == exact
    torch.set_float32_matmul_precision("high")
    assert error_of(layer, x) == middle
    layer.activation = "exact"
    assert error_of(layer, x) == exact
    with pytest.raises(ValueError, match=r"expected one of exact, int16, int8, got 'int4'"):
        awq_ext.set_cpu_activation("int4")


def test_a_scripted_layer_keeps_its_activation() -> None:
    layer = AwqLinear.from_linear(nn.Linear(256, 32))
    layer.activation = "int8"
    x = randn(3, 256)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


def test_explain_says_which_kernel_and_why() -> None:
    strips, gemm = both()
    assert awq_ext.explain(strips, 1).startswith("strips at level ")
    assert "1 pieces of 32 columns" in awq_ext.explain(strips, 1) and "24 bits" in awq_ext.explain(strips, 1)
    assert "int16" in awq_ext.explain(strips, 1, torch.bfloat16)
    strips.activation = "int8"
    assert "int8" in awq_ext.explain(strips, 512)
    assert awq_ext.explain(gemm, 1).startswith("decode at level ") and "many rows" in awq_ext.explain(gemm, 64)
    assert "float64" in awq_ext.explain(strips, 1, torch.float64)
    assert "gemm on meta" in awq_ext.explain(gemm.to("meta"), 1)


# --- several linears of one input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, UNEVEN, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_concatenated_layers_give_the_same_bits_in_one_call(bias: bool, group_size: int, dtype: torch.dtype) -> None:
    linears = [nn.Linear(K, n, bias=bias) for n in (24, 8, 40)]
    layers = [AwqLinear.from_linear(linear, group_size) for linear in linears]
    states = [copy.deepcopy(layer.state_dict()) for layer in layers]
    together = AwqLinear.concatenate(layers)
    for m in (0, 1, 5):
        x = randn(m, K).to(dtype)
        parts = together(x).split([24, 8, 40], -1)
        for part, layer in zip(parts, layers, strict=True):
            assert torch.equal(part, layer(x))
    assert torch.equal(torch.jit.script(together)(x), together(x))
    assert (together.out_features, together.layout) == (72, layers[0].layout)
    for layer, state in zip(layers, states, strict=True):
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())


def test_what_cannot_be_concatenated() -> None:
    def layer(in_features: int = K, group_size: int = GROUP, **options: object) -> AwqLinear:
        return AwqLinear.from_linear(nn.Linear(in_features, 8, bias=bool(options.pop("bias", True))), group_size)

    other = layer()
    other.activation = "int8"
    cast = layer().to(torch.bfloat16)
    with pytest.raises(ValueError, match="at least one layer"):
        AwqLinear.concatenate([])
    for wrong, message in [
        (layer(in_features=2 * K), "in_features must be the same: 64 of layer 0, 128 of layer 1"),
        (layer(group_size=32), "group_size must be the same: 16 of layer 0, 32 of layer 1"),
        (layer(bias=False), "dtype of the bias must be the same: torch.float16 of layer 0, None of layer 1"),
        (other, "activation must be the same"),
        (cast, "dtype of scales must be the same"),
        (layer().to("meta"), "device must be the same: cpu of layer 0, meta of layer 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            AwqLinear.concatenate([layer(), wrong])
