"""Folds found by running a block: the right ones in every architecture, proofs that fail where they should."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from awq_ext import AwqLinear, load_quantized, quantize
from awq_ext.calibrate import BlockInputs
from awq_ext.fold import Fold
from awq_ext.swap import as_linear
from awq_ext.trace import Inputs, Traced, find_blocks, prove, trace


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operators: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Four heads of 16 channels, two of them for keys and values; 128 channels in the MLP.
COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**COMMON, "intermediate_size": 128}
GQA = {**WIDE, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    **GQA,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 4,
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

Expected = tuple[str, tuple[str, ...], float | Tensor]  # producer, readers, what a norm adds or the linear's rows


def attention(norm: str = "input_layernorm", plus: float = 0.0, more: tuple[str, ...] = ()) -> list[Expected]:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [(norm, (*qkv, *more), plus), ("self_attn.v_proj", ("self_attn.o_proj",), KV)]


def mlp(norm: str = "post_attention_layernorm", plus: float = 0.0) -> list[Expected]:
    return [(norm, ("mlp.gate_proj", "mlp.up_proj"), plus), ("mlp.up_proj", ("mlp.down_proj",), UP)]


def fused(norm: str, qkv: str, rows: Tensor, out: str, more: tuple[str, ...] = ()) -> list[Expected]:
    return [(norm, (qkv, *more), 0.0), (qkv, (out,), rows)]


LLAMA = attention() + mlp()
PARALLEL = [*attention(more=("mlp.gate_proj", "mlp.up_proj")), mlp()[1]]
NEOX = torch.arange(192).view(4, 3, 16)[:, 2].flatten()  # [head, (query, key, value), channel]
DEEPSEEK: list[Expected] = [
    ("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), 0.0),
    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), 0.0),
    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), 0.0),
    ("self_attn.kv_b_proj", ("self_attn.o_proj",), torch.arange(128).view(4, 32)[:, 16:].flatten()),
]
SHARED: list[Expected] = [("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",), HEADS)]
DEEPSEEK_MOE = [*DEEPSEEK, ("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",), HEADS)]

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
    "gemma2": ({**GQA, "sliding_window": 8}, attention(plus=1.0) + mlp("pre_feedforward_layernorm", 1.0)),
    "gemma3_text": ({**GQA, "sliding_window": 8}, attention(plus=1.0) + mlp("pre_feedforward_layernorm", 1.0)),
    "olmo2": (GQA, [attention()[1], mlp()[1]]),  # its norms are behind attention and MLP
    "gpt_neox": (
        {**WIDE, "use_parallel_residual": True},
        [
            *fused("input_layernorm", "attention.query_key_value", NEOX, "attention.dense"),
            ("post_attention_layernorm", ("mlp.dense_h_to_4h",), 0.0),
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
        ],
    ),
    "falcon-7b": (  # one head of values; attention and MLP side by side behind one norm
        {**COMMON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
        fused(
            "input_layernorm",
            "self_attention.query_key_value",
            torch.arange(80, 96).expand(4, 16).flatten(),
            "self_attention.dense",
            more=("mlp.dense_h_to_4h",),
        ),
    ),
    "stablelm": ({**GQA, "use_qkv_bias": True}, LLAMA),
    "stablelm-parallel": ({**GQA, "use_parallel_residual": True, "qk_layernorm": True}, PARALLEL),
    "cohere": ({**GQA, "use_qk_norm": True}, PARALLEL),
    "starcoder2": (GQA, [*attention(), ("post_attention_layernorm", ("mlp.c_fc",), 0.0)]),
    "mixtral": ({**GQA, "num_local_experts": 4}, attention()),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 64}, attention() + SHARED),
    "qwen3_moe": (MOE, attention()),
    "granitemoe": ({**GQA, "num_local_experts": 4}, attention()),
    "deepseek_v2": ({**MLA, "topk_method": "greedy"}, DEEPSEEK + mlp(), DEEPSEEK_MOE),
    "deepseek_v3": (MLA, DEEPSEEK + mlp(), DEEPSEEK_MOE),
}


def small_model(kind: str) -> Any:
    """A random model of that type whose norms and biases are not the constants they are initialised to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split("-")[0], **ARCHITECTURES[kind][0]))
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = (
                parameter.data + 0.3 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5
            )
    return model.eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(1))


