"""How far the weights of a quantized checkpoint are from those of the original model.

A quantized weight is the original one, scaled and rounded. AWQ multiplies each input channel of a linear by a scale and
divides by it what comes before, which may be another linear's output channel; so ``W_q[n, k]`` is ``r[n] c[k] W[n, k]``
and an error. r and c are estimated by least squares, and what remains is measured in steps, that is, in units of the
scale of its group. Rounding to nearest leaves errors within half a step, 0.29 in the root mean square, of mean 0, and
independent of the weight. GPTQ's are larger (it makes up for errors where the inputs do not look), by how much depends
on its calibration, so size alone tells little. What does:

- agreement, the cosine between W_q and ``r c W``, of each out_feature: codes in another order have little to do with
  the weight; and of each tile of 64 out_features and at most 128 in_features, for damage to a part of them;
- offset, the size of a row's mean error within a tile, the median of rows: a zero point off by one shifts it by a step;
- spread, how far groups are from the weight in size, the mean of ``|slope - 1|``, and how many times that is what
  chance would make of it: scales of another linear.

Measured on linears of SmolLM2-135M-Instruct (groups of 64) and stories260K (groups of 32): the worst that a sound
linear has; and of damaged linears, in the figure that tells it, the best.

===================================================  ====  ====  ======  =====  =====
..                                                   row   tile  offset  spread
---------------------------------------------------  ----  ----  ------  ------------
rounded to nearest                                   0.99  0.99    0.13  0.012  x 1.4
AWQ with clipping                                    0.97  0.99    0.09  0.018  x 1.8
GPTQ, damping 0.01, 4096 tokens                      0.95  0.96    0.11  0.016  x 1.0
GPTQ, 2048 tokens: up to 1.8 steps                   0.80  0.78    0.25  0.045  x 1.9
limit                                                0.6   0.5     0.5   0.035  x 3
codes in another order of nibbles                    0.46
codes of the next out_feature or in_feature          0.10
weight of another linear                             0.09
one out_feature lost                                 0.23
a tile of random codes                                     0.23    0.64
64 out_features whose codes or zero points are 0                   4.8
zero points off by one                                             0.94
zero points all 8, or in another order of nibbles                  0.86
scales and zero points of each row reversed                        0.92
scales of another linear of the same kind                                0.069  x 6.1
===================================================  ====  ====  ======  =====  =====

Scales that are wrong by one factor for all groups of an out_feature, as they are where there is but one group, look
like a scale that AWQ has folded in; :func:`undone` tells whether other inputs make up for it. Of one factor for the
whole weight nothing can be said.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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

MOST_OFFSET = 0.5
LEAST_TILE = 0.5
LEAST_ROW = 0.6
MOST_SPREAD = 0.035
MOST_NOISE = 3.0  # times what chance makes of the spread
MEAN_OF_NORMAL = math.sqrt(2 / math.pi)  # of the absolute value, by the standard deviation
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
    """Root mean square of the errors in steps."""
    offset: float
    """The median tile's; ``worst_offset`` that of the worst."""
    worst_offset: float
    worst_tile: float
    """The agreement of the worst tile, and of the worst out_feature."""
    worst_row: float
    spread: float
    noise: float
    """What chance alone would make of the spread."""
    bad_tiles: int
    """Of ``tiles``, those beyond a limit."""
    tiles: int
    bad_rows: int
    """The out_features beyond a limit."""
    folded: str
    """Which channels were scaled: "", "in", "out", "in, out", or "all" if it was by one factor (but for a few)."""

    @property
    def score(self) -> float:
        """At most 1 if the linear is what the original becomes by rounding; infinite where nothing can be said."""
        parts = (
            self.worst_offset / MOST_OFFSET,
            (1 - self.worst_tile) / (1 - LEAST_TILE),
            (1 - self.worst_row) / (1 - LEAST_ROW),
            min(self.spread / MOST_SPREAD, self.spread / (MOST_NOISE * self.noise) if self.noise else math.inf),
        )
        return max(part if math.isfinite(part) else math.inf for part in parts)

    @property
    def out_of_line(self) -> str | None:
        """Why the linear is out of line; None if it is not."""
        if self.score <= 1:
            return None
        text = f"is not the original's weight, rounded: errors of {self.steps:.2f} steps (0.29 expected)"
        if self.bad_tiles or self.bad_rows:
            text += f", {self.bad_tiles} of {self.tiles} tiles and {self.bad_rows} output channels out of line"
        if self.offset > MOST_OFFSET:
            return f"{text}, groups shifted by {self.offset:.2f} steps; look at the zero points"
        if self.bad_tiles or self.bad_rows:
            return f"{text}; look at the order of codes and groups, and for damage"
        return f"{text}, groups off in size by {self.spread:.0%}; look at the scales"


