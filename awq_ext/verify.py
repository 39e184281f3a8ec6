"""`verify`: everything that is wrong with a quantized checkpoint, not only what is met first."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from awq_ext.checkpoint import TOKENIZER_FILES
from awq_ext.config import COMPRESSED, GPTQ, QuantConfig
from awq_ext.errors import CheckpointError
from awq_ext.format import (
    INDEX,
    Checkpoint,
    LinearInfo,
    parts_of_linears,
    read_headers,
    read_json,
    read_linear,
    read_quant_config,
    stored_shape,
    weight_names,
)
from awq_ext.hub import resolve
from awq_ext.layouts import SYMMETRIC_ZERO, Groups, Layout, check_scales, detect, layouts, read_scales, read_zeros
from awq_ext.progress import Progress
from awq_ext.reconstruction import Comparison, Factors, Original, compare, undone
from awq_ext.storage import DTYPES, TensorInfo, read_header
from awq_ext.swap import excluded_by

MOST_FINDINGS = 50  # that are kept of problems, and of warnings
MOST_COMPARED = 10  # that are shown as text
MOST_NAMES = 2**24  # comparisons of a tensor's name with an entry of modules_to_not_convert: seconds
PIECE = 4 * 2**20  # bytes of a tensor that are looked at at a time
CODES = 2**22  # codes that are looked at at a time
GROUP_SIZES = (128, 64, 32, 16, 256, 512, 1024, -1)  # that are tried if the config's is wrong


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or looks so. ``file`` and ``tensor`` (or the linear) are "" where it is about neither;
    ``what`` is a whole sentence that names them, too."""

    file: str
    tensor: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found. Of problems and warnings the first 50 are here, and how many there were."""

    path: str
    against: str | None
    layout: str | None
    """None if no linear could be read."""
    group_size: int | None
    linears: int
    tensors: int
    problems: Sequence[Finding]
    problem_count: int
    warnings: Sequence[Finding]
    warning_count: int
    compared: Sequence[Comparison]
    """Every linear that has been compared with its original, the worst first."""

    @property
    def ok(self) -> bool:
        return self.problem_count == 0

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON: what is not finite is None."""
        return {
            "path": self.path,
            "against": self.against,
            "ok": self.ok,
            "layout": self.layout,
            "group_size": self.group_size,
            "linears": self.linears,
            "tensors": self.tensors,
            "problem_count": self.problem_count,
            "problems": [vars(finding) for finding in self.problems],
            "warning_count": self.warning_count,
            "warnings": [vars(finding) for finding in self.warnings],
            "compared": [_plain(comparison) for comparison in self.compared],
        }

    def summary(self) -> str:
        """Every problem and warning on a line, and the verdict."""
        layout = f"layout {self.layout}, group size {self.group_size}, " if self.layout else ""
        lines = [f"{self.path}: {layout}{self.linears} quantized linears, {self.tensors} tensors"]
        kinds = (("problem", self.problems, self.problem_count), ("warning", self.warnings, self.warning_count))
        for kind, findings, count in kinds:
            lines += [f"{kind}: {finding.what}" for finding in findings]
            if count > len(findings):
                lines.append(f"{kind}: ... and {count - len(findings)} more")
        compared = f", {len(self.compared)} linears compared with {self.against}" if self.against else ""
        verdict = "ok" if self.ok else _count(self.problem_count, "problem")
        lines.append(f"{verdict}, {_count(self.warning_count, 'warning')}{compared}")
        return "\n".join(lines)

    def shown(self) -> list[RenderableType]:
        """The summary, and the linears that are farthest from their originals."""
        if not self.compared:
            return [self.summary()]
        title = f"errors against the original, the worst {MOST_COMPARED} first"
        columns = ("linear", "error", "unfolded", "steps", "offset", "agreement", "spread", "scaled channels", "")
        table = Table(*columns, title=title, title_justify="left")
        for c in self.compared[:MOST_COMPARED]:
            agreement = min(c.worst_tile, c.worst_row)
            figures = [f"{x:.3f}" for x in (c.error, c.direct, c.steps, c.worst_offset, agreement, c.spread)]
            table.add_row(escape(c.name), *figures, c.folded, "OUT OF LINE" if c.out_of_line else "")
        return [table, self.summary()]


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _plain(comparison: Comparison) -> dict[str, Any]:
    numbers = ("error", "direct", "steps", "offset", "worst_offset", "worst_tile", "worst_row", "spread", "noise")
    values = {name: getattr(comparison, name) for name in (*numbers, "score")}
    return {
        "name": comparison.name,
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "bad_tiles": comparison.bad_tiles,
        "tiles": comparison.tiles,
        "bad_rows": comparison.bad_rows,
        "folded": comparison.folded,
        "out_of_line": comparison.out_of_line is not None,
    }


