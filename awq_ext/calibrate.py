"""Calibration: text to token windows, and the statistics of what each linear reads, one decoder block at a time."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from awq_ext import ops
from awq_ext.errors import CalibrationError, UnsupportedModelError
from awq_ext.linear import AwqLinear
from awq_ext.memory import give_back_near_peak
from awq_ext.precision import fast_dtype, fast_forward, fast_products, product
from awq_ext.ranks import ALONE, Ranks, SlotSum, generator


class Statistics:
    """Of the input x [tokens, k] of a linear: the mean of |x| [k] and the mean of x^T x [k, k], both float32.

    ``ranks``: the processes that take them together; None: this one alone. ``inputs`` is for who wants to keep the
    inputs themselves, by batch.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._sums = SlotSum(ranks or ALONE)
        self.inputs: dict[int, Tensor] = {}

    def add(self, x: Tensor, slot: int = 0, original: Tensor | None = None) -> None:
        """Count in the inputs [..., k] of a batch. Batches come in the order of their slots.

        ``original`` [..., k]: what the linear reads in the original model for the same tokens, for `drift`; given for
        all batches or for none. Factors of the products are rounded to bfloat16 if that is faster (``precision.py``).
        """
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        sums = self._sums.of_slot(slot)
        if sums is None:
            k = rows.shape[1]
            sums = [torch.zeros((), dtype=torch.float64), rows.new_zeros(k), rows.new_zeros(k, k)]
            if original is not None:
                sums.append(rows.new_zeros(k, k))
            self._sums.begin(sums)
        sums[0] += len(rows)
        sums[1] += rows.abs().sum(0)
        ops.add_gram(sums[2], rows, bfloat16=fast_dtype(rows) == torch.bfloat16)
        if original is not None:
            with fast_products():  # of bfloat16 factors as such the product would be rounded to bfloat16, too
                sums[3].addmm_(rows.T, original.reshape(rows.shape) - rows)

    @property
    def tokens(self) -> int:
        """How many inputs there were. Asked for by all ranks together, after the last `add`, as is `result`."""
        return 0 if self._sums.total is None else int(self._sums.total[0])

    @cached_property
    def _means(self) -> list[Tensor]:
        """Of all sums but the number of tokens, made in their place."""
        assert self._sums.total is not None
        tokens, *sums = self._sums.total
        means = [sum.div_(int(tokens)) for sum in sums]
        _mirror(means[1])
        return means

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        """(x_mean, gram) on the CPU. Raises CalibrationError naming the linear if they are missing or not finite."""
        if self._sums.total is None:
            raise CalibrationError(f"{name} got no calibration token")
        x_mean, gram = self._means[:2]
        if not (torch.isfinite(x_mean).all() and torch.isfinite(gram).all()):
            raise CalibrationError(
                f"the input of {name} is not finite on the calibration data: the model overflows there in "
                "float32, or has NaN weights in front of it"
            )
        return x_mean, gram

    @property
    def drift(self) -> Tensor | None:
        """The mean of x^T (original - x), float32 [k, k] on the CPU; None if the originals were not given."""
        return self._means[2] if self._sums.total is not None and len(self._means) > 2 else None


def _mirror(matrix: Tensor, rows: int = 256) -> None:
    """Make a square matrix symmetric in its place: its upper triangle counts."""
    for start in range(0, len(matrix), rows):
        own, behind = slice(start, start + rows), slice(start + rows, None)
        upper = matrix[own, own].triu()
        matrix[own, own] = upper + upper.triu(1).T
        matrix[behind, own] = matrix[own, behind].T


BATCH = 2
"""Rows that are run together, if they are of one length."""

HELD_OUT = 8
"""The last of every so many batches is held out: no scale is chosen by it, and it has to confirm those that were. Codes
that are chosen together fit the tokens they are chosen on closely (a divergence of 0.053 there, of 0.091 on others of
the same text), and better the more there are, so these count among them. (SmolLM2-135M, 16 batches. Without these two
the divergence on another text is 5 and 1 % larger.)"""

