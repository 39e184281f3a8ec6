"""Swaps nn.Linear for AwqLinear by name rules, and says beforehand what it would do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from awq_ext.linear import AwqLinear, why_not

NEVER_CONVERTED = ("lm_head",)
"""AutoAWQ leaves the output head and the embeddings alone."""


def as_linear(module: nn.Module) -> nn.Linear | None:
    """The module as an nn.Linear, or None if it does something else than ``x @ weight.T + bias``.

    An nn.Linear, or a subclass that computes the same (as Falcon's), is returned itself; transformers' Conv1D, whose
    weight is transposed, as an nn.Linear with a copy of its weights.
    """
    if type(module) is nn.Linear:
        return module
    if isinstance(module, nn.Linear):
        return module if type(module).forward is nn.Linear.forward or _same_as_linear(module) else None
    if type(module).__name__ != "Conv1D" or type(module).__module__ != "transformers.pytorch_utils":
        return None
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype).train(module.training)
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear


@torch.no_grad()
def _same_as_linear(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear gives what nn.Linear gives, on a few numbers."""
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if module.weight.is_meta or not own <= {"weight", "bias"}:
        return False
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight)
    try:
        expected, got = nn.functional.linear(x, module.weight, module.bias), module(x)
        error = (got - expected).norm() / expected.norm()
    except Exception:  # it takes something else, or its dtype has no product here
        return False
    return bool(error <= 4 * torch.finfo(x.dtype).eps)


@dataclass(frozen=True)
class Decision:
    """What happens to one nn.Linear: `reason` says why it stays as it is, or is None if it is quantized."""

    name: str
    in_features: int
    out_features: int
    reason: str | None

    def __str__(self) -> str:
        verb = "quantize" if self.reason is None else "keep"
        why = "" if self.reason is None else f": {self.reason}"
        return f"{verb} {self.name} [{self.out_features}, {self.in_features}]{why}"


def excluded_by(name: str, modules_to_not_convert: Iterable[str]) -> str | None:
    """The first entry that is a substring of the module's full name: AutoAWQ's rule for modules_to_not_convert."""
    return next((key for key in modules_to_not_convert if key in name), None)


def decide(name: str, linear: nn.Linear, group_size: int, modules_to_not_convert: Iterable[str]) -> Decision:
    key = excluded_by(name, modules_to_not_convert)
    reason = f"excluded by name ('{key}')" if key else why_not(linear.in_features, linear.out_features, group_size)
    return Decision(name, linear.in_features, linear.out_features, reason)


def replace_linears(
    model: nn.Module,
    group_size: int = 128,
    *,
    zero_point: bool = True,
    modules_to_not_convert: Iterable[str] = NEVER_CONVERTED,
    dry_run: bool = False,
) -> list[Decision]:
    """Replace every nn.Linear of ``model`` in place by an AwqLinear that rounds its weight to nearest.

    A linear stays as it is when an entry of ``modules_to_not_convert`` is a substring of its full name, or when its
    shape does not fit the group size; subclasses of nn.Linear are not touched. With ``dry_run`` nothing changes.
    Returns one Decision per name of an nn.Linear; a layer that the model holds under several names stays shared.
    Raises RuntimeError, with the model as it was, if a weight is not finite.
    """
    if isinstance(modules_to_not_convert, str):  # it would be taken letter by letter
        raise ValueError(
            "replace_linears: modules_to_not_convert must be a list of names, "
            f"got the string {modules_to_not_convert!r}"
        )
    names = list(modules_to_not_convert)
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    decisions = [decide(name, linear, group_size, names) for name, linear in linears.items()]
    if dry_run:
        return decisions
    layers: dict[nn.Linear, AwqLinear] = {}
    chosen = {decision.name: linears[decision.name] for decision in decisions if decision.reason is None}
    for name, linear in chosen.items():
        if name == "":
            raise ValueError("replace_linears: the model is itself an nn.Linear; use AwqLinear.from_linear")
        if linear not in layers:
            try:
                layers[linear] = AwqLinear.from_linear(linear, group_size, zero_point=zero_point)
            except RuntimeError as error:
                raise RuntimeError(f"replace_linears: {name}.weight: {error}") from error
    for name, linear in chosen.items():
        model.set_submodule(name, layers[linear])
    return decisions
