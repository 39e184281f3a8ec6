"""Results of llm-awq's search (``--dump_awq``), read from its file and applied to a model.

The file is ``torch.save({"scale": [...], "clip": [...]})``, where an item of ``scale`` is ``(name of the producer,
(names of the linears that read it, ...), scales [in_features])`` and one of ``clip`` is ``(name of a linear, largest
absolute value [out_features, G, 1])``. Scales come first, then clips. Source: llm-awq ``awq/quantize/pre_quant.py``
(names, order), ``auto_scale.py`` (``scale_ln_fcs``, ``scale_fc_fc``, ``scale_gelu_fc``) and ``auto_clip.py``.

The weights that llm-awq quantized (``--dump_quant``) are read by :func:`awq_ext.pickled.read_state_dict`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext import pickled
from awq_ext.errors import CheckpointError
from awq_ext.fold import Fold, divide_norm, norm_offset
from awq_ext.scaled import ScaledActivation
from awq_ext.trace import few_inputs, prove

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 65504.0  # of float16, in which scales of the search and of the quantized weights are stored
SMALLEST = 2.0**-24
SOME = 8  # of many problems, those that are told


@dataclass(frozen=True)
class Scale:
    """The input channels of ``readers`` are multiplied by ``scale`` float32 [k], the producer's output divided."""

    producer: str
    readers: tuple[str, ...]
    scale: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return (self.producer, *self.readers)


@dataclass(frozen=True)
class Clip:
    """The weights of a linear, group by group, are clamped to [-bound, bound]; bound is float32 [n, G]."""

    linear: str
    bound: Tensor


@dataclass(frozen=True)
class SearchResults:
    """What a file of search results holds, in its order. ``source`` names it in errors and reports."""

    source: str
    scales: tuple[Scale, ...]
    clips: tuple[Clip, ...]

    @property
    def names(self) -> list[str]:
        """Every module that is mentioned, each once."""
        names = [name for scale in self.scales for name in scale.names] + [clip.linear for clip in self.clips]
        return list(dict.fromkeys(names))


def read_search_results(
    source: str | os.PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False
) -> SearchResults:
    """Search results from a file of llm-awq's, which is a pickle, or from the dictionary that it holds.

    Raises CheckpointError as :func:`awq_ext.pickled.load`, so without ``allow_pickle``; and, naming the item, unless it
    has the structure above with plain float tensors, scales within float16's positive numbers and bounds that are
    finite and not negative, and names each producer, reader and clipped linear once.
    """
    if isinstance(source, (str, os.PathLike)):
        file = pickled.load(source, allow_pickle=allow_pickle)
        results = _parse(str(file.source.file), file.content)
        # The copies are made; now hold the sizes that they were given against the file.
        file.places([item[-1] for items in dict.values(file.content) for item in items])
        return results
    return _parse("search results", dict(source) if isinstance(source, Mapping) else source)


def _parse(source: str, content: Any) -> SearchResults:
    parts = dict(dict.items(content)) if isinstance(content, dict) else {}
    if set(parts) != {"scale", "clip"} or not all(type(part) is list for part in parts.values()):
        keys = ", ".join(str(key)[:100] for key in list(parts)[:SOME])
        held = f"the keys {keys}" if parts else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{source} must hold a dictionary of two lists, 'scale' and 'clip', as llm-awq's --dump_awq writes; "
            f"got {held}. Quantized weights (--dump_quant) are read by 'awq-ext convert'"
        )
    if not any(parts.values()):
        raise CheckpointError(f"{source} has neither scales nor clips, so there is nothing to apply")
    once: dict[str, set[str]] = {"producer": set(), "reader": set(), "clipped linear": set()}

    def fields(what: str, item: Any, length: int) -> Sequence[Any]:
        if type(item) not in (tuple, list) or len(item) != length:
            raise CheckpointError(f"{source}: {what} must have {length} parts, got a {type(item).__name__}")
        return item

    def name(what: str, role: str, value: Any) -> str:
        if type(value) is not str or not value.isprintable() or len(value) > 1000:
            raise CheckpointError(f"{source}: {what} must have a name as its {role}, got a {type(value).__name__}")
        if value in once[role]:
            raise CheckpointError(f"{source}: {what} has {value} as its {role}, which another one has too")
        once[role].add(value)
        return value

    scales = []
    for index, item in enumerate(parts["scale"]):
        what = f"scale {index}"
        producer, readers, scale = fields(what, item, 3)
        if type(readers) not in (tuple, list) or not readers:
            raise CheckpointError(f"{source}: {what} must have a tuple of names, got a {type(readers).__name__}")
        producer = name(what, "producer", producer)
        readers = tuple(name(what, "reader", reader) for reader in readers)
        scale = _floats(f"{source}: {what} ({producer})", scale, "[in_features]", 1, SMALLEST)
        scales.append(Scale(producer, readers, scale))
    clips = []
    for index, item in enumerate(parts["clip"]):
        what = f"clip {index}"
        linear, bound = fields(what, item, 2)
        linear = name(what, "clipped linear", linear)
        bound = _floats(f"{source}: {what} ({linear})", bound, "[out_features, groups, 1]", 3, 0.0)
        if bound.shape[2] != 1:
            raise CheckpointError(
                f"{source}: {what} ({linear}) must be [out_features, groups, 1], got {list(bound.shape)}"
            )
        clips.append(Clip(linear, bound.squeeze(2)))
    return SearchResults(source, tuple(scales), tuple(clips))


