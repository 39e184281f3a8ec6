"""What is known of each model family: where its blocks are, and which scales can be folded where. Data, no code.

A fold multiplies the input channels of `readers` by a scale and divides the output channels of `producer` by it, so
the block computes the same function. It holds only if `readers` are all the readers of that output and the path
between is linear per channel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    producer: str
    readers: tuple[str, ...]
    per_kv_head: bool = False
    """The producer's channels are those of the key/value heads, each read by several query heads (GQA)."""


@dataclass(frozen=True)
class Family:
    folds: tuple[Fold, ...]
    blocks: str = "model.layers"
    norm_adds_one: bool = False
    """The norm multiplies by (1 + weight), as Gemma's does."""


_ATTENTION = Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_VALUES = Fold("self_attn.v_proj", ("self_attn.o_proj",), per_kv_head=True)
_MLP = Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_DOWN = Fold("mlp.up_proj", ("mlp.down_proj",))  # act(gate) * up is linear in up

_LLAMA = Family(folds=(_ATTENTION, _VALUES, _MLP, _DOWN))

# Gemma 3 norms the attention's output with post_attention_layernorm; the norm in front of the MLP has another name.
_GEMMA3 = Family(
    folds=(_ATTENTION, _VALUES, Fold("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")), _DOWN),
    norm_adds_one=True,
)

FAMILIES: dict[str, Family] = {
    "gemma3_text": _GEMMA3,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By config.model_type."""
