"""End-to-end tuning: the scales of a quantized model and its norms, moved so that its predictions are the original's.

Codes and zeros stay. What the file format leaves free besides them are one number for each group of each linear and the
weights of the norms. Both are multiplied by factors that lower the Kullback-Leibler divergence of the quantized model's
next-token distribution from the original's on rows that the model has written, by gradient descent (Adam). To train
step sizes end to end with frozen codes is EfficientQAT's idea (arXiv 2407.11062, "E2E-QP"), there on the language-model
loss of a text.

The quantized model is held in memory in 4 bits, one block at a time besides that as floats: a step runs the blocks
forward and keeps no more than their inputs, then runs them backward, each once more, from the last to the first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext import ops
from awq_ext.calibrate import float_weight, forward_replaced
from awq_ext.errors import CalibrationError
from awq_ext.fold import divide_norm
from awq_ext.linear import AwqLinear
from awq_ext.memory import give_back_near_peak
from awq_ext.precision import embedding_weights, fast_dtype, fast_products, in_float32, product
from awq_ext.report import Tuned
from awq_ext.trace import is_norm

RATE = 1.2e-3  # of change of a factor's logarithm in one step, at its height
WARMUP = 4  # steps in which the rate rises to its height
LEAST_RATE = 0.05  # of its height, which it falls to by the end
ROWS, TOKENS = 4, 32
"""Rows of a step, and tokens of each. The model writes them itself (:mod:`awq_ext.generated`): the codes fit the tokens
that they were chosen on, so that nothing is left to learn there, and what a model writes has no end. Steps count for
more than the tokens of each, and many short rows are written sooner than few long ones. Of the log-likelihood that
SmolLM2-135M loses on two texts 24 such steps take back 10 %, 24 of two rows of 64 tokens or one of 128 take 12 %."""

JUDGES = 4
"""Batches like those of the steps, to judge the result by. Tuning is undone if the divergence there has grown by more
than MARGIN times the standard error of that mean: on so few tokens less than that may be chance."""

MARGIN = 2.0

STEPS = 20
"""Without anybody asking for another number. Of the perplexity that SmolLM2-135M loses (three sets of calibration rows,
two texts) they take back a tenth, in a quarter more time, and about as much of what it loses in 3 bits."""

LOGITS = 2**22  # in memory at a time: the original's, the model's and the gradient by them
IN_CACHE = 2**18  # of them that are worked on at a time, as float32


@dataclass
class Batch:
    """Rows of one length: ids int64 [rows, t]; hidden states float32 [rows, t, width] in front of the first block, and
    those behind the last block of the original model."""

    ids: Tensor
    first: Tensor
    target: Tensor


Run = Callable[[int, nn.Module, Tensor], Any]
"""Calls a block, of that index, with hidden states [rows, t, width] in front of it, and returns what it returns."""


@torch.no_grad()
@fast_products()
def tune(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    linears: Mapping[nn.Module, int],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    run: Run,
    *,
    done: Callable[[], None] = lambda: None,
) -> Tuned:
    """Tune the scales of the quantized ``linears`` in ``blocks`` and the weights of all norms of ``model``, in place.

    ``linears`` gives the group size of each: an AwqLinear, or an nn.Linear whose weight is quantized, but not packed.

    ``blocks`` are those of ``model``, quantized; what is behind them (final norm, output head) is the original's. There
    is one step for each of ``batches``. All is computed in float32, but for factors that :mod:`awq_ext.precision`
    rounds; scales and norms are rounded to the dtypes they have, and the result is judged after that, by two batches
    ``held_out`` or more.
    ``done`` is called after each step.

    Raises CalibrationError if the divergence is not finite before anything is tuned.
    """
    with _in_gemm_layout(linears), in_float32(model, embedding_weights(model)) as dtypes:
        student = _Student(model, blocks, linears, run)
        optimizer = torch.optim.Adam(student.logs, lr=RATE, betas=(0.9, 0.95))
        for log in student.logs:
            log.grad = torch.zeros_like(log)
        with student.scaled():
            before = student.divergences(held_out)
            if not math.isfinite(sum(before)):
                raise CalibrationError("the quantized model's predictions are not finite on the calibration data")
            for step, batch in enumerate(batches):
                rate = RATE * min(1.0, (step + 1) / WARMUP) * max(LEAST_RATE, 1 - step / len(batches))
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad(set_to_none=False)  # memory that stays where it is, see _states
                student.backward(batch)
                optimizer.step()
                give_back_near_peak()
                done()
            old = student.store(dtypes)
            after = student.divergences(held_out)
        kept = not _grown(before, after)
        if not kept:
            for tensor, value in old:
                tensor.copy_(value)
    return Tuned(len(batches), statistics.fmean(before), statistics.fmean(after), kept)


def _grown(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean has, by more than chance may do. What is not finite has."""
    growth = [b - a for a, b in zip(before, after, strict=True)]
    if not math.isfinite(sum(growth)):
        return True
    return statistics.fmean(growth) > MARGIN * statistics.stdev(growth) / math.sqrt(len(growth))


