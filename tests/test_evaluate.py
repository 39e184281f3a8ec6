"""Perplexity and divergence against plain computations; generation; loading of what is sound and of nothing else."""

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


def plain_log_probabilities(model, window: list[int]) -> torch.Tensor:
    """[length - 1, vocabulary] in float64: what a window says of all its tokens but the first."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([window])).logits[0, :-1].double(), -1)


def plain_windows(ids: torch.Tensor, window: int, stride: int | None, bos: int | None) -> list[tuple[list[int], int]]:
    """Windows and the number of their last tokens that are scored, by marking every token that has been in one."""
    lead = [] if bos is None else [bos]
    length = window - len(lead)
    seen, windows = 0, []
    for begin in range(0, len(ids) - length + 1, stride or length):
        new = begin + length - max(seen, begin)
        windows.append((lead + ids[begin : begin + length].tolist(), min(new, window - 1)))
        seen = begin + length
    return windows


IDS = torch.randint(3, 320, (150,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(
    ("length", "stride"), [(16, None), (16, 15), (16, 8), (16, 5), (16, 1), (2 * evaluate.CHUNK + 7, None)]
)
def test_perplexity_is_its_definition(loaded, bos, length, stride):
    model, _ = loaded
    ids = IDS if stride != 1 else IDS[:30]
    means, count = [], 0
    windows = plain_windows(ids, length, stride, bos)
    for window, scored in windows:
        said = plain_log_probabilities(model, window)[-scored:]
        means.append(-said[torch.arange(scored), window[-scored:]].mean().item())
        count += scored
    if stride is not None and stride < 15:  # every token is predicted once, but those that are only read or left over
        assert count == windows[0][1] + (len(windows) - 1) * stride

    result = evaluate.perplexity(model, None, ids, length, stride, bos=bos)

    nll = sum(mean * scored for mean, (_, scored) in zip(means, windows, strict=True)) / count
    assert result.tokens == count
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.value == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.windows == pytest.approx(means, rel=1e-5)


def test_a_window_that_sees_more_than_it_scores_is_transformers_own(loaded):
    """The loop of transformers' documentation on perplexity, its loss counted by token, up to the last full window."""
    model, _ = loaded
    window, stride, total, count, seen = 20, 7, 0.0, 0, 0
    for begin in range(0, len(IDS) - window + 1, stride):
        row = IDS[None, begin : begin + window]
        labels = row.clone()
        labels[:, : window - (begin + window - seen)] = -100
        predictions = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(row, labels=labels).loss.item() * predictions
        count += predictions
        seen = begin + window
    result = evaluate.perplexity(model, None, IDS, window, stride)
    assert result.tokens == count and result.nll == pytest.approx(total / count, rel=1e-5)


def test_perplexity_of_a_text_is_that_of_its_tokens(loaded):
    model, tokenizer = loaded
    text = "The quick brown fox jumps over the lazy dog; \N{SNOWMAN} \N{PILE OF POO}. " * 20
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert evaluate.perplexity(model, tokenizer, text, 16) == evaluate.perplexity(model, None, ids, 16)
    assert evaluate.perplexity(model, tokenizer, text, 16, tokens=100) == evaluate.perplexity(
        model, None, ids[:100], 16
    )


class Constant:
    """A model that says the same everywhere, whatever it reads."""

    def __init__(self, model, logits: torch.Tensor) -> None:
        self.device, self.config, self.logits = model.device, model.config, logits
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, input_ids: torch.Tensor, use_cache: bool):
        assert not use_cache
        return type("Out", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(loaded):
    blind = Constant(loaded[0], torch.zeros(320))
    assert evaluate.perplexity(blind, None, torch.arange(100), 10).value == pytest.approx(320, rel=1e-5)


# --- divergence -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disturbed(tiny_llama):
    model, _ = pretrained.load_any(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("length", "stride", "bos"), [(16, None, None), (16, None, 1), (16, 6, 1), (2 * evaluate.CHUNK + 7, 9, 1)]
)
def test_divergence_is_its_definition(loaded, disturbed, length, stride, bos):
    original, _ = loaded
    kl, agreed = [], []
    for window, scored in plain_windows(IDS, length, stride, bos):
        p, q = (plain_log_probabilities(model, window)[-scored:] for model in (original, disturbed))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        agreed += (p.argmax(-1) == q.argmax(-1)).tolist()

    result = evaluate.divergence(disturbed, original, IDS, length, stride, bos=bos)

    assert result.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4) and result.kl > 0.01
    assert result.kl_p99 == pytest.approx(torch.tensor(kl, dtype=torch.float64).quantile(0.99).item(), rel=1e-4)
    assert result.kl_p99 > result.kl
    assert result.top1 == sum(agreed) / len(agreed) and 0 < result.top1 < 1
    assert result.model == evaluate.perplexity(disturbed, None, IDS, length, stride, bos=bos)
    assert result.original == evaluate.perplexity(original, None, IDS, length, stride, bos=bos)
    differences = torch.tensor(result.model.windows) - torch.tensor(result.original.windows)
    assert result.nll_difference == pytest.approx(math.log(result.model.value / result.original.value))
    assert result.nll_error == pytest.approx(float(differences.std() / len(differences) ** 0.5), rel=1e-4)


