"""Perplexity against a plain computation; generation; loading of what is sound and refusal of what is not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'hf'")

from awq_ext import evaluate, pretrained
from awq_ext.errors import AwqError, CheckpointError, UnsupportedModelError


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return pretrained.load_any(tiny_llama)


def plain_nll(model, windows: list[list[int]]) -> tuple[float, int]:
    """The definition, one prediction after another, in float64."""
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for position in range(len(window) - 1):
            total -= torch.log_softmax(logits[position], -1)[window[position + 1]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_perplexity_is_its_definition(loaded, bos, batch):
    model, _ = loaded
    ids = torch.randint(3, 320, (150,), generator=torch.Generator().manual_seed(0))
    step = 16 if bos is None else 15
    windows = [([] if bos is None else [bos]) + ids[i : i + step].tolist() for i in range(0, 150 - step + 1, step)]
    total, count = plain_nll(model, windows)

    result = evaluate.perplexity(model, ids, window=16, bos=bos, batch=batch)

    assert result.tokens == count == len(windows) * 15
    assert result.nll == pytest.approx(total / count, rel=1e-5)
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(loaded):
    model, _ = loaded
    blind = torch.nn.Module()
    blind.device, blind.config = model.device, model.config
    blind.get_input_embeddings = model.get_input_embeddings
    blind.forward = lambda input_ids, use_cache: type("Out", (), {"logits": torch.zeros(*input_ids.shape, 320)})
    assert evaluate.perplexity(blind, torch.arange(100), window=10).value == pytest.approx(320, rel=1e-5)


def test_split_drops_the_last_part_window():
    ids = torch.arange(10)
    assert evaluate.split(ids, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluate.split(ids, 4, bos=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


def test_too_short_a_text_is_refused():
    with pytest.raises(AwqError, match="too short: it has 3 tokens, one window takes 4"):
        evaluate.split(torch.arange(3), 4)
    assert evaluate.split(torch.arange(3), 4, bos=0).shape == (1, 4)  # three tokens and bos make one window
    with pytest.raises(AwqError, match="at least 2"):
        evaluate.split(torch.arange(3), 1)


def test_first_tokens_are_those_of_the_whole_text(loaded):
    _, tokenizer = loaded
    words = [
        "internationalisation",
        "the",
        "of",
        "quick",
        "Once",
        "upon",
        "1805",
        "def",
        "add(a,",
        "b):",
        "north-west\n",
    ]
    order = torch.randint(len(words), (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = " ".join(words[i] for i in order)
    everything = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in (1, 7, 500, len(everything)):
        assert evaluate.first_tokens(text, tokenizer, count).tolist() == everything[:count]
    assert evaluate.first_tokens(text, tokenizer, len(everything) + 5).tolist() == everything


def test_first_tokens_of_a_text_with_long_tokens():
    class Words:  # 100 characters a token: eight are not enough
        def __call__(self, text, **_):
            return {"input_ids": list(range(len(text.split())))}

    text = " ".join(["x" * 99] * 1000)
    assert evaluate.first_tokens(text, Words(), 500).tolist() == list(range(500))


def test_a_loss_that_is_not_finite_is_refused(tiny_llama):
    model, _ = pretrained.load_any(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(AwqError, match=r"window 0 of 6.*not finite"):
        evaluate.perplexity(model, torch.arange(100), window=16)


def test_tokens_beyond_vocabulary_or_positions_are_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(AwqError, match="token 320, but the model knows only 320"):
        evaluate.perplexity(model, torch.full((20,), 320), window=10)
    with pytest.raises(AwqError, match="1024 tokens in a row are more than the model's 512"):
        evaluate.perplexity(model, torch.zeros(2000, dtype=torch.int64), window=1024)
    with pytest.raises(AwqError, match="more than the model's 512"):
        evaluate.generate(model, tokenizer, "Once", 600)


def test_generation_is_greedy(loaded):
    model, tokenizer = loaded
    result = evaluate.generate(model, tokenizer, "Once upon a time", 12)
    ids = prompt = tokenizer("Once upon a time")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, best]
        if best == tokenizer.eos_token_id:
            break
    assert result.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert (result.prompt_tokens, result.new_tokens) == (len(prompt), len(ids) - len(prompt))
    assert result.tokens_per_second == pytest.approx(result.new_tokens / result.seconds)


def test_generation_ignores_sampling_settings_of_the_model(tiny_llama):
    model, tokenizer = pretrained.load_any(tiny_llama)
    expected = evaluate.generate(model, tokenizer, "Once", 8).text
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert evaluate.generate(model, tokenizer, "Once", 8).text == expected
    assert model.generation_config is own


def test_chat_needs_and_uses_a_template(tiny_llama):
    model, tokenizer = pretrained.load_any(tiny_llama)
    with pytest.raises(AwqError, match="no chat template"):
        evaluate.generate(model, tokenizer, "Once", 4, chat=True)
    tokenizer.chat_template = "{% for m in messages %}A: {{ m['content'] }}\nB:{% endfor %}"
    chat = evaluate.generate(model, tokenizer, "Once", 4, chat=True)
    plain = evaluate.generate(model, tokenizer, "A: Once\nB:", 4)
    assert (chat.text, chat.prompt_tokens) == (plain.text, plain.prompt_tokens)


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(AwqError, match="prompt is empty"):
        evaluate.generate(*loaded, "", 4)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(directory: Path, **values) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_quantized_checkpoint_is_recognised(shared):
    path = shared / "data" / "checkpoints" / "autoawq-gemm"
    assert pretrained.is_quantized_directory(path)
    assert not pretrained.is_quantized_directory(shared / "data" / "stories260K")


def test_a_legacy_quant_config_is_recognised(copy):
    assert not pretrained.is_quantized_directory(copy)
    (copy / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 128}')
    assert pretrained.is_quantized_directory(copy)


def test_loads_in_the_dtype_asked_for(tiny_llama):
    model, _ = pretrained.load_any(tiny_llama, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        pretrained.load_any(tmp_path / "nothing")


def test_a_directory_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pretrained.load_any(copy)


def test_a_missing_tokenizer_is_refused(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer can be loaded.*\n.*Copy the tokenizer files"):
        pretrained.load_any(copy)


def test_an_unknown_architecture_is_refused(copy):
    edit_config(copy, model_type="no-such-thing", architectures=["NoSuchThing"])
    with pytest.raises(UnsupportedModelError, match="no-such-thing"):
        pretrained.load_any(copy)


def test_missing_weights_are_refused_not_invented(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        pretrained.load_any(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        pretrained.load_any(copy)


@pytest.fixture(scope="module")
def stories(shared):
    return pretrained.load_any(shared / "data" / "stories260K")


def test_loss_of_a_trained_model_is_the_published_one(stories, shared):
    """Its author gives a validation loss of 1.2968 nats a token on TinyStories, each story led by bos."""
    model, tokenizer = stories
    text = (shared / "data" / "text" / "calibration" / "tiny.utf8").read_text(encoding="utf-8")
    total = count = 0.0
    for story in text.split("<|endoftext|>")[:40]:
        ids = evaluate.first_tokens(story.strip(), tokenizer, 511)
        result = evaluate.perplexity(model, ids, window=len(ids) + 1, bos=tokenizer.bos_token_id)
        total, count = total + result.nll * result.tokens, count + result.tokens
    assert total / count == pytest.approx(1.2968, abs=0.1)


def test_a_trained_model_writes_the_published_text(stories):
    """The greedy sample in the model's own description (llama2.c, doc/stories260K.md)."""
    assert evaluate.generate(*stories, "Once upon a time", 40).text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )
