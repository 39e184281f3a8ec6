"""Methods "awq+" and "gptq": what is rounded when, for which inputs, and that it pays."""

from __future__ import annotations

import copy
from typing import Any

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


@pytest.mark.parametrize("method", ["awq", "awq+", "gptq"])
def test_codes_chosen_together_have_scales_and_ranges_for_that(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are searched by what the codes do not make up for, as if inputs told nothing about one another."""
    seen: dict[str, list[bool]] = {"scale_losses": [], "search_clip": []}
    for name, at in (("scale_losses", 2), ("search_clip", 1)):
        search = getattr(ops, name)

        def look(*args: torch.Tensor, name: str = name, at: int = at, search: Any = search, **kwargs: Any) -> object:
            seen[name].append(args[at].dim() == 1)  # a diagonal
            return search(*args, **kwargs)

        monkeypatch.setattr(ops, name, look)
    run(small_model("llama"), method=method)
    assert len(seen["search_clip"]) == 14 and set(seen["search_clip"]) == {method != "awq"}
    assert set(seen["scale_losses"]) == {"awq": {False}, "awq+": {True}, "gptq": set()}[method]


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


# --- making up for what is quantized before -------------------------------------------------------------------------


def drifted(tokens: int = 400, k: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear reads in the original model, and what it reads behind quantized layers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    wrong = 0.05 * torch.randn(k, k, generator=generator)
    return x, x + x @ wrong + 0.1 * torch.randn(tokens, k, generator=generator)


def test_the_correction_is_the_weight_that_is_best_for_the_quantized_models_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = drifted()
    w, ridge = torch.randn(10, 24, generator=torch.Generator().manual_seed(1)), 0.03
    statistics = Statistics()
    for slot, (a, b) in enumerate(zip(y.split(100), x.split(100), strict=True)):
        statistics.add(a, slot, b)
    gram, drift = statistics.result("w")[1], statistics.drift
    assert drift is not None
    torch.testing.assert_close(drift, y.T @ (x - y) / len(x), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(block, "PROPAGATION", 1.0)
    got = block._correction(gram + ridge * torch.eye(24), drift)(w)
    # |y v - x w|^2 / tokens + ridge |v - w|^2 as one least squares problem
    left = torch.cat([y / len(y) ** 0.5, ridge**0.5 * torch.eye(24)]).double()
    right = torch.cat([x @ w.T / len(x) ** 0.5, ridge**0.5 * w.T]).double()
    torch.testing.assert_close(got, torch.linalg.lstsq(left, right).solution.T.float(), rtol=1e-3, atol=1e-3)
    monkeypatch.undo()
    error = [
        float((y @ v.T - x @ w.T).square().sum())
        for v in (w, block._correction(gram + ridge * torch.eye(24), drift)(w), got)
    ]
    assert error[0] > 2 * error[1] > 2 * error[2]


def test_a_linear_that_reads_nothing_has_no_correction() -> None:
    w = torch.randn(3, 4)
    assert torch.equal(block._correction(torch.zeros(4, 4), torch.zeros(4, 4))(w), w)


@torch.no_grad()
def test_only_linears_that_read_every_token_are_corrected() -> None:
    """A router may send other tokens to an expert than in the original, so there is nothing to compare them with."""
    torch.manual_seed(0)
    mixture, inputs = Mixture(), mixture_inputs(3, 4, 5)
    linears = linears_of(mixture)
    drifts: dict[str, torch.Tensor | None] = {}

    def quantize(names: list[str], statistics: Statistics) -> dict[str, nn.Module]:
        drifts[names[0]] = statistics.drift
        return {name: linears[name] for name in names}

    def original(name: str) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        kept = {at: torch.full((length, 8), 2.0) for at, length in enumerate((3, 4, 5)) if (name, at) != ("out", 1)}
        return kept, torch.tensor(2.0)

    before = [x.clone() for x in inputs.quantized]
    inputs.quantize_in_turn(0, mixture, linears, ORDER, quantize, original)
    y = torch.cat([x.flatten(0, 1) for x in before])
    drift = drifts.pop("gate")
    assert drift is not None and len(drifts) == 5
    torch.testing.assert_close(drift, y.T @ (1 - y) / len(y), rtol=1e-4, atol=1e-5)
    reads_some = [name for name, drift in drifts.items() if name != "experts.0.up" and drift is not None]
    assert not reads_some, "experts, and a linear that is not known for one batch"


def test_taking_errors_back_brings_a_model_nearer_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    want, errors = logits(model, ids()), []
    for part in (0.0, block.PROPAGATION):
        monkeypatch.setattr(block, "PROPAGATION", part)
        done = run(copy.deepcopy(model), method="awq+", w_bit=3, tune_steps=0)
        errors.append(float((logits(done, ids()) - want).square().mean()))
    assert errors[1] < 0.97 * errors[0], errors
