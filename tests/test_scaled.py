"""Activations with stored scales: AutoAWQ's bloom, mpt, falcon, gpt_bigcode, gpt_neox, gptj and starcoder2 files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from awq_ext import AwqLinear, CheckpointError, cli, load_quantized, save_quantized
from awq_ext import checkpoint as checkpoint_module
from awq_ext.checkpoint import Checkpoint
from awq_ext.scaled import ScaledActivation, insert_scaled_activations

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

GROUP = 16
IDS = torch.arange(3, 19).view(2, 8)


@dataclass(frozen=True)
class Family:
    """config.json as transformers 4 writes it (2 layers, hidden 32), and where AutoAWQ puts the scales."""

    config: dict[str, Any]
    blocks: str
    act: str
    second: str
    renamed: tuple[str, str] = ("", "")
    """The prefix in transformers 5, and in the files of AutoAWQ's time."""


FAMILIES = {
    "bloom": Family(
        dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
        *("transformer.h", "mlp.gelu_impl", "mlp.dense_4h_to_h"),
    ),
    "mpt": Family(
        dict(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64),
        *("transformer.blocks", "ffn.act", "ffn.down_proj"),
    ),
    "falcon": Family(
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            vocab_size=64,
        ),
        *("transformer.h", "mlp.act", "mlp.dense_4h_to_h"),
    ),
    "gpt_bigcode": Family(
        dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64, activation_function="gelu_pytorch_tanh"),
        *("transformer.h", "mlp.act", "mlp.c_proj"),
    ),
    "gpt_neox": Family(
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            rotary_pct=0.5,
            rotary_emb_base=5000,
        ),
        *("gpt_neox.layers", "mlp.act", "mlp.dense_4h_to_h"),
        renamed=("lm_head.", "embed_out."),
    ),
    "gptj": Family(
        dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, vocab_size=64),
        *("transformer.h", "mlp.act", "mlp.fc_out"),
    ),
    "starcoder2": Family(
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        ),
        *("model.layers", "mlp.act", "mlp.c_proj"),
    ),
}


def round_to_nearest(weight: Tensor) -> ref.Weight:
    groups = weight.detach().reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    q = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return ref.Weight(q.reshape(weight.shape).byte(), scale, zero.byte(), GROUP)


def write_as_autoawq(kind: str, path: Path) -> Any:
    """Writes a random model of the type as AutoAWQ does, and returns what the files mean: a plain float64 model.

    The mechanism is another one than the loader's: it has no wrapped activation, but the second linear's dequantized
    weight divided by the scales.
    """
    family = FAMILIES[kind]
    fields = {"model_type": kind, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16", **family.config}
    with torch.random.fork_rng():
        torch.manual_seed(sum(kind.encode()))
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind].from_dict(fields))
        # Initial weights are so small that activations are nearly linear and biases zero: draw all of them anew.
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                nn.init.normal_(weight, std=0.4 if weight.dim() == 2 else 0.2)
        blocks = model.get_submodule(family.blocks)
        sizes = [block.get_submodule(family.second).in_features for block in blocks]
        scales = [(torch.rand(size) * 4 - 2).exp2().half() for size in sizes]  # from a quarter to four
    model = model.float().eval()

    files: dict[str, Tensor] = {}
    with torch.no_grad():
        for number, block in enumerate(blocks):
            prefix = f"{family.blocks}.{number}."
            for name, linear in block.named_modules():
                if not isinstance(linear, nn.Linear):
                    continue
                is_second = name == family.second
                weight = round_to_nearest(linear.weight * scales[number].float() if is_second else linear.weight)
                for part, tensor in zip(("qweight", "scales", "qzeros"), weight.tensors, strict=True):
                    files[f"{prefix}{name}.{part}"] = tensor.clone()
                linear.weight = nn.Parameter(weight.dense / scales[number].double() if is_second else weight.dense)
                if linear.bias is not None:
                    files[f"{prefix}{name}.bias"] = linear.bias.half()
                    linear.bias = nn.Parameter(linear.bias.half().double())
            files[f"{prefix}{family.act}.scales"] = scales[number]
        seen = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            linear = name.rpartition(".")[0]
            if f"{linear}.qweight" not in files and id(tensor) not in seen:
                seen.add(id(tensor))
                tensor.data = tensor.data.half()
                new, old = family.renamed
                files[old + name.removeprefix(new) if name.startswith(new) else name] = tensor.detach().clone()

    path.mkdir()
    fields["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
    }
    (path / "config.json").write_text(json.dumps(fields))
    save_file(files, path / "model.safetensors", metadata={"format": "pt"})
    return model.double()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Directory and float64 model of a type, made at the first call; neither is to be changed."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            path = tmp_path_factory.mktemp("scaled") / kind
            made[kind] = path, write_as_autoawq(kind, path)
        return made[kind]

    return get