class _Notes:
    """Problems and warnings, as they are found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.problem_count = self.warning_count = 0

    def problem(self, what: object, file: str = "", tensor: str = "") -> None:
        self.problem_count += 1
        if self.problem_count <= MOST_FINDINGS:
            self.problems.append(self._finding(what, file, tensor))

    def warning(self, what: object, file: str = "", tensor: str = "") -> None:
        self.warning_count += 1
        if self.warning_count <= MOST_FINDINGS:
            self.warnings.append(self._finding(what, file, tensor))

    def _finding(self, what: object, file: str, tensor: str) -> Finding:
        return Finding(file, tensor, str(what).removeprefix(f"{self.path}{os.sep}"))

    @contextmanager
    def catching(self, file: str = "", tensor: str = "") -> Iterator[None]:
        """A CheckpointError in the block is a problem, and the block's end."""
        try:
            yield
        except CheckpointError as error:
            self.problem(error, file, tensor)


def verify(
    path_or_repo: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Read all of a quantized checkpoint, a directory or a hub repository, and report what is wrong with it.

    Problems are what a reader would refuse or get a wrong model from: files that are missing, damaged or not where the
    index has them; a config that cannot be read or contradicts the tensors; names, shapes and types that do not belong
    to one layout; scales that are 0 or not finite; zeros out of range, and scaled zeros that are not whole; padding
    that is not 0; a g_idx that is none; biases and other float tensors that are not finite. Warnings are what may be
    meant so: act-order, linears that the config has as not quantized or the reverse, constant weights and groups, a
    missing tokenizer, files that are not used.

    With ``against``, the original model (not quantized, safetensors), the weight of every quantized linear is compared
    with the original's: see :mod:`awq_ext.reconstruction`. Linears that are out of line are problems. Those without an
    original of their name are warnings, and so are output channels that were scaled while no inputs undo it.

    Tensors are read one after another: memory is that of the largest packed weight and some tens of megabytes.
    Raises CheckpointError only if there is no such directory or repository, or if the original cannot be opened.
    """
    path = resolve(path_or_repo)
    original = None if against is None else Original(against)
    progress = progress or Progress.silent()
    notes = _Notes(path)
    config = _read_config(path, notes)
    info = _read_info(path, notes)
    parts = parts_of_linears(info)
    checkpoint = _read_checkpoint(path, config, info, parts, notes)
    _check_side_files(path, config, info, notes)
    compared: list[Comparison] = []
    linears = {} if checkpoint is None else checkpoint.linears
    owned = {tensor.name for stored in parts.values() for tensor in stored.values()}
    with progress.task("verify", len(info)) as task:
        if checkpoint is not None:
            _check_names(checkpoint, notes)
            asymmetric = []
            for _, names in groupby(sorted(linears, key=_block), key=_block):
                found: list[tuple[Comparison, Factors]] = []
                for name in names:
                    linear = _Linear(checkpoint, name, notes)
                    linear.check()
                    if linear.groups is not None and bool((linear.groups.zeros != SYMMETRIC_ZERO).any()):
                        asymmetric.append(name)
                    if original is not None:
                        found += _compare(linear, original)
                    task.advance(len(parts[name]), note=name)
                _check_block(found, notes)
                compared += (comparison for comparison, _ in found)
            _check_symmetry(checkpoint, asymmetric, notes)
        for tensor in (tensor for name, tensor in info.items() if name not in owned):
            with notes.catching(tensor.shard, tensor.name):
                if tensor.name.endswith(".scales"):  # of an activation
                    check_scales(str(tensor), tensor.read())
                else:
                    _check_values(tensor, notes)
            task.advance(1, note=tensor.name)
    compared.sort(key=lambda comparison: -comparison.score)
    if original is not None and linears and not compared:
        notes.problem(f"no linear could be compared with {original.path}; is it the original of this model?")
    return VerifyReport(
        path=str(path),
        against=None if original is None else str(original.path),
        layout=None if checkpoint is None else checkpoint.layout.name,
        group_size=None if checkpoint is None else checkpoint.quant.group_size,
        linears=len(linears),
        tensors=len(info),
        problems=tuple(notes.problems),
        problem_count=notes.problem_count,
        warnings=tuple(notes.warnings),
        warning_count=notes.warning_count,
        compared=tuple(compared),
    )


# --- files, config, names -------------------------------------------------------------------------------------------


def _read_config(path: Path, notes: _Notes) -> dict[str, Any] | None:
    with notes.catching("config.json"):
        config = read_json(path, "config.json")
        if config is not None:
            return config
        raise CheckpointError("config.json is missing, so this is not a model directory, or not a complete one")
    return None


def _read_info(path: Path, notes: _Notes) -> dict[str, TensorInfo]:
    """Every tensor that can be found, whatever else is wrong."""
    with notes.catching(INDEX if os.path.lexists(path / INDEX) else ""):
        return read_headers(path, notes.problem)
    info: dict[str, TensorInfo] = {}
    for file in sorted(path.glob("*.safetensors")):
        with notes.catching(file.name):
            for name, tensor in read_header(file).tensors.items():
                info.setdefault(name, tensor)
    return info


def _read_checkpoint(
    path: Path,
    config: dict[str, Any] | None,
    info: dict[str, TensorInfo],
    parts: Mapping[str, Mapping[str, TensorInfo]],
    notes: _Notes,
) -> Checkpoint | None:
    """The checkpoint with those of its linears that are well-formed, and in the layout that most of them have."""
    quant = None
    if config is not None:  # or it is a problem already
        with notes.catching("config.json"):
            quant = read_quant_config(path, config, info)
    quant = _right_group_size(quant, parts, notes)
    if quant is None:
        return None
    found: dict[str, tuple[Layout, LinearInfo]] = {}
    for owner, stored in parts.items():
        with notes.catching(next(iter(stored.values())).shard, owner):
            linear = read_linear(path, quant, owner, stored, info.get(f"{owner}.bias"), notes.problem)
            if linear is not None:
                found[owner] = linear
    if not found:
        if not parts:
            names = " or ".join(f"*.{weight}" for weight in weight_names())
            notes.problem(f"there is a quantization config, but no tensor called {names}")
        return None
    [(usual, _)] = Counter(layout.name for layout, _ in found.values()).most_common(1)
    layout = layouts()[usual]
    for owner, (other, _) in found.items():
        if other is not layout:
            shard = next(iter(parts[owner].values())).shard
            what = f"{shard}: {owner} is in the layout {other.name}, but most others in {layout.name}"
            notes.problem(what, shard, owner)
    if not quant.allows(layout.name):
        what = (
            f"config.json: the quantization config says {quant.version!r}, but the linears are in the layout "
            f"{layout.name}; correct the config if the tensors are right"
        )
        notes.problem(what, "config.json")
    linears = {owner: linear for owner, (other, linear) in found.items() if other is layout}
    return Checkpoint(path, config or {}, replace(quant, version=layout.name), layout, linears, info)


def _right_group_size(
    quant: QuantConfig | None, parts: Mapping[str, Mapping[str, TensorInfo]], notes: _Notes
) -> QuantConfig | None:
    """The config with the group size that the tensors have, if they all have one; None if there is neither."""
    some = list(parts.values())[:100]
    shapes: list[tuple[Mapping[str, TensorInfo], tuple[int, int] | None]] = []
    for stored in some:
        with suppress(CheckpointError):  # it comes up again when the linear is read
            if any(weight in stored for weight in weight_names()):
                shapes.append((stored, stored_shape(stored)))

    def fitting(size: int, version: str | None) -> int:
        return sum(not detect(stored, size, version, shape).problems for stored, shape in shapes)

    if quant is None:
        return next((QuantConfig(size) for size in GROUP_SIZES if some and fitting(size, None) == len(some)), None)
    if not some or fitting(quant.group_size, quant.version):
        return quant
    for size in GROUP_SIZES:
        if fitting(size, quant.version) == len(some):
            what = (
                f"config.json: the quantization config says group size {quant.group_size}, but the tensors have {size}"
            )
            notes.problem(what, "config.json")
            return replace(quant, group_size=size)
    return quant


def _check_names(checkpoint: Checkpoint, notes: _Notes) -> None:
    """Whether readers that go by modules_to_not_convert would look for the same linears as there are."""
    listed = checkpoint.quant.modules_to_not_convert
    if checkpoint.layout.name in GPTQ or any(entry.startswith("re:") for entry in listed):
        return  # they have rules of their own; patterns of a checkpoint are not run

    key = "ignore" if checkpoint.layout.name == COMPRESSED else "modules_to_not_convert"
    if len(listed) * len(checkpoint.info) > MOST_NAMES:
        notes.warning(f"config.json: {key} has {len(listed)} names, too many to look at", "config.json")
        return

    def excluded(name: str) -> str | None:
        if checkpoint.layout.name == COMPRESSED:
            return name if name in listed else None
        return excluded_by(name, listed)

    for name in checkpoint.linears:
        entry = excluded(name)
        if entry is not None:
            what = f"config.json: {key} has {entry!r:.200}, so readers will not look for {name}, which is quantized"
            notes.warning(what, "config.json", name)
    blocks = {_block(name) for name in checkpoint.linears} - {""}
    for name, tensor in checkpoint.info.items():
        module, _, part = name.rpartition(".")
        plain = part == "weight" and len(tensor.shape) == 2 and _block(module) in blocks
        if plain and module not in checkpoint.linears and excluded(module) is None:
            what = f"config.json: {key} does not have {module}, so readers will expect it to be quantized; it is not"
            notes.warning(what, "config.json", module)


def _block(name: str) -> str:
    """The beginning of a name up to the first number: linears elsewhere (the head) are not quantized by any writer."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _check_side_files(
    path: Path, config: Mapping[str, Any] | None, info: Mapping[str, TensorInfo], notes: _Notes
) -> None:
    with notes.catching("generation_config.json"):
        read_json(path, "generation_config.json")
    if config is not None and not isinstance(config.get("model_type"), str):
        notes.warning("config.json: names no 'model_type', so nothing can tell what model this is", "config.json")
    names = sorted(entry.name for entry in os.scandir(path))
    if not any(fnmatch(name, pattern) for name in names for pattern in TOKENIZER_FILES):
        notes.warning("there is no tokenizer beside the weights (tokenizer.json, tokenizer.model ...)")
    used = {tensor.shard for tensor in info.values()}
    for name in names:
        if name.endswith(".safetensors") and info and name not in used:
            notes.warning(f"{name}: no tensor is read from this file", name)


