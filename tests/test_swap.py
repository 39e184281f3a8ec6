"""replace_linears: what it replaces, what it leaves, and what it says about both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from awq_ext import AwqLinear, replace_linears
from awq_ext.swap import Decision, excluded_by

GROUP = 16


class Special(nn.Linear):
    """A subclass with a meaning of its own, which a plain AwqLinear would lose."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)  # out_features not a multiple of 8
        self.gate_proj = nn.Linear(32, 48)
        self.odd = nn.Linear(24, 32)  # in_features not a multiple of the group size
        self.special = Special(32, 32)
        self.experts = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.Sequential(nn.Linear(48, 32))])
        self.attention = nn.MultiheadAttention(32, 2)  # its out_proj is a subclass that it reads the weight of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(32, 16)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AwqLinear)}


FITTING = {f"layers.{i}.{name}" for i in (0, 1) for name in ("gate_proj", "experts.0", "experts.1.0")}


def test_replaces_every_linear_that_fits_and_nothing_else(model: Model) -> None:
    before = kinds(model)
    original = copy.deepcopy(model)
    replace_linears(model, GROUP)
    assert quantized(model) == FITTING
    for name, kind in kinds(model).items():
        assert kind is (AwqLinear if name in FITTING else before[name]), name
    for name in FITTING:
        linear, layer = original.get_submodule(name), model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and isinstance(layer, AwqLinear)
        want = AwqLinear.from_linear(linear, GROUP)
        assert layer.state_dict().keys() == want.state_dict().keys()
        for key, value in want.state_dict().items():
            assert torch.equal(layer.state_dict()[key], value)
        x = torch.randn(5, linear.in_features)
        assert (layer(x) - linear(x)).abs().max() < 0.25
    x = torch.randn(3, 2, 32)
    assert torch.equal(model.layers[0].attention(x, x, x)[0], original.layers[0].attention(x, x, x)[0])


def test_decisions_name_every_linear_in_order(model: Model) -> None:
    decisions = replace_linears(model, GROUP)
    block = [
        ("gate", 32, 4, "out_features 4 is not a multiple of 8"),
        ("gate_proj", 32, 48, None),
        ("odd", 24, 32, "in_features 24 is not a multiple of group_size 16"),
        ("experts.0", 32, 32, None),
        ("experts.1.0", 48, 32, None),
    ]
    want = [Decision(f"layers.{i}.{name}", k, n, reason) for i in (0, 1) for name, k, n, reason in block]
    assert decisions == [*want, Decision("lm_head", 32, 16, "excluded by name ('lm_head')")]
    assert str(decisions[0]) == "keep layers.0.gate [4, 32]: out_features 4 is not a multiple of 8"
    assert str(decisions[1]) == "quantize layers.0.gate_proj [48, 32]"


def test_a_dry_run_says_the_same_and_changes_nothing(model: Model) -> None:
    before, state = kinds(model), copy.deepcopy(model.state_dict())
    decisions = replace_linears(model, GROUP, dry_run=True)
    assert kinds(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert replace_linears(model, GROUP) == decisions


def test_names_are_excluded_by_substring(model: Model) -> None:
    """AutoAWQ's rule, with its well-known edge: "gate" excludes gate_proj too."""
    replace_linears(model, GROUP, modules_to_not_convert=["gate", "layers.1.experts.1"])
    assert quantized(model) == {"layers.0.experts.0", "layers.0.experts.1.0", "layers.1.experts.0", "lm_head"}
    assert excluded_by("layers.0.gate_proj", ["up", "gate"]) == "gate"
    assert excluded_by("layers.0.gate_proj", ["Gate", "gate_proj.weight", "layers.00"]) is None
    assert excluded_by("a.b", ["a?b", ".*", "a*"]) is None  # literal, not a pattern
    assert excluded_by("anything", []) is None


def test_the_name_rules_may_be_any_iterable_but_not_a_string(model: Model) -> None:
    before = kinds(model)
    with pytest.raises(ValueError, match="modules_to_not_convert must be a list of names, got the string 'lm_head'"):
        replace_linears(model, GROUP, modules_to_not_convert="lm_head")
    assert kinds(model) == before
    decisions = replace_linears(model, GROUP, modules_to_not_convert=(name for name in ("experts", "lm_head")))
    assert quantized(model) == {"layers.0.gate_proj", "layers.1.gate_proj"}  # a generator is not used up by one name
    assert sum(d.reason == "excluded by name ('experts')" for d in decisions) == 4


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [8, 48, -1])
def test_options_reach_the_layers(model: Model, zero_point: bool, group_size: int) -> None:
    replace_linears(model, group_size, zero_point=zero_point)
    names = quantized(model)
    if group_size == 48:
        assert names == {"layers.0.experts.1.0", "layers.1.experts.1.0"}
    else:
        assert {"layers.0.odd", "layers.0.gate_proj"} <= names
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, AwqLinear)
        assert layer.group_size == (layer.in_features if group_size == -1 else group_size)
        zeros = layer.state_dict()["qzeros"]
        assert bool((zeros == -0x77777778).all()) is not zero_point  # 0x88888888: every zero is 8


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_size_that_makes_no_sense_fits_nothing(model: Model, group_size: int) -> None:
    decisions = replace_linears(model, group_size)
    assert not quantized(model)
    assert all(
        d.reason is not None and ("group_size must be positive" in d.reason or "excluded" in d.reason)
        for d in decisions
    )


def test_a_model_that_is_itself_a_linear() -> None:
    linear = nn.Linear(32, 16)
    assert replace_linears(linear, GROUP, dry_run=True) == [Decision("", 32, 16, None)]
    with pytest.raises(ValueError, match=r"use AwqLinear\.from_linear"):
        replace_linears(linear, GROUP)
    assert replace_linears(nn.Linear(30, 16), GROUP)[0].reason is not None  # nothing to replace, nothing to refuse
    assert replace_linears(nn.Linear(32, 16).to("meta"), GROUP, dry_run=True)[0].reason is None


def test_a_layer_with_two_names_stays_one_layer() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Linear(32, 32)})
    decisions = replace_linears(model, GROUP)
    assert [d.name for d in decisions] == ["a", "b.0", "c"]
    assert isinstance(model["a"], AwqLinear) and model["a"] is model["b"][0] and model["a"] is not model["c"]
    block = nn.Sequential(nn.Linear(32, 32))
    model = nn.ModuleDict({"a": block, "b": block})
    replace_linears(model, GROUP)
    assert model["a"] is model["b"] and isinstance(model["a"][0], AwqLinear)


def test_a_weight_that_is_not_finite_is_named_and_the_model_stays_whole(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].experts[0].weight[3, 5] = float("nan")
    before = kinds(model)
    with pytest.raises(RuntimeError, match=r"layers\.1\.experts\.0\.weight: .*row 3"):
        replace_linears(model, GROUP)
    assert kinds(model) == before


def test_models_without_linears_and_models_that_are_done(model: Model) -> None:
    assert replace_linears(nn.Sequential(nn.ReLU()), GROUP) == []
    replace_linears(model, GROUP)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    decisions = replace_linears(model, GROUP)
    assert all(d.reason is not None for d in decisions)  # only what was left the first time is seen again
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_and_dtypes_are_kept(model: Model) -> None:
    model.half().eval()
    model.layers[1].train()
    replace_linears(model, GROUP)
    for name in FITTING:
        layer = model.get_submodule(name)
        assert layer.training is name.startswith("layers.1")
        assert layer.scales.dtype == torch.float16


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    replace_linears(model, GROUP)
    assert quantized(model) == FITTING
    assert all(buffer.is_meta for buffer in model.buffers())
