"""The layouts of 4-bit checkpoints: the table of ``csrc/core/layout.h`` for Python, and a linear's tensors by it.

n = out_features, k = in_features, g = group size, G = k / g. Every layout stores, for each linear, codes q [n, k] and
zeros z [n, G] (0..15) and scales s [n, G]; the weight is ``(q - z) * s``. For people: ``docs/formats.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from awq_ext import _library
from awq_ext.errors import CheckpointError

Axis = Literal["out_features", "in_features"]

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # of scales, by safetensors' names
SYMMETRIC_ZERO = 8
# How far -scaled_zero / scale may be from a whole number up to 15: once rounded, the scaled zero is off by half a unit
# in the last place. Twice that leaves room for a file whose scales and scaled zeros were cast apart.
WHOLE = {torch.float16: 15 / 2**10, torch.bfloat16: 15 / 2**7, torch.float32: 15 / 2**23}


@dataclass(frozen=True)
class Codes:
    """How a matrix of codes [n, k] lies in words; see ``Codes`` in the table. ``name`` is what operators call it."""

    name: str
    tile: tuple[int, int]
    order: list[tuple[int, int]] = field(repr=False)
    outer: Axis
    word_bits: int
    padded: bool

    @property
    def word_dtype(self) -> torch.dtype:
        return torch.int16 if self.word_bits == 16 else torch.int32

    @property
    def tile_words(self) -> int:
        return self.tile[0] * self.tile[1] * 4 // self.word_bits

    def can_hold(self, n: int, k: int) -> bool:
        return self.padded or (n % self.tile[0] == 0 and k % self.tile[1] == 0)

    def word_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the words of codes [n, k]."""
        down, across = -(-n // self.tile[0]), -(-k // self.tile[1])
        if self.outer == "out_features":
            return down, across * self.tile_words
        return across, down * self.tile_words

    def rows(self, words: Tensor, begin: int, end: int) -> Tensor:
        """The words of the out_features ``begin`` .. ``end`` - 1 alone; ``begin`` must be a multiple of the tile's."""
        first, last = begin // self.tile[0], -(-end // self.tile[0])
        if self.outer == "out_features":
            return words[first:last]
        return words[:, first * self.tile_words : last * self.tile_words].contiguous()

    def code_shape(self, rows: int, cols: int) -> tuple[int, int] | None:
        """The largest (n, k) whose words have this shape; None if none have."""
        if cols % self.tile_words:
            return None
        tiles = cols // self.tile_words
        if self.outer == "out_features":
            return rows * self.tile[0], tiles * self.tile[1]
        return tiles * self.tile[0], rows * self.tile[1]


@dataclass(frozen=True)
class Expected:
    """Shape and possible dtypes (safetensors' names) of a stored tensor."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{list(self.shape)} {' or '.join(self.dtypes)}"


@dataclass(frozen=True)
class Layout:
    """One entry of the table, field by field, and what follows from it."""

    name: str
    weight: Codes
    zeros: Literal["none", "words", "words_less_one", "scaled"]
    zero_words: Codes | None
    zeros_optional: bool
    scales_outer: Axis
    groups_padded: bool
    scales_order: Literal["natural", "marlin", "strips", "fragments"]
    weight_name: str
    zeros_name: str
    scales_name: str
    extra_name: str
    source: str

    def why_not(self, n: int, k: int, g: int) -> str | None:
        """Why this layout cannot hold a linear of n out_features and k in_features in groups of g; None if it can."""
        if k % g:
            return f"in_features {k} is not a multiple of group_size {g}"
        if not self.weight.can_hold(n, k):
            need_n, need_k = self.weight.tile
            wrong = [f"out_features {n} is not a multiple of {need_n}"] if n % need_n else []
            wrong += [f"in_features {k} is not a multiple of {need_k}"] if k % need_k else []
            return f"{' and '.join(wrong)}, as layout {self.name} needs"
        if self.zero_words is not None and not self.zero_words.can_hold(n, k // g):
            return f"out_features {n} is not a multiple of {self.zero_words.tile[0]}, as zeros of {self.name} need"
        if self.groups_padded and self.groups(k, g) == 0:
            return f"layout {self.name} is not defined for a group_size below 32, got {g}"
        if self.scales_order == "marlin" and n % 64:
            return f"out_features {n} is not a multiple of 64, as scales of layout {self.name} need"
        return None

    def groups(self, k: int, g: int) -> int:
        """The groups that the stored scales have room for: k / g, or more where the layout pads."""
        padded: int = _library.native().padded_groups(k // g, g) if self.groups_padded else k // g
        return padded

    def tensors(self, n: int, k: int, g: int, scales: tuple[str, ...] = tuple(FLOATS)) -> dict[str, Expected]:
        """What is stored for a linear, by the last part of the name (the bias apart); ``scales`` are their dtypes."""
        stored = self.groups(k, g)
        matrix = (stored, n) if self.scales_outer == "in_features" else (n, stored)
        found = {
            self.weight_name: Expected(self.weight.word_shape(n, k), (f"I{self.weight.word_bits}",)),
            self.scales_name: Expected(matrix, scales),
        }
        if self.zeros == "scaled":
            found[self.zeros_name] = Expected(matrix, scales)
        elif self.zero_words is not None:
            found[self.zeros_name] = Expected(self.zero_words.word_shape(n, stored), ("I32",))
        if self.extra_name == "g_idx":
            found["g_idx"] = Expected((k,), ("I32", "I64"))
        elif self.extra_name == "weight_shape":
            found["weight_shape"] = Expected((2,), ("I64", "I32"))
        return found

    @property
    def optional(self) -> frozenset[str]:
        """Names that :meth:`tensors` has, but a linear need not."""
        return frozenset(({self.zeros_name} if self.zeros_optional else set()) | {"g_idx"})


@functools.cache
def layouts() -> dict[str, Layout]:
    """Every layout of files by its name. Raises LibraryError if ``_native`` is missing."""
    return {name: layout for name, layout in every_layout().items() if layout.weight_name}


@functools.cache
def every_layout() -> dict[str, Layout]:
    """:func:`layouts` and those that operators know in memory only, whose tensors have no names."""
    table: dict[str, Layout] = {}
    for entry in _library.native().layouts():
        values = {f.name: entry[f.name] for f in fields(Layout)}
        values["weight"] = _codes(entry["name"], entry["weight"])
        if entry["zero_words"] is not None:
            values["zero_words"] = _codes(entry["name"] + ".zeros", entry["zero_words"])
        table[entry["name"]] = Layout(**values)
    return table


def _codes(name: str, entry: Mapping[str, Any]) -> Codes:
    return Codes(name=name, **entry)


@functools.cache
def find_codes(name: str) -> Codes | None:
    """What an operator means by ``name``: "<layout>" or "<layout>.zeros"; None if it knows no such name."""
    layout = every_layout().get(name.removesuffix(".zeros"))
    if layout is None:
        return None
    return layout.zero_words if name.endswith(".zeros") else layout.weight


# --- layouts of memory alone -----------------------------------------------------------------------------------------


def strips_can_have(in_features: int, group_size: int) -> bool:
    """Whether layout strips can hold such groups: no word of the weight may belong to two."""
    _, octet = every_layout()["strips"].weight.tile
    return group_size == in_features or group_size % octet == 0


def repack_scales(scales: Tensor, src: str, dst: str) -> Tensor:
    """Scales [G, n] in the order of layout ``src`` -> the same in that of ``dst``.

    For the layouts that are computed on: gemm, where the order is the natural one, strips and fragments.
    """
    if src == dst:
        return scales
    groups, n = scales.shape
    if src != "gemm":
        columns = _column_order(n, src, scales.device)
        panels = scales.flatten().split([groups * width for width in _panels(n, src)])
        ordered = torch.cat([panel.view(groups, -1) for panel in panels], dim=1)
        scales = torch.empty_like(ordered)
        scales[:, columns] = ordered
    if dst != "gemm":
        ordered = scales[:, _column_order(n, dst, scales.device)]
        scales = torch.cat([panel.flatten() for panel in ordered.split(_panels(n, dst), dim=1)]).view(groups, n)
    return scales.contiguous()


def _panels(n: int, layout: str) -> list[int]:
    """The columns that lie together, group after group: those of a tile of the weight, in the last what is left."""
    columns, _ = every_layout()[layout].weight.tile
    return [min(columns, n - first) for first in range(0, n, columns)]


def _column_order(n: int, layout: str, device: torch.device) -> Tensor:
    """The column whose scale stands at each place: in fragments 0 8 1 9 .. 7 15 of every whole 16."""
    columns = torch.arange(n, device=device)
    if layout == "fragments":
        whole = n // 16 * 16
        columns[:whole] = columns[:whole].view(-1, 2, 8).transpose(1, 2).flatten()
    return columns


# --- scales and zeros ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """What a linear's groups have, whatever the layout: scales float [n, G], zeros uint8 [n, G] (0..15)."""

    scales: Tensor
    zeros: Tensor


def read_groups(layout: Layout, stored: Mapping[str, Tensor], n: int, k: int, g: int, where: str) -> Groups:
    """Scales and zeros of a linear from its stored tensors (as :meth:`Layout.tensors` says, by the name's last part).

    Raises CheckpointError, beginning with ``where`` (the file and the linear), if a scale is 0 or not finite, if a
    zero of GPTQ v1 is not within 0..15, or if a scaled zero is no whole number of scales within 0..15.
    """
    scales = read_scales(layout, stored, n, k, g, where)
    return Groups(scales, read_zeros(layout, stored, scales, where))


def read_scales(layout: Layout, stored: Mapping[str, Tensor], n: int, k: int, g: int, where: str) -> Tensor:
    """The scales of :func:`read_groups`."""
    groups = k // g
    scales = used_groups(layout, stored[layout.scales_name], groups)
    if layout.scales_order == "marlin":
        straight = torch.empty_like(scales)
        straight[_marlin_channels(n, groups == 1)] = scales
        scales = straight
    check_scales(f"{where}.{layout.scales_name}", scales)
    return scales.contiguous()


def read_zeros(layout: Layout, stored: Mapping[str, Tensor], scales: Tensor, where: str) -> Tensor:
    """The zeros of :func:`read_groups`, which belong to these scales [n, G]."""
    n, groups = scales.shape
    packed = stored.get(layout.zeros_name)
    if packed is None:
        zeros = torch.full((n, groups), SYMMETRIC_ZERO, dtype=torch.uint8)
    elif layout.zeros == "scaled":
        zeros = _whole_zeros(used_groups(layout, packed, groups), scales, f"{where}.{layout.zeros_name}")
    else:
        zeros = torch.ops.awq_ext.unpack(packed, layout=f"{layout.name}.zeros")[:n, :groups]
        if layout.zeros == "words_less_one":
            _refuse(
                zeros == 15,
                f"{where}.{layout.zeros_name}",
                "holds 15 at {place}, which is a zero of 16 or, where subtracting one from 0 has wrapped around, of 0 "
                "(readers differ); take the model's gptq_v2 form, or quantize it again",
            )
            zeros = zeros + 1
    return zeros.contiguous()


def used_groups(layout: Layout, matrix: Tensor, groups: int) -> Tensor:
    """The stored scales (or scaled zeros) as [n, G], a view without padding; permuted columns stay permuted."""
    return (matrix.t() if layout.scales_outer == "in_features" else matrix)[:, :groups]


def write_groups(layout: Layout, groups: Groups, k: int, g: int, where: str) -> dict[str, Tensor]:
    """The inverse of :func:`read_groups`: the tensors of scales and zeros, by the name's last part.

    A scaled zero is ``-(s * z)`` in float32, rounded once to the dtype of scales. Raises CheckpointError, beginning
    with ``where`` (the linear), for a zero that the layout cannot hold.
    """
    scales, zeros = groups.scales, groups.zeros
    n, count = scales.shape
    room = layout.groups(k, g)
    matrix = scales[_marlin_channels(n, count == 1)] if layout.scales_order == "marlin" else scales
    written = {layout.scales_name: _padded(matrix, room, layout)}
    if layout.zeros == "none":
        _refuse(
            zeros != SYMMETRIC_ZERO,
            f"{where}:",
            f"layout {layout.name} is symmetric: every zero must be {SYMMETRIC_ZERO}, got {{value}} at {{place}}; "
            "choose a layout with zero points",
            zeros,
        )
    elif layout.zeros == "scaled":
        scaled = (-(scales.float() * zeros)).to(scales.dtype)
        _refuse(
            ~torch.isfinite(scaled),
            f"{where}:",
            f"layout {layout.name} cannot store -(scale * zero) at {{place}}: it is too large for the type of scales",
        )
        written[layout.zeros_name] = _padded(scaled, room, layout)
    else:
        if layout.zeros == "words_less_one":
            _refuse(
                zeros == 0,
                f"{where}:",
                f"layout {layout.name} (v1) cannot store a zero point of 0, found at {{place}}; convert to gptq_v2",
            )
            zeros = zeros - 1
        if layout.groups_padded:
            zeros = torch.nn.functional.pad(zeros, (0, room - count))
        written[layout.zeros_name] = torch.ops.awq_ext.pack(zeros, layout=f"{layout.name}.zeros")
    return written


def _padded(matrix: Tensor, room: int, layout: Layout) -> Tensor:
    """[n, G] as it is stored: with zeros up to ``room`` groups, transposed if groups come first."""
    matrix = torch.nn.functional.pad(matrix, (0, room - matrix.shape[1]))
    return (matrix.t() if layout.scales_outer == "in_features" else matrix).contiguous()


def _marlin_channels(n: int, one_group: bool) -> Tensor:
    return torch.tensor(_library.native().marlin_scales(n, one_group))


def _whole_zeros(scaled: Tensor, scales: Tensor, where: str) -> Tensor:
    quotient = -scaled.float() / scales.float()
    whole = quotient.round()
    _refuse(
        ~((quotient - whole).abs() <= WHOLE[scaled.dtype]) | (whole < 0) | (whole > 15),
        where,
        "must be -(scale * zero) with a whole zero within 0..15, got a zero of {value} at {place}; the file is damaged",
        quotient,
    )
    return whole.to(torch.uint8)


def check_scales(where: str, scales: Tensor) -> None:
    """Refuse scales, [n, G] of a linear or [features] of an activation, that are 0 or not finite."""
    _refuse(
        ~torch.isfinite(scales) | (scales == 0),
        where,
        "must be finite and not zero, got {value} at {place}; the checkpoint is damaged",
        scales,
    )


def _refuse(bad: Tensor, where: str, text: str, values: Tensor | None = None) -> None:
    """Raise CheckpointError for the first True of ``bad``, with {place} and {value} filled in."""
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        value = None if values is None else values[first].item()
        place = f"channel {first[0]}" if len(first) == 1 else f"group {first[1]}, output channel {first[0]}"
        raise CheckpointError(f"{where} {text.format(place=place, value=value)}")


# --- detection -------------------------------------------------------------------------------------------------------


class Stored(Protocol):
    """What a header says about a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Found:
    """A layout that a linear's tensors may be in, its shape as they have it, and what contradicts (nothing: it is).

    ``fits`` is False if already the weight has no shape that the layout can hold; then n, k and g may be 0.
    """

    layout: Layout
    n: int
    k: int
    g: int
    problems: tuple[str, ...]
    fits: bool = True


def detect(
    stored: Mapping[str, Stored], group_size: int, hint: str | None = None, shape: tuple[int, int] | None = None
) -> Found:
    """Tell a linear's layout by the names, types and shapes of its tensors, never by a name in a config alone.

    ``stored`` has the linear's tensors by the last part of their names, one of them being the weight_name of a layout;
    ``group_size`` is what the config says (-1: one group over in_features), ``shape`` the (n, k) in a weight_shape
    tensor. Only GPTQ v1 and v2, which have the same tensors, are told apart by ``hint``, the config's name of the
    layout. Where no layout fits, the answer is the one that comes nearest, ``hint`` first.
    """
    candidates = [layout for layout in layouts().values() if layout.weight_name in stored]
    found = [_compare(layout, stored, group_size, shape) for layout in candidates]
    return min(found, key=lambda f: (not f.fits, len(f.problems), f.layout.name != hint))


def _compare(layout: Layout, stored: Mapping[str, Stored], group_size: int, shape: tuple[int, int] | None) -> Found:
    words = stored[layout.weight_name].shape
    own = layout.weight.code_shape(*words) if len(words) == 2 else None
    if own is None or 0 in own:
        problem = f"{layout.weight_name} must be a matrix of words, got {list(words)}"
        return Found(layout, 0, 0, 0, (problem,), fits=False)
    n, k = own
    if layout.weight.padded and shape is not None:
        if layout.weight.word_shape(*shape) != words:
            problem = f"weight_shape holds {list(shape)}, but {layout.weight_name} has room for {list(own)}"
            return Found(layout, n, k, 0, (problem,), fits=False)
        n, k = shape
    g = k if group_size == -1 else group_size
    reason = layout.why_not(n, k, g)
    if reason is not None:
        problem = f"{layout.weight_name}: {reason} (group_size of the quantization config)"
        return Found(layout, n, k, g, (problem,), fits=False)
    expected = layout.tensors(n, k, g)
    problems = [
        f"{name} must be {tensor}, got {list(stored[name].shape)} {stored[name].dtype}"
        for name, tensor in expected.items()
        if name in stored and (stored[name].shape != tensor.shape or stored[name].dtype not in tensor.dtypes)
    ]
    missing = [name for name in expected if name not in stored and name not in layout.optional]
    problems += [f"{name} is missing, expected {expected[name]}" for name in missing]
    problems += [f"{name} does not belong to a linear of this layout" for name in stored if name not in expected]
    if layout.zeros == "scaled" and not problems:
        kinds = [stored[name].dtype for name in (layout.scales_name, layout.zeros_name)]
        problems += [f"{layout.zeros_name} must be {kinds[0]} as scales, got {kinds[1]}"] if len({*kinds}) > 1 else []
    return Found(layout, n, k, g, tuple(problems))
