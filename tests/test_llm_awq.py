"""llm-awq's files: search results applied as llm-awq applies them, state dicts read without being mapped, hostile ones
refused. The files are written here as llm-awq writes them; its own code on a CPU made and applied such files to models
of five architectures, and in float32 every tensor came out the same to the last bit."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from awq_ext import AwqLinear, CheckpointError, cli, load_quantized, quantize
from awq_ext.fold import norm_offset
from awq_ext.llm_awq import apply_search_results, read_search_results
from awq_ext.pickled import read_state_dict
from awq_ext.scaled import ScaledActivation

GROUP = 16
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "llama-mha-bias": {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "opt": {"ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
}
COMMON = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}

# What llm-awq writes for each architecture (auto_scale.py auto_scale_block): blocks, producer -> readers.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
FOLDS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "llama": (
        "model.layers",
        {"input_layernorm": ATTENTION, "post_attention_layernorm": MLP, "mlp.up_proj": ("mlp.down_proj",)},
    ),
    "llama-mha-bias": (
        "model.layers",
        {
            "input_layernorm": ATTENTION,
            "self_attn.v_proj": ("self_attn.o_proj",),
            "post_attention_layernorm": MLP,
            "mlp.up_proj": ("mlp.down_proj",),
        },
    ),
    "gemma3_text": ("model.layers", {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP}),
    "gemma2": ("model.layers", {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP}),
    "opt": (
        "model.decoder.layers",
        {
            "self_attn_layer_norm": ATTENTION,
            "self_attn.v_proj": ("self_attn.out_proj",),
            "final_layer_norm": ("fc1",),
            "fc1": ("fc2",),
        },
    ),
    "bloom": (
        "transformer.h",
        {
            "input_layernorm": ("self_attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
            "mlp.gelu_impl": ("mlp.dense_4h_to_h",),
        },
    ),
    "mpt": (
        "transformer.blocks",
        {
            "norm_1": ("attn.Wqkv",),
            "attn.Wqkv": ("attn.out_proj",),
            "norm_2": ("ffn.up_proj",),
            "ffn.act": ("ffn.down_proj",),
        },
    ),
}


def small_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose norms and biases are not the constants that they are initialised to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split("-")[0], **COMMON, **SMALL[kind]))
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = (
                parameter.data + 0.3 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5
            )
    return model.eval().to(dtype)


def search(model: nn.Module, kind: str, group: int = GROUP, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Results in the structure and with the names of llm-awq's run_awq; their values are random, and none is 1."""
    generator = torch.Generator().manual_seed(1)
    blocks, folds = FOLDS[kind]
    results: dict[str, Any] = {"scale": [], "clip": []}
    for index, block in enumerate(model.get_submodule(blocks)):
        prefix = f"{blocks}.{index}."
        columns: dict[str, Tensor] = {}
        for producer, readers in folds.items():
            scale = torch.randn(block.get_submodule(readers[0]).in_features, generator=generator).mul(0.7).exp()
            results["scale"].append((prefix + producer, tuple(prefix + name for name in readers), scale.to(dtype)))
            columns |= dict.fromkeys(readers, scale)
        for name, linear in block.named_modules():
            # auto_clip.py auto_clip_block
            if isinstance(linear, nn.Linear) and not any(part in name for part in ("q_", "k_", "query", "key", "Wqkv")):
                weight = linear.weight.detach().float() * columns.get(name, torch.ones(linear.in_features))
                largest = weight.abs().reshape(len(weight), -1, group).amax(-1, keepdim=True)
                factor = 1 - torch.randint(0, 10, largest.shape, generator=generator) / 20
                results["clip"].append((prefix + name, (largest * factor).to(dtype)))
    return results


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def ids() -> Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


