"""How good and how fast a model is: perplexity on a text, greedy generation.

``model`` is any causal language model of transformers, ``tokenizer`` its tokenizer; the type checker is told Any, since
transformers' own annotations do not hold for what its Auto classes return.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awq_ext.errors import AwqError
from awq_ext.progress import Progress


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats a token) over ``tokens`` predictions."""

    value: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Generation:
    """What a model wrote after the prompt; ``seconds`` are those of prompt and new tokens together."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


@torch.no_grad()
def perplexity(
    model: Any,
    ids: Tensor,
    *,
    window: int = 512,
    bos: int | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of the tokens ``ids`` (int64 [tokens]), cut into windows that do not overlap.

    Each window is ``window`` consecutive tokens and gives ``window - 1`` predictions (its first token is only read);
    with ``bos`` it is that token and ``window - 1`` tokens of the text, all of which are predicted. A last, shorter
    window is left out. ``batch`` windows go through the model at once. Losses are computed in float32.

    Raises AwqError if there is no full window, if the model cannot take the window or the tokens, or if a loss is
    not finite.
    """
    windows = split(ids, window, bos)
    _check_fits(model, windows)
    total = 0.0
    with (progress or Progress.silent()).task("score windows", total=len(windows)) as task:
        done = 0
        for part in torch.split(windows, batch):
            part = part.to(model.device)
            logits = model(input_ids=part, use_cache=False).logits
            for row, target in zip(logits, part, strict=True):  # row by row: the float copy of all would be large
                loss = torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum").item()
                if not math.isfinite(loss):
                    raise AwqError(
                        f"the model's loss is {loss} in window {done} of {len(windows)}: its logits are not finite. "
                        "Score it in float32 (--dtype float32); if that does not help, its weights are damaged"
                    )
                total += loss
                done += 1
            task.advance(len(part), note=f"perplexity {_exp(total / (done * (window - 1))):.2f}")
    tokens = len(windows) * (window - 1)
    return Perplexity(_exp(total / tokens), total / tokens, tokens)


def split(ids: Tensor, window: int, bos: int | None = None) -> Tensor:
    """int64 [count, window]: the full windows of ``ids``, each led by ``bos`` if one is given; see perplexity."""
    if window < 2:
        raise AwqError(f"a window needs at least 2 tokens to predict one from another, got {window}")
    step = window if bos is None else window - 1
    count = len(ids) // step
    if count == 0:
        raise AwqError(
            f"the text is too short: it has {len(ids)} tokens, one window takes {step}. "
            "Give a longer text or a smaller window"
        )
    windows = ids[: count * step].view(count, step)
    return windows if bos is None else torch.cat([windows.new_full((count, 1), bos), windows], dim=1)


def first_tokens(text: str, tokenizer: Any, count: int) -> Tensor:
    """int64 [<= count]: the first ``count`` tokens of the text, without special tokens; fewer if it has fewer.

    Only as much text is tokenized as that takes.
    """
    # A cut can change the few tokens before it, so there must be some to spare behind the last one that is used.
    spare = 64
    characters = 8 * count
    while True:
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count + spare or characters >= len(text):
            return torch.tensor(ids[:count], dtype=torch.int64)
        characters *= 2


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool = False) -> Generation:
    """The model's greedy continuation of ``prompt``; with ``chat`` its answer, under the tokenizer's chat template.

    Raises AwqError if the prompt has no tokens, if prompt and new tokens exceed the model's positions, or with
    ``chat`` if the tokenizer has no chat template.
    """
    from transformers import GenerationConfig

    if chat:
        if not tokenizer.chat_template:
            raise AwqError("the tokenizer has no chat template; leave out --chat")
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].long()  # an empty prompt comes back as floats
    if ids.numel() == 0:
        raise AwqError("the prompt is empty: there is nothing to continue")
    _check_fits(model, ids, max_new_tokens)
    ids = ids.to(model.device)
    own = model.generation_config
    ends = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if isinstance(ends, list) else ends
    # Passed as an argument, what this leaves open (penalties, banned words) would come from the model's own.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad
    )
    try:
        start = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids))
        new = output[0, ids.shape[1] :].tolist()  # waits for the device
    finally:
        model.generation_config = own
    seconds = time.perf_counter() - start
    return Generation(tokenizer.decode(new, skip_special_tokens=True), ids.shape[1], len(new), seconds)


def _check_fits(model: Any, ids: Tensor, new: int = 0) -> None:
    """Refuses ids [rows, tokens] that, with `new` more tokens, exceed the model's positions or vocabulary."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + new > limit:
        raise AwqError(f"{ids.shape[1] + new} tokens in a row are more than the model's {limit} positions")
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = int(ids.max())
    if highest >= vocabulary:
        raise AwqError(
            f"the tokenizer gives token {highest}, but the model knows only {vocabulary}: they do not belong together"
        )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        raise AwqError(f"the model's loss is {nll:.1f} nats a token: its weights are damaged") from None