class Traces:
    """The blocks of a model, opened as `quantize` does, and what they are called with."""

    def __init__(self, model: nn.Module, blocks: str | None = None) -> None:
        self.blocks = list(model.get_submodule(blocks or find_blocks(model)).children())
        for block in self.blocks:
            for name, module in list(block.named_modules()):
                if (linear := as_linear(module)) is not None:
                    block.set_submodule(name, linear)
        self._single = BlockInputs(model, self.blocks, ids(64, 1), batch=64)
        self._several = BlockInputs(model, self.blocks, ids(2, 16))

    def several(self, index: int) -> Inputs:
        return self._several.example(index)

    def linears(self, index: int) -> list[str]:
        return [name for name, module in self.blocks[index].named_modules() if isinstance(module, nn.Linear)]

    def trace(self, index: int) -> Traced:
        return trace(self.blocks[index], self.linears(index), self._single.example(index), self.several(index))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_folds_of_every_architecture(kind: str) -> None:
    """Exactly these, in this order, with nothing known of the architecture; every other linear gets a reason."""
    traces = Traces(small_model(kind))
    _, *expected = ARCHITECTURES[kind]
    for index, folds in ((0, expected[0]), (-1, expected[-1])):
        index %= len(traces.blocks)
        traced = traces.trace(index)
        assert [(fold.producer, fold.readers) for fold in traced.folds] == [fold[:2] for fold in folds]
        for fold, (*_, what) in zip(traced.folds, folds, strict=True):
            if isinstance(what, float):
                assert fold.plus == what and torch.equal(fold.rows, torch.arange(len(fold.rows)))
            else:
                assert fold.plus is None and torch.equal(fold.rows, what)
        scaled = {reader for fold in traced.folds for reader in fold.readers}
        assert set(traced.refused) == set(traces.linears(index)) - scaled
        assert prove(traces.blocks[index], traced.folds, traces.several(index)) == [None] * len(traced.folds)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_quantized_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = small_model(kind)
    with torch.no_grad():
        original = model(ids(2, 24)).logits
    linears = [n for n, m in model.named_modules() if as_linear(m) is not None and n != "lm_head"]
    model = quantize(model, calibration=ids(4, 32), samples=4, seq_len=32, q_group_size=16, out=tmp_path / "out")
    report = model.awq_report
    left_out = {x.name for x in report.kept}
    assert [name for name in linears if name not in left_out] == [x.name for x in report.quantized]
    assert all(type(model.get_submodule(x.name)) is AwqLinear for x in report.quantized)
    scaled = {reader for fold in report.folds for reader in fold.readers}
    assert scaled.isdisjoint(x.name for x in report.unscaled)
    assert scaled | {x.name for x in report.unscaled} == {x.name for x in report.quantized}
    with torch.no_grad():
        logits = model(ids(2, 24)).logits
        assert torch.equal(load_quantized(tmp_path / "out")(ids(2, 24)).logits, logits)
    assert float((logits - original).norm() / original.norm()) < 0.5


# --- proofs that have to fail ---------------------------------------------------------------------------------------


