"""`_native`: the layout table, the plans and the facts, held to what the operators really do."""

from __future__ import annotations

import pytest
import torch

from awq_ext import _library, ops

native = _library.native()


# (name that operators know, how its codes lie)
CODES = [(entry["name"], entry["weight"]) for entry in native.layouts()] + [
    (entry["name"] + ".zeros", entry["zero_words"]) for entry in native.layouts() if entry["zero_words"]
]


@pytest.mark.parametrize(("name", "codes"), CODES, ids=[name for name, _ in CODES])
def test_the_table_describes_what_pack_writes(name: str, codes: dict) -> None:
    """One code set at a time, from the table's fields alone: shape of the words, word and nibble."""
    n, k = 128, 192
    tile_n, tile_k = codes["tile"]
    down, across = n // tile_n, k // tile_k
    per_word = codes["word_bits"] // 4
    tile_words = tile_n * tile_k // per_word
    by_n = codes["outer"] == "out_features"
    for row, column in [(0, 0), (3, 17), (9, 8), (127, 191), (70, 100)]:
        q = torch.zeros(n, k, dtype=torch.uint8)
        q[row, column] = 15
        words = ops.pack(q, layout=name)
        assert words.shape == ((down, across * tile_words) if by_n else (across, down * tile_words))
        assert words.dtype == (torch.int16 if codes["word_bits"] == 16 else torch.int32)
        place = codes["order"].index((row % tile_n, column % tile_k))
        outer, inner = (row // tile_n, column // tile_k) if by_n else (column // tile_k, row // tile_n)
        word = [outer, inner * tile_words + place // per_word]
        assert words.nonzero().tolist() == [word]
        assert words[word[0], word[1]].item() & (2 ** codes["word_bits"] - 1) == 15 << 4 * (place % per_word)


@pytest.mark.parametrize(("name", "codes"), CODES, ids=[name for name, _ in CODES])
def test_the_fakes_know_the_same_layouts(name: str, codes: dict) -> None:
    for n, k in [(128, 192), (8, 3), (3, 8), (64, 64)]:
        q = torch.zeros(n, k, dtype=torch.uint8)
        if not codes["padded"] and (n % codes["tile"][0] or k % codes["tile"][1]):
            for device in ("cpu", "meta"):
                with pytest.raises(RuntimeError, match="needs out_features"):
                    ops.pack(q.to(device), layout=name)
            continue
        words = ops.pack(q, layout=name)
        fake = ops.pack(q.to("meta"), layout=name)
        assert fake.shape == words.shape and fake.dtype == words.dtype
        back, fake = ops.unpack(words, layout=name), ops.unpack(fake, layout=name)
        assert fake.shape == back.shape and fake.dtype == back.dtype


def test_repack_between_buffers() -> None:
    """Any buffer, blocks in pieces, the same bytes as the operator gives."""
    n, k = 320, 384
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for src in ("gemm", "gemv_fast"):
        source = ops.pack(q, layout=src).numpy().tobytes()
        for dst in ("gemm", "gemv", "gemv_fast", "marlin", "gptq", "compressed-tensors"):
            expected = ops.pack(q, layout=dst).numpy().tobytes()
            target = bytearray(len(expected))
            native.repack(source, target, src, dst, n, k)
            assert target == expected
            codes = dict(CODES)[dst]
            outer = n if codes["outer"] == "out_features" else k
            blocks = -(-outer // native.BLOCK)
            pieces = b""
            for block in range(blocks):
                codes_there = min(native.BLOCK, outer - block * native.BLOCK)
                piece = bytearray(len(expected) * codes_there // outer)
                native.repack(source, piece, src, dst, n, k, block, block + 1)
                pieces += piece
            assert pieces == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": "awq"}, "unknown layout 'awq'"),
        ({"dst": "marlin.zeros"}, "unknown layout 'marlin.zeros'"),
        ({"source": bytes(255)}, "source must be 256 bytes, got 255"),
        ({"target": bytearray(257)}, "target must be 256 bytes, got 257"),
        ({"dst": "gemv_fast"}, r"layout 'gemv_fast' cannot hold codes \[16, 32\]"),
        ({"n": -8}, "n and k must be"),
        ({"n": 2**40, "k": 2**40}, "n and k must be"),
        ({"begin": 1, "end": 0}, "must be within the 1 blocks"),
        ({"end": 2}, "must be within the 1 blocks"),
        ({"source": memoryview(bytes(512))[::2]}, "source must be contiguous"),
    ],
)
def test_repack_refuses(change: dict, message: str) -> None:
    arguments = {"source": bytes(256), "target": bytearray(256), "src": "gemm", "dst": "gemv", "n": 16, "k": 32}
    native.repack(**arguments)
    with pytest.raises(ValueError, match=message):
        native.repack(**{**arguments, **change})
    with pytest.raises((TypeError, BufferError)):
        native.repack(**{**arguments, "target": bytes(256)})  # read-only


def test_plans_say_which_kernel_and_why() -> None:
    few, many, double = (
        native.plan_linear(m, 512, 256, dtype) for m, dtype in ((1, "bfloat16"), (64, "float32"), (1, "float64"))
    )
    assert (few["kernel"], many["kernel"], double["kernel"]) == ("decode", "gemm", "reference")
    assert all(plan["why"] and plan["tiles"] * plan["tile"] >= 512 for plan in (few, many, double))
    with pytest.raises(ValueError, match="got int8"):
        native.plan_linear(1, 8, 8, "int8")
    with pytest.raises(ValueError, match="negative"):
        native.plan_linear(-1, 8, 8)


def test_facts() -> None:
    info, features = native.build_info(), native.cpu_features()
    assert info["torch_target"] == "2.10" and info["version"]
    assert info["cpu_kernels"] in ("portable", *[name for name, there in features.items() if there])
