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
    folded: str
    """Which channels were scaled: "", "in", "out", "in, out", or "all" if it was by one factor (but for a few)."""

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
        self.count = self.square = self.slopes = self.sizes = 0.0
        self.difference = self.size = self.direct = self.original = 0.0
        self.offsets: list[Tensor] = []
        self.tile_steps: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, c: Tensor, scales: Tensor) -> Tensor:
        """A tile's rows, in steps, which are overwritten; returns r, the factors of these outputs."""
        m = len(x)
        products = self.products[:m]

        def sums(a: Tensor, b: Tensor) -> Tensor:
            """Of products, over each group."""
            return torch.mul(a, b, out=products).view(m, -1, self.g).sum(2)

        def weighed(squares: Tensor) -> float:
            """Of squares of steps by group, the sum of squares of what they are in weights."""
            return float((squares.double() * scales.double().square()).sum())

        self.original += weighed(sums(x, x))
        self.size += weighed(sums(y, y))
        x -= y
        self.direct += weighed(sums(x, x))
        x += y
        x *= c
        xx, xy = sums(x, x), sums(x, y)
        r = _slope(xy.sum(1), xx.sum(1))
        x *= r[:, None]
        y -= x
        self.difference += weighed(sums(y, y))

        sizes, slopes = xx * r[:, None].square(), _slope(xy, xx * r[:, None])
        self.slopes += float((sizes * (slopes - 1).abs()).sum())
        self.sizes += float(sizes.sum())
        tiles = (m, -1, self.columns)
        squares = products.view(tiles).sum(2)
        self.count += y.numel()
        self.square += float(squares.sum())
        self.tile_steps.append((squares.sum(0) / (m * self.columns)).sqrt())
        self.offsets.append(y.view(tiles).mean(2).abs().median(0).values)
        return r

    def result(self, name: str, file: str, folded: str) -> Comparison:
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
            folded=folded,
        )


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
