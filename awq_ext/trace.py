"""Finds what can be folded in a decoder block of any kind, and proves it.

It asks the block itself, by running it, and knows no architecture and no operator:

1. *Find.* On a copy with random weights and random hidden states of single tokens, the output of one norm or linear is
   multiplied by another number in each channel. Where the input of a linear has become its old input times these
   numbers, it reads those channels, and they are known by the numbers; it is then given its old input, as the fold
   would give it. If the block's output is the old one too, those linears are all the readers, and what is between is
   linear in each channel. Weights are random so that no channel is silent and nothing cancels by chance; tokens are
   alone so that attention hands on its values as they are, which separates them from queries and keys.
2. *Prove.* With several tokens, a random scale folded into the weights must leave the output equal to rounding, first
   on that copy, where the half of it that goes into the producer must not (or the proof says nothing), and then on
   the weights and hidden states of each block that it is to be used in.

All runs are in float64, and casts to narrower types that a model makes on its way are made casts to float64. A layer
of experts is run with the first few of them (:func:`awq_ext.experts.shortened`), which stand for the others.

Readers are linears, and whatever else has a weight [n, k] for an input of k channels, as the router of a mixture has:
the scale is multiplied into it, though it is not quantized.

Hooks on modules were chosen over following operators (TorchDispatchMode, torch.fx): a rule is needed for every
operator that moves, repeats, mixes or multiplies channels, a missing one looks like a reader, a wrong one breaks the
model; running it takes no rule. What a hook cannot see, such as ``F.linear(x, module.weight)``, still changes the
output, so it leads to a fold that is not made, and never to a wrong one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from awq_ext.calibrate import BlockInputs
from awq_ext.errors import UnsupportedModelError
from awq_ext.experts import shortened, stand_ins
from awq_ext.fold import Fold, apply_fold, norm_offset

EQUAL = 1e-9
"""Largest difference, over the largest value, of what is computed in float64 in another order."""

SEVERAL_TOKENS = 16
"""In each of two windows: what folds are proven on."""

Inputs = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""What a block is called with: hidden states [samples, tokens, width], other arguments, those by name."""


@dataclass
class Traced:
    folds: list[Fold] = field(default_factory=list)
    """In the order in which their readers are called; each module is the reader of one at most."""
    refused: dict[str, str] = field(default_factory=dict)
    """For each linear that reads no such output, the reason."""


