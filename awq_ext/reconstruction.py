"""How far the weights of a quantized checkpoint are from those of the original model.

A quantized weight is the original one, scaled and rounded. AWQ multiplies each input channel of a linear by a scale and
divides by it what comes before, which may be another linear's output channel; so ``W_q[n, k]`` is ``r[n] c[k] W[n, k]``
and a rounding error. r and c are estimated by least squares, and what remains is measured in steps, that is, in units
of the scale of its group. Rounding to nearest leaves errors within half a step, 0.29 in the root mean square, with a
mean of 0 over a group, and independent of the weight. Three figures tell when that is not so:

- ``steps``, the root mean square of the errors: codes in another order have nothing to do with the weight;
- ``offset``, the size of a group's mean error, the median over groups: a zero point off by one shifts it by one step;
- ``spread``, how far groups are from the weight in size, the mean of ``|slope - 1|``: scales of another linear.

The first two are taken of every tile of 64 out_features and at most 128 in_features, so that damage to a part of a
weight is found. Measured on linears of SmolLM2-135M-Instruct (groups of 64) and stories260K (groups of 32), in the
worst tile: the most that a sound linear has, and the least that a damaged one has in the figure that tells it.

====================================================  =====  ======  ======
..                                                    steps  offset  spread
====================================================  =====  ======  ======
rounded to nearest                                     0.31    0.13   0.012
AWQ with clipping                                      0.42    0.08   0.018
GPTQ, damping 0.01                                     0.92    0.11   0.016
GPTQ, damping 0.001                                    1.59    0.15   0.022
limit                                                  2       0.5    0.035
codes in another order of nibbles                      2.33
codes of the next in_feature or out_feature            2.77
zero points off by one                                         0.94
zero points all 8, or in another order of nibbles              0.86
scales and zero points of a row's groups reversed              0.92   0.096
scales of another linear of the same kind                             0.069
64 rows whose codes or zero points are all 0           6.3     4.8
====================================================  =====  ======  ======

Scales that are wrong by one factor for all groups of an out_feature, as they are where there is but one group, look
like a scale that AWQ has folded in; :func:`undone` tells whether other inputs make up for it. Of one factor for the
whole weight nothing can be said.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from awq_ext.errors import CheckpointError
from awq_ext.format import Checkpoint, LinearInfo, read_headers
from awq_ext.hub import resolve
from awq_ext.layouts import FLOATS, Groups, used_groups
from awq_ext.storage import TensorInfo

ROWS = 64  # out_features that are looked at together: a multiple of the tile of every layout
COLUMNS = 128
SAMPLE = 2**21  # weights from which the scales of in_features are estimated
ROUNDS = 3  # of alternating least squares; the first is exact where there is but one kind of scale

MOST_STEPS = 2.0
MOST_OFFSET = 0.5
MOST_SPREAD = 0.035
FOLDED = 0.03  # scales whose median is nearer to 1 than that are none: rounding and clipping look the same


@dataclass(frozen=True)
class Comparison:
    """One quantized linear and its original. ``error`` and ``direct`` are relative: root mean square of the difference
    over that of the weight; ``direct`` is without regard to scales that AWQ has folded in."""

    name: str
    file: str
    error: float
    direct: float
    steps: float
    offset: float
    spread: float
    tile_steps: float
    """The worst tile's; ``tile_offset`` likewise."""
    tile_offset: float
    bad_tiles: int
    """Of ``tiles``, those beyond a limit."""
    tiles: int
    in_scales: Tensor = field(repr=False, compare=False)
    """c, float32 [k], divided by its median."""
    out_scales: Tensor = field(repr=False, compare=False)
    """r, float32 [n], multiplied by the median of c."""

    @property
    def score(self) -> float:
        """At most 1 if the linear is what the original becomes by rounding; infinite where nothing can be said."""
        parts = (self.tile_steps / MOST_STEPS, self.tile_offset / MOST_OFFSET, self.spread / MOST_SPREAD)
        return max(part if math.isfinite(part) else math.inf for part in parts)

    @property
    def out_of_line(self) -> str | None:
        """Why the linear is out of line; None if it is not."""
        if self.score <= 1:
            return None
        text = f"is not the original's weight, rounded: errors of {self.steps:.2f} steps (0.29 expected)"
        if self.bad_tiles:
            text += f", out of line in {self.bad_tiles} of {self.tiles} tiles"
        if self.offset > MOST_OFFSET:
            return f"{text}, groups shifted by {self.offset:.2f} steps; look at the zero points"
        if self.bad_tiles:
            return f"{text}; look at the order of codes and groups, and for damage"
        return f"{text}, groups off in size by {self.spread:.0%}; look at the scales"

    @property
    def folded(self) -> str:
        """Which channels were scaled: "", "in", "out", "in, out", or "all" if it was by one factor (but for a few)."""
        scaled = [name for name, scales in (("in", self.in_scales), ("out", self.out_scales)) if _varies(scales)]
        by_one = not scaled and abs(self.out_scales.median().item() - 1) > FOLDED
        return "all" if by_one else ", ".join(scaled)