def planted(kind: str, at: int, **wrong: Any) -> tuple[nn.Module, list[Fold], Inputs]:
    """The first block with its folds, one of them changed."""
    traces = Traces(small_model(kind))
    folds = traces.trace(0).folds
    right = folds[at]
    parts = {"producer": right.producer, "readers": right.readers, "rows": right.rows, "plus": right.plus}
    folds[at] = Fold(**{**parts, **wrong})
    return traces.blocks[0], folds, traces.several(0)


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("kind", "at", "wrong"),
    [
        ("llama", 0, {"readers": QKV[1:]}),  # a reader is missing
        ("llama", 2, {"readers": ("mlp.gate_proj",)}),
        ("llama", 0, {"readers": (*QKV, "self_attn.o_proj")}),  # one is not fed by it
        ("llama", 1, {"rows": torch.arange(32).repeat(2)}),  # query heads share values in another way
        ("llama", 3, {"producer": "mlp.gate_proj"}),  # the branch with the activation
        ("phi3", 1, {"rows": 64 + torch.arange(64)}),  # the last 64 rows, which are keys and values
        ("phi3", 3, {"rows": UP}),  # the half that is the gate
        ("gpt_neox", 1, {"rows": 128 + HEADS}),  # as if q, k and v were one after the other
        ("bloom", 1, {"rows": torch.arange(192).view(4, 3, 16)[:, 1].flatten()}),  # keys
        ("gemma3_text", 0, {"plus": 0.0}),  # 1 + w taken as w
        ("llama", 2, {"plus": 1.0}),  # w taken as 1 + w
        ("cohere", 0, {"readers": QKV}),  # the MLP reads the same norm
        ("gemma2", 2, {"producer": "post_attention_layernorm"}),  # the norm behind, not in front
        ("deepseek_v2", 3, {"rows": HEADS}),
    ],
)
def test_a_wrong_fold_is_not_proven(kind: str, at: int, wrong: dict[str, Any]) -> None:
    block, folds, inputs = planted(kind, at, **wrong)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    proofs = prove(block, folds, inputs)
    assert [index for index, reason in enumerate(proofs) if reason is not None] == [at]
    assert "output would change by" in str(proofs[at])
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_a_block_that_has_no_float64_is_not_folded() -> None:
    block, folds, inputs = planted("llama", 0)
    block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(TypeError("no float64")))
    assert all(
        "cannot be run in float64 (TypeError: no float64)" in str(reason) for reason in prove(block, folds, inputs)
    )
    assert trace(block, ["mlp.up_proj"], inputs, inputs).refused.keys() == {"mlp.up_proj"}


# --- blocks of no library -------------------------------------------------------------------------------------------


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


NOT_SCALED: dict[str, tuple[tuple[str, ...], str]] = {
    "plain": ((), ""),
    "shifted": ((), ""),
    "clamped": ((), ""),
    "functional": (("gate", "up"), "something that is no linear reads norm too"),
    "residual": (("gate", "up"), "something that is no linear reads norm too"),
    "idle": (("qkv", "out", "gate", "up"), "extra might read (ln|qkv|norm) too, but no token reached it"),
}


@pytest.mark.parametrize("kind", NOT_SCALED)
def test_a_model_of_no_library(kind: str) -> None:
    model = own_model(kind)
    with torch.no_grad():
        original = model(ids(2, 24))
    quantize(
        model,
        calibration=ids(4, 32),
        samples=4,
        seq_len=32,
        q_group_size=16,
        blocks="body",
        modules_to_not_convert=["extra"],  # no token reaches it, so it cannot be calibrated
    )
    report = model.awq_report
    assert report.model_type == "Model" and len(report.quantized) == 10
    assert {x.name for x in report.kept} >= {"head", "body.0.direct", "body.1.direct"}
    folds = {tuple(x.removeprefix("body.0.") for x in (f.producer, *f.readers)) for f in report.folds}
    unscaled = {x.name.removeprefix("body.0."): x.reason for x in report.unscaled if x.name.startswith("body.0.")}
    names, reason = NOT_SCALED[kind]
    assert set(unscaled) == set(names)
    for name in names:
        assert re.fullmatch(reason, unscaled[name])
        assert f"body.*.{name} (2x): {unscaled[name]}" in report.summary()
    # ReLU keeps proportions, so both branches could take the scale of down, but for what is done behind them.
    (behind,) = (fold[0] for fold in folds if fold[1] == "down")
    assert behind in {"shifted": ("up",), "clamped": ("gate",)}.get(kind, ("gate", "up"))
    if not names:
        assert folds >= {("ln", "qkv"), ("qkv", "out"), ("norm", "gate", "up")}
    with torch.no_grad():
        assert float((model(ids(2, 24)) - original).norm() / original.norm()) < 0.2


def test_a_fused_linear_splits_by_what_its_rows_become() -> None:
    """[value, query, key] in each of four heads: only the first of the three can take the scale of the output."""
    traced = Traces(own_model("plain"), "body").trace(0)
    (fold,) = [fold for fold in traced.folds if fold.producer == "qkv"]
    assert fold.readers == ("out",) and torch.equal(fold.rows, torch.arange(96).view(4, 3, 8)[:, 0].flatten())
