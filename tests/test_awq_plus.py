"""Methods "awq+" and "gptq": what is rounded when, for which inputs, and that it pays."""

from __future__ import annotations

import copy

import pytest
import torch
from test_quantizer import VARIANTS, ids, logits, run, small_model
from torch import nn

from awq_ext import AwqLinear, block, ops
from awq_ext.calibrate import BlockInputs, Statistics

pytestmark = pytest.mark.usefixtures("float32_products")

READERS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def inputs_of(model: nn.Module) -> BlockInputs:
    with torch.no_grad():
        return BlockInputs(model, list(model.model.layers), ids())


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("kind", VARIANTS)
def test_codes_chosen_together_lose_less(kind: str) -> None:
    model = small_model(kind)
    before = logits(model, ids())
    models = {method: run(copy.deepcopy(model), method=method) for method in ("rtn", "gptq", "awq", "awq+")}
    error = {method: float((logits(m, ids()) - before).square().mean()) for method, m in models.items()}
    assert error["gptq"] < 0.9 * error["rtn"] and error["awq+"] < 0.9 * error["awq"]
    for method in ("gptq", "awq+"):
        report = models[method].awq_report
        assert (report.method, len(report.quantized)) == (method, 14)
        assert sum(isinstance(m, AwqLinear) for m in models[method].modules()) == 14
        assert all(x.error is not None and x.error_rtn is not None for x in report.quantized)


def test_gptq_leaves_everything_else_as_it_is_and_folds_nothing() -> None:
    model = small_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters() if "_proj" not in name}
    run(model, method="gptq")
    assert model.awq_report.folds == []
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_awq_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compensated")

    monkeypatch.setattr(ops, "quantize_compensated", refuse)
    run(small_model("llama"), method="awq")
    with pytest.raises(AssertionError, match="compensated"):
        run(small_model("llama"), method="awq+")


@pytest.mark.parametrize("method", ["awq+", "gptq"])
def test_same_input_same_bytes(method: str) -> None:
    first, second = (run(small_model("llama"), method=method).state_dict() for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_linears_are_taken_in_the_order_of_the_block() -> None:
    model = small_model("llama")
    block = model.model.layers[0]
    linears = linears_of(block)
    backwards = dict(reversed(linears.items()))
    with torch.no_grad():
        assert inputs_of(model).reading_order(0, block, backwards) == READERS


class Mixture(nn.Module):
    """Three experts of two linears, the first two and the last one for tokens whose first channel is large enough,
    and a product of two branches, one of which is called before the experts and used after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        gate = self.gate(x)
        for at_least, expert in zip((-1.0, 1e9, 0.5), self.experts, strict=True):
            row, token = torch.where(x[..., 0] > at_least)
            if len(row):
                y = expert["down"](expert["up"](x[row, token]).relu())
                x = x.index_put((row, token), y, accumulate=True)
        return self.out(gate.sigmoid() * x) + x


def mixture_inputs(*lengths: int) -> BlockInputs:
    model = small_model("llama")
    with torch.no_grad():
        inputs = BlockInputs(model, list(model.model.layers), [ids()[0, :length] for length in lengths])
    generator = torch.Generator().manual_seed(0)
    inputs.quantized = [torch.randn(*hidden.shape[:2], 8, generator=generator) for hidden in inputs.hidden]
    inputs.hidden = [inputs.quantized[0][:, :, :] - 10.0]  # in the first batch no token is for any expert
    return inputs


ORDER = [
    ["gate"],
    ["out"],
    ["experts.0.up"],
    ["experts.0.down"],
    ["experts.1.up"],
    ["experts.1.down"],
    ["experts.2.up"],
    ["experts.2.down"],
]


@torch.no_grad()
def test_experts_without_tokens_have_a_place_in_the_order() -> None:
    mixture = Mixture()
    linears = linears_of(mixture)
    assert mixture_inputs(5).reading_order(0, mixture, linears) == ORDER[:1] + ORDER[2:] + ORDER[1:2]


@pytest.mark.parametrize("order", [ORDER, ORDER[:1] + ORDER[2:] + ORDER[1:2]])
@torch.no_grad()
def test_every_batch_runs_the_block_once_and_waits_for_each_linear(order: list[list[str]]) -> None:
    """Also where batches call different experts. Order only decides who waits for whom; statistics are complete if it
    is the block's own."""
    torch.manual_seed(0)
    mixture = Mixture()
    linears = linears_of(mixture)
    inputs = mixture_inputs(1, 2, 3, 4, 5, 6)
    before = [x.clone() for x in inputs.quantized]
    stand_ins = {name: nn.Linear(8, 8) for name in linears}
    calls = dict.fromkeys(linears, 0)
    seen: dict[str, object] = {}

    def count(name: str) -> object:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name, linear in linears.items():
        linear.register_forward_hook(count(name))

    def quantize(names: list[str], statistics: Statistics) -> dict[str, nn.Module]:
        seen[names[0]] = statistics.result(names[0])[1], statistics.tokens
        return {name: stand_ins[name] for name in names}

    done = inputs.quantize_in_turn(0, mixture, linears, order, quantize)
    assert done.keys() == seen.keys() == linears.keys() - {"experts.1.up", "experts.1.down"}
    assert all("forward" not in vars(linear) for linear in linears.values())
    assert calls["gate"] == len(before) and calls["experts.2.up"] < len(before)
    for name in done:
        mixture.set_submodule(name, stand_ins[name])
    read: dict[str, list[torch.Tensor]] = {name: [] for name in done}
    for name in done:
        stand_ins[name].register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0].reshape(-1, 8)))
    for x, after in zip(before, inputs.quantized, strict=True):
        assert torch.equal(mixture(x), after)
    if order is not ORDER:
        for name, (gram, tokens) in seen.items():
            x = torch.cat(read[name])
            assert tokens == len(x)
            torch.testing.assert_close(gram, x.T @ x / len(x))


@torch.no_grad()
def test_an_error_in_the_middle_leaves_the_block_as_it_was() -> None:
    mixture = Mixture()
    linears = linears_of(mixture)

    def fail(names: list[str], statistics: Statistics) -> dict[str, nn.Module]:
        raise RuntimeError("in the middle")

    inputs = mixture_inputs(3, 4)
    x = inputs.quantized[0].clone()
    want = mixture(x)
    with pytest.raises(RuntimeError, match="in the middle"):
        inputs.quantize_in_turn(0, mixture, linears, ORDER, fail)
    assert torch.equal(mixture(x), want)


def test_each_linear_is_rounded_for_the_inputs_that_the_quantized_model_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("llama")
    grams: list[torch.Tensor] = []
    real = ops.quantize_compensated

    def watch(w: torch.Tensor, gram: torch.Tensor, **options: object) -> object:
        grams.append(gram)
        return real(w, gram, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "quantize_compensated", watch)
    monkeypatch.setattr(block, "RIDGE", 0.0)
    run(model, method="gptq")
    order = [name for names in READERS for name in names]
    seen: dict[str, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for name in order:
            read = seen.setdefault(f"{index}.{name}", [])
            layer.get_submodule(name).register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
    logits(model, ids())
    for gram, read in zip(grams, seen.values(), strict=True):
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in read]).double()
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(gram.diagonal().max()))
