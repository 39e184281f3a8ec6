"""Small random models of every architecture, and the folds that there are in each.

Used by test_trace.py and test_architectures.py, which runs this file in a process of its own, too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from awq_ext import load_quantized, replace_linears
from awq_ext.calibrate import BlockInputs
from awq_ext.experts import open_experts
from awq_ext.scaled import may_be_scaled
from awq_ext.swap import as_linear
from awq_ext.trace import Inputs, Traced, find_blocks, trace

GROUP = 16

# Four heads of 16 channels, two of them for keys and values; 128 channels in the MLP.
COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**COMMON, "intermediate_size": 128}
GQA = {**WIDE, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {**GQA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    **GQA,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

KV = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten()  # two query heads read each head of values
HEADS = torch.arange(64)
UP = torch.arange(128)
NARROW, WIDE_UP = torch.arange(32), torch.arange(256)

Expected = tuple[str, tuple[str, ...], float | Tensor]  # producer, readers, what a norm adds or the linear's rows


def attention(norm: str = "input_layernorm", plus: float = 0.0, more: tuple[str, ...] = ()) -> list[Expected]:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [(norm, (*qkv, *more), plus), ("self_attn.v_proj", ("self_attn.o_proj",), KV)]


def mlp(norm: str = "post_attention_layernorm", plus: float = 0.0) -> list[Expected]:
    return [(norm, ("mlp.gate_proj", "mlp.up_proj"), plus), ("mlp.up_proj", ("mlp.down_proj",), UP)]


def fused(norm: str, qkv: str, rows: Tensor, out: str, more: tuple[str, ...] = ()) -> list[Expected]:
    return [(norm, (qkv, *more), 0.0), (qkv, (out,), rows)]


def experts(name: str, rows: Tensor, gate: str, up: str, down: str, more: tuple[str, ...]) -> list[Expected]:
    """Behind the norm: all of its readers, which are ``more`` and five experts; in each of these, up -> down."""
    first = [f"{name}.{number}.{part}" for number in range(5) for part in (gate, up)]
    inner = [(f"{name}.{number}.{up}", (f"{name}.{number}.{down}",), rows) for number in range(5)]
    return [("post_attention_layernorm", (*more, *first), 0.0), *inner]


LLAMA = attention() + mlp()
PARALLEL = [*attention(more=("mlp.gate_proj", "mlp.up_proj")), mlp()[1]]
NEOX = torch.arange(192).view(4, 3, 16)[:, 2].flatten()  # [head, (query, key, value), channel]
DEEPSEEK: list[Expected] = [
    ("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), 0.0),
    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), 0.0),
    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), 0.0),
    ("self_attn.kv_b_proj", ("self_attn.o_proj",), torch.arange(128).view(4, 32)[:, 16:].flatten()),
]
USUAL = ("gate_proj", "up_proj", "down_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")
QWEN2_MOE = [
    *attention(),
    *experts("mlp.experts", NARROW, *USUAL, ("mlp.gate", *SHARED)),
    ("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",), HEADS),
]
DEEPSEEK_SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
DEEPSEEK_MOE = [
    *DEEPSEEK,
    *experts("mlp.experts", NARROW, *USUAL, ("mlp.gate", *DEEPSEEK_SHARED)),
    ("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",), HEADS),
]
MIXTRAL = [*attention(), *experts("mlp.experts", UP, "w1", "w3", "w2", ("mlp.gate",))]
GRANITE = [
    *attention(),
    *experts("block_sparse_moe.experts", UP, "w1", "w3", "w2", ("block_sparse_moe.router",)),
]

# model_type: its config, the folds of its first block, and those of its last one if they are others
ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    "llama": (GQA, LLAMA),
    "mistral": ({**GQA, "sliding_window": 8}, LLAMA),
    "qwen2": (GQA, LLAMA),
    "qwen3": (GQA, LLAMA),
    "phi3": (
        GQA,
        [
            *fused("input_layernorm", "self_attn.qkv_proj", 96 + KV, "self_attn.o_proj"),
            *fused("post_attention_layernorm", "mlp.gate_up_proj", 128 + UP, "mlp.down_proj"),
        ],
    ),
    "phi3-mha": (
        {**GQA, "num_key_value_heads": 4},
        [
            *fused("input_layernorm", "self_attn.qkv_proj", 128 + HEADS, "self_attn.o_proj"),
            *fused("post_attention_layernorm", "mlp.gate_up_proj", 128 + UP, "mlp.down_proj"),
        ],
    ),
    "gemma2": ({**GQA, "sliding_window": 8}, attention(plus=1.0) + mlp("pre_feedforward_layernorm", 1.0)),
    "gemma3_text": ({**GQA, "sliding_window": 8}, attention(plus=1.0) + mlp("pre_feedforward_layernorm", 1.0)),
    "olmo2": (GQA, [attention()[1], mlp()[1]]),  # its norms are behind attention and MLP
    "gpt_neox": (
        {**WIDE, "use_parallel_residual": True},
        [
            *fused("input_layernorm", "attention.query_key_value", NEOX, "attention.dense"),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",), 0.0),
            ("mlp.act", ("mlp.dense_4h_to_h",), UP),
        ],
    ),
    "gpt2": (
        GPT,
        [*fused("ln_1", "attn.c_attn", 128 + HEADS, "attn.c_proj"), ("ln_2", ("mlp.c_fc",), 0.0)],
    ),
    "opt": (
        {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
        [
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0.0),
            ("self_attn.v_proj", ("self_attn.out_proj",), HEADS),
            ("final_layer_norm", ("fc1",), 0.0),
            ("fc1", ("fc2",), UP),  # ReLU keeps what is positive in proportion
        ],
    ),
    "bloom": (
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        [
            *fused("input_layernorm", "self_attention.query_key_value", NEOX, "self_attention.dense"),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",), 0.0),
            ("mlp.gelu_impl", ("mlp.dense_4h_to_h",), WIDE_UP),
        ],
    ),
    "falcon": (  # [key/value head, (two queries, key, value), channel]
        {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2},
        [
            *fused(
                "ln_attn",
                "self_attention.query_key_value",
                torch.arange(128).view(2, 4, 16)[:, 3:].expand(2, 2, 16).flatten(),
                "self_attention.dense",
            ),
            ("ln_mlp", ("mlp.dense_h_to_4h",), 0.0),
            ("mlp.act", ("mlp.dense_4h_to_h",), WIDE_UP),
        ],
    ),
    "falcon-7b": (  # one head of values; attention and MLP side by side behind one norm
        {**COMMON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
        [
            *fused(
                "input_layernorm",
                "self_attention.query_key_value",
                torch.arange(80, 96).expand(4, 16).flatten(),
                "self_attention.dense",
                more=("mlp.dense_h_to_4h",),
            ),
            ("mlp.act", ("mlp.dense_4h_to_h",), WIDE_UP),
        ],
    ),
    "stablelm": ({**GQA, "use_qkv_bias": True}, LLAMA),
    "stablelm-parallel": ({**GQA, "use_parallel_residual": True, "qk_layernorm": True}, PARALLEL),
    "cohere": ({**GQA, "use_qk_norm": True}, PARALLEL),
    "starcoder2": (
        GQA,
        [
            *attention(),
            ("post_attention_layernorm", ("mlp.c_fc",), 0.0),
            ("mlp.act", ("mlp.c_proj",), UP),
        ],
    ),
    "mixtral": ({**GQA, "num_local_experts": 5}, MIXTRAL),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 64}, QWEN2_MOE),
    "qwen3_moe": (MOE, attention() + experts("mlp.experts", NARROW, *USUAL, ("mlp.gate",))),
    "granitemoe": ({**GQA, "num_local_experts": 5}, GRANITE),
    "deepseek_v2": ({**MLA, "topk_method": "greedy"}, DEEPSEEK + mlp(), DEEPSEEK_MOE),
    "deepseek_v3": (MLA, DEEPSEEK + mlp(), DEEPSEEK_MOE),
    "internlm2": (  # [key/value head, (two queries, key, value), channel], in a model of no library
        None,
        [
            *fused("attention_norm", "wqkv", torch.arange(128).view(2, 4, 16)[:, 3:].expand(2, 2, 16).flatten(), "wo"),
            ("ffn_norm", ("w1", "w3"), 0.0),
            ("w3", ("w2",), UP),
        ],
    ),
    "own": (
        None,
        [
            *fused("ln", "qkv", torch.arange(96).view(4, 3, 8)[:, 0].flatten(), "out"),
            ("norm", ("gate", "up"), 0.0),
            ("up", ("down",), HEADS),
        ],
    ),
}
BLOCKS = {"own": "body"}
"""Where they are, if not in a ModuleList."""


def small_model(kind: str) -> Any:
    """A random model of that type whose norms and biases are not the constants they are initialised to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind in OWN:
            return OWN[kind]().eval()
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split("-")[0], **ARCHITECTURES[kind][0]))
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = (
                parameter.data + 0.3 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5
            )
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output = model(ids(2, 24))
    result: Tensor = output if isinstance(output, Tensor) else output.logits
    return result