# --- applying search results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", SMALL)
def test_scales_alone_leave_the_model_as_it_was(kind: str, dtype: torch.dtype) -> None:
    model = small_model(kind, dtype)
    before, weights = logits(model), state(model)
    apply_search_results(model, {"scale": search(model, kind)["scale"], "clip": []})
    blocks, folds = FOLDS[kind]
    for readers in folds.values():
        name = f"{blocks}.1.{readers[0]}.weight"
        assert not torch.allclose(model.state_dict()[name], weights[name], rtol=0.1)
    # Scales and norms are float32 whatever the model is: a few roundings of 6e-8 in each of two layers.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_rounding_of_a_16_bit_norm_is_undone_in_its_readers(kind: str) -> None:
    """bfloat16 keeps 8 bits: had the readers the scale as it is in the file, products would be 2^-9 off."""
    model = small_model(kind, torch.bfloat16)
    blocks, _ = FOLDS[kind]
    norm, linear = (f"{blocks}.0.{name}.weight" for name in ("input_layernorm", "self_attn.q_proj"))
    plus, before = 1.0 if kind == "gemma2" else 0.0, state(model)
    apply_search_results(model, {"scale": search(model, kind)["scale"], "clip": []})
    after = model.state_dict()
    product = after[linear].double() * (after[norm].double() + plus)
    expected = before[linear].double() * (before[norm].double() + plus)
    # What is left is the rounding of the linear's weight: unbiased, so its mean over rows is much smaller.
    error = (product / expected - 1).mean(0).abs()
    assert float(error.max()) < 2.0**-10


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "mistral", "qwen2", "qwen3"])
def test_the_norm_itself_tells_what_it_adds_to_its_weight(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, num_attention_heads=4, head_dim=16))
    for name, norm in model.named_modules():
        if name.endswith("layernorm"):
            norm.weight.data.normal_()
            assert norm_offset(norm) == (1.0 if kind == "gemma3_text" else 0.0)
    assert norm_offset(nn.LayerNorm(8)) == 0.0
    assert norm_offset(nn.PReLU(8)) is None  # it has a weight of one dimension too


def as_llm_awq(weights: dict[str, Tensor], results: dict[str, Any]) -> dict[str, np.ndarray]:
    """llm-awq's apply_awq on the float32 arrays of a state dict, one number after another."""
    arrays = {name: tensor.numpy().copy() for name, tensor in weights.items()}
    for producer, readers, scale in results["scale"]:
        for i, s in enumerate(scale.float().numpy()):
            if producer + ".weight" not in arrays:  # an activation, which gets them as they are
                arrays.setdefault(producer + ".scales", np.empty(len(scale), np.float32))[i] = s
            else:
                for part in ("weight", "bias"):
                    array = arrays.get(f"{producer}.{part}", np.empty(len(scale), np.float32))
                    array[len(array) - len(scale) + i] /= s
            for reader in readers:
                arrays[reader + ".weight"][:, i] *= s
    for name, bound in results["clip"]:
        array = arrays[name + ".weight"]
        size = array.shape[1] // bound.shape[1]
        for n in range(bound.shape[0]):
            for g in range(bound.shape[1]):
                group = array[n, g * size : (g + 1) * size]
                group[:] = np.clip(group, -bound[n, g].item(), bound[n, g].item())
    return arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in SMALL if not kind.startswith("gemma")])
