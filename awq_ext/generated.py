"""Rows that the model writes itself, for more tokens than there is text (as in LLM-QAT, arXiv 2305.17888).

`quantize` has it rounded to nearest while it does (:meth:`awq_ext.original.Original.rounded`): the rows need not be the
original's, only what the original makes of them.

What a model writes is as good to calibrate on as a text, and to tune on it is better than one that the codes were
chosen on. With 96 rows of 512 tokens, written by the original, beside 32 of C4 the divergence of "awq+" is 4 and 7 %
lower than with those of C4 alone (on two texts, means of three sets of rows, SmolLM2-135M).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext.calibrate import fast_linears
from awq_ext.errors import CalibrationError
from awq_ext.linear import AwqLinear
from awq_ext.memory import give_back
from awq_ext.precision import embedding_weights, fast_dtype, fast_forward, fast_products, in_float32
from awq_ext.ranks import generator

PROMPT = 8  # tokens of a given row that a written one begins with: it keeps to that one's subject or leaves it
DRAWN = 4  # rows whose next token is drawn at a time, which is how many times the vocabulary is in memory as float32
CACHED = 2**14  # tokens of the rows that are written together, which the model's cache has to hold
LOGITS = 2**23  # predictions for the rows that are written together


class CannotWrite(CalibrationError):
    """Of a model that cannot write rows; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; pass generated=0 and tune_steps=0"


@torch.no_grad()
@fast_products()
def write_rows(
    model: Any,
    rows: Sequence[Tensor],
    count: int,
    length: int,
    *,
    seed: tuple[int, int] = (0, 0),
    done: Callable[[int], None] = lambda tokens: None,
) -> list[Tensor]:
    """``count`` rows of ``length`` token ids; ``rows`` are some that are given, int64 [any] each.

    They begin as one of ``rows`` each, in turn, and go on with tokens drawn from all that the model predicts there
    (temperature 1), whatever these are: behind the token that ends a text a new one begins. The numbers that draw them
    depend on ``seed``. ``done`` is told how many tokens have been written since it was last called.

    The model, of transformers, is run in float32 (:mod:`awq_ext.precision` says where in bfloat16), and is then as it
    was. Its linears may be AwqLinears. Weights of those that are none, and of another dtype than their products, are in
    memory in both.

    Raises CannotWrite if the model is not of transformers, keeps no cache, or predicts what is not finite.
    """
    if not hasattr(model, "generation_config"):
        raise CannotWrite(f"only a causal language model of transformers can write rows, got a {type(model).__name__}")
    if not count:
        return []
    begin = min(PROMPT, length, *map(len, rows))
    prompts = torch.stack([rows[i % len(rows)][:begin] for i in range(count)])
    written: list[Tensor] = []
    together = max(1, min(CACHED // length, LOGITS // model.get_input_embeddings().num_embeddings))
    with _computing_in_float32(model), fast_linears(model, nn.Linear), fast_forward():
        for number, ids in enumerate(prompts.split(together)):
            written += _continue(model, ids, length, generator(*seed, number), done)
    return written


@contextmanager
def _computing_in_float32(model: nn.Module) -> Iterator[None]:
    """While it is open, the model computes in float32, but weights of linears and embeddings are as they were: most of
    a model's memory. How nn.Linears compute with theirs is for `fast_linears` to say."""
    linears = {module.weight for module in model.modules() if type(module) is nn.Linear}
    with in_float32(model, embedding_weights(model) | linears), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(lambda _, __, output: output.float()).remove)
            elif isinstance(module, AwqLinear):
                stack.callback(module.register_forward_pre_hook(_with_fast_input).remove)
        yield


def _with_fast_input(_: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """An AwqLinear takes more steps for an input of float32."""
    x: Tensor = args[0]
    return x.to(fast_dtype(x))


def _continue(
    model: Any,
    ids: Tensor,
    length: int,
    random: torch.Generator,
    done: Callable[[int], None],
) -> list[Tensor]:
    """As `write_rows`; ``ids`` are the first of each row."""
    parts, cache = [ids], None
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for _ in range(length - ids.shape[1]):
        output = model(input_ids=parts[-1].to(model.device), past_key_values=cache, use_cache=True, **options)
        cache = getattr(output, "past_key_values", None)
        if cache is None:  # the next call would not know of these tokens
            raise CannotWrite(f"{type(model).__name__} returns no past_key_values, which it needs to write rows")
        parts.append(_draw(output.logits[:, -1], random))
        del output
        give_back()  # the cache grows by copies of all of it, which leave holes
        done(len(ids))
    return list(torch.cat(parts, 1))


def _draw(logits: Tensor, random: torch.Generator) -> Tensor:
    """int64 [rows, 1]: a token for each row of logits [rows, vocabulary], by its probability."""
    drawn = torch.rand(len(logits), 1, generator=random)
    some = zip(logits.split(DRAWN), drawn.split(DRAWN), strict=True)
    return torch.cat([_draw_at(part.float().cpu(), where) for part, where in some])


def _draw_at(logits: Tensor, drawn: Tensor) -> Tensor:
    """As `_draw`, by numbers [rows, 1] from 0 to 1."""
    shares = logits.softmax(-1)
    torch.cumsum(shares, -1, out=shares)
    total = shares[:, -1:]
    if not torch.isfinite(total).all():
        raise CannotWrite("the model's predictions are not finite: its weights are damaged, or overflow")
    return torch.searchsorted(shares, drawn * total).clamp_(max=shares.shape[1] - 1)