@pytest.fixture
def neox(written: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written("gpt_neox")[0], tmp_path / "neox"))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(ids).logits.double()
    return result


def scaled(model: nn.Module) -> dict[str, ScaledActivation]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ScaledActivation)}


# --- the seven families ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_of_every_family(written: Callable[[str], tuple[Path, Any]], kind: str) -> None:
    path, plain = written(kind)
    expected = logits(plain)
    model = load_quantized(path, dtype=torch.float32)
    blocks, act = FAMILIES[kind].blocks, FAMILIES[kind].act
    assert list(scaled(model)) == [f"{blocks}.{number}.{act}" for number in (0, 1)]

    # float32 against float64, at most 128 products in a sum and some ten of these in a row; forgetting the scales, or
    # taking those of the other block, is far outside.
    tolerance = 1e-4 * float(expected.abs().max())
    assert float((logits(model) - expected).abs().max()) < tolerance
    first, second = scaled(model).values()
    first.scales, second.scales = second.scales, first.scales
    assert float((logits(model) - expected).abs().max()) > 100 * tolerance
    for module in scaled(model).values():
        module.scales = torch.ones_like(module.scales)
    assert float((logits(model) - expected).abs().max()) > 100 * tolerance


@pytest.mark.parametrize("kind", FAMILIES)
def test_saving_writes_the_same_files(written: Callable[[str], tuple[Path, Any]], kind: str, tmp_path: Path) -> None:
    path, _ = written(kind)
    out = save_quantized(load_quantized(path), tmp_path / "out")
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    again, model = (load_quantized(directory, dtype=torch.float32) for directory in (out, path))
    assert torch.equal(logits(again), logits(model))


def test_scales_keep_their_values_in_a_bfloat16_model(written: Callable[[str], tuple[Path, Any]]) -> None:
    path, plain = written("starcoder2")
    model = load_quantized(path, dtype=torch.bfloat16)
    stored = load_file(path / "model.safetensors")
    for name, module in scaled(model).items():
        assert module.scales.dtype == torch.float16
        assert torch.equal(module.scales, stored[f"{name}.scales"])
        assert not list(module.parameters())
    error = (logits(model) - logits(plain)).abs()
    assert float(error.mean()) < 0.05 * float(logits(plain).abs().mean())


def test_older_readers_find_the_names_of_gpt_neox(neox: Path, tmp_path: Path) -> None:
    """transformers 4, and AutoAWQ with it, reads the head from embed_out and the rotary embedding from these keys."""
    out = save_quantized(load_quantized(neox), tmp_path / "out")
    assert "embed_out.weight" in load_file(out / "model.safetensors")
    fields = json.loads((out / "config.json").read_text())
    assert (fields["rotary_pct"], fields["rotary_emb_base"]) == (0.5, 5000)