def _floats(where: str, value: Any, shape: str, dimensions: int, least: float) -> Tensor:
    """A copy in float32 on the CPU."""
    pickled.check_dense(where, value)
    if value.dtype not in FLOATS or value.dim() != dimensions or not value.numel():
        raise CheckpointError(f"{where} must be {shape} float, got {list(value.shape)} {value.dtype}")
    copied: Tensor = value.detach().to("cpu", torch.float32, copy=True)
    bad = ~((copied >= least) & (copied <= LARGEST))  # which holds of NaN too
    if bad.any():
        raise CheckpointError(f"{where} must be in [{least:.3g}, {LARGEST:g}], got {copied[bad][0].item()}")
    return copied


# --- one model ------------------------------------------------------------------------------------------------------


@dataclass
class LinearChange:
    """W [n, k] becomes W * columns [k] / rows [n], then clamped to [-bound, bound], bound [n, G]; bias [n] / rows."""

    columns: Tensor | None = None
    rows: Tensor | None = None
    bound: Tensor | None = None

    def apply(self, linear: Any, clip: bool) -> tuple[Tensor, Tensor | None]:
        """The new weight and bias, in float32 or, if the old ones are, float64."""
        old, bias = linear.weight.detach(), linear.bias
        new = old.to(torch.promote_types(old.dtype, torch.float32))
        if self.columns is not None:
            new = new * self.columns.to(new)
        if self.rows is not None:
            rows = self.rows.to(new)
            new, bias = new / rows[:, None], None if bias is None else bias.detach() / rows
        if clip and self.bound is not None:
            bound = self.bound.to(new)[:, :, None]
            new = torch.minimum(torch.maximum(new.reshape(*self.bound.shape, -1), -bound), bound).reshape(new.shape)
        return new, bias


