"""The work on one decoder block: find its folds, search their scales, choose the codes of its linears."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext import llm_awq, ops
from awq_ext.calibrate import BlockInputs, Statistics
from awq_ext.fold import Fold, apply_fold
from awq_ext.linear import AwqLinear
from awq_ext.report import FoldReport, LinearReport, UnscaledReport
from awq_ext.scaled import may_be_scaled
from awq_ext.swap import as_linear
from awq_ext.trace import Traced, prove, trace

GRID = 20
METHODS = ("awq", "awq+", "gptq", "rtn")
COMPENSATING = ("awq+", "gptq")
"""Methods that choose the codes of a weight together, see :func:`awq_ext.ops.quantize_compensated`."""


@dataclass(frozen=True)
class Settings:
    """What to do to each block; the names are those of :func:`awq_ext.quantize`."""

    method: str
    group_size: int
    zero_point: bool
    modules_to_not_convert: tuple[str, ...]
    duo_scaling: bool
    apply_clip: bool
    scaled_activations: bool | None
    seed: int


@dataclass
class Calibration:
    """What the blocks are called with: on the calibration data, and on the few tokens that show how they are made."""

    rows: BlockInputs
    single: BlockInputs
    """Many windows of one token."""
    several: BlockInputs
    """A few windows of several tokens, the same for all ranks."""


@dataclass
class BlockReport:
    """What one block adds to :class:`awq_ext.report.Report`."""

    linears: list[LinearReport] = field(default_factory=list)
    folds: list[FoldReport] = field(default_factory=list)
    unscaled: list[UnscaledReport] = field(default_factory=list)


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

        All is computed in float32; what stays unquantized goes back to its own dtype.
        """
        return _Work(self, index, block, prefix, names).run()

    def skip(self, index: int, block: nn.Module, install: Callable[[], None]) -> None:
        """Move the inputs on through a block that has been quantized before; ``install`` makes it what it was then."""
        if self.calibration is not None:
            block.float().requires_grad_(False)
            self.calibration.rows.advance(index, block)
            self.calibration.several.advance(index, block)
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

    def run(self) -> BlockReport:
        self.block.float()
        if self.plan is not None:
            clipped = [self.prefix + name for name in self.linears if self.settings.apply_clip]
            self.plan.apply(self.block, self.prefix, clipped)
        folds, order = self._look() if self.calibration is not None else ([], [])
        before = {name: self._error(name, self._round(self.linears[name])) for name in self.reads}
        for fold in folds:
            self._fold(fold)
        quantized = self._choose_codes(order)
        for name, linear in self.linears.items():
            entry = LinearReport(self.prefix + name, linear.in_features, linear.out_features)
            if name in self.reads:
                entry.error_rtn, entry.error = before[name], self._error(name, quantized[name])
            self.report.linears.append(entry)
        _restore(self.block, self.dtypes)
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
        several.advance(self.index, self.block)
        self.say("statistics")
        first = {reader: fold.readers[0] for fold in folds for reader in fold.readers}
        watched = {first.get(name, name): self.block.get_submodule(first.get(name, name)) for name in self.linears}
        statistics, self.sensitivity = rows.collect(
            self.index, self.block, watched, self.linears if searched else None, self.settings.seed
        )
        shared = {name: _Input(*seen.result(self.prefix + name)) for name, seen in statistics.items() if seen.tokens}
        self.reads = {name: shared[first.get(name, name)] for name in self.linears if first.get(name, name) in shared}
        self.report.unscaled += [
            UnscaledReport(self.prefix + name, "no calibration token reached it")
            for name in self.linears
            if name not in self.reads
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
        """Search the scale of one fold and move it from the readers' inputs into the producer."""
        self.say(f"{fold.producer} -> {', '.join(name.rpartition('.')[2] for name in fold.readers[:3])}")
        names = [name for name in fold.readers if name in self.linears]  # others are scaled, but not quantized
        if names[0] not in self.reads:
            return
        readers, shared = [self.linears[name] for name in names], self.reads[names[0]]
        scale, losses = ops.search_scale(
            torch.cat([reader.weight for reader in readers]).cpu(),
            shared.x_mean,
            shared.gram,
            group_size=self.settings.group_size,
            grid=GRID,
            duo_scaling=self.settings.duo_scaling,
            zero_point=self.settings.zero_point,
            tie=fold.tie,
            row_weight=torch.cat([self.sensitivity[name] for name in names]),
        )
        dtype = self.dtypes.get(f"{fold.producer}.weight", torch.float16)  # activations have no weight
        scale = apply_fold(self.block, fold, scale.to(readers[0].weight.device), dtype)
        shared.divide(scale.cpu())
        best = int(losses.argmin())
        self.report.folds.append(
            FoldReport(
                self.prefix + fold.producer,
                [self.prefix + name for name in fold.readers],
                float(losses[0]),
                float(losses[best]),
                _candidate_name(best),
            )
        )

    # --- codes ------------------------------------------------------------------------------------------------------

    def _choose_codes(self, order: Sequence[Sequence[str]]) -> dict[str, AwqLinear]:
        """What takes the place of each linear, and is there in the block already."""
        quantized: dict[str, AwqLinear] = {}

        def compensate(names: Sequence[str], statistics: Statistics) -> Mapping[str, nn.Module]:
            self.say(f"codes of {', '.join(names[:3])}")
            _, gram = statistics.result(self.prefix + names[0])
            quantized.update({name: self._compensated(name, gram) for name in names})
            return quantized

        compensating = self.calibration is not None and self.settings.method in COMPENSATING
        if self.calibration is not None and compensating:
            # The quantized model is what a reader of its files will have.
            for name, parameter in self.block.named_parameters():
                if name.rpartition(".")[0] not in self.linears:
                    parameter.data = parameter.data.to(self.dtypes[name]).float()
            self.calibration.rows.quantize_in_turn(self.index, self.block, self.linears, order, compensate)
        for name in self.linears:
            if name not in quantized:
                self.say(f"codes of {name}")
                gram = self.reads[name].gram if name in self.reads else None
                if compensating and gram is not None:  # an expert that only the original model's router chooses
                    quantized[name] = self._compensated(name, gram)
                else:
                    quantized[name] = self._nearest(name, gram)
        for name, module in quantized.items():
            self.block.set_submodule(name, module)
        return quantized

    def _round(self, linear: nn.Linear, range: Tensor | None = None) -> AwqLinear:
        return AwqLinear.from_linear(
            linear, self.settings.group_size, zero_point=self.settings.zero_point, range=range, dtype=torch.float16
        )

    def _clip(self, name: str, gram: Tensor | None) -> Tensor | None:
        """The ranges that lose least on inputs with this Gram matrix."""
        if gram is None or not self.settings.apply_clip:
            return None
        weight = self.linears[name].weight.detach().cpu()
        return ops.search_clip(weight, gram, group_size=self.settings.group_size, zero_point=self.settings.zero_point)

    def _nearest(self, name: str, gram: Tensor | None) -> AwqLinear:
        linear, range = self.linears[name], self._clip(name, gram)
        return self._round(linear, None if range is None else range.to(linear.weight.device))

    def _compensated(self, name: str, gram: Tensor) -> AwqLinear:
        """Codes chosen together, for the inputs that the linear gets in the quantized model.

        Those come through everything that is quantized before, in this block and in those in front of it, so a linear
        makes up for some of the errors made there.
        """
        linear = self.linears[name]
        codes = ops.quantize_compensated(
            linear.weight.detach().cpu(),
            gram,
            group_size=self.settings.group_size,
            zero_point=self.settings.zero_point,
            range=self._clip(name, gram),
            dtype=torch.float16,
        )
        return AwqLinear.from_codes(linear, *(part.to(linear.weight.device) for part in codes))

    def _error(self, name: str, quantized: AwqLinear) -> float:
        return _relative_error(self.linears[name].weight, self.reads[name].gram, quantized)


class _Input:
    """What one set of linears reads, on the CPU: x_mean [k] and gram [k, k] of :class:`calibrate.Statistics`."""

    def __init__(self, x_mean: Tensor, gram: Tensor) -> None:
        self.x_mean, self.gram = x_mean, gram

    def divide(self, scale: Tensor) -> None:
        """The input becomes x / scale."""
        self.x_mean = self.x_mean / scale
        self.gram = self.gram / scale / scale[:, None]


def _restore(block: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _candidate_name(index: int) -> str:
    if index == 0:
        return "identity"
    duo, step = divmod(index - 1, GRID)
    ratio = (step + 1) / GRID
    return f"x^{ratio:g} / w^{1 - ratio:g}" if duo else f"x^{ratio:g}"


def _relative_error(weight: Tensor, gram: Tensor, quantized: AwqLinear) -> float:
    """Mean squared error of the output over its mean square, on the tokens that gram was taken from."""
    weight = weight.detach().cpu()
    difference = quantized.dequantize(torch.float32).cpu() - weight
    power = ((weight @ gram) * weight).sum()
    return float(((difference @ gram) * difference).sum() / power) if power > 0 else 0.0