class Original:
    """A model that is not quantized, as safetensors files."""

    def __init__(self, path_or_repo: str | os.PathLike[str]) -> None:
        """Raises CheckpointError if there is no such directory or repository, or if its files are damaged."""
        self.path: Path = resolve(path_or_repo)
        self.info: Mapping[str, TensorInfo] = read_headers(self.path)

    def weight(self, linear: str, expected: LinearInfo) -> TensorInfo | None:
        """The weight [n, k] of a linear; None if there is none. Raises CheckpointError if it has another shape."""
        found = self.info.get(f"{linear}.weight")
        shape = (expected.out_features, expected.in_features)
        if found is not None and (found.shape != shape or found.dtype not in FLOATS):
            raise CheckpointError(
                f"{found} must be {list(shape)} {' or '.join(FLOATS)}, as the quantized linear is, got "
                f"{list(found.shape)} {found.dtype}; is it the original of this model?"
            )
        return found


def compare(
    checkpoint: Checkpoint, name: str, groups: Groups, original: TensorInfo, order: Tensor | None = None
) -> Comparison:
    """Compare a linear, of which scales and zeros have been read, with the original weight [n, k].

    ``order`` is the g_idx [k] of a linear in act-order, else None. Memory: the packed weight and a few times 64 rows.
    Raises CheckpointError if tensors cannot be read.
    """
    pair = _Pair(checkpoint, name, groups, original, order)
    n, k = original.shape
    blocks = range(0, n, ROWS)
    wanted = max(1, min(len(blocks), SAMPLE // (ROWS * k)))
    sample = [pair.steps(begin) for begin in blocks[:: math.ceil(len(blocks) / wanted)]]
    c = _in_scales(torch.cat([x for x, _ in sample]), torch.cat([y for _, y in sample]))
    del sample

    measured = _Measured(pair.g, k)
    out_scales = []
    for begin in blocks:
        x, y = pair.steps(begin)
        scales = pair.scales[begin : begin + ROWS]
        folded = x * c
        r = _slope(folded, y, 1)
        out_scales.append(r)
        measured.add(x, folded * r[:, None], y, scales)
    middle = c.median()
    file = checkpoint.info[f"{name}.{checkpoint.layout.weight_name}"].shard
    return measured.result(name, file, c / middle, torch.cat(out_scales) * middle)


class _Pair:
    """A linear's rows, quantized and original, in steps of their groups."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, groups: Groups, original: TensorInfo, order: Tensor | None = None
    ) -> None:
        layout = self.layout = checkpoint.layout
        self.n, self.k = original.shape
        self.g = checkpoint.linears[name].group_size
        self.original = original
        self.words = checkpoint.info[f"{name}.{layout.weight_name}"].read()
        self.scales = groups.scales.float()
        self.shift = -groups.zeros.float()
        if layout.zeros == "scaled":  # what is stored counts, not the whole number that it stands for
            stored = checkpoint.info[f"{name}.{layout.zeros_name}"].read()
            self.shift = used_groups(layout, stored, self.k // self.g).float() / self.scales
        self.columns = None if order is None else order.argsort(stable=True)

    def steps(self, begin: int) -> tuple[Tensor, Tensor]:
        """Rows from ``begin`` on, at most 64, of the original and of the quantized weight, each float32 [rows, k].

        Columns are in the order of groups.
        """
        end = min(begin + ROWS, self.n)
        words = self.layout.weight.rows(self.words, begin, end)
        q = torch.ops.awq_ext.unpack(words, layout=self.layout.name)[: end - begin, : self.k].float()
        size = self.original.nbytes // self.n
        raw = bytearray((end - begin) * size)
        self.original.read_into(raw, begin * size)
        w = torch.frombuffer(raw, dtype=FLOATS[self.original.dtype]).view(-1, self.k).float()
        if self.columns is not None:
            q, w = q[:, self.columns], w[:, self.columns]
        shape = (end - begin, self.k // self.g, self.g)
        x = w.view(shape) / self.scales[begin:end, :, None]
        y = q.view(shape) + self.shift[begin:end, :, None]
        return x.view(-1, self.k), y.view(-1, self.k)


def _slope(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """The factor by which x comes nearest to y, along ``dim``; 1 where x is 0."""
    square = (x * x).sum(dim)
    return torch.where(square > 0, (x * y).sum(dim) / square, 1.0)


def _in_scales(x: Tensor, y: Tensor) -> Tensor:
    """c [k] such that ``r[n] c[k] x[n, k]`` is near to y for some r."""
    r = torch.ones(len(x))
    for _ in range(ROUNDS):
        c = _slope(x * r[:, None], y, 0)
        r = _slope(x * c, y, 1)
    return c


class _Measured:
    """Sums over the rows of a linear."""

    def __init__(self, g: int, k: int) -> None:
        self.g, self.k = g, k
        part = math.gcd(g, COLUMNS)
        self.columns = part if part >= 16 else g  # of a tile; a mean over fewer says little
        self.count = self.square = self.slopes = self.sizes = 0.0
        self.difference = self.size = self.direct = self.original = 0.0
        self.offsets: list[Tensor] = []
        self.tile_steps: list[Tensor] = []

    def add(self, x: Tensor, folded: Tensor, y: Tensor, scales: Tensor) -> None:
        """The rows of a tile, in steps: the original, the same with the scales that were found, and the quantized."""
        rows, tiles, groups = len(x), self.k // self.columns, self.k // self.g
        error = (y - folded).view(rows, tiles, self.columns)
        squares = (error * error).sum(2)
        self.count += error.numel()
        self.square += squares.sum().item()
        self.tile_steps.append((squares.sum(0) / (rows * self.columns)).sqrt())
        self.offsets.append(error.mean(2).abs().median(0).values)

        by_group = (rows, groups, self.g)
        sizes = (folded * folded).view(by_group).sum(2)
        slopes = _slope(folded.view(by_group), y.view(by_group), 2)
        self.slopes += (sizes * (slopes - 1).abs()).sum().item()
        self.sizes += sizes.sum().item()

        def weighed(steps: Tensor) -> float:
            return float((steps.view(by_group).square().sum(2).double() * scales.double().square()).sum())

        self.difference += weighed(error)
        self.size += weighed(y)
        self.direct += weighed(y - x)
        self.original += weighed(x)

    def result(self, name: str, file: str, in_scales: Tensor, out_scales: Tensor) -> Comparison:
        steps, offsets = torch.stack(self.tile_steps), torch.stack(self.offsets)
        bad = ~(steps <= MOST_STEPS) | ~(offsets <= MOST_OFFSET)
        return Comparison(
            name=name,
            file=file,
            error=_root(self.difference, self.size),
            direct=_root(self.direct, self.original),
            steps=_root(self.square, self.count),
            offset=offsets.median().item(),
            spread=self.slopes / self.sizes if self.sizes else 0.0,
            tile_steps=steps.max().item(),
            tile_offset=offsets.max().item(),
            bad_tiles=int(bad.sum()),
            tiles=bad.numel(),
            in_scales=in_scales,
            out_scales=out_scales,
        )


def _root(part: float, whole: float) -> float:
    """The root of a ratio; 0 of nothing."""
    if whole:
        return math.sqrt(part / whole)
    return math.inf if part else 0.0


def undone(out_scales: Tensor, readers: Iterable[Tensor]) -> bool:
    """Whether the input scales of one of ``readers`` are the inverse of these, up to a factor.

    The reader may take only the last of the out_features (of a linear that computes queries, keys and values, or gate
    and up), and each of them several times over (values under grouped-query attention).
    """
    scales = _logarithm(out_scales)
    for inverse in (-_logarithm(reader) for reader in readers):
        k = len(inverse)
        for size in (k // times for times in range(1, k + 1) if k % times == 0 and k // times <= len(scales)):
            rest, read = scales[: len(scales) - size], scales[len(scales) - size :]
            heads = [head for head in range(1, size + 1) if size % head == 0] if size < k else [size]
            matches = (_same(inverse.view(-1, k // size, head) - read.view(-1, 1, head)) for head in heads)
            if not _same(read) and (not len(rest) or _same(rest)) and any(matches):
                return True
    return False


def _logarithm(scales: Tensor) -> Tensor:
    return scales.abs().clamp_min(1e-30).log()


def _same(logarithms: Tensor) -> bool:
    return bool((logarithms - logarithms.median()).abs().median() <= FOLDED)


def _varies(scales: Tensor) -> bool:
    return not _same(_logarithm(scales))