@dataclass(frozen=True)
class Plan:
    """What search results do to one model: by the full name of its modules, all of which are there.

    ``norms`` has the new values of a norm's parameters, ``activations`` the scales [k] of a ScaledActivation.
    """

    results: SearchResults
    blocks: str
    linears: dict[str, LinearChange] = field(default_factory=dict)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, root: nn.Module, prefix: str = "", clipped: Collection[str] | None = None) -> None:
        """Change the modules of ``root``, which the whole model has under ``prefix``, in place.

        Results are computed in float32 and rounded to the dtype of what they replace. Clips are applied to the linears
        in ``clipped`` (full names, None: all of them).
        """

        def inside(names: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
            return ((name, name.removeprefix(prefix)) for name in names if name.startswith(prefix))

        for name, local in inside(self.linears):
            linear: Any = root.get_submodule(local)
            weight, bias = self.linears[name].apply(linear, clip=clipped is None or name in clipped)
            linear.weight.data = weight.to(linear.weight.dtype)
            if bias is not None:
                linear.bias.data = bias.to(linear.bias.dtype)
        for name, local in inside(self.norms):
            for parameter, value in self.norms[name].items():
                old = root.get_submodule(local).get_parameter(parameter)
                old.data = value.to(old)
        for name, local in inside(self.activations):
            root.set_submodule(local, ScaledActivation(root.get_submodule(local), self.activations[name]))


def apply_search_results(
    model: nn.Module, results: str | os.PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False
) -> None:
    """Apply llm-awq's search results (a file or its dictionary) to a model that is not quantized, in place.

    After the scales alone the model computes what it did before, up to rounding; then weights are clipped. Modules are
    found by their full names, or, if the model keeps its blocks under another name, by block number and name within
    the block, if exactly one list of blocks in the model has all of them in the right shapes.

    Raises CheckpointError as :func:`read_search_results`; and, with the model as it was, if a module is not found or is
    not of the kind or shape that its entry needs, if a block of the model has no results, if scales moved as they say
    would change what a block computes (tried in float64, if the model can be run on a few tokens), or if a weight would
    leave float16's range.
    """
    plan(model, read_search_results(results, allow_pickle=allow_pickle)).apply(model)


@torch.no_grad()
def plan(model: nn.Module, results: SearchResults) -> Plan:
    """How these results apply to this model, which is not changed. Raises CheckpointError as apply_search_results."""
    modules = dict(model.named_modules(remove_duplicate=False))
    results, blocks = _place(results, modules)
    made = Plan(results, blocks)
    folds: list[Fold] = []

    def change(name: str) -> LinearChange:
        return made.linears.setdefault(name, LinearChange())

    def check(name: str, parameter: str, value: Tensor | None) -> None:
        if value is not None and not value.abs().amax() <= LARGEST:  # not NaN either
            raise CheckpointError(
                f"{results.source}: {name}.{parameter} would have values up to {value.abs().amax().item():g}, expected "
                f"{LARGEST:g} (float16) at most; the results are of another model, or the weight is damaged"
            )

    for scale in results.scales:
        producer, columns = modules[scale.producer], scale.scale
        rows, offset = torch.arange(len(columns)), None
        if isinstance(producer, nn.Linear):
            # A producer with more channels than are read has what is read at its end, as the values in MPT's Wqkv.
            rest = torch.ones(producer.out_features - len(columns))
            rows += len(rest)
            change(scale.producer).rows = torch.cat([rest, columns])
        elif _is_activation(producer):
            stored = columns.to(modules[scale.readers[0]].get_parameter("weight"))
            made.activations[scale.producer], columns = stored, stored.float().cpu()
        else:
            offset, weight = norm_offset(producer), producer.get_parameter("weight")
            if offset is None:
                raise CheckpointError(
                    f"{results.source}: {scale.producer} is a {type(producer).__name__}, expected a norm that "
                    "multiplies by its weight, or by 1 + weight, for a scale to be moved into it"
                )
            new, columns = divide_norm(weight.float().cpu(), columns, offset, weight.dtype)
            others = {name: value.float().cpu() / columns for name, value in producer.named_parameters()}
            made.norms[scale.producer] = {**others, "weight": new}
        for reader in scale.readers:
            change(reader).columns = columns
        folds.append(Fold(scale.producer, scale.readers, rows, offset))
    for clip in results.clips:
        change(clip.linear).bound = clip.bound
    for name, parameters in made.norms.items():
        for parameter, value in parameters.items():
            check(name, parameter, value)
    for name, linear_change in made.linears.items():
        weight, bias = linear_change.apply(modules[name], clip=False)
        check(name, "weight", weight)
        check(name, "bias", bias)
    _refuse_changes(results.source, model, blocks, folds)
    return made


def _refuse_changes(source: str, model: nn.Module, blocks: str, folds: Sequence[Fold]) -> None:
    """Raises CheckpointError for a fold that changes what its block computes, if the model can be run to see that."""
    modules = list(model.get_submodule(blocks).children())
    inputs = few_inputs(model, modules) if folds else None
    if inputs is None:
        return
    for index, block in enumerate(modules):
        prefix = f"{blocks}.{index}."
        local = [
            replace(
                fold,
                producer=fold.producer.removeprefix(prefix),
                readers=tuple(name.removeprefix(prefix) for name in fold.readers),
            )
            for fold in folds
            if fold.producer.startswith(prefix)
        ]
        for fold, reason in zip(local, prove(block, local, inputs.example(index)), strict=True):
            if reason is not None:
                raise CheckpointError(
                    f"{source} does not fit the model, which is left as it was:\n"
                    f"  the scale from {prefix}{fold.producer} to {', '.join(fold.readers)}: in this model these are "
                    f"not all who read that module's output, or not the only ones ({reason})"
                )
        inputs.advance(index, copy.deepcopy(block).float())


_IN_BLOCK = re.compile(r"(.+?)\.(\d{1,6})\.(.+)")  # list of blocks, number, name in the block


def _place(results: SearchResults, modules: Mapping[str, Any]) -> tuple[SearchResults, str]:
    """The results under the model's own names, and the name of its list of blocks."""
    numbers: dict[str, set[int]] = {}
    for name in results.names:
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{results.source}: {name} must be a module in a numbered decoder block")
        numbers.setdefault(match[1], set()).add(int(match[2]))
    if len(numbers) > 1:
        lists = ", ".join(list(numbers)[:SOME])
        raise CheckpointError(f"{results.source}: all modules must be in one list of blocks, got {lists}")
    ((stated, has),) = numbers.items()

    def fit(blocks: str) -> tuple[SearchResults, list[str]]:
        moved = _moved(results, stated, blocks)
        problems = list(_problems(moved, modules, blocks))
        needs = {int(name) for name, _ in modules[blocks].named_children()} if blocks in modules else set()
        if not problems and has != needs:
            problems.append(f"it has results for {len(has)} blocks, up to number {max(has)}, of {len(needs)}")
        return moved, problems

    moved, problems = fit(stated)
    if not problems:
        return moved, stated
    others = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and name != stated]
    fitting = {blocks: moved for blocks in others for moved, wrong in [fit(blocks)] if not wrong}
    if len(fitting) == 1:
        ((blocks, moved),) = fitting.items()
        return moved, blocks
    if fitting:
        problems = [f"{stated}, of which it has results, could be any of {', '.join(sorted(fitting))}"]
    if len(problems) > SOME:
        problems = [*problems[:SOME], f"and {len(problems) - SOME} more"]
    raise CheckpointError(
        f"{results.source} does not fit the model, which is left as it was:\n  " + "\n  ".join(problems)
    )


