"""How the linears of a block hang together, as far as calibration has to know: seen by running the block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext.calibrate import BlockInputs, forward_replaced

TOLERANCE = 1e-3  # of the change that is made, to its effect: far above rounding in float32


def reading_order(
    inputs: BlockInputs, index: int, block: nn.Module, linears: Mapping[str, nn.Module]
) -> list[list[str]]:
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
        inputs.run(index, block, inputs.hidden[0])
    order = [names for _, names in calls]
    before = -1
    for name in linears:
        place = next((i for i, names in enumerate(order) if name in names), None)
        if place is None:
            order.insert(before + 1, [name])
        before = before + 1 if place is None else place
    return order


def adders(inputs: BlockInputs, index: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """The names of the linears whose output is added to the hidden states in front of the block, in order of calls.

    Shown on the first batch: the block's output stays the same if something is added to what it is called with and
    taken from the linear's output, while all linears that are called before it give what they gave. That holds for
    what ends attention and MLP in a plain decoder block, and not if there is a norm or a factor behind them.
    """
    hidden = inputs.hidden[0]
    outputs: dict[str, Tensor] = {}
    repeated: set[str] = set()

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            repeated.update({name} & outputs.keys())
            outputs[name] = output

        return hook

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(record(name)).remove)
        want = inputs.run(index, block, hidden)
    change = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(index)).to(hidden)
    change *= hidden.square().mean().sqrt()
    found = []
    names = list(outputs)
    for place, name in enumerate(names):
        if outputs[name].shape != hidden.shape or repeated & set(names[: place + 1]):
            continue
        given = {before: outputs[before] for before in names[:place]} | {name: outputs[name] - change}
        with ExitStack() as restored:
            for fixed, output in given.items():
                restored.enter_context(forward_replaced(linears[fixed], lambda _, output=output: output))
            try:
                got = inputs.run(index, block, hidden + change)
            except Exception:  # experts get other tokens now, for which there is no output: whatever a block does then
                continue
        if float((got - want).norm()) <= TOLERANCE * float(change.norm()):
            found.append(name)
    return found
