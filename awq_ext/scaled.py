"""ScaledActivation: AutoAWQ's place for a scale between an activation and the linear that reads it.

AWQ multiplies the input channels of a linear by a scale before rounding and has to undo that in front of it. A norm
or a linear takes the division into its own weights; an activation has none, so AutoAWQ stores the scale beside it as
``<activation>.scales`` and divides while the model runs. Source: AutoAWQ ``awq/modules/act.py``, and each model's
``get_act_for_scaling``.
"""

# No "from __future__ import annotations" here: TorchScript reads the annotations of ScaledActivation as types.
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from awq_ext.errors import CheckpointError
from awq_ext.layouts import FLOATS
from awq_ext.linear import AwqLinear
from awq_ext.names import Names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from awq_ext.relayout import Converted


class ScaledActivation(nn.Module):
    """``act(x) / scales``, in the dtype of ``act(x)``: x is [..., features], ``scales`` a float buffer [features].

    The quotient is computed in the wider of both dtypes and rounded once, so scales stored as float16 keep their
    values in a bfloat16 model. ``.to(dtype)`` casts the scales.
    """

    scales: Tensor

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        return (y / self.scales).to(y.dtype)

    def extra_repr(self) -> str:
        return f"features={self.scales.numel()}"


def insert_scaled_activations(checkpoint: "Converted", model: "PreTrainedModel") -> None:
    """Wrap each activation of ``model`` that has scales in the files; the scales stay on the meta device.

    The linears that are quantized have to be AwqLinear already. Raises CheckpointError, naming the tensor, if the
    model has no activation of that name, if the same activation is in use where the files have no scales for it, or
    if no linear beside it has as many inputs as there are scales.
    """
    modules, names = dict(model.named_modules(remove_duplicate=False)), Names(model)
    for stored, features in checkpoint.activations.items():
        tensor = checkpoint.info[f"{stored}.scales"]
        name = names.in_model(f"{stored}.scales").removesuffix(".scales")
        where = f"{checkpoint.path / tensor.shard}: {stored}.scales"
        act, (parent, _, child) = modules.get(name), name.rpartition(".")
        reason = why_no_activation(act)
        if act is None or reason is not None:
            raise CheckpointError(f"{where}, with no {stored}.qweight beside it, scales an activation, but {reason}")
        # Modules that share one activation object keep it; only this parent's is replaced. But the parent may have it
        # under a second name, or be a second time in the model itself.
        for other, module in modules.items():
            alias = module is act and modules[other.rpartition(".")[0]] is modules[parent]
            if alias and names.in_files(f"{other}.scales").removesuffix(".scales") not in checkpoint.activations:
                raise CheckpointError(f"{where}: the model uses the same module as {other}, which has no scales")
        readers = _inputs_beside(modules[parent], model)
        if features not in readers:
            wanted = " or ".join(map(str, readers)) or "none: the activation has no linear beside it"
            raise CheckpointError(
                f"{where} must have one element for each input of the linear behind the activation ({wanted}), "
                f"got {features}"
            )
        scales = torch.empty(features, dtype=FLOATS[tensor.dtype], device="meta")
        setattr(modules[parent], child, ScaledActivation(act, scales))


def may_be_scaled(block: nn.Module, model_type: str, wanted: bool | None) -> list[str]:
    """The names of the activations in a block that a checkpoint may have scales for.

    ``wanted`` False: none; True: all; None: in a model type that readers of AutoAWQ's files know, the one that they
    look for, by transformers' list of them.
    """
    beside: dict[str, str] = {}
    if wanted is None:
        try:
            from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

            beside = AWQ_SCALES_MAPPINGS.get(model_type, {})
        except ImportError:
            pass
    names = [name for name, module in block.named_modules() if name and why_no_activation(module) is None]
    if wanted is None:
        names = [
            name
            for name in names
            if (parts := name.rpartition("."))[2] == beside.get("act")
            and hasattr(block.get_submodule(parts[0]), beside["layer_before_act"])
        ]
    return names if wanted is not False else []


def why_no_activation(module: nn.Module | None) -> str | None:
    """The reason why a module cannot be what AutoAWQ scales, one elementwise function; None if it can."""
    if module is None:
        return "the model has no module of that name"
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"the model has a {kind} there, and its quantized weight is missing"
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return f"the model's {kind} there has weights of its own"
    if next(module.children(), None) is not None or isinstance(module, nn.Dropout):
        return f"the model's {kind} there is no activation"
    return None


def _inputs_beside(parent: nn.Module, model: "PreTrainedModel") -> list[int]:
    """in_features of the linears that can read the activation: those in its parent, but for those that read the
    hidden states, as the first linear of an MLP does, unless all do."""
    sizes = {child.in_features for child in parent.children() if isinstance(child, (nn.Linear, AwqLinear))}
    return sorted(sizes - {getattr(model.config, "hidden_size", None)} or sizes)