def test_divergence_of_two_known_distributions(loaded):
    """It is KL(original || model) and not the other way round."""
    model = loaded[0]
    p, q = torch.full((320,), -50.0), torch.full((320,), -50.0)
    p[:2], q[:2] = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    result = evaluate.divergence(Constant(model, q), Constant(model, p), torch.zeros(20, dtype=torch.int64), 10)
    assert result.kl == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5)
    assert result.kl_p99 == pytest.approx(result.kl) and result.top1 == 1
    assert result.nll_difference == pytest.approx(math.log(0.9 / 0.5), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(loaded):
    result = evaluate.divergence(loaded[0], loaded[0], IDS[:16], 16)
    assert (result.kl, result.kl_p99, result.top1, result.nll_difference) == (0, 0, 1, 0)
    assert result.nll_error is None  # one window


def test_divergence_of_models_of_other_vocabularies_is_refused(loaded):
    other = Constant(loaded[0], torch.zeros(300))
    with pytest.raises(AwqError, match="one of 300 tokens, the original one of 320"):
        evaluate.divergence(other, loaded[0], IDS, 16)


# --- windows --------------------------------------------------------------------------------------------------------


def test_split_drops_the_last_part_window():
    ids = torch.arange(10)
    windows, scored = evaluate.split(ids, 4)
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and scored == [3, 3]
    windows, scored = evaluate.split(ids, 4, bos=99)
    assert windows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]] and scored == [3, 3, 3]
    windows, scored = evaluate.split(ids, 4, stride=3)
    assert windows.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]] and scored == [3, 3, 3]
    windows, scored = evaluate.split(ids, 5, bos=99, stride=2)
    assert windows[:, 1].tolist() == [0, 2, 4, 6] and scored == [4, 2, 2, 2]


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(AwqError, match="too short: it has 3 tokens, one window takes 4"):
        evaluate.split(torch.arange(3), 4)
    assert evaluate.split(torch.arange(3), 4, bos=0)[0].shape == (1, 4)  # three tokens and bos make one window
    with pytest.raises(AwqError, match="at least 2"):
        evaluate.split(torch.arange(3), 1)
    for stride, bos in ((0, None), (5, None), (4, 1)):
        with pytest.raises(AwqError, match=rf"from 1 to the {4 if bos is None else 3} tokens.*, got {stride}"):
            evaluate.split(torch.arange(10), 4, bos, stride)


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
        evaluate.perplexity(model, None, torch.arange(100), 16)


def test_tokens_beyond_vocabulary_or_positions_are_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(AwqError, match="token 320, but the model knows only 320"):
        evaluate.perplexity(model, None, torch.full((20,), 320), 10)
    with pytest.raises(AwqError, match="1024 tokens in a row are more than the model's 512"):
        evaluate.perplexity(model, None, torch.zeros(2000, dtype=torch.int64), 1024)
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
        result = evaluate.perplexity(model, None, ids, len(ids) + 1, bos=tokenizer.bos_token_id)
        total, count = total + result.nll * result.tokens, count + result.tokens
    assert total / count == pytest.approx(1.2968, abs=0.1)


def test_a_trained_model_writes_the_published_text(stories):
    """The greedy sample in the model's own description (llama2.c, doc/stories260K.md)."""
    assert evaluate.generate(*stories, "Once upon a time", 40).text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )
