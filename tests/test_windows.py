"""Calibration data: every kind of source, what is made of it, and the account that is given of that."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from awq_ext.errors import CalibrationError
from awq_ext.windows import SPREAD, Windows, builtin_text, first_tokens, read


class Words:
    """A tokenizer of words: one id each, and 0 for a word that it does not know (a word cut in two)."""

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, text: str) -> None:
        self.ids = {word: i for i, word in enumerate(dict.fromkeys(text.split()), start=1)}
        self.texts: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        self.texts.append(text)
        ids = [self.ids.get(word, 0) for word in text.split()]
        return {"input_ids": [-1, *ids] if add_special_tokens else ids}


def special(**ids: int) -> Words:
    tokenizer = Words("")
    for name, value in ids.items():
        setattr(tokenizer, f"{name}_token_id", value)
    return tokenizer


def lists(windows: Windows) -> list[list[int]]:
    assert all(row.dtype == torch.int64 and row.dim() == 1 for row in windows.rows)
    assert windows.tokens == sum(len(row) for row in windows.rows)
    assert windows.note.startswith(f"{windows.tokens} tokens in {len(windows.rows)} ")
    return [row.tolist() for row in windows.rows]


TEXT = "the quick brown fox jumps over a lazy dog and then it sleeps"  # 13 words
TOKENIZER = Words(TEXT)
FIRST = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


# --- one text, one sequence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        TEXT.replace(" a ", "\na "),
        [TEXT],
        TEXT.split(),  # a list of texts
        tuple(TEXT.split()),
        iter(TEXT.split()),
        [{"id": "x", "text": TEXT}],
        {"text": TEXT.split()},
        list(range(1, 14)),
        tuple(range(1, 14)),
        range(1, 14),
        [np.int64(i) for i in range(1, 14)],
        torch.arange(1, 14),
        np.arange(1, 14, dtype=np.uint16),
        torch.arange(1, 14, dtype=torch.int32).view(1, 13),
        torch.arange(1, 13).view(3, 4),
        np.arange(1, 13).reshape(3, 4),
        {"input_ids": torch.arange(1, 13).view(3, 4)},
        [torch.arange(1, 14).view(1, 13)],  # as tokenizers return with return_tensors="pt"
        ([1, 2, 3, 4], (5, 6, 7, 8), torch.arange(9, 13)),
        iter([torch.arange(1, 9).view(2, 4), [[9, 10, 11, 12]]]),
    ],
    ids=lambda source: type(source).__name__,
)
def test_all_sources_give_the_first_tokens_in_order(source: Any) -> None:
    assert lists(read(source, TOKENIZER, samples=3, seq_len=4)) == FIRST


def test_texts_are_glued_by_newlines_and_no_special_tokens_come_in() -> None:
    tokenizer = Words("a b c")
    windows = read(["a b", "c"], tokenizer, 1, 3)
    assert lists(windows) == [[1, 2, 3]]
    assert tokenizer.texts == ["a b\nc"]
    assert windows.note == "3 tokens in 1 window of 3; rows glued with newlines between them"


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    tokenizer = Words(TEXT + " <s>")
    tokenizer.bos_token_id = -1  # which it puts in front by itself
    windows = read([TEXT], tokenizer, 3, 4)
    assert lists(windows) == [[-1, 1, 2, 3], [-1, 4, 5, 6], [-1, 7, 8, 9]]
    assert windows.note.endswith("; each begins with token -1, as the tokenizer begins a text")
    with pytest.raises(
        CalibrationError, match=r"has 13 tokens, but 5 samples of 4 need 15\. .* at most 4 samples of 4"
    ):
        read([TEXT], tokenizer, 5, 4)
    apart = read(["the", "", TEXT, "the quick"], tokenizer, 5, 4, pack=False)
    assert lists(apart) == [[-1, 1], [-1, 1, 2, 3], [-1, 4, 5, 6], [-1, 7, 8, 9], [-1, 10, 11, 12], [-1, 13]]
    assert "dropped" not in apart.note
    with pytest.raises(CalibrationError, match="seq_len 1 leaves no room"):
        read([TEXT], tokenizer, 1, 1)
    tokenizer.ids["<s>"] = -1
    assert lists(read(["<s> the quick", "<s>"], tokenizer, 5, 4, pack=False)) == [[-1, 1, 2]]  # not twice
    assert lists(read([[1, 2, 3, 4]], tokenizer, 1, 4)) == [[1, 2, 3, 4]]  # ids are as they are
    tokenizer.bos_token_id = 7  # known, but not put there
    assert lists(read([TEXT], tokenizer, 1, 4)) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("pack", [False, True])
def test_no_more_tokens_than_asked_for_with_the_token_that_begins_a_text(pack: bool) -> None:
    tokenizer = Words("w")
    tokenizer.bos_token_id = -1
    for samples, seq_len, length in ((2, 5, 3), (2, 5, 4), (3, 4, 9), (2, 5, 1), (1, 2, 7), (3, 7, 5)):
        windows = read(("w " * length for _ in count()), tokenizer, samples, seq_len, pack=pack)
        rows = lists(windows)
        assert all(row[0] == -1 and set(row[1:]) == {1} and 2 <= len(row) <= seq_len for row in rows)
        assert samples * seq_len - windows.tokens == 0 if pack else samples * seq_len - windows.tokens < 2


def test_the_rest_of_a_text_is_accounted_for() -> None:
    assert read([TEXT], TOKENIZER, 3, 4).note == (
        "12 tokens in 3 windows of 4; rows glued with newlines between them; the rest left out"
    )
    assert read(range(12), None, 3, 4).note == "12 tokens in 3 windows of 4"
    assert read(range(13), None, 3, 4).note == "12 tokens in 3 windows of 4; the rest left out"


def test_full_windows_need_enough_tokens() -> None:
    with pytest.raises(
        CalibrationError, match=r"has 13 tokens, but 4 samples of 4 need 16\. .* at most 3 samples of 4"
    ):
        read([TEXT], TOKENIZER, samples=4, seq_len=4)
    assert len(read([TEXT], TOKENIZER, samples=13, seq_len=1).rows) == 13
    for source in ("\n", [""], [], [[]], torch.empty(0, dtype=torch.int64), iter(())):
        with pytest.raises(CalibrationError):
            read(source, TOKENIZER, 1, 1)
    for samples, seq_len in ((0, 4), (4, 0), (-1, 4), (4, -1)):
        with pytest.raises(CalibrationError, match=f"must be positive, got {samples} and {seq_len}"):
            read([TEXT], TOKENIZER, samples, seq_len)


@pytest.mark.parametrize(
    "source",
    [
        None,
        7,
        1.5,
        [1.0, 2.0, 3.0],
        [1, 2.5],
        [[1, 2], [3.5]],
        torch.arange(13.0),
        torch.ones(13, dtype=torch.bool),
        torch.ones(2, 2, 2, dtype=torch.int64),
        torch.tensor(5),
        np.arange(13.0),
        [torch.arange(13.0)],
        ["text", 5],
        ["text", [1, 2]],
        [[1, 2], "text"],
        [["text", 1]],
        b"bytes are numbers too",
        [b"bytes"],
        {1, 2, 3},
        {"some", "text"},
        iter([1, 2, 3]),
        [None],
        {"input_ids": [0.5, 1.5]},
        {"input_ids": None},
    ],
    ids=repr,
)
def test_what_is_neither_text_nor_ids_is_refused(source: Any) -> None:
    """In particular nothing that would become an id only by being cut down to a whole number."""
    with pytest.raises(CalibrationError, match=r"calibration must be .*token ids.*; got "):
        read(source, TOKENIZER, 4, 2)


def test_text_needs_a_tokenizer_and_ids_do_not() -> None:
    for source in ("a\nb", [TEXT], [{"text": TEXT}]):
        with pytest.raises(CalibrationError, match="needs a tokenizer"):
            read(source, None, 1, 2)
    assert lists(read([1, 2], None, 1, 2)) == [[1, 2]]


def test_a_tokenizer_is_loaded_from_its_directory_when_text_needs_it(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(tiny_llama)(TEXT, add_special_tokens=False).input_ids
    assert lists(read([TEXT], str(tiny_llama), 2, 8)) == [whole[:8], whole[8:16]]
    assert lists(read([[1, 2], [3, 4]], tmp_path, 2, 2)) == [[1, 2], [3, 4]]  # ids are read without one


@pytest.mark.parametrize("shape", [str, list, iter])
def test_a_long_text_is_not_tokenized_whole(shape: Callable[[Any], Any]) -> None:
    lines = ["word " * 50] * 2000
    source = "\n".join(lines) if shape is str else shape(lines)
    tokenizer = Words("word")
    assert torch.stack(read(source, tokenizer, 4, 16).rows).unique().tolist() == [1]
    assert sum(map(len, tokenizer.texts)) < 20_000


@pytest.mark.parametrize("length", [6, 7, 8, 9, 12, 40])
@pytest.mark.parametrize("need", [1, 2, 3, 16, 100])
def test_tokens_do_not_depend_on_where_a_long_text_is_cut(length: int, need: int) -> None:
    """Cutting inside a word would give tokens that the text does not have."""
    text = "\n".join(f"{i:0{length + i % 3}d}" for i in range(1, 400))
    assert lists(read(text, Words(text), 1, need)) == [list(range(1, need + 1))]
    assert lists(read(text.split(), Words(text), 1, need, pack=True)) == [list(range(1, need + 1))]


def test_a_real_tokenizer(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "\n".join(f"the number {i} and the dog" for i in range(300))
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert torch.cat(read(text, tokenizer, 5, 8).rows).tolist() == whole[:40]
    assert torch.cat(read(text.split("\n"), tokenizer, 5, 8).rows).tolist() == whole[:40]
    batch = tokenizer(text.split("\n")[:10], return_tensors="pt", padding=True, padding_side="left")
    rows = lists(read(batch, tokenizer, 10, 64))
    assert rows == [tokenizer(line).input_ids for line in text.split("\n")[:10]]
    assert len({len(row) for row in rows}) > 1 or len(batch["input_ids"][0]) == len(rows[0])


def test_first_tokens_know_whether_they_are_all() -> None:
    for count_, whole in ((12, False), (13, True), (14, True)):
        ids, all_of_it = first_tokens([TEXT], "", TOKENIZER, count_)
        assert (ids.tolist(), all_of_it) == (list(range(1, min(count_, 13) + 1)), whole)
    ids, all_of_it = first_tokens([], "", TOKENIZER, 3)
    assert (ids.tolist(), all_of_it) == ([], True)


def test_a_memory_mapped_array_is_read_piece_by_piece(tmp_path: Path) -> None:
    values = np.arange(2**21, dtype=np.uint16)  # two pieces
    values.tofile(tmp_path / "ids.bin")
    ids = np.memmap(tmp_path / "ids.bin", dtype=np.uint16)
    length = 2**20 + 5
    (row,) = read(ids, None, 1, length).rows
    assert row.dtype == torch.int64 and np.array_equal(row.numpy(), values[:length])
    rows = lists(read(ids.reshape(-1, 4), None, 2, 4))
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]


# --- rows that stand alone ------------------------------------------------------------------------------------------


def test_rows_are_cut_kept_short_or_dropped_and_never_glued() -> None:
    windows = read([[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]], None, samples=8, seq_len=4)
    assert lists(windows) == [[1, 2, 3], [5, 6, 7, 8], [9, 10, 11, 12], [14, 15]]
    assert windows.note == (
        "13 tokens in 4 rows of 2 to 4; fewer than the 32 asked for; 1 row of more than 4 tokens cut into windows; "
        "2 single tokens dropped"
    )


def test_reading_stops_when_there_are_enough_tokens() -> None:
    read_rows: list[int] = []

    def rows() -> Iterator[list[int]]:
        for i in count(1):
            read_rows.append(i)
            yield [i] * 3

    windows = read(rows(), None, samples=2, seq_len=5)
    assert lists(windows) == [[1] * 3, [2] * 3, [3] * 3]  # the one token that is left would be a row of its own
    assert windows.note == "9 tokens in 3 rows of 3; reading stopped there"
    assert len(read_rows) == 3
    windows = read(rows(), None, samples=1, seq_len=8)
    assert lists(windows) == [[1] * 3, [2] * 3, [3] * 2]
    assert windows.note == "8 tokens in 3 rows of 2 to 3; the last row cut to 2 tokens; reading stopped there"


def test_texts_stand_alone_on_request_and_only_what_is_used_of_them_is_tokenized() -> None:
    tokenizer = Words("a b c d")
    windows = read(["a b", "c", "d " * 100_000, "a b"], tokenizer, 4, 8, pack=False)
    assert lists(windows) == [[1, 2], [4] * 8, [4] * 8, [4] * 8, [4] * 6]
    assert "the last row cut to 30 tokens" in windows.note and "1 single token dropped" in windows.note
    assert sum(map(len, tokenizer.texts)) < 2_000


@pytest.mark.parametrize("end", [None, 99])
def test_rows_of_ids_are_glued_on_request(end: int | None) -> None:
    tokenizer = None if end is None else special(eos=end)
    glued = [1, 2, 3, 4, 5, 99, 6] if end is None else [1, 2, 3, 99, 4, 5, 99, 6]
    windows = read([[1, 2, 3], [], [4, 5, 99], [6, 7, 8, 9]], tokenizer, 1, len(glued), pack=True)
    assert lists(windows) == [glued]  # a row that ends a text needs no second end
    between = "nothing" if end is None else "token 99, the end of a text,"
    assert f"rows glued with {between} between them" in windows.note
    assert windows.note.endswith("; the rest left out")
    with pytest.raises(CalibrationError, match="has 3 tokens, but 1 samples of 4"):
        read([[1, 2, 3]], tokenizer, 1, 4, pack=True)


def test_an_endless_source_of_texts_can_be_glued() -> None:
    windows = read(("a b" for _ in count()), Words("a b"), 2, 3)
    assert lists(windows) == [[1, 2, 1], [2, 1, 2]]
    assert windows.note.endswith("the rest left out")


def test_no_row_of_two_tokens_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no row of at least 2 tokens, in 3 rows"):
        read([[1], [2], []], None, 1, 4)


# --- padding --------------------------------------------------------------------------------------------------------

PADDED = torch.tensor([[9, 9, 1, 2, 9], [3, 4, 5, 6, 7], [8, 9, 9, 9, 9], [1, 1, 1, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("kind", [torch.Tensor.long, torch.Tensor.bool, torch.Tensor.tolist, torch.Tensor.numpy])
def test_padding_goes_by_the_mask(kind: Callable[[Tensor], Any]) -> None:
    batch = {"input_ids": PADDED, "attention_mask": kind(MASK), "labels": PADDED}
    windows = read([batch], special(pad=9), 4, 5)
    assert lists(windows) == [[1, 2, 9], [3, 4, 5, 6, 7], [1, 1, 1]]
    assert "9 tokens of padding taken off by the mask" in windows.note


def test_a_model_is_quantized_for_the_rows_without_their_padding(tiny_llama: Path) -> None:
    from awq_ext import quantize

    ids = torch.randint(3, 320, (6, 24), generator=torch.Generator().manual_seed(0))
    lengths = [24, 9, 17, 24, 2, 13]
    mask = torch.stack([torch.arange(24) < length for length in lengths])
    options: dict[str, Any] = {"samples": 6, "seq_len": 24, "q_group_size": 32, "method": "awq+"}
    left = {"input_ids": ids.flip(1) * mask.flip(1), "attention_mask": mask.flip(1)}
    rows = [row[-length:] for row, length in zip(ids.flip(1), lengths, strict=True)]
    padded, plain = (quantize(str(tiny_llama), calibration=source, **options) for source in ([left], rows))
    assert padded.awq_report.calibration_tokens == sum(lengths)
    assert "tokens of padding taken off by the mask" in padded.awq_report.calibration
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in padded.state_dict().items())


def test_padding_without_a_mask_goes_by_the_pad_token() -> None:
    for source in (PADDED, [PADDED], {"input_ids": PADDED}, PADDED.tolist(), list(PADDED)):
        windows = read(source, special(pad=9), 4, 5)
        assert lists(windows) == [[1, 2], [3, 4, 5, 6, 7], [1, 1, 1]]
        assert "9 pad tokens taken off the ends of rows that have no mask" in windows.note
    windows = read(PADDED, special(pad=9, eos=9), 4, 5)  # then it may end a text, too
    assert lists(windows) == [[9, 1, 2, 9], [3, 4, 5, 6, 7], [8, 9], [1, 1, 1, 9]]
    assert "5 pad tokens" in windows.note
    assert lists(read(PADDED, None, 4, 5)) == PADDED.tolist()
    assert lists(read(PADDED[0], special(pad=9), 1, 5)) == [PADDED[0].tolist()]  # one sequence is no batch


def test_masks_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(CalibrationError, match="zeros between ones"):
        read({"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 0, 1]}, None, 1, 4)
    with pytest.raises(CalibrationError, match="another shape"):
        read({"input_ids": PADDED, "attention_mask": MASK[:, 1:]}, None, 1, 4)
    pair = torch.utils.data.TensorDataset(PADDED, MASK)
    with pytest.raises(CalibrationError, match=r"got a tuple of Tensor|look like token ids and their attention mask"):
        read(pair, None, 1, 4)
    with pytest.raises(CalibrationError, match=r"got a list of Tensor"):
        read(torch.utils.data.DataLoader(pair, batch_size=2), None, 1, 4)


def test_loaders_give_batches() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(1, 13).view(6, 2))
    windows = read(torch.utils.data.DataLoader(data, batch_size=4), None, 5, 2)
    assert lists(windows) == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    dicts = [{"input_ids": row, "attention_mask": torch.ones(2)} for row in torch.arange(1, 13).view(6, 2)]
    with pytest.raises(CalibrationError, match=r"got a torch\.float32 array"):
        read(torch.utils.data.DataLoader(dicts, batch_size=2), None, 5, 2)
    dicts = [{"input_ids": row, "attention_mask": torch.tensor([1, 1])} for row in torch.arange(1, 13).view(6, 2)]
    assert lists(read(torch.utils.data.DataLoader(dicts, batch_size=2), None, 5, 2)) == lists(windows)
    texts = torch.utils.data.DataLoader([{"title": t, "text": t} for t in TEXT.split()], batch_size=5)
    assert lists(read(texts, TOKENIZER, 3, 4)) == FIRST


# --- drawing --------------------------------------------------------------------------------------------------------


def test_shuffled_windows_are_drawn_from_the_text_by_seed() -> None:
    ids = torch.arange(1000)
    windows = read(ids, None, 5, 8, shuffle=True, seed=3)
    starts = [row[0] for row in lists(windows)]
    assert all(row == list(range(row[0], row[0] + 8)) and row[0] % 8 == 0 for row in lists(windows))
    assert len(set(starts)) == 5 and starts != [0, 8, 16, 24, 32]
    assert lists(read(ids, None, 5, 8, shuffle=True, seed=3)) == lists(windows)
    assert lists(read(ids, None, 5, 8, shuffle=True, seed=4)) != lists(windows)
    assert windows.note == "40 tokens in 5 windows of 8, drawn with seed 3 from all 125; the rest left out"
    everything = read(range(40), None, 5, 8, shuffle=True)
    assert sorted(lists(everything)) == torch.arange(40).view(5, 8).tolist()
    assert everything.note == "40 tokens in 5 windows of 8, drawn with seed 0 from all 5"


def test_shuffled_rows_are_drawn_by_seed_and_all_can_come() -> None:
    rows = [[i, i] for i in range(100)]
    drawn = [row[0] for row in lists(read(rows, None, 50, 2, shuffle=True, seed=1))]
    assert len(set(drawn)) == 50 and drawn != sorted(drawn) and max(drawn) > 80
    assert drawn == [row[0] for row in lists(read(iter(rows), None, 50, 2, shuffle=True, seed=1))]
    assert drawn != [row[0] for row in lists(read(rows, None, 50, 2, shuffle=True, seed=2))]
    whole = read(rows, None, 100, 2, shuffle=True)
    assert sorted(lists(whole)) == rows
    assert whole.note == ("200 tokens in 100 rows of 2, drawn with seed 0 from the first 100; reading stopped there")


def test_shuffling_an_endless_source_looks_only_so_far() -> None:
    rows = ([i, i] for i in count())
    drawn = [row[0] for row in lists(read(rows, None, 3, 2, shuffle=True, seed=5))]
    assert max(drawn) < 3 * SPREAD <= next(rows)[0] <= 3 * SPREAD + 1
    texts = (f"w{i}" for i in count())
    tokenizer = Words(" ".join(f"w{i}" for i in range(5000)))
    windows = read(texts, tokenizer, 2, 4, shuffle=True)
    assert f"drawn with seed 0 from the first {2 * SPREAD}; rows glued" in windows.note
    assert all(row == list(range(row[0], row[0] + 4)) and row[0] % 4 == 1 for row in lists(windows))


# --- files and datasets ---------------------------------------------------------------------------------------------


def test_a_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes("naïve ☃\n".encode() + b"\xff\xfe end")
    tokenizer = Words("naïve ☃ \ufffd\ufffd end")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in (str(path), path, "~/text", "text", "./text"):
        assert lists(read(source, tokenizer, 1, 4)) == [[1, 2, 3, 4]]
    assert tokenizer.texts[0] == "naïve ☃\n\ufffd\ufffd end"
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CalibrationError, match=r"'empty.txt' is empty"):
        read("empty.txt", tokenizer, 1, 4)


def test_a_long_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"w{i}\n" for i in range(400_000)))
    tokenizer = Words(" ".join(f"w{i}" for i in range(1000)))
    assert lists(read(path, tokenizer, 3, 100)) == torch.arange(1, 301).view(3, 100).tolist()
    assert sum(map(len, tokenizer.texts)) < 5000


def test_the_text_that_python_carries() -> None:
    first, second = builtin_text()
    assert len(first) > 100_000 and len(second) > 100_000
    assert builtin_text() == (first, second)
    shared = {p.strip() for p in first.split("\n\n")} & {p.strip() for p in second.split("\n\n")}
    assert sum(map(len, shared)) < 0.01 * len(second)  # a score on the second half is one on text that was not seen
    assert lists(read("builtin", Words(first), 1, 20)) == lists(read(first, Words(first), 1, 20))


@pytest.mark.parametrize(
    "name", ["missing.txt", "./missing", "/missing", "../missing", "a/b.json", "~nobody-here/x", "~/missing"]
)
def test_a_missing_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("awq_ext.windows._dataset", lambda *_, **__: pytest.fail("asked the hub for a file"))
    with pytest.raises(CalibrationError, match=re.escape(repr(name))):
        read(name, TOKENIZER, 1, 4)


def test_a_directory_and_text_that_looks_like_a_name(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"{re.escape(repr(str(tmp_path)))} is not a file"):
        read(str(tmp_path), TOKENIZER, 1, 4)
    with pytest.raises(CalibrationError, match=r"cannot be read as a file.* is passed in a list") as caught:
        read("It was a dark and stormy night. " * 100, TOKENIZER, 1, 4)
    assert len(str(caught.value).split("cannot be read")[0]) < 300
    assert read("It was a dark and stormy night. " * 200, TOKENIZER, 1, 4).tokens == 4  # longer than any name


ROWS = [{"id": i, "content": word} for i, word in enumerate(TEXT.split())]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json", ".JSONL"])
def test_files_of_rows(suffix: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("id,content\n" + "".join(f"{row['id']},{row['content']}\n" for row in ROWS))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) if suffix != ".json" else json.dumps(ROWS))
    windows = read(path, TOKENIZER, 3, 4)
    assert lists(windows) == FIRST
    assert "texts from column 'content'" in windows.note
    path.write_bytes(b'"\x00[{]')
    with pytest.raises(CalibrationError, match=f"{re.escape(str(path))}.*could not be read as a dataset"):
        read(path, TOKENIZER, 3, 4)


def test_datasets_in_memory() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    texts = datasets.Dataset.from_dict({"text": [*TEXT.split()[:3], None, *TEXT.split()[3:]]})
    assert lists(read(texts, TOKENIZER, 3, 4)) == FIRST
    assert lists(read(texts.to_iterable_dataset(), TOKENIZER, 3, 4)) == FIRST
    assert sum(map(len, lists(read(texts, TOKENIZER, 3, 4, shuffle=True)))) == 12
    ids = datasets.Dataset.from_dict({"input_ids": PADDED.tolist(), "attention_mask": MASK.tolist()})
    expected = [[1, 2, 9], [3, 4, 5, 6, 7], [1, 1, 1]]
    for source in (ids, ids.with_format("torch"), ids.with_format("numpy"), ids.to_iterable_dataset()):
        assert lists(read(source, None, 4, 5)) == expected
    with pytest.raises(CalibrationError, match="neither input_ids nor a text, only id"):
        read(datasets.Dataset.from_dict({"id": [1, 2]}), TOKENIZER, 1, 4)
    with pytest.raises(CalibrationError, match="neither input_ids nor a text, only train, test"):
        read(datasets.DatasetDict({"train": texts, "test": texts}), TOKENIZER, 1, 4)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[str, str]]]:
    """Puts an answer, or an error, in the place of datasets.load_dataset; returns what it was asked for."""

    def answer(rows: Any) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def load_dataset(name: str, split: str) -> Any:
            asked.append((name, split))
            if isinstance(rows, Exception):
                raise rows
            return rows

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return answer


def test_a_dataset_on_the_hub(hub: Callable[[Any], list[tuple[str, str]]]) -> None:
    asked = hub([{"id": 1, "title": "t", "text": "the quick"}, {"id": 2, "title": "u", "text": "brown fox"}])
    for name in ("owner/name", "owner/name:test", "pileval"):
        assert lists(read(name, TOKENIZER, 1, 4)) == [[1, 2, 3, 4]]
    assert asked == [
        ("owner/name", "train"),
        ("owner/name", "test"),
        ("mit-han-lab/pile-val-backup", "validation"),
    ]
    hub([{"id": 1}])
    with pytest.raises(CalibrationError, match=r"neither input_ids nor a text, only id"):
        read("owner/name", TOKENIZER, 1, 4)


def test_a_dataset_that_cannot_be_had(
    hub: Callable[[Any], list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"))
    with pytest.raises(CalibrationError) as caught:
        read("owner/name", TOKENIZER, 1, 4)
    text = str(caught.value)
    assert "'owner/name' is no text file" in text and "ConnectionError: Couldn't reach" in text and "'builtin'" in text
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    with pytest.raises(CalibrationError, match=r"needs the package datasets: pip install 'awq_ext\[hf\]'"):
        read("owner/name", TOKENIZER, 1, 4)