@dataclass(frozen=True)
class Factors:
    """What the channels of a linear were multiplied by: ``inputs`` float32 [k] (1 in the median), ``outputs`` [n]."""

    inputs: Tensor
    outputs: Tensor

    @property
    def folded(self) -> str:
        """As :attr:`Comparison.folded`."""
        scaled = [name for name, factors in (("in", self.inputs), ("out", self.outputs)) if _varies(factors)]
        by_one = not scaled and abs(self.outputs.median().item() - 1) > FOLDED
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
) -> tuple[Comparison, Factors]:
    """Compare a linear, of which scales and zeros have been read, with the original weight [n, k].

    ``order`` is the g_idx [k] of a linear in act-order, else None. Memory: the packed weight and a few times 64 rows.
    Raises CheckpointError if tensors cannot be read.
    """
    rows = _Rows(checkpoint, name, groups, original, order)
    n, k = original.shape
    c = _input_factors(rows)
    measured = _Measured(n, k, rows.g)
    outputs = []
    for begin in range(0, n, ROWS):
        x, y = rows.steps(begin)
        outputs.append(measured.add(x, y, c, rows.scales[begin : begin + ROWS]))
    middle = c.median()
    file = checkpoint.info[f"{name}.{checkpoint.layout.weight_name}"].shard
    factors = Factors(c / middle, torch.cat(outputs) * middle)
    return measured.result(name, file, factors.folded), factors


# Below, large tensors are made once for a linear and then overwritten: of many that come and go, the C library's heap
# would keep the pieces.


