"""Methods "awq+" and "gptq": what is rounded when, for which inputs, and that it pays."""

from __future__ import annotations

import copy

import pytest
import torch
from test_quantizer import VARIANTS, ids, logits, run, small_model
from torch import nn

from awq_ext import AwqLinear, correction, ops
from awq_ext.calibrate import BlockInputs, Originals, Statistics
from awq_ext.topology import adders, reading_order

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
        assert reading_order(inputs_of(model), 0, block, backwards) == READERS


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
    assert reading_order(mixture_inputs(5), 0, mixture, linears) == ORDER[:1] + ORDER[2:] + ORDER[1:2]


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

    def quantize(names: list[str], statistics: Statistics, held_out: Statistics) -> dict[str, nn.Module]:
        assert not held_out.tokens
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

    def fail(*_: object) -> dict[str, nn.Module]:
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
    monkeypatch.setattr(correction, "RIDGE", 0.0)
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


def drifted(tokens: int, seed: int = 0, k: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear reads in the original model, and what it reads behind quantized layers."""
    mixing, wrong = (torch.randn(2, k, k, generator=torch.Generator().manual_seed(9)) * scale for scale in (1.0, 0.05))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ mixing[0]
    return x, x + x @ wrong[1] + 0.1 * torch.randn(tokens, k, generator=generator)


def statistics_of(y: torch.Tensor, missing: torch.Tensor) -> Statistics:
    statistics = Statistics()
    for slot, (a, b) in enumerate(zip(y.split(100), missing.split(100), strict=True)):
        statistics.add(a, slot, b)
    return statistics


def solved(y: torch.Tensor, wanted: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The v with the least |y v - wanted|^2 / tokens + ridge |v - w|^2, as one least squares problem."""
    gram = y.T @ y / len(y)
    ridge = correction.TIMES * correction.RIDGE * len(gram) / len(y) * float(gram.diagonal().mean())
    left = torch.cat([y / len(y) ** 0.5, ridge**0.5 * torch.eye(len(gram))]).double()
    right = torch.cat([wanted / len(y) ** 0.5, ridge**0.5 * w.T]).double()
    return torch.linalg.lstsq(left, right).solution.T.float()


@pytest.mark.parametrize("added", [False, True])
def test_a_corrected_weight_is_the_best_for_what_the_quantized_model_reads(added: bool) -> None:
    """With a share of it that is the best for tokens held out, which a search of the shares shows."""
    generator = torch.Generator().manual_seed(1)
    w = [torch.randn(n, 24, generator=generator) for n in ((24,) if added else (10, 6))]
    turn = 0.02 * torch.randn(24, 24, generator=generator)  # what the hidden states lack besides

    def lacks(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y) @ w[0].T + y @ turn if added else x - y

    def wanted(x: torch.Tensor, y: torch.Tensor, i: int) -> torch.Tensor:
        return y @ w[i].T + (lacks(x, y) if added else lacks(x, y) @ w[i].T)

    (x, y), (held_x, held_y) = drifted(200), drifted(300, seed=5)
    held_x = held_y + 0.6 * (held_x - held_y)  # less is lacking there
    statistics, held_out = statistics_of(y, lacks(x, y)), statistics_of(held_y, lacks(held_x, held_y))
    gram = statistics.result("w")[1]
    whole = [solved(y, wanted(x, y, i), w[i]) for i in range(len(w))]

    def error(weights: list[torch.Tensor]) -> float:
        parts = [held_y @ v.T - wanted(held_x, held_y, i) for i, v in enumerate(weights)]
        return sum(float(part.square().sum()) for part in parts)

    got = correction.corrected(gram, statistics, held_out, w, added)
    tried = [[a + s / 100 * (b - a) for a, b in zip(w, whole, strict=True)] for s in range(101)]
    assert error(got) <= 1.0001 * min(map(error, tried)) and error(got) < 0.9 * error(w)
    share = float((got[0] - w[0]).norm() / (whole[0] - w[0]).norm())
    assert 0.3 < share < 0.99
    for v, a, b in zip(got, w, whole, strict=True):
        torch.testing.assert_close(v, a + share * (b - a), rtol=1e-3, atol=1e-3)
    unknown = correction.corrected(gram, statistics, Statistics(), w, added)  # nothing is held out
    for v, a, b in zip(unknown, w, whole, strict=True):
        torch.testing.assert_close(v, a + correction.SHARE * (b - a), rtol=1e-3, atol=1e-3)


def test_a_correction_that_tokens_held_out_contradict_is_not_made() -> None:
    x, y = drifted(300)
    w = [torch.randn(4, 24, generator=torch.Generator().manual_seed(1))]
    gram = statistics_of(y, x - y).result("w")[1]
    got = correction.corrected(gram, statistics_of(y, x - y), statistics_of(y, y - x), w, False)
    assert torch.equal(got[0], w[0])


def test_nothing_is_corrected_without_anything_to_go_by() -> None:
    w, zero, one = [torch.ones(3, 4)], torch.zeros(4, 4), torch.zeros(1, 4)
    assert torch.equal(correction.corrected(zero, statistics_of(one, one), Statistics(), w, False)[0], w[0])
    unknown = Statistics()
    unknown.add(torch.ones(5, 4))
    assert torch.equal(correction.corrected(torch.eye(4), unknown, Statistics(), w, False)[0], w[0])


@torch.no_grad()
def test_only_linears_that_read_every_token_are_compared() -> None:
    """A router may send other tokens to an expert than in the original, so there is nothing to compare them with."""
    torch.manual_seed(0)
    mixture, inputs = Mixture(), mixture_inputs(3, 4, 5)
    linears = linears_of(mixture)
    missing: dict[str, torch.Tensor | None] = {}

    def quantize(names: list[str], statistics: Statistics, _: Statistics) -> dict[str, nn.Module]:
        missing[names[0]] = statistics.missing
        return {name: linears[name] for name in names}

    kept = {
        name: {at: torch.full((length, 8), 2.0) for at, length in enumerate((3, 4, 5)) if (name, at) != ("out", 1)}
        for name in linears
    }
    before = [x.clone() for x in inputs.quantized]
    originals = Originals({}, kept, dict.fromkeys(linears, torch.tensor(2.0)))
    inputs.quantize_in_turn(0, mixture, linears, ORDER, quantize, originals)
    y = torch.cat([x.flatten(0, 1) for x in before])
    of_gate = missing.pop("gate")
    assert of_gate is not None and len(missing) == 5
    torch.testing.assert_close(of_gate, y.T @ (1 - y) / len(y), rtol=1e-4, atol=1e-5)
    reads_some = [name for name, value in missing.items() if name != "experts.0.up" and value is not None]
    assert not reads_some, "experts, and a linear that is not known for one batch"


class Normed(nn.Module):
    """Attention and MLP, as far as their ends are concerned, with something between them and the sum, or nothing."""

    def __init__(self, behind: str, parallel: bool) -> None:
        super().__init__()
        self.norm, self.q, self.o = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.behind = {"norm": nn.LayerNorm(8), "factor": lambda x: 0.5 * x, "nothing": nn.Identity()}[behind]
        self.parallel = parallel

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        attention = x + self.behind(self.o(self.q(self.norm(x)).tanh()))
        return attention + self.behind(self.down(self.up(self.norm(x if self.parallel else attention)).relu()))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("behind", ["nothing", "norm", "factor"])
@torch.no_grad()
def test_what_is_added_to_the_hidden_states_is_found(behind: str, parallel: bool) -> None:
    torch.manual_seed(0)
    block, inputs = Normed(behind, parallel), mixture_inputs(5)
    assert adders(inputs, 0, block, linears_of(block)) == (["o", "down"] if behind == "nothing" else [])
    assert all("forward" not in vars(module) for module in block.modules())


@torch.no_grad()
def test_linears_that_are_called_twice_are_not_taken_for_added() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            x = x + self.twice(x)
            return x + self.twice(x) + self.once(x)

    block = Twice()
    assert adders(mixture_inputs(5), 0, block, linears_of(block)) == []


class Sparse(nn.Module):
    """Attention's end, then two experts, each for the tokens that a router sends there, and one for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.experts, self.shared = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)] * 2), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        x = x + self.o(x.tanh())
        chosen = x.sum(-1) > 0
        routed = torch.zeros_like(x)
        for expert, token in zip(self.experts, (chosen, ~chosen), strict=True):
            routed[token] = expert(x[token])
        return x + routed + self.shared(x)


@torch.no_grad()
def test_what_a_router_sends_elsewhere_is_not_taken_for_added() -> None:
    torch.manual_seed(0)
    block = Sparse()
    block.experts[1] = nn.Linear(8, 8)
    inputs = mixture_inputs(9)
    inputs.hidden = list(inputs.quantized)
    assert adders(inputs, 0, block, linears_of(block)) == ["o"]
    assert all("forward" not in vars(module) for module in block.modules())


@torch.no_grad()
def test_hidden_states_lack_what_all_before_has_lost() -> None:
    """`missing` of the linears that are added, against hidden states taken at the norms of the two models."""
    model = small_model("llama")
    block, rows = model.model.layers[0], inputs_of(model)
    linears, ends = linears_of(block), ["self_attn.o_proj", "mlp.down_proj"]
    assert adders(rows, 0, block, linears) == ends
    original, before = copy.deepcopy(block), [x.clone() for x in rows.hidden]
    originals = Originals({name: {} for name in ends})
    rows.collect(0, block, linears, originals=originals)
    originals.scales = {name: torch.ones(()) for name in linears}
    rows.quantized = [x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in before]
    start, lacked, changed = [x.clone() for x in rows.quantized], {}, {}

    def quantize(names: list[str], statistics: Statistics, _: Statistics) -> dict[str, nn.Module]:
        lacked[names[0]] = statistics.missing
        for name in names:
            changed[name] = copy.deepcopy(original.get_submodule(name))
            changed[name].weight.mul_(1.1)
        return {name: changed[name] for name in names}

    rows.quantize_in_turn(0, block, linears, READERS, quantize, originals)
    assert not originals.inputs and not any(originals.streams.values())
    seen: dict[str, list[torch.Tensor]] = {}

    def run(block: nn.Module, key: str, states: list[torch.Tensor]) -> None:
        hooks = [
            linears_of(block)[name].register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(f"{key} {name}", []).append(args[0].flatten(0, 1))
            )
            for name in ends
        ]
        norm = block.post_attention_layernorm
        hooks.append(
            norm.register_forward_pre_hook(
                lambda _, args: seen.setdefault(f"{key} middle", []).append(args[0].flatten(0, 1))
            )
        )
        seen[f"{key} end"] = [rows.run(0, block, x).flatten(0, 1) for x in states]
        for hook in hooks:
            hook.remove()

    run(original, "original", before)
    now = copy.deepcopy(block)
    for name, linear in changed.items():
        now.set_submodule(name, linear)
    run(now, "quantized", start)
    held = [at for at, (number, _) in enumerate(rows.places) if number in rows.held_out]
    for name, place in zip(ends, ("middle", "end"), strict=True):
        products = []
        for at, y in enumerate(seen[f"quantized {name}"]):
            if at in held:
                continue
            own = seen[f"quantized {place}"][at] - changed[name](y)  # the hidden states without it
            products.append(y.T @ (seen[f"original {place}"][at] - own - original.get_submodule(name)(y)))
        tokens = sum(len(y) for at, y in enumerate(seen[f"quantized {name}"]) if at not in held)
        want = sum(products) / tokens
        torch.testing.assert_close(lacked[name], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_taking_errors_back_brings_a_model_nearer_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    want, errors = logits(model, ids()), []
    for times in (1e9, correction.TIMES):  # nothing is taken back with so large a ridge
        monkeypatch.setattr(correction, "TIMES", times)
        done = run(copy.deepcopy(model), method="awq+", w_bit=3, tune_passes=0)
        errors.append(float((logits(done, ids()) - want).square().mean()))
    assert errors[1] < 0.9 * errors[0], errors
