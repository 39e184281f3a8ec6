"""The work on one decoder block: find its folds, search their scales, choose the codes of its linears."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext import llm_awq, ops
from awq_ext.calibrate import BlockInputs, Statistics
from awq_ext.experts import read_alone
from awq_ext.fold import Fold, apply_fold
from awq_ext.linear import AwqLinear
from awq_ext.measure import Codes, Measured, dequantize
from awq_ext.memory import give_back
from awq_ext.report import FoldReport, LinearReport, UnscaledReport
from awq_ext.scaled import may_be_scaled
from awq_ext.search import search_scale, unpredicted
from awq_ext.swap import as_linear
from awq_ext.trace import Traced, prove, trace

GRID = 20
METHODS = ("awq", "awq+", "gptq", "rtn")
COMPENSATING = ("awq+", "gptq")
"""Methods that choose the codes of a weight together, see :func:`awq_ext.ops.quantize_compensated`."""

RIDGE = 5.0
"""RIDGE k / tokens times the mean of its diagonal is added to the diagonal of a Gram matrix [k, k] by which ranges and
codes are chosen, so that they suit more than the tokens that it is of. Of the factors tried, this one loses least on
other tokens of the same text, for 3584 and 14336 tokens and for k = 576 and 1536 (linears of SmolLM2-135M)."""


PROPAGATION = 0.5
"""How much of the error of what is quantized before a linear its weight is made to take back."""


@dataclass(frozen=True)
class Settings:
    """What to do to each block; the names are those of :func:`awq_ext.quantize`."""

    method: str
    w_bit: int
    group_size: int
    zero_point: bool
    modules_to_not_convert: tuple[str, ...]
    duo_scaling: bool
    apply_clip: bool
    scaled_activations: bool | None
    seed: int

    def group_of(self, in_features: int) -> int:
        """How many of so many input channels share a scale."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass
class Calibration:
    """What the blocks are called with: on the calibration data, and on the few tokens that show how they are made."""

    rows: BlockInputs
    single: BlockInputs
    """Many windows of one token."""
    several: BlockInputs
    """A few windows of several tokens, the same for all ranks."""
    besides: BlockInputs | None = None
    """Rows that nothing is chosen by, but of which the original's hidden states are wanted; the same for all ranks."""

    def advance(self, index: int, block: nn.Module) -> None:
        """Move the original's hidden states, but those of ``rows``, on through its block."""
        for inputs in (self.several, self.besides):
            if inputs is not None:
                inputs.advance(index, block)


@dataclass
class BlockReport:
    """What one block adds to :class:`awq_ext.report.Report`."""

    linears: list[LinearReport] = field(default_factory=list)
    folds: list[FoldReport] = field(default_factory=list)
    unscaled: list[UnscaledReport] = field(default_factory=list)
    seconds: float = 0.0