def _check_symmetry(checkpoint: Checkpoint, asymmetric: Sequence[str], notes: _Notes) -> None:
    layout = checkpoint.layout
    if asymmetric and not checkpoint.quant.zero_point:
        what = (
            f"config.json: the quantization config says symmetric, but {len(asymmetric)} linears have "
            f"zeros other than {SYMMETRIC_ZERO}, which readers may ignore; the first is {asymmetric[0]}"
        )
        notes.problem(what, "config.json")
    stored = any(f"{name}.{layout.zeros_name}" in checkpoint.info for name in checkpoint.linears)
    if layout.zeros_optional and checkpoint.quant.zero_point and not stored:
        what = "config.json: the quantization config says that there are zero points, but no linear has any"
        notes.problem(what, "config.json")


# --- tensors --------------------------------------------------------------------------------------------------------


class _Linear:
    """A quantized linear that is being checked; ``groups`` is there if scales and zeros are right."""

    def __init__(self, checkpoint: Checkpoint, name: str, notes: _Notes) -> None:
        self.checkpoint, self.name, self.notes = checkpoint, name, notes
        self.layout = checkpoint.layout
        shape = checkpoint.linears[name]
        self.n, self.k, self.g = shape.out_features, shape.in_features, shape.group_size
        self.groups: Groups | None = None
        self.order: Tensor | None = None
        """The g_idx, if it is in act-order."""
        self.readable = True
        """Whether the codes can be compared with an original."""

    def check(self) -> None:
        stored = {}
        for part in (self.layout.scales_name, self.layout.zeros_name, "g_idx"):
            tensor = self.checkpoint.info.get(f"{self.name}.{part}")
            if tensor is not None and part:
                with self.notes.catching(tensor.shard, tensor.name):
                    stored[part] = tensor.read()
        if "g_idx" in stored:
            self._check_order(stored.pop("g_idx"))
        if self.layout.scales_name in stored:
            self._check_groups(stored)
        weight = self.info(self.layout.weight_name)
        with self.notes.catching(weight.shard, weight.name):
            self._check_codes(weight)

    def info(self, part: str) -> TensorInfo:
        return self.checkpoint.info[f"{self.name}.{part}"]

    def _check_order(self, order: Tensor) -> None:
        tensor, groups = self.info("g_idx"), self.k // self.g
        order = order.long()
        if torch.equal(order, torch.arange(self.k) // self.g):
            return
        valid = bool(((order >= 0) & (order < groups)).all())
        if not valid or not (order.bincount(minlength=groups) == self.g).all():
            what = f"must have each group of 0..{groups - 1} {self.g} times, got {order.min()}..{order.max()}"
            self._problem("g_idx", what)
            self.readable = False
            return
        self.order = order
        what = f"{tensor} is in act-order: only readers of GPTQ's own layout can use it, and nothing can convert it"
        self.notes.warning(what, tensor.shard, tensor.name)

    def _check_groups(self, stored: Mapping[str, Tensor]) -> None:
        layout, scales, zeros = self.layout, None, None
        tensor = self.info(layout.scales_name)
        where = str(tensor).removesuffix(f".{layout.scales_name}")
        with self.notes.catching(tensor.shard, tensor.name):
            scales = read_scales(layout, stored, self.n, self.k, self.g, where)
        packed = stored.get(layout.zeros_name)
        # Scaled zeros say nothing without scales.
        if scales is not None or (packed is not None and layout.zeros != "scaled"):
            shard = tensor.shard if packed is None else self.info(layout.zeros_name).shard
            with self.notes.catching(shard, f"{self.name}.{layout.zeros_name}"):
                some = torch.empty(self.n, self.k // self.g) if scales is None else scales
                zeros = read_zeros(layout, stored, some, where)
        if scales is not None and zeros is not None:
            self.groups = Groups(scales, zeros)
        self._check_padding(layout.scales_name, stored[layout.scales_name])
        if packed is not None:
            self._check_padding(layout.zeros_name, packed)

    def _check_padding(self, part: str, stored: Tensor) -> None:
        """What lies beyond the groups and the channels that there are is 0."""
        layout, groups = self.layout, self.k // self.g
        if layout.zero_words is not None and part == layout.zeros_name:
            matrix = torch.ops.awq_ext.unpack(stored, layout=f"{layout.name}.zeros")
        else:
            matrix = stored.t() if layout.scales_outer == "in_features" else stored
        dirty = int((matrix[: self.n, groups:] != 0).sum() + (matrix[self.n :] != 0).sum())
        if dirty:
            self._problem(part, f"must be 0 beyond its {groups} groups of {self.n} channels, got {dirty} other values")

    def _check_codes(self, weight: TensorInfo) -> None:
        codes, words = self.layout.weight, weight.read()
        rows = max(64, CODES // self.k // 64 * 64)
        lowest, highest, constant, dirty, first = 15, 0, 0, 0, (0, 0)
        for begin in range(0, self.n, rows):
            end = min(begin + rows, self.n)
            q = torch.ops.awq_ext.unpack(codes.rows(words, begin, end), layout=codes.name)[: end - begin]
            dirty += int((q[:, self.k :] != 0).sum())
            grouped = q[:, : self.k].reshape(end - begin, -1, self.g)
            low, high = grouped.amin(2), grouped.amax(2)
            lowest, highest = min(lowest, int(low.min())), max(highest, int(high.max()))
            same = low == high
            if not constant and same.any():
                row, group = same.nonzero()[0].tolist()
                first = (begin + row, group)
            constant += int(same.sum())
        part = self.layout.weight_name
        if dirty:
            self._problem(part, f"must be 0 beyond its {self.k} in_features, got {dirty} other codes")
        if lowest == highest:
            self._warning(part, f"has the code {lowest} everywhere; was the file ever filled?")
        elif constant and self.g > 1:
            some = f"{constant} of {self.n * (self.k // self.g)} groups have one code everywhere"
            self._warning(part, f"{some}, the first is group {first[1]} of output channel {first[0]}")

    def _problem(self, part: str, what: str) -> None:
        tensor = self.info(part)
        self.notes.problem(f"{tensor} {what}", tensor.shard, tensor.name)

    def _warning(self, part: str, what: str) -> None:
        tensor = self.info(part)
        self.notes.warning(f"{tensor}: {what}", tensor.shard, tensor.name)


def _check_values(tensor: TensorInfo, notes: _Notes) -> None:
    """A tensor that is no part of a quantized linear: floats are finite, and a matrix is not constant."""
    _, dtype = DTYPES.get(tensor.dtype, (0, None))
    if dtype is None:
        notes.problem(f"{tensor} cannot be read: torch has no dtype {tensor.dtype!r}", tensor.shard, tensor.name)
    if dtype is None or not dtype.is_floating_point:
        return
    bad, constant, first = 0, True, None
    for begin in range(0, tensor.nbytes, PIECE):
        buffer = bytearray(min(PIECE, tensor.nbytes - begin))
        tensor.read_into(buffer, begin)
        values = torch.frombuffer(buffer, dtype=dtype)
        values = values.float() if dtype.itemsize == 1 else values
        first = values[0] if first is None else first
        bad += int((~torch.isfinite(values)).sum())
        constant = constant and bool((values == first).all())
    if bad:
        notes.problem(f"{tensor} has {bad} values that are not finite", tensor.shard, tensor.name)
    elif len(tensor.shape) > 1 and math.prod(tensor.shape) > 1 and constant and first is not None:
        notes.warning(f"{tensor}: is {first.item():g} everywhere; was the file ever filled?", tensor.shard, tensor.name)


# --- the original ---------------------------------------------------------------------------------------------------


def _compare(linear: _Linear, original: Original) -> list[tuple[Comparison, Factors]]:
    name, notes = linear.name, linear.notes
    file = linear.info(linear.layout.weight_name).shard
    with notes.catching(file, name):
        weight = original.weight(name, linear.checkpoint.linears[name])
        if weight is None:
            notes.warning(f"{file}: {name} was not compared: the original has no {name}.weight", file, name)
        elif linear.groups is not None and linear.readable:
            return [compare(linear.checkpoint, name, linear.groups, weight, linear.order)]
    return []


def _check_block(found: Sequence[tuple[Comparison, Factors]], notes: _Notes) -> None:
    """Report the linears of a block that are out of line; and, if none is, folds of which there is only half."""
    in_line = not any(comparison.out_of_line for comparison, _ in found)
    for comparison, factors in found:
        file, name = comparison.file, comparison.name
        if comparison.out_of_line is not None:
            notes.problem(f"{file}: {name} {comparison.out_of_line}", file, name)
        elif in_line and "out" in comparison.folded:
            others = (other.inputs for _, other in found if other is not factors)
            if not undone(factors.outputs, others):
                what = (
                    f"{file}: {name} has output channels that were scaled, but no other linear that was compared has "
                    "inputs scaled the other way; are its scales those of another linear?"
                )
                notes.warning(what, file, name)
