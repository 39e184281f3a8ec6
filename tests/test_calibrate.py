"""Calibration: statistics of inputs, and hidden states moved block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq_ext.calibrate import BlockInputs, Statistics
from awq_ext.errors import CalibrationError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("float32_products")

# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_equal_their_definition(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 24), (2, 7, 24), (24,), (0, 24), (1, 1, 24))
    ]
    statistics = Statistics()
    for part in parts:
        statistics.add(part)
    x = torch.cat([part.reshape(-1, 24) for part in parts]).double()
    x_mean, gram = statistics.result("name")
    assert statistics.tokens == len(x) == 21
    assert x_mean.dtype == gram.dtype == torch.float32 and x_mean.shape == (24,) and gram.shape == (24, 24)
    torch.testing.assert_close(x_mean.double(), x.abs().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gram.double(), x.t() @ x / len(x), rtol=1e-5, atol=1e-6)


def test_statistics_of_half_precision_do_not_overflow() -> None:
    statistics = Statistics()
    statistics.add(torch.full((1000, 8), 60000.0, dtype=torch.float16))
    x_mean, gram = statistics.result("name")
    assert (x_mean == 60000).all() and torch.allclose(gram, torch.full((8, 8), 3.6e9))


def test_statistics_refuse() -> None:
    with pytest.raises(CalibrationError, match=r"layers.0.mlp.down_proj got no calibration token"):
        Statistics().result("layers.0.mlp.down_proj")
    empty = Statistics()
    empty.add(torch.empty(0, 8))
    with pytest.raises(CalibrationError, match=r"got no calibration token"):
        empty.result("name")
    for bad in (float("nan"), float("inf"), 1e30):  # the square of 1e30 is beyond float32
        statistics = Statistics()
        statistics.add(torch.ones(3, 8))
        statistics.add(torch.full((1, 8), bad))
        with pytest.raises(CalibrationError, match=r"the input of layers.3.q_proj is not finite"):
            statistics.result("layers.3.q_proj")


def test_statistics_keep_no_graph() -> None:
    statistics = Statistics()
    x = torch.randn(4, 8, requires_grad=True)
    statistics.add(x * 2)
    assert not any(t.requires_grad for t in statistics.result("name"))


# --- hidden states, block by block ----------------------------------------------------------------------------------

SEQ_LEN = 24


def llama(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def gemma(**options: Any) -> nn.Module:
    """Sliding and full attention in turn, each with its own mask and its own rotary embedding."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    config = transformers.Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=64,
        **options,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


def hidden_states(model: Any, ids: Tensor) -> list[Tensor]:
    """What stands in front of every block, and behind the last one, in the model's own forward pass."""
    states: list[Tensor] = []
    blocks = list(model.model.layers)
    hooks = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in blocks]
    hooks.append(
        blocks[-1].register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    )
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 100, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [(24,), (24,) * 6, (24, 24, 7, 1, 1, 24)])
@torch.no_grad()
def test_blocks_run_one_by_one_give_the_models_hidden_states(
    make: Callable[..., nn.Module], attention: str, lengths: tuple[int, ...]
) -> None:
    """Each row by itself, however long it is: neither its neighbours nor padding change it."""
    model: Any = make(attn_implementation=attention)
    rows = rows_of(*lengths)
    want = [hidden_states(model, row[None]) for row in rows]
    inputs = BlockInputs(model, list(model.model.layers), rows)

    def check(index: int) -> None:
        assert all(hidden.dtype == torch.float32 for hidden in inputs.hidden)
        got = [row for batch in inputs.hidden for row in batch]
        for row, states in zip(got, want, strict=True):
            torch.testing.assert_close(row, states[index][0], rtol=1e-5, atol=1e-5)

    for index, block in enumerate(model.model.layers):
        check(index)
        inputs.advance(index, block)
    check(-1)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all("forward" not in vars(m) for m in model.modules())


@torch.no_grad()
def test_batches_are_neighbours_of_one_length() -> None:
    model: Any = llama()
    inputs = BlockInputs(model, list(model.model.layers), rows_of(9, 9, 9, 9, 9, 5, 9), batch=4)
    assert [hidden.shape[:2] for hidden in inputs.hidden] == [(4, 9), (1, 9), (1, 5), (1, 9)]
    assert [number for number, _ in inputs.places] == [0, 1, 2, 3]