class BlockQuantizer:
    """Quantizes one block after another.

    ``shared``: full names of parameters that the model uses elsewhere, too. ``plan``: search results of llm-awq that
    take the place of the search. ``say`` is told what is being worked on.
    """

    def __init__(
        self,
        settings: Settings,
        model_type: str,
        calibration: Calibration | None,
        shared: Collection[str],
        plan: llm_awq.Plan | None,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.model_type, self.calibration = settings, model_type, calibration
        self.shared, self.plan, self.say = shared, plan, say
        self._traced: dict[Any, Traced] = {}

    def quantize(self, index: int, block: nn.Module, prefix: str, names: Collection[str]) -> BlockReport:
        """Quantize the linears ``names`` of a block that the model has under ``prefix``, and move the inputs on.

        Weights, hidden states and sums are float32; what stays unquantized goes back to its own dtype.
        """
        return _Work(self, index, block, prefix, names).run()

    def skip(self, index: int, block: nn.Module, install: Callable[[], None]) -> None:
        """Move the inputs on through a block that has been quantized before; ``install`` makes it what it was then."""
        if self.calibration is not None:
            block.float().requires_grad_(False)
            self.calibration.rows.advance(index, block)
            self.calibration.advance(index, block)
        install()
        if self.calibration is not None and self.settings.method in COMPENSATING:
            dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
            for parameter in block.parameters():
                parameter.data = parameter.data.float()
            self.calibration.rows.advance_quantized(index, block)
            _restore(block, dtypes)


class _Work:
    """One block being quantized."""

    def __init__(
        self, quantizer: BlockQuantizer, index: int, block: nn.Module, prefix: str, names: Collection[str]
    ) -> None:
        self.settings, self.calibration, self.plan = quantizer.settings, quantizer.calibration, quantizer.plan
        self.shared, self.traced, self.say = quantizer.shared, quantizer._traced, quantizer.say
        self.model_type = quantizer.model_type
        self.index, self.block, self.prefix = index, block, prefix
        self.report = BlockReport()
        self.linears: dict[str, nn.Linear] = {}
        for name, module in list(block.named_modules()):
            linear = as_linear(module) if prefix + name in names else None
            if linear is not None:
                self.linears[name] = linear
                block.set_submodule(name, linear)  # another one only if it was a Conv1D
        self.dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
        self.reads: dict[str, _Input] = {}
        self.sensitivity: dict[str, Tensor] = {}
        self.measured: dict[str, Measured] = {}
        self.entries = {
            name: LinearReport(prefix + name, linear.in_features, linear.out_features)
            for name, linear in self.linears.items()
        }
        self.rounding: dict[str, Any] = {
            "group_size": self.settings.group_size,
            "w_bit": self.settings.w_bit,
            "zero_point": self.settings.zero_point,
            "dtype": torch.float16,
        }

    def run(self) -> BlockReport:
        start = time.perf_counter()
        self.block.float()
        if self.plan is not None:
            clipped = [self.prefix + name for name in self.linears if self.settings.apply_clip]
            self.plan.apply(self.block, self.prefix, clipped)
        folds, order = self._look() if self.calibration is not None else ([], [])
        for name, read in self.reads.items():
            weight = self.linears[name].weight.detach().cpu()
            self.measured[name] = Measured(weight, read.x_mean, read.grams, self._round(name))
        for fold in folds:
            self._fold(fold)
        self._choose_codes(order)
        self.report.linears += self.entries.values()
        for unscaled in self.report.unscaled:
            self.entries[unscaled.name.removeprefix(self.prefix)].unscaled = unscaled.reason
        _restore(self.block, self.dtypes)
        self.report.seconds = time.perf_counter() - start
        return self.report

    # --- looking at the block -------------------------------------------------------------------------------------

    def _look(self) -> tuple[list[Fold], list[list[str]]]:
        """The folds to use, and the order in which linears are called; the original's inputs are moved on."""
        assert self.calibration is not None
        rows, several, searched = self.calibration.rows, self.calibration.several, self.settings.method != "gptq"
        for parameter in self.block.parameters():
            parameter.requires_grad_(False)
        self.say("looking for folds")
        folds = self._find_folds() if searched else []
        order = several.reading_order(self.index, self.block, self.linears)
        self.calibration.advance(self.index, self.block)
        self.say("statistics")
        first = {reader: fold.readers[0] for fold in folds for reader in fold.readers}
        watched = {first.get(name, name): self.block.get_submodule(first.get(name, name)) for name in self.linears}
        statistics, held_out, self.sensitivity = rows.collect(
            self.index,
            self.block,
            watched,
            self.linears if searched else None,
            self.settings.seed,
            keep=self.settings.method == "awq+",
        )
        give_back()
        shared = {
            name: _Input(seen, held_out[name], self.prefix + name) for name, seen in statistics.items() if seen.tokens
        }
        self.reads = {name: shared[first.get(name, name)] for name in self.linears if first.get(name, name) in shared}
        for name, entry in self.entries.items():
            counted = read_alone(self.block, name)
            entry.tokens = self.reads[counted].tokens if counted in self.reads else 0
        known = {entry.name for entry in self.report.unscaled}
        self.report.unscaled += [
            UnscaledReport(self.prefix + name, "no calibration token reached it")
            for name in self.linears
            if name not in self.reads and self.prefix + name not in known
        ]
        return folds, order

    def _find_folds(self) -> list[Fold]:
        """The folds to use, proven; the reasons of linears that have none go to the report."""
        assert self.calibration is not None
        several = self.calibration.several.example(self.index)
        every = [name for name, module in self.block.named_modules() if isinstance(module, nn.Linear)]
        alike = type(self.block), tuple((name, type(module)) for name, module in self.block.named_modules())
        key = alike, tuple((name, parameter.shape) for name, parameter in self.block.named_parameters())
        known = key in self.traced
        while True:
            if not known:
                activations = may_be_scaled(self.block, self.model_type, self.settings.scaled_activations)
                single = self.calibration.single.example(self.index)
                self.traced[key] = trace(self.block, every, single, several, activations)
            traced = self.traced[key]
            proofs = prove(self.block, traced.folds, several)
            if not known or not any(proofs):
                break
            known = False  # a block that is made like another may do something else
        reasons, folds = dict(traced.refused), []
        for fold, wrong in zip(traced.folds, proofs, strict=True):
            reason = wrong or self._why_not_usable(fold)
            if reason is None:
                folds.append(fold)
            else:
                reasons.update(dict.fromkeys(fold.readers, reason))
        self.report.unscaled += [
            UnscaledReport(self.prefix + name, reasons[name]) for name in self.linears if name in reasons
        ]
        return folds

    def _why_not_usable(self, fold: Fold) -> str | None:
        if not any(name in self.linears for name in fold.readers):
            return "none that reads it is quantized"
        producer = self.block.get_submodule(fold.producer)
        if isinstance(producer, nn.Linear) and fold.producer not in self.linears:
            return f"{fold.producer}, in front of it, stays as it is"
        for name in (fold.producer, *fold.readers):
            if any(parameter.startswith(f"{self.prefix}{name}.") for parameter in self.shared):
                return f"the weights of {name} are used elsewhere in the model too"
        return None

    # --- scales -----------------------------------------------------------------------------------------------------

    def _fold(self, fold: Fold) -> None:
        """Search the scale of one fold, where its readers are, and move it from their inputs into the producer."""
        self.say(f"{fold.producer} -> {', '.join(name.rpartition('.')[2] for name in fold.readers[:3])}")
        names = [name for name in fold.readers if name in self.linears]  # others are scaled, but not quantized
        if names[0] not in self.reads:
            return
        readers, shared = [self.linears[name] for name in names], self.reads[names[0]]
        weight = torch.cat([reader.weight for reader in readers])
        row_weight = torch.cat([self.sensitivity[name] for name in names]).to(weight.device)
        gram = shared.gram
        if self.settings.method in COMPENSATING:
            gram = unpredicted(gram.to(weight.device), RIDGE * len(gram) / shared.tokens)
        scale, best, rtn, loss = search_scale(
            weight,
            shared.x_mean.to(weight.device),
            gram.to(weight.device),
            row_weight,
            grid=GRID,
            duo_scaling=self.settings.duo_scaling,
            tie=None if fold.tie is None else fold.tie.to(weight.device),
            **self.rounding,
        )
        report = FoldReport(
            self.prefix + fold.producer, [self.prefix + name for name in fold.readers], rtn, loss, _candidate_name(best)
        )
        if len(shared.grams) > 1:  # tokens that had no part in the choice have to agree
            identity = torch.ones_like(scale)
            gram = shared.grams[1].to(weight.device)
            both = ops.scale_losses(
                weight, torch.stack([identity, scale]), gram, row_weight=row_weight, **self.rounding
            )
            report.held_out_rtn, report.held_out = both.tolist()
            if both[1] > both[0]:
                scale, report.refused, report.candidate = identity, report.candidate, _candidate_name(0)
                report.loss, report.held_out = report.loss_rtn, report.held_out_rtn
        self.report.folds.append(report)
        for name in names:
            self.entries[name].producer, self.entries[name].scale = report.producer, report.candidate
        dtype = self.dtypes.get(f"{fold.producer}.weight", torch.float16)  # activations have no weight
        scale = apply_fold(self.block, fold, scale, dtype)
        shared.divide(scale.cpu())

    # --- codes ------------------------------------------------------------------------------------------------------

    def _choose_codes(self, order: Sequence[Sequence[str]]) -> None:
        """Put what takes its place where each linear is."""
        quantized: dict[str, nn.Module] = {}

        def compensate(names: Sequence[str], statistics: Statistics) -> Mapping[str, nn.Module]:
            self.say(f"codes of {', '.join(names[:3])}")
            done = {*quantized, *names}
            for read in map(self.reads.get, names):  # the statistics have seen what it kept
                if read is not None and all(name in done for name, own in self.reads.items() if own is read):
                    read.inputs.clear()
            give_back()
            gram: Tensor | None = None
            correct: Callable[[Tensor], Tensor] = _unchanged
            if statistics.tokens:  # an expert may be called with none, or with such only that are held out
                gram = statistics.result(self.prefix + names[0])[1]
                _add_ridge(gram, statistics.tokens)
                if statistics.drift is not None:
                    device = self.linears[names[0]].weight.device
                    correct = _correction(gram.to(device), statistics.drift.to(device))
            quantized.update({name: self._quantized(name, gram, correct) for name in names})
            return quantized

        def original(name: str) -> tuple[Mapping[int, Tensor], Tensor]:
            read = self.reads.get(name)
            return ({}, torch.ones(())) if read is None else (read.inputs, read.scale)

        if self.calibration is not None and self.settings.method in COMPENSATING:
            # The quantized model is what a reader of its files will have.
            for name, parameter in self.block.named_parameters():
                if name.rpartition(".")[0] not in self.linears:
                    parameter.data = parameter.data.to(self.dtypes[name]).float()
            give_back()
            self.calibration.rows.quantize_in_turn(self.index, self.block, self.linears, order, compensate, original)
        for name in self.linears:
            if name not in quantized:
                self.say(f"codes of {name}")
                quantized[name] = self._quantized(name, None, _unchanged)
        for name, module in quantized.items():
            self.block.set_submodule(name, module)

    def _quantized(self, name: str, gram: Tensor | None, correct: Callable[[Tensor], Tensor]) -> nn.Module:
        """What takes the place of a linear whose inputs in the quantized model have this Gram matrix.

        Those come through everything that is quantized before, in this block and in those in front of it, so codes that
        are chosen for them, and for what `_correction` makes of the weight, make up for some of the errors made there.
        None: the inputs are as in the original model.
        """
        if gram is None and name in self.reads:
            gram = self.reads[name].gram.clone()
            _add_ridge(gram, self.reads[name].tokens)
        device = self.linears[name].weight.device
        weight = self.linears[name].weight.detach().cpu()
        wanted = correct(self.linears[name].weight.detach()).cpu()
        together = self.settings.method in COMPENSATING
        range = None
        if gram is not None and self.settings.apply_clip:
            # Errors that are made up for do not add up as the inputs of a group do.
            by = gram.diagonal() if together else gram
            range = ops.search_clip(wanted.to(device), by.to(device), **self.rounding).cpu()
        codes = nearest = self._round(name, range)
        if gram is not None and together:
            codes = ops.quantize_compensated(wanted, gram, range=range, **self.rounding)
        if name in self.reads:
            read, last = self.reads[name], 2**self.settings.w_bit - 1
            self.measured[name].report(self.entries[name], weight, read.scale, read.grams, nearest, codes, range, last)
        return self._module(name, codes)

    def _round(self, name: str, range: Tensor | None = None) -> Codes:
        """The codes nearest to a linear's weight, on the CPU."""
        weight = self.linears[name].weight.detach()
        range = None if range is None else range.to(weight.device)
        q, scales, zeros = ops.quantize(weight, range=range, **self.rounding)
        return q.cpu(), scales.cpu(), zeros.cpu()

    def _module(self, name: str, codes: Codes) -> nn.Module:
        """The linear with these codes: of 4 bits packed, of any other number of bits as the weights they stand for."""
        linear = self.linears[name]
        if self.settings.w_bit == 4:
            return AwqLinear.from_codes(linear, *(part.to(linear.weight.device) for part in codes))
        simulated = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        simulated.weight = nn.Parameter(dequantize(codes).to(linear.weight.device), requires_grad=False)
        simulated.bias = linear.bias
        return simulated.train(linear.training)


class _Input:
    """What one set of linears reads, on the CPU: x_mean [k] and Gram matrices [k, k], the first of the calibration
    tokens, the second, if there is one, of those held out; ``scale`` [k] is what it was divided by since. ``inputs``
    are the calibration's own, before that, by batch, if they were kept."""

    def __init__(self, statistics: Statistics, held_out: Statistics, name: str) -> None:
        self.x_mean, gram = statistics.result(name)
        self.grams = [gram, held_out.result(name)[1]] if held_out.tokens else [gram]
        self.tokens, self.inputs, self.scale = statistics.tokens, statistics.inputs, torch.ones_like(self.x_mean)

    @property
    def gram(self) -> Tensor:
        return self.grams[0]

    def divide(self, scale: Tensor) -> None:
        """The input becomes x / scale."""
        self.x_mean, self.scale = self.x_mean / scale, self.scale * scale
        for gram in self.grams:
            gram.div_(scale).div_(scale[:, None])


def _add_ridge(gram: Tensor, tokens: int) -> None:
    gram.diagonal().add_(RIDGE * len(gram) / tokens * float(gram.diagonal().mean()))


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _correction(gram: Tensor, drift: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of a weight [n, k] the one that is best for the inputs of the quantized model.

    With the original's inputs x, those of the quantized model y, and a ridge r, |y v - x w|^2 + r |v - w|^2 is least
    for v = w + (y^T y + r)^-1 y^T (x - y) w (as in GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695). ``gram`` is
    y^T y + r, ``drift`` is y^T (x - y). Only `PROPAGATION` of it is made: all of it fits the calibration tokens too
    closely (as in QEP, arXiv 2504.09629).
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return _unchanged
    return lambda weight: weight + PROPAGATION * torch.cholesky_solve(drift @ weight.T, factor).T


def _restore(block: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _candidate_name(index: int) -> str:
    if index == 0:
        return "identity"
    duo, step = divmod(index - 1, GRID)
    ratio = (step + 1) / GRID
    return f"x^{ratio:g} / w^{1 - ratio:g}" if duo else f"x^{ratio:g}"