def find_blocks(model: nn.Module) -> str:
    """The name of the list of decoder blocks: of all in the model, the ModuleList that holds the most weights.

    Raises UnsupportedModelError if the model has no ModuleList.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if name and isinstance(module, nn.ModuleList)
    }
    if not sizes:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no ModuleList, so it is unknown where its decoder blocks are; pass blocks="
        )
    return max(sizes, key=lambda name: sizes[name])  # the first, so the outermost, of equals


@torch.no_grad()
def trace(
    block: nn.Module, linears: Sequence[str], single: Inputs, several: Inputs, activations: Collection[str] = ()
) -> Traced:
    """The folds of a block among its ``linears``, by name, and its norms. The block is not changed.

    ``single`` are inputs of many windows of one token, ``several`` of some with several tokens; of the hidden states
    only the shape counts. ``activations`` are names of activations that may take a scale of their own
    (:class:`awq_ext.scaled.ScaledActivation`) where nothing else can.
    """
    copies = stand_ins(block)
    try:
        with shortened(block):
            twin = _random_twin(block)
        short = [name for name in linears if name == _stand_in(name, copies)]
        found = _trace(twin, short, single, several, activations)
    except Exception as error:  # whatever a block of any kind may raise on float64
        return Traced(refused=dict.fromkeys(linears, _not_run(error)))
    traced = Traced([whole for fold in found.folds for whole in _for_all(fold, copies)])
    for name in linears:
        if (reason := found.refused.get(_stand_in(name, copies))) is not None:
            traced.refused[name] = reason
    return traced


def _stand_in(name: str, copies: Mapping[str, str]) -> str:
    """The module that stands for this one in a shortened block."""
    return next((first + name.removeprefix(other) for other, first in copies.items() if name.startswith(other)), name)


def _for_all(fold: Fold, copies: Mapping[str, str]) -> list[Fold]:
    """A fold of a shortened block as folds of the whole: one for each expert, or with the readers in all experts."""
    folds, readers = [fold], list(fold.readers)
    for other, first in copies.items():
        same = [other + name.removeprefix(first) for name in fold.readers if name.startswith(first)]
        if fold.producer.startswith(first):
            folds.append(replace(fold, producer=other + fold.producer.removeprefix(first), readers=tuple(same)))
        else:
            readers += same
    return folds if len(folds) > 1 else [replace(fold, readers=tuple(readers))]


def _trace(
    twin: nn.Module, linears: Sequence[str], single: Inputs, several: Inputs, activations: Collection[str]
) -> Traced:
    probe = _Probe(twin, linears, _random_states(single), activations)
    norms = {name: plus for name, module in twin.named_modules() if (plus := is_norm(module)) is not None}
    reasons: dict[str, str] = {}
    traced, taken = Traced(), set[str]()
    several = _random_states(several)

    def take(producers: list[str]) -> None:
        # A linear that two could scale (both factors of a product) takes the later one, which is the one with no
        # activation behind it in every model that has one.
        found = [
            Fold(producer, readers, rows, norms.get(producer))
            for producer in producers
            for rows, readers in probe.readers(producer, reasons)
        ]
        for fold in reversed(found):
            if taken.isdisjoint(fold.readers):
                wrong = _why_not_beside(fold, activations) or _why_not_proven(twin, fold, several)
                wrong = wrong or probe.why_unsure(fold)
                if wrong is None:
                    traced.folds.append(fold)
                    taken.update(fold.readers)
                else:
                    reasons.update(dict.fromkeys(fold.readers, wrong))

    take(sorted((name for name in (*linears, *norms) if name in probe.called), key=probe.called.index))
    if not taken.issuperset(linears):
        take([name for name in activations if name in probe.widths])
    traced.folds.sort(key=lambda fold: probe.called.index(fold.readers[0]))
    for name in linears:
        if name not in taken:
            traced.refused[name] = reasons.get(name) or "nothing in front of it in the block can take its scale"
    return traced


@torch.no_grad()
def prove(block: nn.Module, folds: Sequence[Fold], inputs: Inputs) -> list[str | None]:
    """For each fold, why it must not be used in this block (None: it is proven). The block is not changed."""
    if not folds:
        return []
    copies = stand_ins(block)
    short = [_short(fold, copies) for fold in folds]
    different = {_key(fold): fold for fold in short if fold is not None}
    wrong: dict[Any, str | None] = dict.fromkeys(different)
    try:
        with shortened(block):
            twin = _float64_twin(block)
        before = _run(twin, inputs)
        if _differ(before, _folded(twin, list(different.values()), inputs)) is not None:
            wrong = {key: _differ(before, _folded(twin, [fold], inputs)) for key, fold in different.items()}
    except Exception as error:  # as above
        wrong = dict.fromkeys(different, _not_run(error))
    return ["it is not the same for all experts" if fold is None else wrong[_key(fold)] for fold in short]


def _short(fold: Fold, copies: Mapping[str, str]) -> Fold | None:
    """The fold in a shortened block that stands for this one; None if that one stands for something else."""
    readers = dict.fromkeys(_stand_in(name, copies) for name in fold.readers)
    short = replace(fold, producer=_stand_in(fold.producer, copies), readers=tuple(readers))
    meant = [(whole.producer, set(whole.readers)) for whole in _for_all(short, copies)]
    return short if (fold.producer, set(fold.readers)) in meant else None


def _key(fold: Fold) -> Any:
    return fold.producer, fold.readers, tuple(fold.rows.tolist()), fold.plus


def _not_run(error: Exception) -> str:
    return f"the block cannot be run in float64 ({type(error).__name__}: {error})"


# --- running a block in float64 -------------------------------------------------------------------------------------


class _Float64(TorchDispatchMode):
    """Whatever asks for a narrower float gets float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _float64_twin(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block).double().eval()
    for module in twin.modules():
        config = getattr(module, "config", None)  # a copy, as the module is
        if config is not None and getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # transformers' others use a product that has no float64
    return twin


def _random_twin(block: nn.Module) -> nn.Module:
    twin, generator = _float64_twin(block), torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        random = torch.empty(parameter.shape, dtype=torch.float64)
        if parameter.dim() < 2:
            random.uniform_(0.5, 1.5, generator=generator)
        else:
            random.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        parameter.copy_(random)
    return twin


