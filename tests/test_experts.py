"""Fused experts as linears: what they compute, what they are called, what is left alone, what no token reaches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import GQA, GROUP, MLA, QUANTIZE, Traces, logits, small_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from awq_ext import (
    AwqLinear,
    CheckpointError,
    UnsupportedModelError,
    load_quantized,
    quantize,
    replace_linears,
    save_quantized,
)
from awq_ext.experts import OpenedExperts, open_experts, shortened
from awq_ext.names import Names
from awq_ext.trace import prove

pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(module: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


def gpt_oss() -> Any:
    """Transposed weights, gate and up in turn, biases, and a rule of their own for how they act together."""
    config = AutoConfig.for_model("gpt_oss", **GQA, num_local_experts=5, num_experts_per_tok=2)
    return randomized(AutoModelForCausalLM.from_config(config))


def llama4() -> Any:
    """Transposed without saying so, and called with as many tokens for each expert, weighted before."""
    config = AutoConfig.for_model(
        "llama4_text", **GQA, intermediate_size_mlp=128, num_local_experts=5, interleave_moe_layer_step=1
    )
    return randomized(AutoModelForCausalLM.from_config(config))


class Fused(nn.Module):
    """Experts as transformers keeps them, [experts, outputs, inputs], with ``kind`` of a difference."""

    def __init__(self, kind: str = "", experts: int = 5) -> None:
        super().__init__()
        self.kind, self.num_experts, self.act_fn, self.limit = kind, experts, nn.SiLU(), 0.5
        self.has_gate = kind != "plain"
        self.is_transposed, self.has_post_expert_norm = False, kind == "norm"
        if self.has_gate:
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * 24, 16))
        else:
            self.up_proj = nn.Parameter(torch.empty(experts, 24, 16))
        self.down_proj = nn.Parameter(torch.empty(experts, 16, 24))
        if kind == "norm":
            self.post_expert_norm = nn.RMSNorm(16)
        if kind == "scaled":
            self.per_expert_scale = nn.Parameter(torch.empty(experts))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * (up.clamp(-self.limit, self.limit) if self.kind == "limited" else up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                first = self.gate_up_proj if self.has_gate else self.up_proj
                y = first[expert] @ hidden_states[token]
                y = self.down_proj[expert] @ (self._apply_gate(y) if self.has_gate else self.act_fn(y))
                if self.kind == "norm":
                    y = self.post_expert_norm(y)
                output[token] += weight * y
        return output * 1.1 if self.kind == "louder" else output


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(12)])
    return torch.randn(12, 16, generator=generator), index, torch.rand(12, 2, generator=generator)


# --- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "mixtral", "deepseek_v3"])
def test_a_model_computes_the_same(kind: str) -> None:
    model = {"gpt_oss": gpt_oss, "llama4": llama4}.get(kind, lambda: small_model(kind))()
    before, weights = logits(model), sum(parameter.numel() for parameter in model.parameters())
    assert open_experts(model) == {}
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert max(parameter.dim() for parameter in model.parameters()) == 2
    assert float((logits(model) - before).norm()) <= 1e-5 * float(before.norm())
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("kind", ["", "plain", "limited", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_experts(kind: str, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"experts": randomized(Fused(kind))}).to(dtype)
    x, index, weights = routed()
    with torch.no_grad():
        expected = model["experts"](x.to(dtype), index, weights.to(dtype))
        assert open_experts(model) == {}
        opened = model["experts"]
        assert isinstance(opened, OpenedExperts) and hasattr(opened.get_submodule("4"), "down_proj")
        got = opened(x.to(dtype), index, weights.to(dtype))
    # Products of 24 and sums of 4 such, each rounded to the dtype on the way.
    assert float((got - expected).norm()) <= 8 * torch.finfo(dtype).eps * float(expected.norm())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 5 * (2 if kind == "plain" else 3)
    # Without values, as where a checkpoint is to be loaded, a small copy tells.
    empty = nn.ModuleDict({"experts": Fused(kind)}).to("meta")
    assert open_experts(empty) == {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("louder", "a Fused stays fused: it does not compute what gated linears of these weights do"),
        ("scaled", "a Fused has weights down_proj, gate_up_proj, per_expert_scale, of an unknown arrangement"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_cannot_be_proven_stays_fused(kind: str, reason: str, device: str) -> None:
    model = nn.ModuleDict({"experts": randomized(Fused(kind))}).to(device)
    assert open_experts(model).keys() == {"experts"}
    assert sorted(open_experts(model)["experts"].replace(",", "").split()) == sorted(reason.replace(",", "").split())
    assert isinstance(model["experts"], Fused)


def test_experts_that_stay_fused_are_reported_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("qwen3_moe")
    kind = type(model.model.layers[0].mlp.experts)
    rule = kind._apply_gate
    monkeypatch.setattr(kind, "_apply_gate", lambda self, gate_up: 1.5 * rule(self, gate_up))  # forward has its own
    model.config._experts_implementation = "eager"
    quantize(model, **QUANTIZE, out=tmp_path / "out")
    report = model.awq_report
    reason = "a Qwen3MoeExperts stays fused: it does not compute what gated linears of these weights do"
    assert {x.name: x.kept for x in report.kept}["model.layers.1.mlp.experts.down_proj"] == reason
    assert not [x for x in report.quantized if "experts" in x.name]
    # No scale goes through a norm that they read.
    assert not [fold for fold in report.folds if fold.producer.endswith("post_attention_layernorm")]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(config["quantization_config"]["modules_to_not_convert"]) == {"mlp.gate", "mlp.experts"}
    loaded: Any = load_quantized(tmp_path / "out")
    loaded.config._experts_implementation = "eager"
    assert not isinstance(loaded.model.layers[0].mlp.experts, OpenedExperts)
    assert torch.equal(logits(loaded), logits(model))


def test_why_quantized_experts_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("qwen3_moe")
    quantize(model, **QUANTIZE, out=tmp_path / "out")
    monkeypatch.setattr("awq_ext.experts._same", lambda fused, opened: False)
    reason = "a Qwen3MoeExperts stays fused: it does not compute what gated linears of these weights do"
    with pytest.raises(CheckpointError, match=rf"experts\.\d\.\w+_proj is quantized .* no Linear: {reason}"):
        load_quantized(tmp_path / "out")


def test_damaged_experts_are_refused_by_name() -> None:
    model = small_model("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts\.2\.w2\.weight has NaN"):
        quantize(model, **QUANTIZE)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_in_files_and_back() -> None:
    for kind, mine, there in [
        ("mixtral", "model.layers.0.mlp.experts.2.w1.qweight", "model.layers.0.block_sparse_moe.experts.2.w1.qweight"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        (
            "granitemoe",
            "model.layers.1.block_sparse_moe.router.weight",
            "model.layers.1.block_sparse_moe.router.layer.weight",
        ),
        ("qwen3_moe", *["model.layers.0.mlp.experts.0.up_proj.scales"] * 2),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        ("llama", *["model.layers.0.mlp.gate_proj.qzeros"] * 2),
    ]:
        model = small_model(kind)
        open_experts(model)
        names = Names(model)
        assert (names.in_files(mine), names.in_model(there)) == (there, mine)
        assert names.in_model(mine) == mine
        assert [names.in_model(names.in_files(name)) for name in model.state_dict()] == list(model.state_dict())


def test_files_with_fused_experts_are_loaded_as_they_are(tmp_path: Path) -> None:
    model = small_model("granitemoe")
    replace_linears(model, GROUP)  # which knows linears only
    save_quantized(model, tmp_path / "out")
    fused = load_file(tmp_path / "out/model.safetensors")
    assert fused["model.layers.1.block_sparse_moe.input_linear.weight"].shape == (5, 256, 64)
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(model))


def test_experts_that_are_not_quantized_are_files_of_their_own_too(tmp_path: Path) -> None:
    model = small_model("mixtral")
    quantize(model, **QUANTIZE, modules_to_not_convert=["experts"], out=tmp_path / "out")
    files = load_file(tmp_path / "out/model.safetensors")
    assert files["model.layers.0.block_sparse_moe.experts.4.w2.weight"].shape == (64, 128)
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(model))


# --- folds ----------------------------------------------------------------------------------------------------------


def test_a_wrong_fold_of_experts_is_not_proven() -> None:
    traces = Traces(small_model("qwen2_moe"))
    folds = {fold.producer: fold for fold in traced.folds} if (traced := traces.trace(0)) else {}
    norm, up = folds["post_attention_layernorm"], folds["mlp.experts.4.up_proj"]
    unlike, changed = "it is not the same for all experts", "the block's output would change by"

    def without(*names: str) -> tuple[str, ...]:
        return tuple(name for name in norm.readers if name not in names)

    def reason(fold: Any, **wrong: Any) -> str:
        parts = {part: getattr(fold, part) for part in ("producer", "readers", "rows", "plus")}
        (why,) = prove(traces.blocks[0], [type(fold)(**{**parts, **wrong})], traces.several(0))
        return str(why)

    assert reason(norm) == reason(up) == "None"
    assert reason(norm, readers=without("mlp.experts.3.up_proj")) == unlike
    assert reason(norm, readers=without("mlp.experts.0.up_proj")) == unlike
    assert changed in reason(norm, readers=without("mlp.gate"))
    assert changed in reason(norm, readers=without("mlp.shared_expert_gate"))
    every = [f"mlp.experts.{number}.gate_proj" for number in range(5)]
    assert changed in reason(norm, readers=without(*every))
    assert changed in reason(up, producer="mlp.experts.4.gate_proj")
    assert changed in reason(up, rows=up.rows.flip(0))
    assert reason(up, readers=("mlp.experts.3.down_proj",)) == unlike


@pytest.mark.parametrize(("make", "layer"), [(gpt_oss, "mlp"), (llama4, "feed_forward")])
def test_folds_and_files_of_uncommon_experts(make: Any, layer: str, tmp_path: Path) -> None:
    model = make()
    before = logits(model)
    quantize(model, **QUANTIZE, out=tmp_path / "out")
    folds = {fold.producer: fold for fold in model.awq_report.folds}
    norm = folds["model.layers.1.post_attention_layernorm"].readers
    experts = f"model.layers.1.{layer}.experts"
    assert {f"{experts}.{number}.{part}_proj" for number in range(5) for part in ("gate", "up")} < set(norm)
    assert f"model.layers.1.{layer}.router" in norm
    # GPT-OSS adds 1 to what up gives, so nothing can take the scale of down.
    assert (f"{experts}.4.up_proj" in folds) == (make is llama4)
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(model))
    assert float((logits(model) - before).norm() / before.norm()) < 0.5


def test_a_shortened_block_is_whole_again() -> None:
    model = small_model("mixtral")
    open_experts(model)
    block = model.model.layers[0]
    before = list(block.state_dict())
    with pytest.raises(KeyError), shortened(block):
        assert sum(parameter.numel() for parameter in block.mlp.experts.parameters()) == 2 * 3 * 64 * 128
        block.mlp.experts(torch.ones(2, 64), torch.tensor([[0, 4], [3, 1]]), torch.ones(2, 2))
        raise KeyError
    assert list(block.state_dict()) == before and block.mlp.experts.num_experts == 5


@pytest.mark.parametrize("method", ["awq", "awq+"])
def test_an_expert_that_no_token_reaches(method: str) -> None:
    """Its codes are the nearest ones, under the norm's scale as in every other expert; its own fold is left out."""
    config = AutoConfig.for_model("deepseek_v3", **{**MLA, "num_hidden_layers": 2})
    model = randomized(AutoModelForCausalLM.from_config(config))
    router = model.model.layers[1].mlp.gate
    router.e_score_correction_bias[3] = -100.0
    original = copy.deepcopy(model)
    quantize(model, **QUANTIZE, method=method)
    report, experts = model.awq_report, "model.layers.1.mlp.experts"
    assert {x.name: x.reason for x in report.unscaled} == {f"{experts}.3.down_proj": "no calibration token reached it"}
    tokens = {x.name: x.tokens for x in report.linears if x.name.startswith(experts)}
    assert [tokens[f"{experts}.3.{part}"] for part in ("gate_proj", "up_proj", "down_proj")] == [0, 0, 0]
    assert sum(tokens[f"{experts}.{number}.gate_proj"] for number in range(5)) == 2 * 4 * 32  # two experts a token
    folds = {fold.producer: fold for fold in report.folds}
    assert f"{experts}.2.up_proj" in folds and f"{experts}.3.up_proj" not in folds
    assert f"{experts}.3.up_proj" in folds["model.layers.1.post_attention_layernorm"].readers
    assert type(model.get_submodule(f"{experts}.3.down_proj")) is AwqLinear

    def error(bias: float) -> float:
        """With that expert chosen always, or never."""
        for either in (model, original):
            either.model.layers[1].mlp.gate.e_score_correction_bias[3] = bias
        expected = logits(original)
        return float((logits(model) - expected).norm() / expected.norm())

    assert error(100.0) < 1.5 * error(-100.0) < 0.6