@torch.no_grad()
def test_the_sliding_window_matters_in_the_test_above() -> None:
    """Or it could not tell one mask from another."""
    ids = torch.randint(0, 100, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    model: Any = gemma()
    narrow = hidden_states(model, ids)
    inputs = BlockInputs(model, list(model.model.layers), ids)
    inputs.advance(1, model.model.layers[0])  # the first block under the second block's mask and rotation
    assert (inputs.hidden[0] - narrow[1]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_models_are_run_in_float32(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    """The weights are those of the half-precision model, the arithmetic in the blocks is float32; what is computed
    before the first block (embeddings, rotary tables) has been rounded to the model's dtype."""
    model: Any = make().to(dtype)
    ids = torch.randint(0, 100, (4, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    inputs = BlockInputs(model, list(model.model.layers), ids, batch=4)
    assert inputs.hidden[0].dtype == torch.float32
    want = hidden_states(model.float(), ids)
    unit = torch.finfo(dtype).eps
    for index, block in enumerate(model.model.layers):
        inputs.advance(index, block)
        (hidden,) = inputs.hidden
        assert hidden.dtype == torch.float32
        error = (hidden - want[index + 1]).square().mean().sqrt() / want[index + 1].square().mean().sqrt()
        assert error < 2 * unit


@torch.no_grad()
def test_blocks_see_no_cache_and_the_model_is_left_as_it_was() -> None:
    model: Any = llama()
    model.config.use_cache = True
    ids = torch.randint(0, 100, (4, SEQ_LEN))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = BlockInputs(model, list(model.model.layers), ids)
    inputs.advance(0, model.model.layers[0])
    inputs.advance_quantized(0, model.model.layers[0])
    assert torch.equal(inputs.quantized[0], inputs.hidden[0])  # a cache would have grown
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_statistics_are_of_all_rows_but_those_held_out_and_need_no_second_run() -> None:
    model: Any = llama()
    block = model.model.layers[0]
    rows = rows_of(24, 24, 24, 24, 24, 7, 6, 5, 4, 3, 8, 9)  # nine batches, the eighth of which is held out: 8 tokens
    seen: list[Tensor] = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for row in rows:
        hidden_states(model, row[None])
    handle.remove()
    inputs = BlockInputs(model, list(model.model.layers), rows, batch=4)
    once = BlockInputs(model, list(model.model.layers), rows, batch=4)
    once.advance(0, block)
    watched, linears = {"down": block.mlp.down_proj}, {"up": block.mlp.up_proj}
    statistics, held_out, sensitivity = inputs.collect(0, block, watched, linears)
    assert inputs.held_out_tokens == 8
    for found, parts in ((statistics["down"], [*seen[:-2], seen[-1]]), (held_out["down"], seen[-2:-1])):
        x = torch.cat(parts)
        x_mean, gram = found.result("down")
        assert found.tokens == len(x)
        torch.testing.assert_close(x_mean, x.abs().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert sensitivity["up"].shape == (48,) and (sensitivity["up"] > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, once.hidden, strict=True))
    assert not any(hidden.requires_grad for hidden in inputs.hidden)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


class Toy(nn.Module):
    """Blocks called in an odd way: by keyword, with positional extras, and a block that is never called."""

    def __init__(self, *blocks: nn.Module, skip_last: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(blocks)
        self.skip_last = skip_last

    def forward(self, ids: Tensor, use_cache: bool = True) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks[: -1 if self.skip_last else None]:
            hidden = block(hidden)
        return hidden


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (self.outer(self.inner(hidden_states)),)


class Chained(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states)[0]


@torch.no_grad()
def test_a_block_that_is_never_called_is_an_error() -> None:
    blocks = [Chained(TwoLayers()), Chained(TwoLayers())]
    with pytest.raises(CalibrationError, match="the model called 1 of its 2 blocks"):
        BlockInputs(Toy(*blocks, skip_last=True), blocks, torch.zeros(2, 3, dtype=torch.int64))
    assert all(not block._forward_pre_hooks for block in blocks)


class PerLayer(Toy):
    """Blocks are given something of each token, as Gemma 3n's."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden, scale={"per_token": ids[..., None] / 50})
        return hidden


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, scale: dict[str, Tensor]) -> Tensor:
        return self.linear(hidden_states * scale["per_token"])


@torch.no_grad()
def test_arguments_that_depend_on_the_tokens_are_refused() -> None:
    blocks = [Scaled(), Scaled()]
    rows = torch.arange(30).view(10, 3)
    BlockInputs(PerLayer(*blocks), blocks, rows[:2])  # one batch
    with pytest.raises(UnsupportedModelError, match=r"block 0 is called with an argument .*per_token.* depends on the"):
        BlockInputs(PerLayer(*blocks), blocks, rows)
    assert all("forward" not in vars(block) for block in blocks)


@torch.no_grad()
def test_errors_of_the_model_pass_through_and_leave_no_hooks() -> None:
    blocks = [Chained(TwoLayers())]
    with pytest.raises(IndexError):
        BlockInputs(Toy(*blocks), blocks, torch.full((2, 3), 1000))  # an id beyond the vocabulary
    assert all(not block._forward_pre_hooks for block in blocks)


@torch.no_grad()
def test_sensitivity_is_the_square_of_the_derivative() -> None:
    """For a linear block it is known: 1 for the last layer, and the column norms of the last weight for the first."""
    torch.manual_seed(0)
    block = TwoLayers()
    idle = nn.Linear(3, 5)
    model = Toy(Chained(block)).requires_grad_(False)
    ids = torch.randint(0, 50, (8, 500))
    linears = {"inner": block.inner, "outer": block.outer, "idle": idle}

    def found(seed: int) -> dict[str, Tensor]:
        return BlockInputs(model, list(model.blocks), ids).collect(0, model.blocks[0], {}, linears, seed)[2]

    first = found(0)
    assert {name: value.shape for name, value in first.items()} == {"inner": (12,), "outer": (8,), "idle": (5,)}
    torch.testing.assert_close(first["outer"], torch.ones(8))  # the square of a sign, exactly
    want = block.outer.weight.square().sum(0)
    torch.testing.assert_close(first["inner"], want, rtol=0.1, atol=0)  # an estimate from 4000 tokens
    assert not first["idle"].any()
    assert all(torch.equal(value, first[name]) for name, value in found(0).items())
    assert not torch.equal(found(1)["inner"], first["inner"])
    assert all(not module._forward_hooks for module in model.modules())
