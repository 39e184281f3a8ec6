"""`quantize`: folds that change nothing, searches that never lose, and a real small model from end to end."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import awq_ext
from awq_ext import AwqLinear, CalibrationError, UnsupportedModelError, block, quantize

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
VARIANTS = {
    "llama": {},
    "llama-mha-bias": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def small_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of that type whose norms and biases are not the constants they are initialised to."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split("-")[0], **{**SMALL, **VARIANTS.get(kind, {})})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.3
        else:
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model.to(dtype)


def ids(samples: int = 4, seq_len: int = 32) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (samples, seq_len), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, **kwargs: object) -> nn.Module:
    arguments = {"calibration": ids(), "samples": 4, "seq_len": 32, "q_group_size": 16, **kwargs}
    return quantize(model, **arguments)


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def unrounded(work: block._Work, name: str, *_: object) -> nn.Linear:
    """What takes the place of a linear in the fold tests: its weight as it is after folding."""
    return copy.deepcopy(work.linears[name])


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folding_alone_leaves_the_model_as_it_was(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(kind, dtype)
    before = logits(copy.deepcopy(model).float(), ids())
    monkeypatch.setattr(block._Work, "_module", unrounded)
    monkeypatch.setattr(block, "_restore", restore_norms)
    folded = run(model, method="awq").float()
    report = folded.awq_report
    moved = [fold for fold in report.folds if fold.candidate != "identity"]
    assert {fold.producer.rsplit(".", 1)[-1] for fold in moved} >= {"input_layernorm", "up_proj", "v_proj"}
    after = logits(folded, ids())
    # Float32 sums in another order, through two layers: a few hundred roundings of 6e-8 each.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))


def restore_norms(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Only the norms are rounded back: linears would be stored as codes, whose rounding is not the fold's."""
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.to(dtypes[name])


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_family_quantizes_and_no_choice_loses(kind: str) -> None:
    model = small_model(kind)
    before = logits(model, ids())
    rtn = logits(run(copy.deepcopy(model), method="rtn"), ids())
    awq = run(model)
    report = awq.awq_report
    assert len(report.quantized) == 14 and [x.name for x in report.kept] == ["lm_head"]
    assert len(report.folds) == 8
    assert all(fold.loss <= fold.loss_rtn for fold in report.folds)
    error = lambda y: float((y - before).square().mean())  # noqa: E731
    assert error(logits(awq, ids())) < 0.95 * error(rtn)


def test_round_to_nearest_is_from_linear() -> None:
    model = small_model("llama")
    linear = copy.deepcopy(model.model.layers[1].mlp.up_proj)
    run(model, method="rtn")
    expected = AwqLinear.from_linear(linear, 16).state_dict()
    for key, value in model.model.layers[1].mlp.up_proj.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_same_input_same_bytes() -> None:
    first, second = run(small_model("qwen3")).state_dict(), run(small_model("qwen3")).state_dict()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_the_rest_of_the_model_keeps_its_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = run(small_model("llama", dtype))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16


def test_linears_that_do_not_fit_or_are_excluded_stay_and_are_listed() -> None:
    model = small_model("llama")
    q_proj = model.model.layers[0].self_attn.q_proj.weight.clone()
    gate = model.model.layers[1].mlp.gate_proj.weight.clone()
    run(model, modules_to_not_convert=["layers.1.mlp.gate_proj", "q_proj"])
    kept = {x.name: x.kept for x in model.awq_report.kept}
    assert set(kept) == {
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
    }
    assert "excluded" in kept["model.layers.1.mlp.gate_proj"]
    # They are linears still, but take part in the scales of what they read.
    for linear, before in (
        (model.model.layers[0].self_attn.q_proj, q_proj),
        (model.model.layers[1].mlp.gate_proj, gate),
    ):
        scale = linear.weight / before
        torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-5, atol=0)
        assert not torch.equal(linear.weight, before)
    assert "gate_proj" in model.awq_report.summary()
    assert set(model.config.quantization_config["modules_to_not_convert"]) == set(kept) - {"lm_head"}


def test_group_size_that_no_linear_fits() -> None:
    with pytest.raises(UnsupportedModelError, match="not a multiple of group_size 48"):
        run(small_model("llama"), q_group_size=48)