@contextmanager
def _in_gemm_layout(linears: Iterable[nn.Module]) -> Iterator[None]:
    """While it is open, scales are [groups, n] in natural order."""
    packed = [linear for linear in linears if isinstance(linear, AwqLinear)]
    try:
        for linear in packed:
            linear.repack("gemm")
        yield
    finally:
        for linear in packed:
            linear.repack()


class _Student:
    """The quantized model, with the logarithm of a factor for each group of its linears and channel of its norms."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], linears: Mapping[nn.Module, int], run: Run
    ) -> None:
        self.model, self.blocks, self.run = model, blocks, run
        self.vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        self.returns_tuple = [False] * len(blocks)
        modules = dict.fromkeys(module for block in blocks for module in block.modules())
        self.linears = {m: _log_factors(float_weight(m)[:, ::size]) for m, size in linears.items()}
        self.offsets = {m: plus for m in model.modules() if (plus := is_norm(m)) is not None}
        self.norms = {m: _log_factors(m.get_parameter("weight")) for m in self.offsets}
        self.behind = [m for m in model.modules() if type(m) is nn.Linear and m not in modules]
        # What is behind the blocks serves the original model, too.
        norms = [p for m in self.norms if m not in modules for p in m.parameters()]
        self.originals = [(parameter, parameter.data.clone()) for parameter in norms]
        self.as_original = False

    @property
    def logs(self) -> list[Tensor]:
        return [*self.linears.values(), *self.norms.values()]

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """While it is open, linears and norms have their factors, and the output head is fast."""

        def linear(module: nn.Module, log: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: _Product.apply(x, _scaled_weight(module, log.detach()), module.bias, log)

        def norm(log: Tensor) -> Any:
            return lambda _, __, output: output if self.as_original else output * log.exp()

        with ExitStack() as stack:
            for module, log in self.linears.items():
                stack.enter_context(forward_replaced(module, linear(module, log)))
            for module in self.behind:
                stack.enter_context(forward_replaced(module, product(module.weight, module.bias)))
            for normed, log in self.norms.items():
                stack.callback(normed.register_forward_hook(norm(log)).remove)
            yield

    def divergences(self, batches: Sequence[Batch]) -> list[float]:
        """For each batch, the mean over its tokens."""
        means = []
        for batch in batches:
            means.append(self._divergence(batch, self._states(batch)[-1])[0] / batch.ids.numel())
            give_back_near_peak()
        return means

    def backward(self, batch: Batch) -> None:
        """Add the gradients of the batch's mean divergence to those of the logarithms."""
        states = self._states(batch)
        _, gradient = self._divergence(batch, states[-1], differentiate=True)
        for index in reversed(range(len(self.blocks))):
            hidden = states[index].detach().requires_grad_()
            with torch.enable_grad():
                self._call(index, hidden).backward(gradient)
            assert hidden.grad is not None
            gradient = hidden.grad

    def _states(self, batch: Batch) -> Tensor:
        """The inputs of all blocks, and the output of the last: one tensor, as many small ones that live long would
        break up the memory that each block's large ones leave behind."""
        states = batch.first.new_empty(len(self.blocks) + 1, *batch.first.shape)
        states[0] = batch.first
        for index in range(len(self.blocks)):
            states[index + 1] = self._call(index, states[index])
        return states

    def _call(self, index: int, hidden: Tensor) -> Tensor:
        output = self.run(index, self.blocks[index], hidden)
        self.returns_tuple[index] = isinstance(output, tuple)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _divergence(self, batch: Batch, hidden: Tensor, differentiate: bool = False) -> tuple[float, Tensor]:
        """The sum over tokens; if asked for, the gradient of the mean by the hidden states behind the last block."""
        total, gradients, positions = 0.0, [], max(1, LOGITS // (len(batch.ids) * self.vocabulary))
        for ids, own, target in zip(*(x.split(positions, 1) for x in (batch.ids, hidden, batch.target)), strict=True):
            wanted = self._original_logits(ids, target)
            with torch.set_grad_enabled(differentiate):
                own = own.detach().requires_grad_(differentiate)
                logits = self._logits(ids, own)
            # Many positions share a reading of the output head, few the cache. The gradient by the logits needs memory
            # of its own, as what is behind them may need them once more: a tanh does.
            gradient = torch.empty_like(logits)
            size = max(1, IN_CACHE // self.vocabulary)
            pieces = (x.detach().flatten(0, 1).split(size) for x in (logits, wanted, gradient))
            for piece, wanted_piece, slope in zip(*pieces, strict=True):
                got, log_share = piece.float().log_softmax(-1), wanted_piece.float().log_softmax(-1)
                share = log_share.exp()
                total += float(log_share.sub_(got).mul_(share).sum())
                if differentiate:  # the derivative is softmax - softmax of the original
                    slope.copy_(got.exp_().sub_(share).div_(batch.ids.numel()))
            if differentiate:
                logits.backward(gradient)
                assert own.grad is not None
                gradients.append(own.grad)
        return total, torch.cat(gradients, 1) if differentiate else hidden

    def _original_logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        tuned = [parameter.data for parameter, _ in self.originals]
        self.as_original = True
        try:
            for parameter, original in self.originals:
                parameter.data = original
            return self._logits(ids, hidden)
        finally:
            self.as_original = False
            for (parameter, _), value in zip(self.originals, tuned, strict=True):
                parameter.data = value

    def _logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Of the next token, from hidden states behind the last block.

        The model is run on some positions only, with blocks that do nothing; what is behind them works position by
        position in every causal language model.
        """
        with ExitStack() as stack:
            for block, as_tuple in zip(self.blocks, self.returns_tuple, strict=True):
                result = (hidden,) if as_tuple else hidden
                stack.enter_context(forward_replaced(block, lambda *_, result=result, **__: result))
            logits: Tensor = self.model(ids.to(hidden.device)).logits
        return logits

    def store(self, dtypes: Mapping[Tensor, torch.dtype]) -> list[tuple[Tensor, Tensor]]:
        """Multiply the factors in, and set them to one. Returns the tensors changed, each with its old value.

        ``dtypes``: what each is to be stored in; the results are rounded to that.
        """
        old: list[tuple[Tensor, Tensor]] = []

        def put(tensor: Tensor, value: Tensor) -> None:
            old.append((tensor, tensor.data.clone()))
            tensor.data.copy_(value.to(dtypes[tensor]))

        for linear, log in self.linears.items():
            if isinstance(linear, AwqLinear):
                put(linear.scales, linear.scales * log.exp().t())
            else:
                weight = linear.get_parameter("weight")
                put(weight, _scale(weight, log))
        for norm, log in self.norms.items():
            weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
            value, divisor = divide_norm(weight.data, (-log).exp(), self.offsets[norm], dtypes[weight])
            put(weight, value)
            if bias is not None:
                put(bias, bias.data / divisor)
        for log in self.logs:
            log.data.zero_()
        return old


def _log_factors(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float32, requires_grad=True)


def _scale(weight: Tensor, log: Tensor) -> Tensor:
    """A weight [n, k] times exp of [n, groups]."""
    return (weight.unflatten(1, (log.shape[1], -1)) * log.exp()[..., None]).flatten(1)


def _scaled_weight(linear: nn.Module, log: Tensor) -> Tensor:
    """[n, k], its groups multiplied by exp of log [n, groups], as `fast_dtype` says."""
    dtype = fast_dtype(log)
    if isinstance(linear, AwqLinear):
        scales = linear.scales * log.exp().t()
        return ops.dequantize(linear.qweight, scales, linear.qzeros, group_size=linear.group_size, dtype=dtype)
    return _scale(linear.get_parameter("weight"), log).to(dtype)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, with gradients for x and log: weight is proportional to exp(log), log [n, groups]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, log: Tensor) -> Tensor:
        factor = x.to(weight.dtype)
        ctx.save_for_backward(factor, weight)
        ctx.dtype, ctx.groups = x.dtype, log.shape[1]
        y = nn.functional.linear(factor, weight).to(x.dtype)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        by_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        by_log = (by_weight * weight).unflatten(1, (ctx.groups, -1)).sum(-1, dtype=ctx.dtype)  # as dw/dlog = w
        return (gradient @ weight).to(ctx.dtype), None, None, by_log