SENSITIVITY_TOKENS = 4096
"""The first batches with so many tokens show how sensitive a block is: an average over them has long settled."""


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class BlockInputs:
    """The hidden states in front of one block, for all calibration rows, moved on block by block.

    ``hidden`` are those of the original model, batch by batch, float32 [rows, length, width]: neighbouring rows of one
    length, at most ``batch``. A row is run at its own length, so there is no padding and no mask for it. ``quantized``
    are those of the quantized model, for who moves them on, too. With several ranks, each has its own batches only.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        rows: Sequence[Tensor] | Tensor,
        batch: int = BATCH,
        ranks: Ranks | None = None,
        sensitivity_tokens: int = SENSITIVITY_TOKENS,
    ) -> None:
        """``rows``: token ids, int64 [length] each. Parts of the model behind the blocks are not run.

        Raises CalibrationError if the model does not call all blocks, UnsupportedModelError if it calls them with
        something else than hidden states that depends on the tokens.
        """
        self.ranks = ranks or ALONE
        batches = [torch.stack(rows_) for rows_ in _batches(rows, batch)]
        self.places = self.ranks.batches(len(batches))
        """Number and slot of each batch here."""
        tokens_before = itertools.accumulate((ids.numel() for ids in batches), initial=0)
        self._sensitive = {i for i, before in enumerate(tokens_before) if before < sensitivity_tokens}
        self._sensitive_tokens = sum(ids.numel() for i, ids in enumerate(batches) if i in self._sensitive)
        self.held_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT))
        """The numbers of the batches held out."""
        self.held_out_tokens = sum(batches[i].numel() for i in self.held_out)
        self._arguments: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self.ids = [batches[i] for i, _ in self.places]
        self.hidden = self._capture(model, blocks)
        self.quantized = list(self.hidden)

    def _capture(self, model: nn.Module, blocks: Sequence[nn.Module]) -> list[Tensor]:
        """What the first block is called with, and the other arguments of all blocks, by the shape of the batch.

        Those (masks, rotary embeddings) have to be the same for every batch of that shape, which two of them show.
        Behind the first block the hidden states are handed through as they are; what a block returns beside them is
        what the first one does.
        """
        states: list[Tensor] = []
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        compared: set[torch.Size] = set()
        beside: tuple[Any, ...] | None = None
        as_float = _AsFloat()

        def stand_in(index: int, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal beside
                hidden = args[0] if args else kwargs["hidden_states"]
                if index == 0:
                    states.append(hidden.float())
                    if ids.shape in compared:
                        raise _Stop
                    if len(states) == 1:
                        output = forward(*args, **kwargs)
                        beside = output[1:] if isinstance(output, tuple) else None
                others = {key: as_float(value) for key, value in kwargs.items() if key != "hidden_states"}
                others.update({key: None for key in others if key in ("past_key_values", "past_key_value")})
                seen.append((tuple(as_float(value) for value in args[1:]), others))
                if index == len(blocks) - 1:
                    raise _Stop
                return hidden if beside is None else (hidden, *beside)

            return run

        accepted = inspect.signature(model.forward).parameters.values()
        knows_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in accepted)
        options = {"use_cache": False} if knows_cache else {}
        device = next(blocks[0].parameters()).device
        with ExitStack() as restored:
            for index, block in enumerate(blocks):
                restored.enter_context(forward_replaced(block, stand_in(index, block.forward)))
            for ids in self.ids:
                seen = []
                with suppress(_Stop):
                    model(ids.to(device), **options)
                if ids.shape in compared:
                    continue
                if len(seen) != len(blocks):
                    raise CalibrationError(
                        f"the model called {len(seen)} of its {len(blocks)} blocks on the calibration data"
                    )
                if ids.shape in self._arguments:
                    _refuse_differing(self._arguments[ids.shape], seen)
                    compared.add(ids.shape)
                self._arguments.setdefault(ids.shape, seen)
        return states

    def example(self, index: int) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the block is called with for the first batch: hidden states, other arguments, those by name."""
        return (self.hidden[0], *self._arguments[self.hidden[0].shape[:2]][index])

    def call(self, index: int, block: nn.Module, hidden: Tensor) -> Any:
        """What the block returns for hidden states in front of it, of the shape of any of the batches."""
        args, kwargs = self._arguments[hidden.shape[:2]][index]
        return block(hidden, *args, **kwargs)

    def _call(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states behind the block, float32."""
        out = self.call(index, block, hidden)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states.float()

    def _run(self, index: int, block: nn.Module, at: int) -> Tensor:
        """The output of the original's block for one batch: of the sensitive ones, with its graph.

        It is always made for these, whether used or not, because the last bits may depend on it.
        """
        sensitive = self.places[at][0] in self._sensitive
        with torch.set_grad_enabled(sensitive), fast_forward():
            return self._call(index, block, self.hidden[at].detach().requires_grad_(sensitive))

    @fast_products()
    def advance(self, index: int, block: nn.Module) -> None:
        """Move the original model's hidden states on through its block."""
        with fast_linears(block):
            for at in range(len(self.hidden)):
                self.hidden[at] = self._run(index, block, at).detach()

    @fast_products()
    def advance_quantized(self, index: int, block: nn.Module) -> None:
        """Move the quantized model's hidden states on through its block."""
        with fast_linears(block), fast_forward():
            for at, hidden in enumerate(self.quantized):
                self.quantized[at] = self._call(index, block, hidden)

    @fast_products()
    def collect(
        self,
        index: int,
        block: nn.Module,
        watched: Mapping[str, nn.Module],
        linears: Mapping[str, nn.Linear] | None = None,
        seed: int = 0,
        *,
        keep: bool = False,
    ) -> tuple[dict[str, Statistics], dict[str, Statistics], dict[str, Tensor]]:
        """Move the original model's hidden states on through its block, and look at what happens in it.

        Returns the statistics of what each of the modules ``watched`` reads, the same of the batches held out, and for
        each of ``linears`` how much an error in each of its output channels moves the block's output: float32 [n],
        zeros if no token reached it.

        The last is the diagonal of J^T J, J the derivative of the block's output by the linear's, averaged over
        tokens: the squared gradient of a random-sign projection of the output has that expectation (Hutchinson's
        estimator). So a search that weighs rows by it minimises the error of the block and not of its linears one by
        one. The signs depend on ``seed``, the block and the batch.

        ``keep``: the statistics keep their ``inputs``, in 16 bits, of modules that read one vector for every token;
        those of the batches held out are with the others.
        """
        statistics = {name: Statistics(self.ranks) for name in watched}
        held_out = {name: Statistics(self.ranks) for name in watched}
        squares = {name: SlotSum(self.ranks) for name in linears or ()}
        at = number = slot = 0

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                (held_out if number in self.held_out else statistics)[name].add(args[0], slot)
                if keep and self._is_whole(args[0], at):
                    statistics[name].inputs[at] = args[0].detach().to(torch.bfloat16, copy=True)

            return hook

        def differentiate(name: str) -> Any:
            def add(gradient: Tensor) -> None:
                square = gradient.detach().float().reshape(-1, gradient.shape[-1]).square().sum(0)
                sums = squares[name].of_slot(slot)
                if sums is None:
                    squares[name].begin([square])
                else:
                    sums[0] += square

            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(add)

            return hook

        with fast_linears(block), ExitStack() as hooks:
            for name, module in watched.items():
                hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
            for name, linear in (linears or {}).items():
                hooks.callback(linear.register_forward_hook(differentiate(name)).remove)
            for at, (number, slot) in enumerate(self.places):  # noqa: B007 (the hooks read them)
                output = self._run(index, block, at)
                if output.requires_grad and linears:
                    signs = torch.randint(0, 2, output.shape, generator=generator(seed, index, number))
                    output.backward(signs.to(output) * 2 - 1)
                self.hidden[at] = output.detach()
                give_back_near_peak()
        sensitivity = {}
        for name, linear in (linears or {}).items():
            total = squares[name].total
            mean = torch.zeros(linear.out_features) if total is None else total[0] / self._sensitive_tokens
            sensitivity[name] = mean
        return statistics, held_out, sensitivity

    def _is_whole(self, input: Tensor, at: int) -> bool:
        """Whether the input [..., k] of a linear has a row for every token of a batch; experts get some of them."""
        return input.shape[:-1].numel() == self.ids[at].numel()

    def reading_order(self, index: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> list[list[str]]:
        """The names of the linears in the order in which the block calls them, those that read the same in one list.

        Looked at on the first batch. Linears that are not called there (experts that get no token) come behind the one
        that is in front of them in ``linears``.
        """
        calls: list[tuple[Tensor, list[str]]] = []  # the tensor is kept, so that no other one can take its place

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if any(name in names for _, names in calls):
                    return
                names = next((names for read, names in calls if read is args[0]), None)
                if names is None:
                    calls.append((args[0], [name]))
                else:
                    names.append(name)

            return hook

        with ExitStack() as hooks:
            for name, linear in linears.items():
                hooks.callback(linear.register_forward_pre_hook(watch(name)).remove)
            self._call(index, block, self.hidden[0])
        order = [names for _, names in calls]
        before = -1
        for name in linears:
            place = next((i for i, names in enumerate(order) if name in names), None)
            if place is None:
                order.insert(before + 1, [name])
            before = before + 1 if place is None else place
        return order

    @fast_products()
    def quantize_in_turn(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        order: Sequence[Sequence[str]],
        quantize: Callable[[Sequence[str], Statistics], Mapping[str, nn.Module]],
        original: Callable[[str], tuple[Mapping[int, Tensor], Tensor]] = lambda name: ({}, torch.ones(())),
    ) -> dict[str, nn.Module]:
        """Move the quantized model's hidden states on through its block, while its linears are quantized one by one.

        ``quantize(names, statistics)`` returns what stands in for the linears ``names``, which are one list of
        ``order``, given the statistics of what they read when all that is called before them is quantized. Returns what
        it returned for all of them. It is not called for linears that no token reaches. Batches held out count, too.
        ``original(name)``: what a linear reads in the original model, by batch, and what that is to be divided by. If
        it is known for all batches, the statistics have a `drift`.

        Every batch runs the block once, as a coroutine (greenlet) that stops at each linear until that is quantized.
        Of the linears at which batches wait, the one that comes first in ``order`` is taken. A batch that comes to a
        linear later than that is not in its statistics, but still gets its result.
        """
        turn = {name: i for i, names in enumerate(order) for name in names}
        done: dict[str, nn.Module] = {}
        forwards: dict[str, Callable[[Tensor], Tensor]] = {}
        waiting: dict[int, tuple[int, Tensor]] = {}  # at: turn, what the linear is to read
        here = greenlet.getcurrent()

        def stand_in(name: str) -> Any:
            def run(input: Tensor) -> Tensor:
                if name not in forwards:
                    here.switch(name, input)
                return forwards[name](input)

            return run

        def proceed(at: int, run: greenlet.greenlet, *args: Any) -> None:
            with fast_forward():
                reached = run.switch(*args)
            if run.dead:
                self.quantized[at] = reached
            else:
                name, read = reached
                waiting[at] = turn[name], read

        with fast_linears(block, but=linears.values()), ExitStack() as restored:
            for name, linear in linears.items():
                restored.enter_context(forward_replaced(linear, stand_in(name)))
            runs = [greenlet.greenlet(self._call) for _ in self.quantized]
            for at, run in enumerate(runs):
                proceed(at, run, index, block, self.quantized[at])
            while True:
                first = self.ranks.least(min((t for t, _ in waiting.values()), default=len(order)))
                if first == len(order):
                    return done
                statistics = Statistics(self.ranks)
                ready = [at for at in sorted(waiting) if waiting[at][0] == first]
                kept, scale = original(order[first][0])
                known = all(at in kept and self._is_whole(waiting[at][1], at) for at in ready)
                known = self.ranks.least(int(known)) == 1
                for at in ready:
                    other = kept[at].float() / scale.to(kept[at].device) if known else None
                    statistics.add(waiting[at][1], self.places[at][1], other)
                    give_back_near_peak()
                done.update(quantize(order[first], statistics))
                forwards.update({name: _fast_forward(done[name]) for name in order[first]})
                for at in ready:
                    del waiting[at]
                    proceed(at, runs[at])
                    give_back_near_peak()


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module computes something else; its hooks stay. A forward of its own (accelerate's) is put back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def fast_linears(block: nn.Module, *kinds: type[nn.Module], but: Collection[nn.Module] = ()) -> Iterator[None]:
    """The linears of a block, of ``kinds`` (none: quantized or not), compute as `_fast_forward` says.

    Those in ``but`` stay as they are: each would have its weight in memory a second time.
    """
    left = set(but)
    with ExitStack() as restored:
        for module in block.modules():
            if module not in left and type(module) in (kinds or (nn.Linear, AwqLinear)):
                restored.enter_context(forward_replaced(module, _fast_forward(module)))
        yield


def _fast_forward(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a linear computes, as a product of float weights, which is faster for many rows than one of packed codes."""
    bias = linear.bias
    return product(float_weight(linear), bias.float() if isinstance(bias, Tensor) else None)


def float_weight(linear: nn.Module) -> Tensor:
    """The weight [n, k] of an AwqLinear in float32, or that of an nn.Linear as it is."""
    return linear.dequantize(torch.float32) if isinstance(linear, AwqLinear) else linear.get_parameter("weight")


def _refuse_differing(before: Sequence[Any], after: Sequence[Any]) -> None:
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        for (path, a), (_, b) in zip(tree_flatten_with_path(one)[0], tree_flatten_with_path(other)[0], strict=True):
            if isinstance(a, Tensor) and a is not b and not torch.equal(a, b):
                raise UnsupportedModelError(
                    f"block {index} is called with an argument {keystr(path)} that depends on the tokens; only hidden "
                    "states are carried from block to block"
                )


def _batches(rows: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    for _, alike in itertools.groupby(rows, len):
        same = iter(alike)
        while batch := list(itertools.islice(same, most)):
            yield batch


class _AsFloat:
    """Half-precision tensors as float32, inside tuples and dicts too: blocks are run in float32.

    A tensor that comes several times, as a mask does for all blocks, is converted once.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id stays its own

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or value.dtype == torch.float32:
                return value
            return self._seen.setdefault(id(value), (value, value.float()))[1]
        if isinstance(value, tuple):
            return tuple(self(item) for item in value)
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return value
