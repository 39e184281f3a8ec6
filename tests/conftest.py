"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = """\
Once upon a time there was a little girl who lived in a house by the sea. Every morning she ran to the beach.
The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not even open one eye to look at it.
In the year 1805 the fleet left the harbour with 27 ships of the line; the wind was light and from the north-west.
def add(a, b): return a + b  # the sum of two numbers, whatever they are: 0, 1, 2, 3, 4, 5, 6, 7, 8 or 9.
"""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run outside the checkout: a `python -c` or `python -m` that a test starts looks in the working directory first,
    and would find the sources there instead of the installed package."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of shared data beside the checkout ($AWQ_SHARED elsewhere); the test is skipped without it."""
    path = Path(os.environ.get("AWQ_SHARED", REPOSITORY.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared data: {path} does not exist, and AWQ_SHARED names no other place")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random float32 Llama (2 layers, hidden 128, FFN 256, GQA 4/2, vocabulary 320) and a tokenizer.

    Weights are drawn from a fixed seed. Tests must not write into it; copy it first.
    """
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny_llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT.splitlines(), trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For thousands of tiny operators: threads would only wait for one another."""
    from awq_ext import relayout

    with relayout.one_thread():
        yield


@pytest.fixture
def float32_products() -> Iterator[None]:
    """Calibration with float32 products on a CPU that would take bfloat16 ones."""
    import torch

    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    yield
    products.fp32_precision = before


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """What a test tells torch.set_float32_matmul_precision is forgotten, also by the backend that it is handed to."""
    import torch

    products = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), products.fp32_precision
    yield
    torch.set_float32_matmul_precision(before[0])
    products.fp32_precision = before[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads afterwards."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
