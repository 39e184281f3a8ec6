"""How good and how fast a model is: perplexity on a text, distance to the original model, greedy generation.

``model`` is any causal language model of transformers, ``tokenizer`` its tokenizer; the type checker is told Any, since
transformers' own annotations do not hold for what its Auto classes return.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awq_ext import windows as data
from awq_ext.errors import AwqError
from awq_ext.progress import Progress


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats a token) over ``tokens`` predictions."""

    value: float
    nll: float
    tokens: int
    windows: tuple[float, ...]
    """The mean negative log-likelihood of each window, to compare two models window by window."""

    @classmethod
    def of(cls, losses: Sequence[float], counts: Sequence[int]) -> Perplexity:
        """losses: the sum of the negative log-likelihoods of each window's predictions; counts: how many those are."""
        nll = sum(losses) / sum(counts)
        means = tuple(loss / count for loss, count in zip(losses, counts, strict=True))
        return cls(_exp(nll), nll, sum(counts), means)


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of the original, at the same positions of the same text."""

    kl: float
    """KL(original || model), nats, mean over all predictions."""
    kl_p99: float
    """The 99th percentile of it."""
    top1: float
    """The share of predictions in which both find the same token likeliest."""
    model: Perplexity
    original: Perplexity

    @property
    def nll_difference(self) -> float:
        """Nats a token that the model loses: the logarithm of the quotient of the perplexities."""
        return self.model.nll - self.original.nll

    @property
    def nll_error(self) -> float | None:
        """Standard error of nll_difference over the windows, which are paired; None: there is only one."""
        pairs = zip(self.model.windows, self.original.windows, strict=True)
        differences = [model - original for model, original in pairs]
        if len(differences) == 1:
            return None
        return statistics.stdev(differences) / math.sqrt(len(differences))


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
    tokenizer: Any,
    text: str | Tensor,
    window: int = 512,
    stride: int | None = None,
    *,
    tokens: int | None = None,
    bos: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text, window by window.

    A window is ``window`` consecutive tokens, and predicts all of them but the first, which is only read. The next one
    begins ``stride`` tokens further on and is scored only on the tokens that no window in front of it has in it, so
    that with a small stride every prediction sees at least ``window - stride`` tokens (as transformers' documentation
    on perplexity has it; but a last, shorter window is left out).

    Args:
        text: a text, tokenized without special tokens, or its token ids, int64 [tokens], for which no tokenizer is
            needed.
        window, stride: in tokens; stride None: windows that touch and do not overlap.
        tokens: how many tokens of the text to use, None: all.
        bos: the id of a token to lead every window, which then holds ``window - 1`` tokens of the text and predicts
            them all.

    Losses are computed in float32, and only one window's logits are in memory.

    Raises:
        AwqError: no full window, a model that cannot take the window or the tokens, or a loss that is not finite.
    """
    count = sys.maxsize if tokens is None else tokens
    ids = text[:count] if isinstance(text, Tensor) else first_tokens(text, tokenizer, count)
    windows, counts = split(ids, window, bos, stride)
    _check_fits(model, windows)
    losses: list[float] = []
    with (progress or Progress.silent()).task("score windows", total=len(windows)) as task:
        for row, count in zip(windows, counts, strict=True):
            logits, target = _predictions(model, row, count)
            said = zip(_log_probabilities(logits), target.split(CHUNK), strict=True)
            losses.append(_finite(sum(_nll(log_q, some) for log_q, some in said), len(losses), len(windows)))
            task.advance(note=f"perplexity {Perplexity.of(losses, counts[: len(losses)]).value:.2f}")
    return Perplexity.of(losses, counts)


@torch.no_grad()
def divergence(
    model: Any,
    original: Any,
    ids: Tensor,
    window: int = 512,
    stride: int | None = None,
    *,
    bos: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """How far a model is from the original on the tokens ``ids`` (int64 [tokens], see :func:`first_tokens`).

    Windows, the other arguments and what is raised are those of :func:`perplexity`. Both models are in memory, and one
    window's logits of each; distributions are computed in float32.
    """
    windows, counts = split(ids, window, bos, stride)
    _check_fits(model, windows)
    _check_fits(original, windows)
    losses, original_losses = [0.0] * len(windows), [0.0] * len(windows)
    kl: list[Tensor] = []
    agreed = 0
    with (progress or Progress.silent()).task("compare windows", total=len(windows)) as task:
        for index, (row, count) in enumerate(zip(windows, counts, strict=True)):
            q, target = _predictions(model, row, count)
            p = _predictions(original, row, count)[0].to(q.device)
            if p.shape != q.shape:
                raise AwqError(
                    f"the model predicts one of {q.shape[-1]} tokens, the original one of {p.shape[-1]}: "
                    "they do not belong together"
                )
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            said = zip(_log_probabilities(p), _log_probabilities(q), target.split(CHUNK), strict=True)
            for log_p, log_q, some in said:
                losses[index] += _nll(log_q, some)
                original_losses[index] += _nll(log_p, some)
                # Never negative, but for rounding.
                kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).double().cpu())
            _finite(losses[index] + original_losses[index], index, len(windows))
            task.advance(note=f"KL {torch.cat(kl).mean():.4f}")
    every = torch.cat(kl)
    return Divergence(
        kl=float(every.mean()),
        kl_p99=float(every.quantile(0.99)),
        top1=agreed / len(every),
        model=Perplexity.of(losses, counts),
        original=Perplexity.of(original_losses, counts),
    )


def split(ids: Tensor, window: int, bos: int | None = None, stride: int | None = None) -> tuple[Tensor, list[int]]:
    """int64 [count, window], the full windows of ``ids``, and how many predictions at the end of each are scored.

    See :func:`perplexity`.
    """
    if window < 2:
        raise AwqError(f"a window needs at least 2 tokens to predict one from another, got {window}")
    length = window if bos is None else window - 1
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise AwqError(f"the stride must be from 1 to the {length} tokens of the text in a window, got {stride}")
    if len(ids) < length:
        raise AwqError(
            f"the text is too short: it has {len(ids)} tokens, one window takes {length}. "
            "Give a longer text or a smaller window"
        )
    windows = ids.unfold(0, length, stride)
    if bos is not None:
        windows = torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)
    return windows, [window - 1] + [min(stride, window - 1)] * (len(windows) - 1)


def first_tokens(text: str, tokenizer: Any, count: int) -> Tensor:
    """int64 [<= count]: the first ``count`` tokens of the text, without special tokens; fewer if it has fewer.

    Only as much text is tokenized as that takes.
    """
    return data.first_tokens([text], "", tokenizer, count)[0]


CHUNK = 64
"""Predictions whose distributions are in memory as float32 together: vocabularies are wide."""


def _predictions(model: Any, row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits [count, vocabulary] of the last ``count`` tokens of a window, and these tokens."""
    row = row.to(model.device)
    return model(input_ids=row[None], use_cache=False).logits[0, -1 - count : -1], row[-count:]


def _log_probabilities(logits: Tensor) -> Iterator[Tensor]:
    return (part.float().log_softmax(-1) for part in logits.split(CHUNK))


def _nll(log_probabilities: Tensor, target: Tensor) -> float:
    return -log_probabilities.gather(1, target[:, None]).double().sum().item()


def _finite(loss: float, index: int, windows: int) -> float:
    if not math.isfinite(loss):
        raise AwqError(
            f"the model's loss is {loss} in window {index} of {windows}: its logits are not finite. "
            "Score it in float32 (--dtype float32); if that does not help, its weights are damaged"
        )
    return loss


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
