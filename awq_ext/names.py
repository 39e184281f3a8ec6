"""Names of tensors: those that files on the hub have, and those of a model in the installed transformers.

transformers renames modules from version to version and keeps lists of how (``transformers.conversion_mapping``); its
older versions have no lists, and the names of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

# Renamed without being listed everywhere: (prefix in files, which all versions read, prefix in newer ones).
RENAMED = {"gpt_neox": ("embed_out.", "lm_head.")}


def _listed(model: nn.Module) -> Sequence[Any]:
    """transformers' rules for a model, in the order in which they apply to names from files."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return ()
    try:
        return get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    except (AttributeError, TypeError):  # no transformers model, or other arguments in another version
        return ()


class Names:
    """Translates names of tensors between the files of a model and the model."""

    def __init__(self, model: nn.Module) -> None:
        rules = _listed(model)
        if rules:
            from transformers.core_model_loading import PrefixChange, WeightRenaming

            rules = [rule for rule in rules if isinstance(rule, WeightRenaming)]
            self._back = [rule.reverse_transform() for rule in reversed(rules) if not isinstance(rule, PrefixChange)]
        else:
            self._back = []
        self._forth = rules
        self._tensors = set(model.state_dict(keep_vars=True))
        self._modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        config = getattr(model, "config", None)
        self._prefixes = RENAMED.get(getattr(config, "model_type", ""), ())

    def in_model(self, name: str) -> str:
        """The model's name for a tensor of the files.

        A name that both have is left alone, as are quantized parts of a module of that name.
        """
        if name in self._tensors:
            return name
        for mine, other in (self._prefixes, self._prefixes[::-1]) if self._prefixes else ():
            if name.startswith(other) and mine + name.removeprefix(other) in self._tensors:
                return mine + name.removeprefix(other)
        renamed = _apply(self._forth, name)
        return name if renamed not in self._tensors and name.rpartition(".")[0] in self._modules else renamed

    def in_files(self, name: str) -> str:
        """The name under which a tensor of the model is written, such that `in_model` finds it again."""
        if self._prefixes and name.startswith(self._prefixes[1]):
            return self._prefixes[0] + name.removeprefix(self._prefixes[1])
        there = _apply(self._back, name)
        return there if _apply(self._forth, there) == name else name


def _apply(rules: Sequence[Any], name: str) -> str:
    for rule in rules:
        name, _ = rule.rename_source_key(name)
    return name


def experts_in_files(model: nn.Module, experts: str, gated: bool) -> tuple[str, ...]:
    """What files call the linears of one expert of the module named ``experts``: (gate,) up, down.

    Taken from transformers' rule for merging them. Without one they are Mixtral's names under Mixtral's name for the
    layer, which is what vLLM makes of GraniteMoE's, and else those of most models.
    """
    found: dict[str, tuple[str, ...]] = {}
    for rule in _listed(model):
        target = rule.target_patterns[0].replace("\\", "")
        if hasattr(rule, "operations") and all("*." in source for source in rule.source_patterns):
            for tensor in ("gate_up_proj", "up_proj", "down_proj"):
                if f".{experts}.{tensor}".endswith(target):
                    leaves = (source.rpartition("*.")[2] for source in rule.source_patterns)
                    found[tensor] = tuple(leaf.removesuffix(".weight") for leaf in leaves)
    first, count = ("gate_up_proj", 2) if gated else ("up_proj", 1)
    names = (*found.get(first, ()), *found.get("down_proj", ()))
    if len(names) == count + 1:
        return names
    usual = ("w1", "w3", "w2") if ".block_sparse_moe." in f".{experts}" else ("gate_proj", "up_proj", "down_proj")
    return usual if gated else usual[1:]