def _moved(results: SearchResults, old: str, new: str) -> SearchResults:
    """The results with one list of blocks in place of another in every name."""

    def rename(name: str) -> str:
        return new + name[len(old) :]

    return replace(
        results,
        scales=tuple(Scale(rename(s.producer), tuple(map(rename, s.readers)), s.scale) for s in results.scales),
        clips=tuple(Clip(rename(c.linear), c.bound) for c in results.clips),
    )


def _problems(results: SearchResults, modules: Mapping[str, Any], blocks: str) -> Iterator[str]:
    """Why these results do not fit these modules, in words; nothing if they do."""
    missing = {name for name in results.names if name not in modules}
    yield from (f"{name} is not in the model" for name in results.names if name in missing)
    for scale in results.scales:
        reason = None if missing & set(scale.names) else _why_no_fold(scale, modules, blocks)
        if reason is not None:
            yield f"the scale from {scale.producer} to {', '.join(scale.readers)}: {reason}"
    for clip in results.clips:
        reason = None if clip.linear in missing else _why_no_clip(clip, modules[clip.linear])
        if reason is not None:
            yield f"the clip of {clip.linear}: {reason}"


def _why_no_fold(scale: Scale, modules: Mapping[str, Any], blocks: str) -> str | None:
    channels, producer = len(scale.scale), modules[scale.producer]
    for name in scale.readers:
        reason = _why_no_linear(modules[name])
        if reason is not None:
            return f"{name}: {reason}"
        if modules[name].in_features != channels:
            return f"{name} reads {modules[name].in_features} channels, there are scales for {channels}"
    number = scale.producer.removeprefix(f"{blocks}.").partition(".")[0]
    block = f"{blocks}.{number}."
    if not all(name.startswith(block) for name in scale.readers):
        return "they are not in one block"
    if isinstance(producer, nn.Linear):
        if len(scale.readers) > 1 or producer.out_features < channels:
            return f"a linear must have one reader and channels for all {channels} scales, got {producer.out_features}"
        return _why_no_linear(producer)
    weight = getattr(producer, "weight", None)
    if _is_activation(producer) or (isinstance(weight, Tensor) and weight.shape == (channels,) and not weight.is_meta):
        return None
    return f"expected a norm of {channels} channels, a linear or an activation, got a {type(producer).__name__}"


def _why_no_clip(clip: Clip, linear: Any) -> str | None:
    reason = _why_no_linear(linear)
    if reason is None and (len(clip.bound) != linear.out_features or linear.in_features % clip.bound.shape[1]):
        reason = f"the bounds are {list(clip.bound.shape)}, the weight is {[linear.out_features, linear.in_features]}"
    return reason


def _why_no_linear(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"expected a Linear, got a {type(module).__name__}"
    if module.weight.is_meta or module.weight.dtype not in FLOATS:
        return f"expected float weights in memory, got {module.weight.dtype} on {module.weight.device}"
    return None


def _is_activation(module: nn.Module) -> bool:
    """A function without weights or parts."""
    return not [*module.parameters(), *module.buffers(), *module.children()]