class _Rows:
    """A linear's rows, quantized and original, in steps of their groups."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, groups: Groups, original: TensorInfo, order: Tensor | None
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
        self.size = original.nbytes // self.n  # bytes of a row
        self.raw = bytearray(min(ROWS, self.n) * self.size)
        self.x, self.y = torch.empty(2, min(ROWS, self.n), self.k)

    def steps(self, begin: int) -> tuple[Tensor, Tensor]:
        """Rows from ``begin`` on, at most 64, of the original and of the quantized weight, each float32 [rows, k].

        Columns are in the order of groups. Valid until the next call.
        """
        end = min(begin + ROWS, self.n)
        m = end - begin
        words = self.layout.weight.rows(self.words, begin, end)
        q = torch.ops.awq_ext.unpack(words, layout=self.layout.name)[:, : self.k]
        raw = memoryview(self.raw)[: m * self.size]
        self.original.read_into(raw, begin * self.size)
        w = torch.frombuffer(raw, dtype=FLOATS[self.original.dtype]).view(m, self.k)
        if self.columns is not None:
            q, w = q[:, self.columns], w[:, self.columns]
        x, y = self.x[:m].copy_(w), self.y[:m].copy_(q)
        x.view(m, -1, self.g).div_(self.scales[begin:end, :, None])
        y.view(m, -1, self.g).add_(self.shift[begin:end, :, None])
        return x, y


def _slope(xy: Tensor, xx: Tensor) -> Tensor:
    """The factor by which x comes nearest to y, from sums of products; 1 where x is 0."""
    return torch.where(xx > 0, xy / xx, 1.0)


def _input_factors(rows: _Rows) -> Tensor:
    """c [k] such that ``r[n] c[k] x[n, k]`` is near to y for some r: alternating least squares on some of the rows."""
    begins = range(0, rows.n, ROWS)
    wanted = max(1, SAMPLE // (ROWS * rows.k))
    begins = begins[:: math.ceil(len(begins) / wanted)]
    xx, xy = torch.empty(2, sum(min(ROWS, rows.n - begin) for begin in begins), rows.k)
    at = 0
    for begin in begins:
        x, y = rows.steps(begin)
        torch.mul(x, x, out=xx[at : at + len(x)])
        torch.mul(x, y, out=xy[at : at + len(x)])
        at += len(x)
    r = torch.ones(len(xx))
    for _ in range(ROUNDS):
        c = _slope(r @ xy, r.square() @ xx)
        r = _slope(xy @ c, xx @ c.square())
    return c


class _Measured:
    """Sums over the rows of a linear."""

    def __init__(self, n: int, k: int, g: int) -> None:
        self.g, self.k = g, k
        part = math.gcd(g, COLUMNS)
        self.columns = part if part >= 16 else g  # of a tile; a mean over fewer says little
        self.products = torch.empty(min(ROWS, n), k)
        self.count = self.square = self.slopes = self.noise = self.sizes = 0.0
        self.difference = self.size = self.direct = self.original = 0.0
        self.offsets: list[Tensor] = []
        self.tiles: list[Tensor] = []
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, c: Tensor, scales: Tensor) -> Tensor:
        """A tile's rows, in steps, which are overwritten; returns r, the factors of these outputs."""
        m = len(x)
        products = self.products[:m]

        def sums(a: Tensor, b: Tensor) -> Tensor:
            """Of products, over the columns of each tile."""
            return torch.mul(a, b, out=products).view(m, -1, self.columns).sum(2)

        def by_group(tiles: Tensor) -> Tensor:
            return tiles.view(m, -1, self.g // self.columns).sum(2)

        def weighed(squares: Tensor) -> float:
            """Of squares of steps, the sum of squares of what they are in weights."""
            return float((by_group(squares).double() * scales.double().square()).sum())

        self.original += weighed(sums(x, x))
        x -= y
        self.direct += weighed(sums(x, x))
        x += y
        x *= c
        xx, xy, yy = sums(x, x), sums(x, y), sums(y, y)
        r = _slope(xy.sum(1), xx.sum(1))
        x *= r[:, None]
        y -= x
        squares = sums(y, y)
        self.difference += weighed(squares)
        self.size += weighed(yy)
        self.count += y.numel()
        self.square += float(squares.sum())

        xx, xy = xx * r[:, None].square(), xy * r[:, None]
        self.offsets.append(y.view(m, -1, self.columns).mean(2).abs().median(0).values)
        self.tiles.append(_agreement(xx.sum(0), xy.sum(0), yy.sum(0), m * self.columns))
        self.rows.append(_agreement(xx.sum(1), xy.sum(1), yy.sum(1), self.k))

        xx, xy, yy = by_group(xx), by_group(xy), by_group(yy)
        slopes = _slope(xy, xx)
        deviations = ((yy - slopes * xy).clamp_min(0) / (max(self.g - 1, 1) * xx)).sqrt()  # what chance does to a slope
        self.slopes += float((xx * (slopes - 1).abs()).sum())
        self.noise += float((xx * deviations).nan_to_num(0).sum()) * MEAN_OF_NORMAL
        self.sizes += float(xx.sum())
        return r

    def result(self, name: str, file: str, folded: str) -> Comparison:
        offsets, tiles, rows = torch.stack(self.offsets), torch.stack(self.tiles), torch.cat(self.rows)
        bad = ~(offsets <= MOST_OFFSET) | ~(tiles >= LEAST_TILE)
        return Comparison(
            name=name,
            file=file,
            error=_root(self.difference, self.size),
            direct=_root(self.direct, self.original),
            steps=_root(self.square, self.count),
            offset=offsets.median().item(),
            worst_offset=offsets.max().item(),
            worst_tile=tiles.min().item(),
            worst_row=rows.min().item(),
            spread=self.slopes / self.sizes if self.sizes else 0.0,
            noise=self.noise / self.sizes if self.sizes else 0.0,
            bad_tiles=int(bad.sum()),
            tiles=bad.numel(),
            bad_rows=int((~(rows >= LEAST_ROW)).sum()),
            folded=folded,
        )


def _agreement(xx: Tensor, xy: Tensor, yy: Tensor, count: int) -> Tensor:
    """The cosine between x and y of ``count`` elements each, from sums of products.

    As much as rounding may be is added to all of them, so that what is smaller than that agrees.
    """
    rounding = count / 12
    return (xy + rounding) / ((xx + rounding) * (yy + rounding)).sqrt()


def _root(part: float, whole: float) -> float:
    """The root of a ratio; 0 of nothing."""
    if whole:
        return math.sqrt(part / whole)
    return math.inf if part else 0.0


def undone(outputs: Tensor, readers: Iterable[Tensor]) -> bool:
    """Whether the factors of inputs of one of ``readers`` are the inverse of these of ``outputs``, up to a constant.

    The reader may take only the last of the out_features (of a linear that computes queries, keys and values, or gate
    and up), and each of them several times over (values under grouped-query attention).
    """
    scales = _logarithm(outputs)
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