def test_gpt_neox_is_read_with_either_name_of_its_head(neox: Path) -> None:
    before = logits(load_quantized(neox, dtype=torch.float32))
    edit(neox, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert torch.equal(logits(load_quantized(neox, dtype=torch.float32)), before)


def test_a_genuine_file_of_autoawq() -> None:
    """Logits are AutoAWQ's own: see tests/data/README.md."""
    path = Path(__file__).parent / "data" / "autoawq-gpt_neox-scaled"
    expected = torch.from_numpy(np.load(path / "reference_logits.npy")).double()
    ids = torch.tensor([json.loads((path / "reference.json").read_text())["input_ids"]])
    model = load_quantized(path, dtype=torch.float32)
    assert len(scaled(model)) == 2
    assert float((logits(model, ids)[0] - expected).abs().max()) < 1e-5
    assert float((logits(model, ids[:, :5])[0] - expected[:5]).abs().max()) < 1e-5
    for module in scaled(model).values():
        module.scales.fill_(1)
    assert float((logits(model, ids)[0] - expected).abs().max()) > 0.1


# --- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_divides_by_the_stored_values(shape: tuple[int, ...], x_dtype: torch.dtype, scales_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(x_dtype)
    scales = (torch.rand(24, generator=generator) + 0.5).to(scales_dtype)
    y = ScaledActivation(nn.ReLU(), scales)(x)
    assert (y.dtype, y.shape) == (x_dtype, x.shape)
    exact = x.double().clamp(min=0) / scales.double()
    # One rounding to the wider type and one to x's.
    assert ((y.double() - exact).abs() <= 1.01 * ref.UNIT_ROUNDOFF[x_dtype] * exact).all()


def test_names_are_autoawqs_and_it_can_be_scripted() -> None:
    module = ScaledActivation(nn.GELU(), torch.tensor([0.5, 2.0, 4.0]))
    assert list(module.state_dict()) == ["scales"]
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.jit.script(module)(x), module(x))
    assert "features=3" in repr(module)


# --- refusals -------------------------------------------------------------------------------------------------------

ACT = "gpt_neox.layers.1.mlp.act"
SECOND = "gpt_neox.layers.1.mlp.dense_4h_to_h"


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