def reload(path: Path, kind: str) -> nn.Module:
    """What has been saved under ``path``: a checkpoint, or the state dict of a model of no library."""
    if kind not in OWN:
        return load_quantized(path)
    model = small_model(kind)
    replace_linears(model, GROUP, modules_to_not_convert=["head"])
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(1))


QUANTIZE: dict[str, Any] = {"calibration": ids(4, 32), "samples": 4, "seq_len": 32, "q_group_size": GROUP}
"""Arguments of `quantize` for these models."""


class Traces:
    """The blocks of a model, opened as `quantize` does, and what they are called with."""

    def __init__(self, model: nn.Module, blocks: str | None = None, scaled_activations: bool | None = None) -> None:
        open_experts(model)
        self.blocks = list(model.get_submodule(blocks or find_blocks(model)).children())
        for block in self.blocks:
            for name, module in list(block.named_modules()):
                if (linear := as_linear(module)) is not None:
                    block.set_submodule(name, linear)
        self._single = BlockInputs(model, self.blocks, ids(64, 1), batch=64)
        self._several = BlockInputs(model, self.blocks, ids(2, 16))
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        self._activations = [may_be_scaled(block, model_type, scaled_activations) for block in self.blocks]

    def several(self, index: int) -> Inputs:
        return self._several.example(index)

    def linears(self, index: int) -> list[str]:
        return [name for name, module in self.blocks[index].named_modules() if isinstance(module, nn.Linear)]

    def trace(self, index: int) -> Traced:
        single, several = self._single.example(index), self.several(index)
        return trace(self.blocks[index], self.linears(index), single, several, self._activations[index])


