"""What a quantization did, linear by linear, as text and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
FILE_NAME = "awq_report.json"


@dataclass
class Loss:
    """Mean squared error of a linear's output over the mean square of its output, when it reads what it reads in the
    original model. Of linears with many output channels some are measured, see :data:`awq_ext.measure.ROWS`."""

    calibration: float
    """On the tokens that scales, ranges and codes were chosen on."""
    held_out: float | None
    """On those held out, by which no scale and no range of rounding to nearest was chosen, but codes that were chosen
    together; None: there are none, or none reached it."""
    salient: float
    """The part of `calibration` that salient channels have in it: 0.1 is a tenth. Parts of channels add up to 1; where
    errors cancel, one may be negative or larger than 1."""


@dataclass
class LinearReport:
    """One nn.Linear. What was not measured, or makes no sense for it, is None."""

    name: str
    in_features: int
    out_features: int
    kept: str | None = None
    """Why it stays as it is; None if it is quantized."""
    tokens: int | None = None
    """How many calibration tokens it read, without those held out: of an expert, those that its router sent."""
    producer: str | None = None
    """Where the inverse of its inputs' scale is folded in: a norm, a linear or an activation."""
    scale: str | None = None
    """How its input channels are scaled, see :attr:`FoldReport.candidate`."""
    unscaled: str | None = None
    """Why they are not."""
    clipped: float | None = None
    """The share of groups whose range was narrowed, and by how much of its width on average."""
    shrink: float | None = None
    rtn: Loss | None = None
    """The weight as it was, rounded to nearest."""
    nearest: Loss | None = None
    """Scaled and clipped, rounded to nearest: AWQ."""
    final: Loss | None = None
    """As it is in the quantized model."""
    salient: int | None = None
    """The number of salient input channels: the hundredth with the largest mean |x|, at least one."""
    salient_power: float | None = None
    """Their share of the inputs' mean square."""
    groups: int | None = None
    saturated: int | None = None
    """Groups of whose weights more than a sixteenth lie beyond what the codes reach, by more than half a step."""
    empty: int | None = None
    """Groups of which all weights are 0."""

    @property
    def error_rtn(self) -> float | None:
        """Of round-to-nearest, on the calibration tokens; `error` that of the weight as it was quantized."""
        return None if self.rtn is None else self.rtn.calibration

    @property
    def error(self) -> float | None:
        return None if self.final is None else self.final.calibration


@dataclass
class FoldReport:
    """One scale search. Losses are those of :func:`awq_ext.ops.search_scale`, summed over the readers; with "awq+",
    those on the calibration tokens are by what is left of the inputs (:func:`awq_ext.search.unpredicted`)."""

    producer: str
    readers: list[str]
    loss_rtn: float
    """Of the identity, on the calibration tokens; `loss` that of the scale that was used."""
    loss: float
    candidate: str
    """What was used: 'identity', 'x^r' or 'x^r / w^(1-r)'."""
    held_out_rtn: float | None = None
    """Both on the tokens held out."""
    held_out: float | None = None
    refused: str | None = None
    """What lost least on the calibration tokens, but on those held out more than the identity, which took its place."""


@dataclass
class UnscaledReport:
    """A quantized linear whose input no proven fold scales, and why. Names in the reason are those in its block."""

    name: str
    reason: str


@dataclass
class Tuned:
    """What :func:`awq_ext.tune.tune` did. Divergences are means over tokens of rows held out, in nats."""

    steps: int
    kl_before: float
    kl: float
    kept: bool
    """False: it became more by more than chance may do, so everything is as it was before."""

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of tuning scales and norms: divergence from the original on tokens held out "
            f"from {self.kl_before:.4f} to {self.kl:.4f} nats{'' if self.kept else ', so it was undone'}"
        )