def test_autoawq_quant_config_wins() -> None:
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": False, "version": "GEMM"}
    model = run(small_model("llama"), quant_config=config)
    assert model.awq_report.group_size == 32 and not model.awq_report.zero_point
    layer = model.model.layers[0].mlp.up_proj
    assert layer.group_size == 32 and (awq_ext.ops.unpack(layer.qzeros) == 8).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w_bit": 9}, "w_bit must be a whole number of 2..8, got 9"),
        ({"w_bit": "4"}, "w_bit must be"),
        ({"w_bit": 3, "out": "/nowhere/awq"}, "w_bit 3 is only simulated"),
        ({"q_group_size": 0}, "q_group_size"),
        ({"q_group_size": "64"}, "q_group_size"),
        ({"method": "spqr"}, "method must be one of"),
        ({"modules_to_not_convert": "gate"}, "must be a list of names"),
        ({"quant_config": {"version": "gemv"}}, "version must be GEMM"),
        ({"quant_config": {"bits": 4}}, "unknown key 'bits'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(small_model("llama"), **arguments)


def test_a_model_without_a_list_of_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no ModuleList, .*pass blocks="):
        run(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(UnsupportedModelError, match="blocks: LlamaModel has no attribute `blocks`"):
        run(small_model("llama"), blocks="model.blocks")
    with pytest.raises(UnsupportedModelError, match=r"blocks: model must be a list of modules, got .*LlamaModel"):
        run(small_model("llama"), blocks="model")


def test_quantized_models_are_refused() -> None:
    model = run(small_model("llama"))
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        run(model)
    fp8 = small_model("llama")
    fp8.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        fp8.model.layers[1].mlp.up_proj.weight.data.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.weight is torch\.float8_e4m3fn"):
        run(fp8)


def test_weights_that_are_not_finite_are_named() -> None:
    model = small_model("llama")
    model.model.layers[1].self_attn.k_proj.weight.data[3, 5] = math.nan
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.k_proj\.weight has NaN"):
        run(model)


def test_activations_that_are_not_finite_are_named() -> None:
    model = small_model("llama")
    model.model.layers[1].input_layernorm.weight.data[7] = math.inf
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj is not finite"):
        run(model)


def test_calibration_data_that_does_not_fit() -> None:
    with pytest.raises(CalibrationError, match="has 128 tokens, but 8 samples of 32 need 256"):
        run(small_model("llama"), calibration=ids().flatten(), samples=8)
    with pytest.raises(CalibrationError, match="vocabulary"):
        run(small_model("llama"), calibration=ids() + 90)
    with pytest.raises(CalibrationError, match="128 positions"):
        run(small_model("llama"), calibration=torch.zeros(256, dtype=torch.int64), samples=1, seq_len=256)
    with pytest.raises(CalibrationError, match="tokenizer"):
        run(small_model("llama"), calibration=["some text"])


def test_dead_channels_and_one_token() -> None:
    """A channel that is always zero, and a Gram matrix of rank one."""
    model = small_model("llama")
    model.model.layers[0].post_attention_layernorm.weight.data[:8] = 0
    run(model, calibration=ids()[:1, :1], samples=1, seq_len=1)
    assert all(math.isfinite(fold.loss) for fold in model.awq_report.folds)
    assert torch.isfinite(logits(model, ids())).all()


def test_a_path_is_enough(tiny_llama) -> None:  # type: ignore[no-untyped-def]
    """Model and tokenizer from the directory, calibration on the text that Python carries."""
    model = quantize(str(tiny_llama))
    assert model.awq_report.calibration_tokens == 32 * 512 and len(model.awq_report.quantized) == 14


def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    return math.exp(
        float(nn.functional.cross_entropy(logits(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    )


def test_a_real_small_model_from_end_to_end(shared, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """stories260K: quantized, saved, loaded and run by another process; its awkward layer is reported."""
    source = shared / "data" / "stories260K"
    text = (shared / "data" / "text" / "calibration" / "tiny.utf8").read_text(encoding="utf-8", errors="replace")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = torch.tensor(tokenizer(text[:200_000], add_special_tokens=False).input_ids)
    calibration, scoring = tokens[: 16 * 256], tokens[16 * 256 : 32 * 256].view(16, 256)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    common = {"calibration": calibration, "samples": 16, "seq_len": 256, "q_group_size": 64}
    rtn = quantize(str(source), method="rtn", **common)
    awq = quantize(str(source), out=tmp_path / "awq", **common)
    kept = {x.name: x.kept for x in awq.awq_report.kept}
    assert all(
        kept[f"model.layers.{i}.mlp.down_proj"] == "in_features 172 is not a multiple of group_size 64"
        for i in range(5)
    )
    reference, rounded, quantized = (perplexity(m, scoring) for m in (original, rtn, awq))
    assert reference < quantized < rounded
    program = (
        "import sys, torch, awq_ext; from transformers import AutoTokenizer\n"
        "model = awq_ext.load_quantized(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "out = model.generate(**tokenizer('Once upon a time', return_tensors='pt', return_token_type_ids=False), "
        "max_new_tokens=20, do_sample=False)\n"
        "print(out[0].tolist())"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "awq")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    prompt = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    here = awq.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert fresh.stdout.splitlines()[-1] == str(here[0].tolist())