def test_a_file_is_applied_as_llm_awq_applies_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the last bit, in a float32 model, whatever the type of the file."""
    model = small_model(kind)
    results = search(model, kind, dtype=dtype)
    expected = as_llm_awq(state(model), results)
    apply_search_results(model, save(tmp_path / "x.pt", results), allow_pickle=True)
    after = model.state_dict()
    assert set(after) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(after[name].numpy(), array), name


def test_scaled_activations_are_put_in_front_of_their_readers() -> None:
    model = small_model("bloom", torch.float16)
    results = search(model, "bloom")
    apply_search_results(model, results)
    act = model.transformer.h[1].mlp.gelu_impl
    assert isinstance(act, ScaledActivation) and act.scales.dtype == torch.float16
    assert torch.equal(act.scales, results["scale"][5][2].half())


# --- quantizing with them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-mha-bias", "opt", "bloom"])
def test_quantize_rounds_what_llm_awq_would_round(kind: str, tmp_path: Path) -> None:
    model = small_model(kind)
    results = search(model, kind)
    expected = as_llm_awq(state(model), results)
    file = save(tmp_path / "x.pt", results)
    model = quantize(model, search_results=file, allow_pickle=True, q_group_size=GROUP)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    assert len(layers) == {"bloom": 8, "opt": 12}.get(kind, 14)
    for name, layer in layers.items():
        groups = torch.from_numpy(expected[name + ".weight"]).reshape(layer.out_features, -1, GROUP)
        rounded = reference.round_trip(groups, True, torch.float16).reshape(layer.out_features, -1)
        assert torch.equal(layer.dequantize(torch.float32), rounded), name
    report = model.awq_report
    assert report.search_results == str(file) and report.calibration_tokens == 0 and report.method == "awq"
    assert f"scales and clips from {file}" in report.summary()


def test_a_quantized_model_with_scaled_activations_is_saved_and_loaded(tmp_path: Path) -> None:
    model = small_model("bloom")
    model = quantize(model, search_results=search(model, "bloom"), q_group_size=GROUP, out=tmp_path / "out")
    again = load_quantized(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again.transformer.h[0].mlp.gelu_impl.scales, model.transformer.h[0].mlp.gelu_impl.scales)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-3 * float(logits(model).abs().max()))


def test_linears_that_stay_are_scaled_but_not_clipped() -> None:
    model = small_model("llama")
    results = search(model, "llama")
    unclipped = as_llm_awq(state(model), {**results, "clip": []})
    both = quantize(
        copy.deepcopy(model), search_results=results, q_group_size=GROUP, modules_to_not_convert=["layers.0.mlp"]
    )
    for name in ("gate_proj", "up_proj", "down_proj"):
        kept = f"model.layers.0.mlp.{name}.weight"
        assert np.array_equal(both.state_dict()[kept].numpy(), unclipped[kept])
    assert isinstance(both.model.layers[1].mlp.up_proj, AwqLinear)
    without = quantize(model, search_results=results, q_group_size=GROUP, apply_clip=False)
    weight = torch.from_numpy(unclipped["model.layers.1.mlp.up_proj.weight"])
    rounded = reference.round_trip(weight.reshape(len(weight), -1, GROUP), True, torch.float16).reshape(weight.shape)
    assert torch.equal(without.model.layers[1].mlp.up_proj.dequantize(torch.float32), rounded)


def test_what_quantize_refuses() -> None:
    model = small_model("llama")
    results, before = search(model, "llama"), state(model)
    with pytest.raises(CheckpointError, match=r"v_proj is clipped in groups of 16, .*pass q_group_size=16"):
        quantize(model, search_results=results, q_group_size=32)
    with pytest.raises(ValueError, match="search_results are of method 'awq', got method 'rtn'"):
        quantize(model, search_results=results, q_group_size=GROUP, method="rtn")
    assert unchanged(model, before)


def test_on_the_command_line(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    file, out = save(tmp_path / "x.pt", search(model, "llama", group=32)), tmp_path / "out"
    arguments = ["quantize", str(tiny_llama), str(out), "--group-size", "32", "--search-results", str(file), "--json"]
    assert cli.main(arguments) == 1 and not out.exists()
    assert "--allow-pickle" in capsys.readouterr().err
    assert cli.main([*arguments, "--allow-pickle", "--calibration", "text"]) == 1
    assert "--calibration" in capsys.readouterr().err
    assert cli.main([*arguments, "--allow-pickle"]) == 0
    assert json.loads(capsys.readouterr().out)["search_results"] == str(file)
    assert len([m for m in load_quantized(out).modules() if isinstance(m, AwqLinear)]) == 14
    assert (out / "tokenizer.json").is_file()


# --- which module is meant ------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model inside another, as in a multimodal one."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


def renamed(results: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    def change(name: str) -> str:
        assert name.startswith(old)
        return new + name[len(old) :]

    return {
        "scale": [(change(p), tuple(map(change, readers)), scale) for p, readers, scale in results["scale"]],
        "clip": [(change(name), bound) for name, bound in results["clip"]],
    }


@pytest.mark.parametrize("stated", ["llm.model.layers", "layers", "model.language_model.layers"])
def test_blocks_under_another_name_are_found(stated: str) -> None:
    plain = small_model("llama")
    results = search(plain, "llama")
    other = Holder(language_model=copy.deepcopy(plain), vision_tower=small_model("opt"))
    apply_search_results(plain, results)
    apply_search_results(other, renamed(results, "model.layers", stated))
    assert unchanged(other.language_model, state(plain))


def test_blocks_that_could_be_meant_twice_are_refused() -> None:
    model = small_model("llama")
    both = Holder(thinker=model, talker=copy.deepcopy(model))
    before, results = state(both), search(model, "llama")
    with pytest.raises(CheckpointError, match=r"could be any of talker\.model\.layers, thinker\.model\.layers"):
        apply_search_results(both, results)
    assert unchanged(both, before)
    apply_search_results(both, renamed(results, "model", "talker.model"))  # the exact name is never in doubt
    assert unchanged(
        both.thinker, {name.removeprefix("thinker."): before[name] for name in before if "thinker" in name}
    )
    assert not unchanged(both, before)


def edit(results: dict[str, Any], part: str, index: int, **fields: Any) -> None:
    names = ("producer", "readers", "scale") if part == "scale" else ("linear", "bound")
    results[part][index] = tuple(
        fields.get(name, value) for name, value in zip(names, results[part][index], strict=True)
    )


def far_apart(results: dict[str, Any]) -> None:
    """mlp.up_proj is multiplied by the one and divided by the other."""
    for index, (producer, _, scale) in enumerate(results["scale"]):
        edit(results, "scale", index, scale=torch.full_like(scale, 1e-3 if "up_proj" in producer else 1e4))


LAYER = "model.layers.1."
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a key more": (lambda r: r.update(more=[]), "two lists, 'scale' and 'clip'"),
    "a key less": (lambda r: r.pop("clip"), "two lists, 'scale' and 'clip'"),
    "not a list": (lambda r: r.update(clip={}), "two lists"),
    "nothing": (lambda r: r.update(clip=[], scale=[]), "nothing to apply"),
    "too short": (lambda r: r["clip"].append(("a",)), "clip 10 must have 2 parts, got a tuple"),
    "a string as an item": (lambda r: r["clip"].append("ab"), "clip 10 must have 2 parts, got a str"),
    "a string as a tensor": (lambda r: edit(r, "scale", 1, scale="1.0"), "scale 1 .*must be a tensor, got '1.0'"),
    "a number as a name": (lambda r: edit(r, "clip", 1, linear=3), "clip 1 must have a name .* got a int"),
    "readers as a string": (
        lambda r: edit(r, "scale", 0, readers="q"),
        "scale 0 must have a tuple of names, got a str",
    ),
    "no readers": (lambda r: edit(r, "scale", 0, readers=()), "scale 0 must have a tuple of names"),
    "whole numbers": (lambda r: edit(r, "scale", 0, scale=torch.ones(64, dtype=torch.int64)), r"\[in_features\] float"),
    "two dimensions": (lambda r: edit(r, "scale", 0, scale=torch.ones(1, 64)), r"\[in_features\] float, got \[1, 64\]"),
    "no scales": (lambda r: edit(r, "scale", 0, scale=torch.ones(0)), r"\[in_features\] float, got \[0\]"),
    "sparse": (lambda r: edit(r, "scale", 0, scale=torch.ones(64).to_sparse()), "dense contiguous tensor"),
    "complex": (lambda r: edit(r, "scale", 0, scale=torch.ones(64, dtype=torch.complex128)), "dense contiguous tensor"),
    "expanded": (lambda r: edit(r, "clip", 0, bound=torch.ones(1).expand(32, 4, 1)), "dense contiguous tensor"),
    "NaN": (lambda r: r["scale"][1][2].__setitem__(3, torch.nan), r"scale 1 \(.*post_attention.*got nan"),
    "infinite": (lambda r: r["clip"][1][1].__setitem__((0, 0), torch.inf), r"clip 1 \(.*o_proj.*got inf"),
    "zero": (lambda r: r["scale"][1][2].__setitem__(3, 0), "got 0.0"),
    "negative": (lambda r: r["scale"][1][2].__setitem__(3, -1), "got -1.0"),
    "a negative bound": (lambda r: r["clip"][1][1].__setitem__((0, 0), -1), "got -1.0"),
    "a scale twice": (lambda r: r["scale"].append(r["scale"][0]), "which another one has too"),
    "a reader twice": (lambda r: edit(r, "scale", 0, readers=r["scale"][3][1]), "which another one has too"),
    "a clip twice": (lambda r: r["clip"].append(r["clip"][0]), "which another one has too"),
    "a bound too wide": (lambda r: edit(r, "clip", 0, bound=torch.ones(32, 2, 2)), r"\[out_features, groups, 1\], got"),
    "no such module": (lambda r: edit(r, "clip", 0, linear=LAYER + "mlp.none"), "mlp.none is not in the model"),
    "too many blocks": (
        lambda r: r["clip"].append(("model.layers.2.mlp.up_proj", torch.ones(128, 4, 1))),
        r"layers\.2\.mlp\.up_proj is not in the model",
    ),
    "a block less": (
        lambda r: [r[part].__delitem__(slice(len(r[part]) // 2, None)) for part in r],
        "results for 1 blocks, up to number 0, of 2",
    ),
    "outside of blocks": (lambda r: edit(r, "clip", 0, linear="lm_head"), "lm_head must be a module in a numbered"),
    "two lists of blocks": (lambda r: edit(r, "clip", 0, linear="h.1.up"), r"one list of blocks, got model\.layers, h"),
    "other channels": (
        lambda r: edit(r, "scale", 0, scale=torch.ones(32)),
        "reads 64 channels, there are scales for 32",
    ),
    "another block": (lambda r: edit(r, "scale", 0, producer=LAYER + "self_attn.o_proj"), "not in one block"),
    "a reader less": (lambda r: edit(r, "scale", 0, readers=r["scale"][0][1][:2]), "not all who read"),
    "from an activation": (lambda r: edit(r, "scale", 0, producer="model.layers.0.mlp.act_fn"), "not all who read"),
    "from the values under grouped queries": (
        lambda r: r["scale"].append((LAYER + "self_attn.v_proj", (LAYER + "self_attn.o_proj",), torch.ones(64))),
        "channels for all 64 scales, got 32",
    ),
    "into a norm": (
        lambda r: edit(r, "scale", 0, readers=(LAYER + "post_attention_layernorm",)),
        "expected a Linear, got a LlamaRMSNorm",
    ),
    "clipped norm": (lambda r: edit(r, "clip", 0, linear=LAYER + "input_layernorm"), "expected a Linear, got a Llama"),
    "rows of another model": (
        lambda r: edit(r, "clip", 0, bound=torch.ones(64, 4, 1)),
        r"bounds are \[64, 4\], the weight is \[32, 64\]",
    ),
    "groups that do not divide": (lambda r: edit(r, "clip", 0, bound=torch.ones(32, 5, 1)), r"bounds are \[32, 5\]"),
    "scales far apart": (far_apart, r"up_proj\.weight would have values up to .* 65504 \(float16\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_do_not_fit_change_nothing(case: str) -> None:
    change, message = REFUSED[case]
    model = small_model("llama")
    results, before = search(model, "llama"), state(model)
    change(results)
    with pytest.raises(CheckpointError, match=message):
        apply_search_results(model, results)
    assert unchanged(model, before)


def test_rows_that_are_not_the_values_are_refused() -> None:
    """The last rows of a fused [q; k; v] are the values only without grouped queries; with them, keys come first."""
    config = AutoConfig.for_model("phi3", **COMMON, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    before, scale = state(model), torch.linspace(0.5, 2, 64)
    fold = ("model.layers.{}.self_attn.qkv_proj", "model.layers.{}.self_attn.o_proj")
    results = {"scale": [(fold[0].format(i), (fold[1].format(i),), scale) for i in range(2)], "clip": []}
    with pytest.raises(
        CheckpointError,
        match=r"layers\.0\.self_attn\.qkv_proj to self_attn\.o_proj: .*not the only ones \(the block's output would",
    ):
        apply_search_results(model, results)
    assert unchanged(model, before)


def test_modules_that_take_no_scale() -> None:
    model = small_model("opt")
    results, before = search(model, "opt"), state(model)
    norm = model.model.decoder.layers[1].final_layer_norm
    model.model.decoder.layers[1].final_layer_norm = nn.PReLU(64)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.final_layer_norm is a PReLU, expected a norm that multiplies"
    ):
        apply_search_results(model, results)
    model.model.decoder.layers[1].final_layer_norm = nn.Conv1d(64, 64, 1)
    with pytest.raises(CheckpointError, match=r"expected a norm of 64 channels, .*got a Conv1d"):
        apply_search_results(model, results)
    model.model.decoder.layers[1].final_layer_norm = norm
    assert unchanged(model, before)
    with pytest.raises(CheckpointError, match=r"expected float weights in memory, got .* on meta"):
        apply_search_results(model.to("meta"), results)
    # A model that is quantized already has no such Linear.
    llama = small_model("llama")
    quantized = quantize(copy.deepcopy(llama), method="rtn", q_group_size=GROUP)
    with pytest.raises(CheckpointError, match="expected a Linear, got a AwqLinear"):
        apply_search_results(quantized, search(llama, "llama"))


# --- state dicts ----------------------------------------------------------------------------------------------------


class WQLinear(nn.Module):
    """The buffers of llm-awq's module (awq/quantize/qmodule.py), with random content."""

    def __init__(self, n: int, k: int, bias: bool) -> None:
        super().__init__()
        rows = 8 * ((k // 32 + 31) // 32 * 4)
        self.register_buffer("qweight", torch.randint(-(2**15), 2**15, (n // 4, k), dtype=torch.int16))
        self.register_buffer("scales", torch.rand(n, rows).half().t().contiguous())
        self.register_buffer("scaled_zeros", -torch.rand(rows, n).half())
        self.register_buffer("bias", torch.rand(n).half() if bias else None)


def quantized_state_dict() -> OrderedDict[str, Tensor]:
    """As --dump_quant saves it: model.cpu().state_dict(), an OrderedDict with an attribute."""
    model = small_model("llama", torch.float16)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied: two names, one storage
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.set_submodule(name, WQLinear(linear.out_features, linear.in_features, "up" in name))
    state_dict: OrderedDict[str, Tensor] = model.state_dict()
    assert hasattr(state_dict, "_metadata")
    return state_dict


def test_a_quantized_state_dict_is_read_from_the_file(tmp_path: Path) -> None:
    state_dict = quantized_state_dict()
    fused = torch.rand(6, 5)
    state_dict["view"] = fused[2:4]  # of a larger storage, all of which is in the file
    state_dict["empty"] = torch.empty(0, 3)
    state_dict["flags"] = torch.tensor([True, False])
    state_dict["number"] = torch.tensor(3)
    file = save(tmp_path / "x-v2.pt", state_dict)
    header = read_state_dict(file, allow_pickle=True)
    assert list(header.tensors) == list(state_dict)
    for name, tensor in state_dict.items():
        info, found = header.tensors[name], header.tensors[name].read()
        assert info.shape == tuple(tensor.shape) and found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert file.read_bytes()[info.begin : info.end] == tensor.numpy().tobytes()
    qweight = header.tensors["model.layers.0.mlp.up_proj.qweight"]
    assert (qweight.dtype, qweight.shape, qweight.shard) == ("I16", (32, 64), "x-v2.pt")
    assert header.tensors["lm_head.weight"].begin == header.tensors["model.embed_tokens.weight"].begin

    os.truncate(file, qweight.begin)  # it would be the end of a process that had the file mapped
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        qweight.read()


def test_the_flag_is_needed_and_named(tmp_path: Path) -> None:
    state_dict = save(tmp_path / "q-v2.pt", quantized_state_dict())
    results = save(tmp_path / "r.pt", search(small_model("llama"), "llama"))
    for read, file in ((read_state_dict, state_dict), (read_search_results, results)):
        with pytest.raises(CheckpointError, match=rf"{file.name} is a pickle, .*allow_pickle=True .*--allow-pickle"):
            read(file, allow_pickle=False)
        with pytest.raises(CheckpointError, match=r"none\.pt cannot be opened"):
            read(tmp_path / "none.pt", allow_pickle=True)
        with pytest.raises(CheckpointError, match="must be a file, got a directory"):
            read(tmp_path, allow_pickle=True)
    with pytest.raises(CheckpointError, match="give it to quantize as search_results"):
        read_state_dict(results, allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"two lists.*got the keys model\.embed_tokens\.weight"):
        read_search_results(state_dict, allow_pickle=True)


# --- hostile files --------------------------------------------------------------------------------------------------


class Stored:
    """A storage, as the pickle refers to it: any claim about type, record and length."""

    def __init__(self, *claim: Any) -> None:
        self.claim = claim


class Call:
    """A function that is to be called when the pickle is read."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", *value.claim) if isinstance(value, Stored) else None


def claimed(stored: Stored, size: Any, stride: Any, offset: int = 0, metadata: Any = None) -> Call:
    more = () if metadata is None else (metadata,)
    return Call(torch._utils._rebuild_tensor_v2, stored, offset, size, stride, False, OrderedDict(), *more)


FLOAT16 = Stored(torch.FloatStorage, "0", "cpu", 16)
GOOD = claimed(FLOAT16, (4, 4), (4, 1))


def archive(path: Path, content: Any, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    records = {"data.pkl": stream.getvalue(), "byteorder": b"little", "version": b"3\n"}
    records |= {f"data/{name}": content for name, content in storages.items()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, record in records.items():
            file.writestr(f"x/{name}", record)
    return path


def touch(path: str) -> None:
    Path(path).touch()


def many(count: int) -> list[Any]:
    return [[] for _ in range(count)]


SIXTEEN = {"0": bytes(range(64))}
HOSTILE: dict[str, tuple[Any, dict[str, bytes], str]] = {
    "a call": ({"a": Call(os.system, "touch touched")}, {}, r"refers to '(posix|nt)\.system'"),
    "a call of the tests": ({"a": Call(touch, "touched")}, {}, "refers to 'test_llm_awq.touch'"),
    "eval": ({"a": Call(eval, "open('touched', 'w')")}, {}, "refers to '__builtin__.eval'"),
    # These torch.load(weights_only=True) would do.
    "a terabyte of zeros": ({"a": Call(bytearray, 10**12)}, {}, "refers to '__builtin__.bytearray'"),
    "a tensor without a storage": ({"a": Call(torch.Tensor, 2**20, 2**20)}, {}, r"refers to 'torch\S*\.Tensor'"),
    "a storage made up": ({"a": Call(torch.UntypedStorage, 2**40)}, {}, "refers to 'torch.storage.UntypedStorage'"),
    "a parameter": ({"a": Call(torch._utils._rebuild_parameter, GOOD, False, None)}, SIXTEEN, "_rebuild_parameter"),
    "a sparse tensor": ({"a": Call(torch._utils._rebuild_sparse_tensor, None, ())}, {}, "_rebuild_sparse_tensor"),
    # From here on all names are allowed.
    "a storage that claims more": (
        {"a": claimed(Stored(torch.FloatStorage, "0", "cpu", 2**40), (4, 4), (4, 1))},
        SIXTEEN,
        "holds 1 storages with 64 bytes, but its tensors refer to 1 with",
    ),
    "a storage that claims less": (
        {"a": claimed(Stored(torch.FloatStorage, "0", "cpu", 4), (4,), (1,))},
        SIXTEEN,
        "with 64 bytes, but its tensors refer to 1 with 16",
    ),
    "a negative length": ({"a": claimed(Stored(torch.FloatStorage, "0", "cpu", -16), (4,), (1,))}, SIXTEEN, "read"),
    "a storage that nobody has": ({"a": GOOD}, {"0": bytes(64), "1": bytes(64)}, "holds 2 storages with 128 bytes"),
    "a storage that is not there": ({"a": GOOD}, {"1": bytes(64)}, "cannot be read: RuntimeError"),
    "a record of another name": ({"a": claimed(Stored(torch.FloatStorage, "../x", "cpu", 4), (4,), (1,))}, {}, "read"),
    "a shape beyond the storage": ({"a": claimed(FLOAT16, (2**30, 4), (4, 1))}, SIXTEEN, "cannot be read"),
    "an offset beyond the storage": ({"a": claimed(FLOAT16, (4, 4), (4, 1), 2)}, SIXTEEN, "cannot be read"),
    "a negative offset": ({"a": claimed(FLOAT16, (4,), (1,), -8)}, SIXTEEN, "cannot be read"),
    "a negative stride": ({"a": claimed(FLOAT16, (4, 4), (-4, 1))}, SIXTEEN, "cannot be read"),
    "a shape beyond 64 bits": ({"a": claimed(FLOAT16, (2**62, 4), (4, 1))}, SIXTEEN, "cannot be read"),
    "one row many times": ({"a": claimed(FLOAT16, (2**40, 4), (0, 1))}, SIXTEEN, "a must be a dense contiguous tensor"),
    "transposed": ({"a": claimed(FLOAT16, (4, 4), (1, 4))}, SIXTEEN, "a must be a dense contiguous tensor"),
    "negated": ({"a": claimed(FLOAT16, (4,), (1,), 0, {"neg": True})}, SIXTEEN, "a must be a dense contiguous tensor"),
    "a string": ({"a": "text"}, {}, "a must be a tensor, got 'text'"),
    "a list": ({"a": [GOOD]}, SIXTEEN, "a must be a tensor, got a list"),
    "a number as a name": ({3: GOOD}, SIXTEEN, "names must be printable text, got a int"),
    "a name that is not printable": ({"a\n": GOOD}, SIXTEEN, r"names must be printable text, got 'a\\n'"),
    "no dictionary": ([GOOD], SIXTEEN, "must hold a dictionary of tensors, got a list"),
    "nothing": ({}, {}, "must hold a dictionary of tensors, got a dict"),
    "a thousand names for one tensor": ({f"a{i}": GOOD for i in range(1000)}, SIXTEEN, "too many share their memory"),
    "too many instructions": ({"a": many(300_000)}, {}, "more than 500000 instructions"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, storages, message = HOSTILE[case]
    file = archive(tmp_path / "hostile.pt", content, storages)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(file, allow_pickle=True)
    assert str(file) in str(caught.value)
    with pytest.raises(CheckpointError):
        read_search_results(file, allow_pickle=True)
    assert not Path("touched").exists()


def test_an_honest_file_made_the_same_way(tmp_path: Path) -> None:
    """What the hostile ones differ from; also from a GPU, which is not needed to read it."""
    for place in ("cpu", "cuda:0"):
        tensor = claimed(Stored(torch.FloatStorage, "0", place, 16), (4, 4), (4, 1))
        file = archive(tmp_path / "x.pt", {"a": tensor}, SIXTEEN)
        found = read_state_dict(file, allow_pickle=True).tensors["a"].read()
        assert found.numpy().tobytes() == SIXTEEN["0"] and found.shape == (4, 4)


def test_methods_that_the_file_replaces(tmp_path: Path) -> None:
    """An OrderedDict has attributes, and those of the file come before its methods."""
    replaced = dict.fromkeys(("items", "keys", "values", "__iter__", "__len__", "get"), 3)
    file = archive(tmp_path / "x.pt", Call(OrderedDict, [("a", GOOD)], state=replaced), SIXTEEN)
    assert list(read_state_dict(file, allow_pickle=True).tensors) == ["a"]
    scale = claimed(Stored(torch.FloatStorage, "0", "cpu", 16), (16,), (1,))
    results = Call(OrderedDict, [("scale", [("m.0.a", ("m.0.b",), scale)]), ("clip", [])], state=replaced)
    file = archive(tmp_path / "x.pt", results, {"0": np.ones(16, np.float32).tobytes()})
    assert read_search_results(file, allow_pickle=True).scales[0].producer == "m.0.a"


def test_hostile_archives(tmp_path: Path) -> None:
    file, good = tmp_path / "x.pt", {"a": GOOD}

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_state_dict(file, allow_pickle=True)
        assert str(file) in str(caught.value)

    archive(file, good, SIXTEEN, zipfile.ZIP_DEFLATED)
    refused("not compressed")
    archive(file, good, SIXTEEN)
    whole = file.read_bytes()
    for length in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused("truncated")
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    refused("no file of torch.save")
    file.write_bytes(b"\x80\x04}.")
    refused("no file of torch.save")

    archive(file, good, SIXTEEN)
    with zipfile.ZipFile(file, "a") as more, pytest.warns(UserWarning, match="Duplicate"):
        more.writestr("x/data/0", bytes(64))
    refused("must be there once")
    archive(file, good, SIXTEEN)
    with zipfile.ZipFile(file, "a") as more:
        more.writestr("y/data/0", bytes(64))
    refused("must be there once")
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("x/model.json", b"{}")
    refused("must hold a record data.pkl .* got none")
    with zipfile.ZipFile(file, "w") as big:
        big.writestr("x/data.pkl", bytes(17 * 2**20))
    refused("data.pkl of 16777216 bytes at most")

    with zipfile.ZipFile(file, "w") as big_endian:
        for record in zipfile.ZipFile(archive(tmp_path / "good.pt", good, SIXTEEN)).infolist():
            content = zipfile.ZipFile(tmp_path / "good.pt").read(record)
            big_endian.writestr(record.filename, b"big" if "byteorder" in record.filename else content)
    refused("byteorder must be little, got b'big'")

    # Two entries of the directory at one place in the file; an entry that is longer than its place.
    data = bytearray(whole)
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    struct.pack_into("<I", data, entries[-1] + 42, struct.unpack_from("<I", data, entries[0] + 42)[0])
    file.write_bytes(data)
    refused("reaches into what comes after it")
    data = bytearray(whole)
    struct.pack_into("<2I", data, entries[-1] + 20, 10**6, 10**6)
    file.write_bytes(data)
    refused("'x/data/0' reaches into what comes after it")


@pytest.mark.parametrize("kind", ["search results", "state dict"])
def test_files_with_wrong_bytes(kind: str, tmp_path: Path) -> None:
    """Whatever a byte is changed to, it is read or refused."""
    read: Callable[..., Any] = read_search_results
    if kind == "search results":
        file = save(tmp_path / "x.pt", search(small_model("llama"), "llama"))
    else:
        file, read = archive(tmp_path / "x.pt", {"a": GOOD, "b": GOOD}, SIXTEEN), read_state_dict
    whole, generator = file.read_bytes(), random.Random(0)
    with zipfile.ZipFile(file) as records:
        middle = 100 + next(record.file_size for record in records.infolist() if "data.pkl" in record.filename)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            where = generator.choice((generator.randrange(middle), -1 - generator.randrange(400)))
            data[where] = generator.choice((0, 1, 255, generator.randrange(256)))
        file.write_bytes(data)
        try:
            read(file, allow_pickle=True)
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