@dataclass
class Report:
    """All of it. As JSON (`awq_report.json` beside a checkpoint) it is one object with these fields by name, nested as
    they are here; what is None is null, as is a number that is not finite. ``format`` is 1, and rises when a field
    changes its meaning or goes; new ones may come at any time."""

    method: str
    model_type: str
    group_size: int
    zero_point: bool
    w_bit: int = 4
    format: int = FORMAT
    search_results: str | None = None
    """Where scales and clips come from if they were not searched: the file of llm-awq's."""
    calibration_tokens: int = 0
    """All of them, `held_out_tokens` of which confirmed scales and chose none."""
    held_out_tokens: int = 0
    calibration: str = ""
    """What the calibration tokens are: how many rows, and what was glued, cut, dropped or left out to make them."""
    seconds: float = 0.0
    block_seconds: list[float] = field(default_factory=list)
    linears: list[LinearReport] = field(default_factory=list)
    folds: list[FoldReport] = field(default_factory=list)
    unscaled: list[UnscaledReport] = field(default_factory=list)
    tuned: Tuned | None = None
    """None: nothing was tuned."""
    notes: list[str] = field(default_factory=list)
    """What else is worth knowing of the run."""

    @property
    def quantized(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.kept is None]

    @property
    def kept(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.kept is not None]

    def to_dict(self) -> dict[str, Any]:
        """What the JSON holds."""
        fields: dict[str, Any] = _finite(asdict(self))
        return fields

    def write(self, directory: Path) -> None:
        """Write `awq_report.json` into a directory."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def summary(self) -> str:
        """A few lines: how many linears, what was gained, the worst ones, and all that was not scaled or quantized."""
        lines = [
            f"{len(self.quantized)} linears quantized to {self.w_bit} bits in groups of {self.group_size} "
            f"({self.method}), {self.seconds:.0f} s"
        ]
        if self.search_results is not None:
            lines.append(f"scales and clips from {self.search_results}, rounded to nearest")
        if self.calibration:
            lines.append(f"calibrated on {self.calibration}")
        lines += self._losses()
        if self.tuned is not None:
            lines.append(str(self.tuned))
        refused = [fold for fold in self.folds if fold.refused is not None]
        if refused:
            lines.append(f"{len(refused)} scales gained nothing on tokens held out, so none is used:")
            lines += [f"  {fold.producer}: {fold.refused}" for fold in refused]
        # What is alike in all blocks is one line.
        unscaled = Counter((re.sub(r"\.\d+\.", ".*.", x.name, count=1), x.reason) for x in self.unscaled)
        if unscaled:
            lines.append(f"{len(self.unscaled)} linears quantized without a scale:")
            lines += [f"  {name} ({count}x): {reason}" for (name, reason), count in unscaled.items()]
        lines += self.notes
        if self.kept:
            lines.append(f"{len(self.kept)} linears kept as they are:")
            lines += [f"  {x.name} [{x.out_features}, {x.in_features}]: {x.kept}" for x in self.kept]
        return "\n".join(lines)

    def _losses(self) -> list[str]:
        """Means over the linears that were measured."""
        pairs = [(x, x.rtn, x.final) for x in self.quantized if x.rtn is not None and x.final is not None]
        if not pairs:
            return []

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        tokens = self.calibration_tokens - self.held_out_tokens
        lines = [
            f"mean output error of a linear on {tokens} calibration tokens: "
            f"{mean([rtn.calibration for _, rtn, _ in pairs]):.4%} round-to-nearest, "
            f"{mean([final.calibration for *_, final in pairs]):.4%} {self.method}"
        ]
        held = [(r.held_out, f.held_out) for _, r, f in pairs if r.held_out is not None and f.held_out is not None]
        if held:
            lines.append(
                f"the same on {self.held_out_tokens} tokens held out: {mean([rtn for rtn, _ in held]):.4%} "
                f"round-to-nearest, {mean([final for _, final in held]):.4%} {self.method}"
            )
        worst = sorted(pairs, key=lambda pair: pair[2].calibration, reverse=True)[:3]
        lines.append("largest: " + ", ".join(f"{x.name} {final.calibration:.3%}" for x, _, final in worst))
        lines.append(
            f"the salient hundredth of input channels has {mean([x.salient_power or 0 for x, *_ in pairs]):.0%} of the "
            f"inputs' power and {mean([rtn.salient for _, rtn, _ in pairs]):.0%} of the error of round-to-nearest, "
            f"{mean([final.salient for *_, final in pairs]):.0%} of that of {self.method}"
        )
        for what in ("saturated", "empty"):
            count = sum(getattr(x, what) or 0 for x in self.quantized)
            if count:
                lines.append(f"{count} of {sum(x.groups or 0 for x in self.quantized)} groups are {what}")
        return lines


def _finite(value: Any) -> Any:
    """None in the place of numbers that JSON has no form for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