def first_is(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[f"{ACT}.scales"][3].fill_(value)


def unquantized_linear(tensors: dict[str, Tensor]) -> None:
    for part in ("qweight", "qzeros"):
        del tensors[f"{SECOND}.{part}"]
    tensors[f"{SECOND}.scales"] = torch.ones(64)


def whole_linear(tensors: dict[str, Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales"):
        tensors[f"{ACT}.{part}"] = tensors[f"{SECOND}.{part}"]


NO_ACTIVATION = "scales an activation, but the model"
REFUSED = {
    "too short": (put(f"{ACT}.scales", torch.ones(56)), rf"{ACT}\.scales must have .* \(64\), got 56"),
    "too long": (put(f"{ACT}.scales", torch.ones(128)), rf"{ACT}\.scales must have .* \(64\), got 128"),
    "one for all": (put(f"{ACT}.scales", torch.ones(1)), rf"{ACT}\.scales must have .* \(64\), got 1"),
    "none": (put(f"{ACT}.scales", torch.ones(0)), rf"{ACT}\.scales must have .* \(64\), got 0"),
    "inputs of the first linear": (put(f"{ACT}.scales", torch.ones(32)), rf"{ACT}\.scales must .* \(64\), got 32"),
    "matrix": (put(f"{ACT}.scales", torch.ones(1, 64)), rf"{ACT}\.scales.* there is no {ACT}\.qweight"),
    "integers": (put(f"{ACT}.scales", torch.ones(64, dtype=torch.int32)), rf"{ACT}\.scales"),
    "nan": (first_is(torch.nan), rf"{ACT}\.scales must be finite and not zero, got nan at channel 3"),
    "infinite": (first_is(-torch.inf), rf"{ACT}\.scales must be finite and not zero, got -inf at channel 3"),
    "zero": (first_is(0), rf"{ACT}\.scales must be finite and not zero, got 0\.0 at channel 3"),
    "one missing": (
        lambda tensors: tensors.update({f"{ACT}s.scales": tensors.pop(f"{ACT}.scales")}),
        rf"{ACT}s\.scales, .* {NO_ACTIVATION} has no module of that name",
    ),
    "linear without its words": (unquantized_linear, rf"{SECOND}\.scales, .* has a Linear there, and its quantized"),
    "norm": (put("gpt_neox.final_layer_norm.scales", torch.ones(32)), f"{NO_ACTIVATION}'s LayerNorm .* of its own"),
    "rotary": (put("gpt_neox.rotary_emb.scales", torch.ones(32)), f"{NO_ACTIVATION}'s .*Rotary.* of its own"),
    "dropout": (
        put("gpt_neox.layers.0.post_mlp_dropout.scales", torch.ones(32)),
        f"{NO_ACTIVATION}'s Dropout there is no activation",
    ),
    "words too": (put(f"{ACT}.qweight", torch.ones(32, 8, dtype=torch.int32)), rf"{ACT}\.scales must be \[2, 64\]"),
    "zeros too": (put(f"{ACT}.qzeros", torch.ones(4, 8, dtype=torch.int32)), rf"there is no {ACT}\.qweight"),
    "a whole linear": (whole_linear, rf"{ACT} is quantized in the files, but the model has GELUActivation there"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(neox: Path, case: str) -> None:
    change, message = REFUSED[case]
    edit(neox, change)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(neox)


def test_no_scales_for_an_activation_without_linears(neox: Path) -> None:
    """The module tree cannot tell how long they would have to be."""
    checkpoint = Checkpoint.open(neox)
    model = checkpoint_module.skeleton(checkpoint, torch.float32)
    mlp = model.gpt_neox.layers[1].mlp
    del mlp.dense_h_to_4h, mlp.dense_4h_to_h
    with pytest.raises(CheckpointError, match=re.escape(f"{ACT}.scales") + ".*no linear beside it"):
        insert_scaled_activations(checkpoint, model)


def test_a_shared_activation(neox: Path) -> None:
    checkpoint = Checkpoint.open(neox)

    # One object in both blocks, as where a model takes its activations from a table of instances: both are scaled.
    model = checkpoint_module.skeleton(checkpoint, torch.float32)
    act = model.gpt_neox.layers[0].mlp.act
    model.gpt_neox.layers[1].mlp.act = act
    insert_scaled_activations(checkpoint, model)
    wrapped = scaled(model)
    assert len(set(wrapped.values())) == 2 and all(module.act is act for module in wrapped.values())

    # A second name in the same block: nothing says which of the two the block calls.
    model = checkpoint_module.skeleton(checkpoint, torch.float32)
    model.gpt_neox.layers[1].mlp.also = model.gpt_neox.layers[1].mlp.act
    with pytest.raises(CheckpointError, match=re.escape(f"the same module as {ACT[:-3]}also, which has no scales")):
        insert_scaled_activations(checkpoint, model)

    # A whole MLP in two places, with scales for one of them.
    edit(neox, lambda tensors: tensors.pop("gpt_neox.layers.0.mlp.act.scales"))
    checkpoint = Checkpoint.open(neox)
    model = checkpoint_module.skeleton(checkpoint, torch.float32)
    model.gpt_neox.layers[0].mlp = model.gpt_neox.layers[1].mlp
    with pytest.raises(CheckpointError, match=r"the same module as gpt_neox\.layers\.0\.mlp\.act, which has no"):
        insert_scaled_activations(checkpoint, model)


def test_bad_scales_are_not_written(neox: Path, tmp_path: Path) -> None:
    model = load_quantized(neox)
    scaled(model)[ACT].scales[5] = 0
    with pytest.raises(CheckpointError, match=rf"{ACT}\.scales must be finite and not zero, got 0\.0 at channel 5"):
        save_quantized(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_shows_them(neox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(neox), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [f"gpt_neox.layers.{number}.mlp.act" for number in (0, 1)]
    assert result["scaled_activations"] == [{"name": name, "features": 64} for name in names]
    assert not any(tensor["name"].endswith(".scales") for tensor in result["not_quantized"])
    assert result["quantized_linears"] == sum(isinstance(m, AwqLinear) for m in load_quantized(neox).modules())
    assert cli.main(["inspect", str(neox)]) == 0
    assert "2 activations divided by 64 stored scales each: gpt_neox.layers.*.mlp.act" in capsys.readouterr().out
