"""Methods "awq+" and "gptq": what is rounded when, for which inputs, and that it pays."""

from __future__ import annotations

import copy

import pytest
import torch
from test_quantizer import VARIANTS, ids, logits, run, small_model
from torch import nn

from awq_ext import AwqLinear, ops
from awq_ext.calibrate import BlockInputs

READERS = [
    [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
    [["self_attn.o_proj"]],
    [["mlp.gate_proj", "mlp.up_proj"]],
    [["mlp.down_proj"]],
]


def inputs_of(model: nn.Module) -> BlockInputs:
    with torch.no_grad():
        inputs = BlockInputs(model, list(model.model.layers), ids())
    inputs.quantized = inputs.hidden
    return inputs


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
        assert inputs_of(model).stages(0, block, backwards) == READERS


class Mixture(nn.Module):
    """Two experts of two linears each, of which the second gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        for expert in (self.experts[0], self.experts[2]):
            x = x + expert["down"](expert["up"](x).relu())
        return x


def test_experts_are_one_stage_and_those_without_tokens_come_last() -> None:
    inputs = inputs_of(small_model("llama"))
    inputs.quantized = torch.randn(2, 3, 8)
    mixture = Mixture()
    linears = linears_of(mixture)
    with torch.no_grad():
        assert inputs.stages(0, mixture, linears) == [
            [["experts.0.up"], ["experts.2.up"]],
            [["experts.0.down"], ["experts.2.down"]],
            [["experts.1.up"], ["experts.1.down"]],
        ]
        assert inputs.quantized_statistics(0, mixture, {"up": mixture.experts[1]["up"]})["up"].tokens == 0


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
    run(model, method="gptq")
    order = [name for stage in READERS for names in stage for name in names]
    seen: dict[str, list[torch.Tensor]] = {}
    for layer, block in enumerate(model.model.layers):
        for name in order:
            read = seen.setdefault(f"{layer}.{name}", [])
            block.get_submodule(name).register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
    logits(model, ids())
    for gram, read in zip(grams, seen.values(), strict=True):
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in read]).double()
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(gram.diagonal().max()))
