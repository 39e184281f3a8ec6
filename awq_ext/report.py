"""What a quantization did, linear by linear, as text and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LinearReport:
    """One nn.Linear. Errors are relative: mean squared error of its output over the mean square of its output."""

    name: str
    in_features: int
    out_features: int
    kept: str | None = None
    """Why it stays as it is; None if it is quantized."""
    error_rtn: float | None = None
    """Round-to-nearest of the weight as it was."""
    error: float | None = None
    """The weight as it was quantized."""


@dataclass
class FoldReport:
    """One scale search: `losses` before and after, on the calibration tokens."""

    producer: str
    readers: list[str]
    loss_rtn: float
    loss: float
    candidate: str
    """The winner: 'identity', 'x^r' or 'x^r / w^(1-r)'."""


@dataclass
class UnscaledReport:
    """A quantized linear whose input no proven fold scales, and why. Names in the reason are those in its block."""

    name: str
    reason: str


@dataclass
class Report:
    method: str
    model_type: str
    group_size: int
    zero_point: bool
    search_results: str | None = None
    """Where scales and clips come from if they were not searched: the file of llm-awq's."""
    calibration_tokens: int = 0
    calibration: str = ""
    """What the calibration tokens are: how many rows, and what was glued, cut, dropped or left out to make them."""
    seconds: float = 0.0
    linears: list[LinearReport] = field(default_factory=list)
    folds: list[FoldReport] = field(default_factory=list)
    unscaled: list[UnscaledReport] = field(default_factory=list)

    @property
    def quantized(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.kept is None]

    @property
    def kept(self) -> list[LinearReport]:
        return [linear for linear in self.linears if linear.kept is not None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """A few lines: how many linears, what was gained, the worst ones, and all that was not scaled or quantized."""
        lines = [
            f"{len(self.quantized)} linears quantized to 4 bits in groups of {self.group_size} ({self.method}), "
            f"{self.seconds:.0f} s"
        ]
        if self.search_results is not None:
            lines.append(f"scales and clips from {self.search_results}, rounded to nearest")
        if self.calibration:
            lines.append(f"calibrated on {self.calibration}")
        measured = [x for x in self.quantized if x.error is not None and x.error_rtn]
        if measured:
            before = sum(x.error_rtn or 0.0 for x in measured) / len(measured)
            after = sum(x.error or 0.0 for x in measured) / len(measured)
            lines.append(
                f"mean output error of a linear on {self.calibration_tokens} calibration tokens: "
                f"{before:.4%} round-to-nearest, {after:.4%} {self.method}"
            )
            worst = sorted(measured, key=lambda x: x.error or 0.0, reverse=True)[:3]
            lines.append("largest: " + ", ".join(f"{x.name} {x.error:.3%}" for x in worst))
        # What is alike in all blocks is one line.
        unscaled = Counter((re.sub(r"\.\d+\.", ".*.", x.name, count=1), x.reason) for x in self.unscaled)
        if unscaled:
            lines.append(f"{len(self.unscaled)} linears quantized without a scale:")
            lines += [f"  {name} ({count}x): {reason}" for (name, reason), count in unscaled.items()]
        if self.kept:
            lines.append(f"{len(self.kept)} linears kept as they are:")
            lines += [f"  {x.name} [{x.out_features}, {x.in_features}]: {x.kept}" for x in self.kept]
        return "\n".join(lines)