# --- models of no library ----


class Block(nn.Module):
    """Attention over all earlier tokens, then two branches multiplied, with one thing more that ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.ln, self.norm = nn.LayerNorm(32), nn.RMSNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.direct = nn.Parameter(torch.randn(32, 32))
        if kind == "idle":
            self.extra = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        value, query, key = self.qkv(self.ln(x)).unflatten(-1, (4, 3, 8)).movedim(1, 3).unbind(2)
        value = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(value.transpose(1, 2).flatten(2))
        y = self.norm(x)
        if self.kind == "functional":
            x = x + nn.functional.linear(y, self.direct)
        if self.kind == "residual":
            x = x + y
        if self.kind == "idle" and x.shape[1] > 10_000:
            x = x + self.extra(y)
        gate, up = self.gate(y).relu(), self.up(y)
        if self.kind == "shifted":
            gate = gate + 1
        if self.kind == "clamped":
            up = up.clamp(-1, 1)
        return x + self.down(gate * up)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.body = nn.Sequential(Block(kind), Block(kind))
        self.head = nn.Linear(32, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


def own_model(kind: str) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(kind).eval()


class InternLM2Block(nn.Module):
    """Rows of wqkv are in groups, each of two query heads, their key and their value; w3 is the linear branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(64), nn.RMSNorm(64)
        self.wqkv, self.wo = nn.Linear(64, 128, bias=False), nn.Linear(64, 64, bias=False)
        self.w1, self.w3, self.w2 = (nn.Linear(n, m, bias=False) for n, m in ((64, 128), (64, 128), (128, 64)))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.wqkv(self.attention_norm(x)).unflatten(-1, (2, 4, 16))
        query = qkv[..., :2, :].flatten(2, 3).transpose(1, 2)
        key, value = (qkv[..., i, :].repeat_interleave(2, 2).transpose(1, 2) for i in (2, 3))
        y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.w2(nn.functional.silu(self.w1(y)) * self.w3(y))


class InternLM2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(96, 64), nn.Linear(64, 96)
        self.layers = nn.ModuleList([InternLM2Block(), InternLM2Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


OWN: dict[str, Any] = {"internlm2": InternLM2, "own": lambda: Model("plain")}

if __name__ == "__main__":  # the logits of all that is in a directory, in a process that has quantized nothing
    torch.set_num_threads(1)
    for path in sorted(Path(sys.argv[1]).iterdir()):
        torch.save(logits(reload(path, path.name)), path / "reloaded.pt")