def _random_states(inputs: Inputs) -> Inputs:
    hidden, args, kwargs = inputs
    random = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return random.to(hidden.device), args, kwargs


def _run(block: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the block returns, or leaves in its arguments."""
    hidden, args, kwargs = tree_map_only(Tensor, _copy, inputs)
    with _Float64(), sdpa_kernel(SDPBackend.MATH):
        output = block(hidden, *args, **kwargs)
    return [leaf for leaf in tree_leaves((output, args, kwargs)) if isinstance(leaf, Tensor)]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.clone()


def _differ(before: list[Tensor], after: list[Tensor]) -> str | None:
    """How far the outputs of two runs are apart, in words; None if they are equal up to float64's rounding."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return "the block's output changes its shape"
    worst = 0.0
    for x, y in zip(before, after, strict=True):
        unequal = x != y  # masks have infinities, which have no difference
        if unequal.any() and x.is_floating_point():
            largest = x.nan_to_num(0, 0, 0).abs().max().clamp(min=torch.finfo(x.dtype).tiny)
            error = float((y - x)[unequal].abs().max() / largest)
            worst = max(worst, math.inf if math.isnan(error) else error)
        elif unequal.any():
            worst = math.inf
    if math.isinf(worst):
        return "the block's output is not finite, or would become another one altogether"
    return None if worst <= EQUAL else f"the block's output would change by {worst:.1g} of its largest value"


# --- proof ----------------------------------------------------------------------------------------------------------


def _folded(twin: nn.Module, folds: Sequence[Fold], inputs: Inputs, half: bool = False) -> list[Tensor]:
    """A run with a random scale in each fold (``half``: only in the producer); the weights are put back."""
    modules = {name: twin.get_submodule(name) for fold in folds for name in (fold.producer, *fold.readers)}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        for fold in folds:
            _, per_channel = fold.rows.unique(return_inverse=True)
            scale = _numbers(int(per_channel.max()) + 1)[per_channel].to(parameters[0].device)
            with _Float64():  # divide_norm is written for float32
                apply_fold(twin, replace(fold, readers=()) if half else fold, scale, torch.float64)
        return _run(twin, inputs)
    finally:
        for name, module in modules.items():
            twin.set_submodule(name, module)  # an activation has become a ScaledActivation
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.data = value


def few_inputs(model: nn.Module, blocks: Sequence[nn.Module]) -> BlockInputs | None:
    """What a few tokens are when they come to each block; None for a model that cannot be run on tokens."""
    try:
        tokens = torch.arange(2 * SEVERAL_TOKENS).view(2, SEVERAL_TOKENS)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        return BlockInputs(model, blocks, tokens.remainder(embeddings.num_embeddings))
    except Exception:  # it is no language model, is not in memory, or has no product in its dtype on its device
        return None


def _why_not_beside(fold: Fold, activations: Collection[str]) -> str | None:
    """Why an activation cannot have scales in a checkpoint: readers of files look for a linear beside it."""
    parent = fold.producer.rpartition(".")[0]
    apart = [name for name in fold.readers if name.rpartition(".")[0] != parent]
    return f"{fold.producer} is not beside {apart[0]}" if fold.producer in activations and apart else None


def _why_not_proven(twin: nn.Module, fold: Fold, inputs: Inputs) -> str | None:
    """Why a fold is not proven on these weights and hidden states, which have to show it if it is wrong."""
    before = _run(twin, inputs)
    wrong = _differ(before, _folded(twin, [fold], inputs))
    if wrong is None and _differ(before, _folded(twin, [fold], inputs, half=True)) is None:
        return f"nothing shows that {fold.producer} matters"
    return wrong


def _numbers(count: int) -> Tensor:
    """Different numbers between 1.25 and 2.5, in an order that has nothing to do with channels."""
    numbers = torch.linspace(1.25, 2.5, count, dtype=torch.float64)
    return numbers[torch.randperm(count, generator=torch.Generator().manual_seed(count))]


# --- finding --------------------------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> float | None:
    """What the norm adds to its weight (see `norm_offset`); None if the module is none that can take a scale."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or not parameters.keys() <= {"weight", "bias"}:
        return None
    return norm_offset(module)


See = Callable[[str, Tensor], Tensor | None]
"""Is given a module's name and its input; what it returns takes the input's place."""


class _Stop(Exception):
    """Ends a run that has shown what it was made for."""


class _Probe:
    """A block with random weights, what goes into its modules, and what happens when one writes something else."""

    def __init__(
        self, block: nn.Module, linears: Sequence[str], block_inputs: Inputs, activations: Collection[str]
    ) -> None:
        self.block, self.block_inputs = block, block_inputs
        self.inputs: dict[str, list[Tensor]] = {}
        own = {name: dict(module.named_parameters(recurse=False)) for name, module in block.named_modules()}
        # Everything with weights of its own is watched, so that a reader that cannot take a scale can be named.
        self.watched = [name for name, parameters in own.items() if parameters]
        weights = {name: parameters["weight"] for name, parameters in own.items() if "weight" in parameters}
        self.readable = {name: weight.shape[1] for name, weight in weights.items() if weight.dim() == 2}
        self.widths = {name: len(weight) for name, weight in weights.items()}
        """How many channels a producer writes."""

        def record(name: str, x: Tensor) -> None:
            self.inputs.setdefault(name, []).append(x.clone())

        def measure(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if len(args) == 1 and getattr(output, "shape", None) == getattr(args[0], "shape", ()):
                    self.widths[name] = output.shape[-1]

            return hook

        handles = [block.get_submodule(name).register_forward_hook(measure(name)) for name in activations]
        try:
            self.output = self._run({name: record for name in self.watched})
        finally:
            for handle in handles:
                handle.remove()
        self.called = list(self.inputs)
        self.idle = [name for name in linears if name not in self.inputs]

    def _run(
        self, see: Mapping[str, See], producer: str = "", change: Callable[[Any], Any] | None = None
    ) -> list[Tensor]:
        """Run the block, with what modules read shown to ``see``, and what the producer writes changed."""
        with ExitStack() as hooks:
            for name, see_input in see.items():
                hooks.enter_context(_before(self.block.get_submodule(name), name, see_input))
            if change is not None:
                hooks.enter_context(_behind(self.block.get_submodule(producer), change))
            return _run(self.block, self.block_inputs)

    def readers(self, producer: str, reasons: dict[str, str]) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """(channels of the producer, linears that read them) for every set of channels with no other reader."""
        every = torch.arange(self.widths[producer])
        seen = self._scaled(producer, every)
        if seen.problem is not None:
            # Some of the rows, as those of the values in a fused qkv, may yet do.
            parts = [rows.unique() for rows in seen.rows.values()]
            for name in seen.wrong:
                if len(every) > self.inputs[name][0].shape[-1]:
                    parts += [rows.unique() for rows in [self._homogeneous(producer, name)] if rows is not None]
            seen = next((s for part in parts if (s := self._scaled(producer, part)).problem is None), seen)
        if seen.problem is not None:
            reasons.update(dict.fromkeys((*seen.rows, *seen.wrong), seen.problem))
            return
        left = list(seen.rows.items())
        while left:
            rows = left[0][1]
            same = tuple(name for name, other in left if torch.equal(other, rows))
            left = [(name, other) for name, other in left if name not in same]
            if any(torch.isin(other, rows).any() for _, other in left):
                names = ", ".join(seen.rows)
                reasons.update(dict.fromkeys(seen.rows, f"{names} read channels of {producer} in different orders"))
                return
            yield rows, same

    def _scaled(self, producer: str, channels: Tensor) -> _Seen:
        """Who reads these channels of the producer: run with each multiplied by a number of its own."""
        scale = torch.ones(self.widths[producer], dtype=torch.float64)
        scale[channels] = _numbers(len(channels))
        scale = scale.to(self.block_inputs[0].device)
        seen, calls = _Seen(), dict.fromkeys(self.watched, 0)
        foreign: list[str] = []
        in_turn: dict[str, list[Tensor | None]] = {}

        def see(name: str, x: Tensor) -> Tensor | None:
            before = self.inputs[name]
            at = calls[name]
            calls[name] += 1
            same_shape = at < len(before) and x.shape == before[at].shape
            if same_shape and _close(x, before[at]):
                in_turn.setdefault(name, []).append(None)
                return before[at].clone()
            if self.readable.get(name) != x.shape[-1] or not x.is_floating_point():
                foreign.append(name)
                return None
            rows = _match(x, before[at], scale) if same_shape else None
            if rows is None:
                seen.wrong.append(name)
                if not same_shape:
                    raise _Stop
            in_turn.setdefault(name, []).append(rows)
            return before[at].clone()

        def change(output: Any) -> Any:
            if not isinstance(output, Tensor) or output.shape[-1:] != scale.shape:
                raise _Stop
            return output * scale

        try:
            changed = _differ(self.output, self._run(dict.fromkeys(self.watched, see), producer, change))
        except _Stop:
            changed = "stopped"
        for name, turns in in_turn.items():
            first = next((rows for rows in turns if rows is not None), None)
            if first is None or name in seen.wrong:
                continue
            seen.rows[name] = first
            if any(rows is None or not torch.equal(rows, first) for rows in turns) or len(turns) != len(
                self.inputs[name]
            ):
                seen.wrong.append(name)
        if changed is not None or seen.wrong:
            if foreign:
                kind = type(self.block.get_submodule(foreign[0])).__name__
                seen.problem = f"{foreign[0]}, a {kind}, reads {producer} too and cannot take a scale"
            elif seen.wrong:
                seen.problem = f"{seen.wrong[0]} reads {producer}, but not channel by channel and in proportion"
            else:
                seen.problem = f"something that is no linear reads {producer} too"
        return seen

    def _homogeneous(self, producer: str, reader: str) -> Tensor | None:
        """int64 [k]: for each input channel of the reader, the channel of the producer that it is proportional to.

        By Euler's theorem: z is proportional to y, whatever else it depends on, if y dz/dy = z.
        """
        wrote: list[Tensor] = []
        read: list[Tensor] = []

        def change(output: Tensor) -> Tensor:
            wrote.append(output.detach().requires_grad_())
            return wrote[0]

        def see(_: str, x: Tensor) -> None:
            read.append(x)
            raise _Stop

        with torch.enable_grad():
            with suppress(_Stop):
                self._run({reader: see}, producer, change)
            if not (wrote and read and read[0].requires_grad):
                return None
            (gradient,) = torch.autograd.grad(read[0].sum(), wrote[0])
        y, z = (wrote[0] * gradient).detach().flatten(0, -2), read[0].detach().flatten(0, -2)
        if len(y) != len(z):
            return None
        rows = _nearest(y[0], z[0])
        return rows.cpu() if _close(y[:, rows], z) else None

    def why_unsure(self, fold: Fold) -> str | None:
        """A linear that no token reached might read the same."""
        size = len(fold.rows)
        idle = [n for n in self.idle if self.block.get_submodule(n).get_parameter("weight").shape[1] == size]
        return f"{idle[0]} might read {fold.producer} too, but no token reached it" if idle else None


@dataclass
class _Seen:
    """What a run with scaled channels has shown: for each linear that reads them, which."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """Linears whose input depends on them in another way."""
    problem: str | None = None
    """Why there is no fold, if something is wrong."""


@contextmanager
def _before(module: nn.Module, name: str, see: See) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if args and isinstance(args[0], Tensor):
            new = see(name, args[0])
            return None if new is None else (new, *args[1:])
        return None

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _behind(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    return bool((x - y).abs().max() <= EQUAL * y.abs().max()) if y.numel() else True


def _match(x: Tensor, before: Tensor, scale: Tensor) -> Tensor | None:
    """int64 [k]: which of the numbers other than 1 each channel of ``before`` [.., k] was multiplied by to give x."""
    x, before = x.flatten(0, -2), before.flatten(0, -2)
    ratio = (x * before).sum(0) / before.square().sum(0)
    if not bool(((x - ratio * before).abs() <= EQUAL * before.abs().amax(0)).all()):  # which holds of NaN too
        return None
    channels = (scale != 1).nonzero().flatten()
    rows = channels[_nearest(scale[channels], ratio)]
    return rows.cpu() if bool(((scale[rows] - ratio).abs() <= EQUAL * ratio).all()) else None


def _nearest(values: Tensor, wanted: Tensor) -> Tensor:
    """For each of ``wanted``, the index of the nearest of ``values``."""
    ordered, order = values.sort()
    above = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    return order[torch.where((ordered[below] - wanted).abs() < (ordered[above] - wanted).abs(), below, above)]
