"""Experts of a mixture as linears of their own.

transformers 5 keeps all experts of a layer in two tensors, ``gate_up_proj`` and ``down_proj``, while files on the hub,
AutoAWQ and other readers have a linear for each: ``experts.7.gate_proj``, Mixtral's ``experts.7.w1``. `open_experts`
turns the former into the latter, so that they can be quantized, saved under those names, and loaded from them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext.names import experts_in_files

ENOUGH = 2
"""As many experts show all that the others of a layer can do: the same code runs each, see `shortened`."""


class OpenedExperts(nn.Module):
    """The experts of one layer, each a ModuleDict of linears: (gate,) up, down, under the names that it is given.

    Called as the fused module it stands for: hidden_states [tokens, width], top_k_index [tokens, k] (which experts),
    top_k_weights [tokens, k] (times what); returns [tokens, width]. The sum over experts is taken in their order, in
    the dtype of hidden_states. Or, as Llama 4's, with hidden_states alone: as many for each expert, one expert's after
    the other's.
    """

    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, fused: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        # All that the fused module's own rule for gate and up may want to know, such as limits and the activation.
        vars(self).update({key: value for key, value in vars(fused).items() if not key.startswith("_")})
        for name, child in fused.named_children():
            self.add_module(name, child)
        self._class, self._names = type(fused), names
        self._concatenated, transposed = getattr(fused, "is_concatenated", True), _transposed(fused)
        self.num_experts = len(fused.get_parameter("down_proj"))
        both = len(names) == 3
        first = "gate_up_proj" if both else "up_proj"
        for number in range(self.num_experts):
            weight, bias = _rows(fused, first, number, transposed)
            parts = [(weight, bias)]
            if both:
                cut = _halves if self._concatenated else _alternating
                parts = list(zip(cut(weight), (None, None) if bias is None else cut(bias), strict=True))
            parts.append(_rows(fused, "down_proj", number, transposed))
            linears = {name: _linear(*part) for name, part in zip(names, parts, strict=True)}
            self.add_module(str(number), nn.ModuleDict(linears))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        if top_k_index is None or top_k_weights is None:
            parts = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(number, x) for number, x in enumerate(parts)])
        output = torch.zeros_like(hidden_states)
        index = top_k_index % self.num_experts  # which are fewer than the router's in a shortened copy only
        for number in index.unique().tolist():
            token, place = torch.where(index == number)
            y = self._expert(number, hidden_states[token]) * top_k_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    def _expert(self, number: int, x: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        *first, down = (expert[name] for name in self._names)
        if len(first) == 1:
            y = self.act_fn(first[0](x))
        elif self._concatenated:
            y = self._gated(torch.cat([linear(x) for linear in first], -1))
        else:
            y = self._gated(torch.stack([linear(x) for linear in first], -1).flatten(-2))
        y = down(y)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _gated(self, gate_up: Tensor) -> Tensor:
        rule: Any = getattr(self._class, "_apply_gate", None)
        if rule is not None:
            gated: Tensor = rule(self, gate_up)
            return gated
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


def _transposed(fused: nn.Module) -> bool:
    """Whether weights are [inputs, outputs]: stated, or else told by what fits."""
    first: Any = getattr(fused, "gate_up_proj", None)
    first = getattr(fused, "up_proj", None) if first is None else first
    return bool(getattr(fused, "is_transposed", first.shape[2] != fused.get_parameter("down_proj").shape[1]))


def _rows(fused: nn.Module, name: str, number: int, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """Weight [n, k] and bias [n] of one expert."""
    weight, bias = fused.get_parameter(name)[number].detach(), getattr(fused, f"{name}_bias", None)
    return weight.t() if transposed else weight, None if bias is None else bias[number].detach()


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = rows.chunk(2)
    return gate, up


def _alternating(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[::2], rows[1::2]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    # Copies, so that the fused tensor can go.
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(memory_format=torch.contiguous_format))
    return linear


@torch.no_grad()
def open_experts(model: nn.Module, stored: Collection[str] = ()) -> dict[str, str]:
    """Replace all fused experts of a model by `OpenedExperts`, in place, but for those whose tensors are ``stored``.

    ``stored``: names of tensors that a checkpoint has for this model. Every replacement is run beside what it
    replaces on random tokens for each expert, and must give the same up to rounding; on the meta device, where there
    are no values to run on, a small copy of it with random ones is. Returns the reason for each module with weights of
    three dimensions that stays as it is, by name.
    """
    kept: dict[str, str] = {}
    fused = [
        (name, module)
        for name, module in model.named_modules()
        if name
        and any(weight.dim() == 3 for part, weight in module.named_parameters(recurse=False) if part != "weight")
    ]
    for name, module in fused:
        own = {part: f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)}
        if stored and all(tensor in stored for tensor in own.values()):
            continue
        first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
        known = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
        if not {first, "down_proj"} <= own.keys() <= known or next(module.buffers(recurse=False), None) is not None:
            kept[name] = f"a {type(module).__name__} has weights {', '.join(own)}, of an unknown arrangement"
            continue
        reason = "it does not compute what gated linears of these weights do"
        try:
            opened = OpenedExperts(module, experts_in_files(model, name, gated=first == "gate_up_proj"))
            same = _same(module, opened)
        except Exception as error:  # whatever a class of any kind does on being called
            same, reason = False, f"it cannot be tried ({type(error).__name__}: {error})"
        if same:
            model.set_submodule(name, opened.train(module.training))
        else:
            kept[name] = f"a {type(module).__name__} stays fused: {reason}"
    return kept


def _same(fused: nn.Module, opened: OpenedExperts) -> bool:
    if fused.get_parameter("down_proj").is_meta:
        fused = _miniature(fused)
        opened = OpenedExperts(fused, opened._names)
    weight = fused.get_parameter("down_proj")
    count, generator = opened.num_experts, torch.Generator().manual_seed(0)
    width = opened.get_submodule(f"0.{opened._names[0]}").get_parameter("weight").shape[1]
    x = torch.randn(max(count, 8), width, generator=generator)
    x[::2] *= 4  # limits on what is large have to show, too
    index = torch.arange(2 * len(x)).remainder(count).view(-1, 2)
    weights = torch.rand(len(x), 2, generator=generator)
    arguments = [x.to(weight), index.to(weight.device), weights.to(weight)]
    if len(inspect.signature(fused.forward).parameters) == 1:
        arguments = [torch.cat(arguments[:1] * count)]
    # Damaged weights are for others to find.
    expected, got = (run(*arguments).float().nan_to_num(0, 0, 0) for run in (fused, opened))
    # A few roundings to the dtype, and what sums in another order differ by in float32.
    tolerance = 4 * torch.finfo(weight.dtype).eps + 1e-5
    return bool((got - expected).norm() <= tolerance * expected.norm())


def _miniature(fused: nn.Module, experts: int = 4, channels: int = 8) -> nn.Module:
    """A copy on the CPU with random values: of a few experts, as wide as they are, with few channels inside."""
    twin, generator = copy.deepcopy(fused), torch.Generator().manual_seed(0)
    count, *shape = fused.get_parameter("down_proj").shape
    transposed = _transposed(fused)
    inside = {part: 1 + int(transposed) for part in ("gate_up_proj", "up_proj")}
    inside |= {"gate_up_proj_bias": 1, "up_proj_bias": 1, "down_proj": 2 - int(transposed)}
    inner = shape[inside["down_proj"] - 1]
    for part, weight in list(twin.named_parameters(recurse=False)):
        sizes = [experts, *weight.shape[1:]]
        if part in inside:
            sizes[inside[part]] = sizes[inside[part]] // inner * channels
        setattr(twin, part, nn.Parameter(torch.empty(sizes)))
    for key, value in list(vars(twin).items()):
        if type(value) is int and value in (count, inner):
            setattr(twin, key, experts if value == count else channels)
    twin.to_empty(device="cpu").float()
    for weight in twin.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return twin


def read_alone(block: nn.Module, linear: str) -> str:
    """The linear whose inputs are those tokens that reach this one: in an expert its last, as the others may share
    the statistics of all that reads the norm."""
    expert, _, _ = linear.rpartition(".")
    inside = block.get_submodule(expert)
    layer = block.get_submodule(expert.rpartition(".")[0])
    return f"{expert}.{layer._names[-1]}" if isinstance(layer, OpenedExperts) and inside is not layer else linear


# --- a few experts in place of all ----------------------------------------------------------------------------------


@contextmanager
def shortened(block: nn.Module) -> Iterator[None]:
    """While open, every OpenedExperts of ``block`` has its first experts only, which take the tokens of all.

    One code runs every expert of a layer, on the tokens that are routed to it: what holds of one, whatever its
    weights and its tokens, holds of each. So a few show where scales can be folded, and no expert lacks a token.
    """
    left_out: list[tuple[OpenedExperts, dict[str, nn.Module]]] = []
    for module in block.modules():
        if isinstance(module, OpenedExperts):
            numbers = [str(number) for number in range(ENOUGH, module.num_experts)]
            left_out.append((module, {number: module.get_submodule(number) for number in numbers}))
    for module, others in left_out:
        for number in others:
            delattr(module, number)
        module.num_experts -= len(others)
    try:
        yield
    finally:
        for module, others in left_out:
            for number, expert in others.items():
                module.add_module(number, expert)
            module.num_experts += len(others)


def stand_ins(block: nn.Module) -> dict[str, str]:
    """For each expert that a shortened block lacks, such as ``mlp.experts.5.``, the one that stands for it there."""
    return {
        f"{name}.{number}.": f"{name}.{number % ENOUGH}."
        for name, module in block.named_modules()
        if isinstance(module, OpenedExperts)
        for number in range(ENOUGH, module.num_experts)
    }
