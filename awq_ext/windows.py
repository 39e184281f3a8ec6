"""Calibration data: from what a user has to rows of token ids, with an account of what became of it."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awq_ext.errors import CalibrationError, CheckpointError

EXPECTED = "calibration must be a file name, a text, token ids, or a list or other iterable of texts or of token ids"

BUILTIN_TEXT = "builtin"
"""The source that needs no file: the language reference that every CPython carries."""

SPREAD = 64
"""Shuffled, windows and rows are drawn from the first ``SPREAD`` times as many as are asked for."""

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Files that the package datasets reads row by row; all others are text."""


@dataclass(frozen=True)
class Windows:
    """Rows to calibrate on: int64 [length] each, at most seq_len tokens, without padding."""

    rows: list[Tensor]
    note: str
    """How many tokens they are, and what was glued, cut, dropped or left unread to make them."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


def read(
    source: Any,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    *,
    seed: int = 0,
    shuffle: bool = False,
    pack: bool | None = None,
) -> Windows:
    """At most ``samples`` x ``seq_len`` tokens of the calibration data; no more of it is read than that takes.

    One text, or one sequence of token ids, is cut into ``samples`` windows of ``seq_len`` tokens each. Rows are glued
    and cut in the same way if ``pack`` says so; otherwise each stands alone: a longer one is cut into windows, a
    shorter one stays as short as it is, and what has fewer than 2 tokens is dropped. Windows and rows of text begin
    with the token that the tokenizer begins a text with, if it does (Gemma's and Llama's do, and Gemma is lost without
    it); it counts among their tokens. Nothing is added to token ids.

    Args:
        source: text (with a line break in it), or the name of a file: of text, or .jsonl, .json, .csv or .parquet
            rows; ``"builtin"`` (CPython's own help text); ``name`` or ``name:split`` of a dataset on the hub; token ids
            (a list, a tensor); a list, dataset, loader or any other iterable, even one without an end, of rows or
            batches of rows. A row is a text, token ids, or a dictionary with ``input_ids`` (and ``attention_mask``) or
            a text: ``text``, else its first text. Padding is what the mask says, without one the tokenizer's pad
            tokens at the ends of a row, of which one is kept if it means the beginning or end of a text as well.
        tokenizer: a tokenizer of transformers, or a directory or hub name to load one from when it is needed; None
            will do for token ids.
        samples, seq_len: the number of tokens is at most their product.
        seed: of what is drawn.
        shuffle: draw windows (of one text, or of rows glued), or rows, by a permutation of the first 64 x samples of
            them, instead of taking the first. A dataset sorted by kind is better shuffled as a whole before.
        pack: glue rows: texts by newlines, token ids by the tokenizer's end-of-text token. None: texts are glued, so
            that every window is full, as in all other implementations of AWQ; rows of token ids are not, since who
            made them has said where each begins and ends.

    Raises:
        CalibrationError: a source that cannot be read; less data than asked for where windows must be full; no row of
            2 tokens at all. Rows that do not reach samples x seq_len together are used, and the note says so.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"samples and seq_len must be positive, got {samples} and {seq_len}")
    reader = _Reader(tokenizer)
    items, joined = _open(source)
    rows = reader.rows(items, joined)
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"there is no calibration data: {_shown(source)} is empty")
    rows = chain([first], rows)
    if seq_len <= len(reader.lead):
        raise CalibrationError(f"seq_len {seq_len} leaves no room for text behind the token that begins it")
    drawn_by = seed if shuffle else None
    if joined or (reader.texts if pack is None else pack):
        return reader.windows(rows, joined, samples, seq_len, drawn_by)
    return reader.apart(rows, samples, seq_len, drawn_by)


def builtin_text() -> tuple[str, str]:
    """Two disjoint halves of CPython's own help topics: one to calibrate on, one to score on."""
    topics = pydoc_data.topics.topics
    # Topics repeat one another, paragraph by paragraph; without repetitions the halves have nothing in common.
    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))
    return text[: len(text) // 2], text[len(text) // 2 :]


def first_tokens(texts: Iterable[str], glue: str, tokenizer: Any, count: int) -> tuple[Tensor, bool]:
    """int64 [<= count]: the first tokens of the texts glued together, without special tokens; and whether that is all.

    Only as much is read and tokenized as that takes. A cut can change the few tokens before it, so some are made that
    are not used.
    """
    spare = 64
    characters = 5 * (count + spare)
    texts = iter(texts)
    text, ended = next(texts, ""), False
    while True:
        pieces, length = [text], len(text)
        while length < characters and not ended:
            piece = next(texts, None)
            ended = piece is None
            if piece is not None:
                pieces += [glue, piece]
                length += len(glue) + len(piece)
        text = "".join(pieces)
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        whole = ended and characters >= len(text)
        if whole or len(ids) >= count + spare:
            return torch.tensor(ids[:count], dtype=torch.int64), whole and len(ids) <= count
        characters *= 2


# --- sources --------------------------------------------------------------------------------------------------------


def _open(source: Any) -> tuple[Iterable[Any], bool]:
    """What to iterate over, and whether that are the pieces of one text, or of one sequence of token ids."""
    if isinstance(source, os.PathLike):
        return _open_file(os.fspath(source))
    if isinstance(source, str):
        # No file has such a name. 4096: PATH_MAX of Linux.
        return ([source], True) if "\n" in source or len(source) > 4096 else _open_file(source)
    if isinstance(source, (Tensor, np.ndarray)):
        if source.ndim == 1:  # perhaps a memory-mapped file, so piece by piece
            return (source[i : i + 2**20] for i in range(0, len(source), 2**20)), True
        return source if source.ndim == 2 else [source], False
    if isinstance(source, Mapping):
        return [source], False
    if _is_list(source) and len(source) > 0 and isinstance(source[0], Integral):
        return [source], True
    if isinstance(source, (bytes, bytearray, Set)) or not (
        hasattr(source, "__iter__") or hasattr(source, "__getitem__")
    ):
        raise _refusal(source)
    return source, False


def _open_file(source: str) -> tuple[Iterable[Any], bool]:
    """The text of a UTF-8 file or of ``builtin``, the rows of a file of another format or of a dataset on the hub.

    Undecodable bytes become U+FFFD.
    """
    if source == BUILTIN_TEXT:
        return [builtin_text()[0]], True
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
        meant_as_file = path.exists() or path.suffix or path.is_absolute() or source.startswith((".", "~"))
    except (OSError, RuntimeError) as error:  # not readable, too long for a name, no such user
        raise CalibrationError(
            f"calibration text {_shown(source)} cannot be read as a file: {error}. A text itself is passed in a list"
        ) from error
    if is_file and path.suffix.lower() in FORMATS:
        return _dataset(
            source, FORMATS[path.suffix.lower()], data_files=str(path), split="train", streaming=True
        ), False
    if is_file:
        return _pieces(path), True
    if meant_as_file:
        raise CalibrationError(f"calibration text {_shown(source)} is not a file")
    name, _, split = source.partition(":")
    name = {"pileval": "mit-han-lab/pile-val-backup"}.get(name, name)  # AutoAWQ's short name for its default
    return _dataset(
        source, name, split=split or ("validation" if name == "mit-han-lab/pile-val-backup" else "train")
    ), False


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            while piece := file.read(1 << 20):
                yield piece
    except OSError as error:
        raise CalibrationError(f"calibration text {str(path)!r} cannot be read as a file: {error}") from error


def _dataset(source: str, name: str, **options: Any) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{source!r} is no text file, and reading it as a dataset needs the package datasets: "
            "pip install 'awq_ext[hf]', or pass a text file"
        ) from error
    try:
        yield from datasets.load_dataset(name, **options)
    except Exception as error:  # of the many packages below
        raise CalibrationError(
            f"{source!r} is no text file, and could not be read as a dataset ({type(error).__name__}: {error}). "
            "Pass a text file, or 'builtin' for the text that Python itself carries"
        ) from error


class _Reader:
    """Reads rows and keeps count of the padding that it takes off."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts = False
        """Whether the rows are texts; known from the first one on."""
        self._column: str | None = None
        self._masked = self._pads = 0

    @cached_property
    def tokenizer(self) -> Any:
        if isinstance(self._tokenizer, (str, os.PathLike)):
            from awq_ext.hub import resolve
            from awq_ext.pretrained import load_tokenizer

            return load_tokenizer(resolve(self._tokenizer))
        return self._tokenizer

    def special(self, *names: str) -> list[int | None]:
        """Ids of the tokenizer's special tokens. Without a tokenizer there are none: token ids do not need one."""
        try:
            return [getattr(self.tokenizer, f"{name}_token_id", None) for name in names]
        except CheckpointError:
            return [None] * len(names)

    @cached_property
    def lead(self) -> Tensor:
        """What begins every row of a text: the token that the tokenizer itself begins a text with, if it has one."""
        (bos,) = self.special("bos") if self.texts else [None]
        ids = [] if bos is None else self.tokenizer("a")["input_ids"][:1]
        return torch.tensor([token for token in ids if token == bos], dtype=torch.int64)

    def rows(self, items: Iterable[Any], joined: bool) -> Iterator[str | Tensor]:
        """Texts, or int64 [length] without padding."""
        first = True
        for item in items:
            for row in self._rows(item, joined):
                if first:
                    first, self.texts = False, isinstance(row, str)
                    if self.texts and self.tokenizer is None:
                        raise CalibrationError("calibration text needs a tokenizer; pass one, or pass token ids")
                if self.texts is not isinstance(row, str):
                    raise CalibrationError(f"{EXPECTED}; got texts and token ids in one")
                yield row

    def _rows(self, item: Any, joined: bool) -> Sequence[str | Tensor]:
        """The rows of one item, which is a row or a batch of them."""
        if isinstance(item, Mapping):
            if "input_ids" in item:
                return self._unpadded(item["input_ids"], item.get("attention_mask"))
            item = self._text_of(item)
        if isinstance(item, str):
            return [item]
        if _is_list(item) and len(item) > 0 and all(isinstance(text, str) for text in item):
            return list(item)
        return _id_rows(item) if joined else self._unpadded(item, None)

    def _text_of(self, row: Mapping[str, Any]) -> Any:
        """The text in a row of a dataset, or the texts in a batch of rows."""
        if self._column is None:
            texts = (
                name for name, value in row.items() if isinstance(value[0] if _is_list(value) and value else value, str)
            )
            self._column = "text" if "text" in row else next(texts, None)
        if self._column is None or self._column not in row:
            raise CalibrationError(
                f"a row of the calibration data has neither input_ids nor a text, only {', '.join(map(str, row))}"
            )
        return row[self._column] or ""  # a text that a dataset lacks is None

    def _unpadded(self, ids: Any, mask: Any) -> list[Tensor]:
        rows = _id_rows(ids)
        if mask is None:
            pad, bos, eos = self.special("pad", "bos", "eos")
            kept = rows if pad is None else [_stripped(row, pad, int(pad in (bos, eos))) for row in rows]
            self._pads += _length(rows) - _length(kept)
            return kept
        masks = [keep != 0 for keep in _id_rows(mask, mask=True)]
        if [len(keep) for keep in masks] != [len(row) for row in rows]:
            raise CalibrationError(
                "a batch of the calibration data has an attention_mask of another shape than its ids"
            )
        # In a row of ones without a gap, only the first has no one in front of it.
        if any(int(keep[:1].sum() + (keep[1:] & ~keep[:-1]).sum()) > 1 for keep in masks):
            raise CalibrationError(
                "an attention_mask of the calibration data has zeros between ones; pass what they divide as rows"
            )
        kept = [row[keep] for row, keep in zip(rows, masks, strict=True)]
        self._masked += _length(rows) - _length(kept)
        return kept

    def windows(self, rows: Iterator[Any], joined: bool, samples: int, seq_len: int, seed: int | None) -> Windows:
        """All rows as one sequence, cut into full windows."""
        step = seq_len - len(self.lead)
        need = samples * step
        count = need if seed is None else SPREAD * need
        if self.texts:
            ids, whole = first_tokens(rows, "" if joined else "\n", self.tokenizer, count)
            glue = "newlines"
        else:
            (end,) = [None] if joined else self.special("eos")
            ids, whole = _glued(rows, end, count)
            glue = "nothing" if end is None else f"token {end}, the end of a text,"
        there = len(ids) // step
        if there < samples:
            raise CalibrationError(
                f"the calibration data has {len(ids)} tokens, but {samples} samples of {seq_len} need {need}. "
                f"Pass more text, or at most {there} samples of {seq_len}"
            )
        notes = [f"{samples * seq_len} tokens in {_many(samples, 'window')} of {seq_len}"]
        drawn = torch.arange(samples)
        if seed is not None:
            drawn = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:samples]
            notes[0] += f", drawn with seed {seed} from {'all' if whole else 'the first'} {there}"
        notes += [] if joined else [f"rows glued with {glue} between them"]
        notes += [] if whole and len(ids) == need else ["the rest left out"]
        used = [torch.cat([self.lead, ids[i * step : (i + 1) * step]]) for i in drawn.tolist()]
        return Windows(used, self._account(notes))

    def apart(self, rows: Iterator[Any], samples: int, seq_len: int, seed: int | None) -> Windows:
        """Each row by itself."""
        drawn = ""
        if seed is not None:
            known = list(islice(rows, SPREAD * samples))
            order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
            rows = chain((known[i] for i in order.tolist()), rows)
            drawn = f", drawn with seed {seed} from the first {len(known)}"
        need = left = samples * seq_len
        least, lead = min(2, seq_len), len(self.lead)
        used: list[Tensor] = []
        read = longer = dropped = 0
        whole = True
        for row in rows:
            read += 1
            room = left // seq_len * (seq_len - lead) + max(0, left % seq_len - lead)
            if isinstance(row, str):
                ids, whole = first_tokens([row], "", self.tokenizer, room)
            else:
                ids, whole = row[:room], len(row) <= room
            if lead and torch.equal(ids[:lead], self.lead):  # a text that begins with it in so many words
                ids = ids[lead:]
            parts = [torch.cat([self.lead, part]) for part in ids.split(seq_len - lead)]
            longer += len(parts) > 1
            dropped += sum(lead < len(part) < least for part in parts)
            parts = [part for part in parts if len(part) >= least]
            used += parts
            left -= _length(parts)
            if left < least:
                break
        if not used:
            raise CalibrationError(f"the calibration data has no row of at least {least} tokens, in {read} rows")
        lengths = sorted({len(part) for part in used})
        span = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
        notes = [f"{need - left} tokens in {_many(len(used), 'row')} of {span}{drawn}"]
        notes += [] if left < least else [f"fewer than the {need} asked for"]
        notes += [f"{_many(longer, 'row')} of more than {seq_len} tokens cut into windows"] if longer else []
        notes += [] if whole else [f"the last row cut to {len(ids)} tokens"]
        notes += [f"{_many(dropped, 'single token')} dropped"] if dropped else []
        notes += ["reading stopped there"] if left < least else []
        return Windows(used, self._account(notes))

    def _account(self, notes: list[str]) -> str:
        if len(self.lead):
            notes.append(f"each begins with token {int(self.lead)}, as the tokenizer begins a text")
        if self._column not in (None, "text"):
            notes.append(f"texts from column {self._column!r}")
        if self._masked:
            notes.append(f"{self._masked} tokens of padding taken off by the mask")
        if self._pads:
            notes.append(f"{self._pads} pad tokens taken off the ends of rows that have no mask")
        return "; ".join(notes)


# --- token ids ------------------------------------------------------------------------------------------------------


def _id_rows(ids: Any, mask: bool = False) -> list[Tensor]:
    """One row or a batch of rows, int64 [length] each. Whole numbers only: a float would be cut down to one unseen."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iub":
        ids = torch.from_numpy(ids)
    if isinstance(ids, Tensor):
        whole = not (ids.is_floating_point() or ids.is_complex()) and (mask or ids.dtype != torch.bool)
        if whole and ids.dim() in (1, 2):
            return list(torch.atleast_2d(ids).long().cpu())
    elif _is_list(ids) and all(isinstance(token, Integral) for token in ids):
        return [torch.tensor([int(token) for token in ids], dtype=torch.int64)]
    elif _is_list(ids) and len(ids) == 1:
        return _id_rows(ids[0], mask)
    elif _is_list(ids):
        rows = [_id_rows(row, mask) for row in ids]
        if all(len(row) == 1 for row in rows):
            batch = [row[0] for row in rows]
            if len(batch) == 2 and len(batch[0]) == len(batch[1]) and _is_mask(batch[1]) and not _is_mask(batch[0]):
                raise CalibrationError(
                    "calibration has pairs that look like token ids and their attention mask; "
                    "pass dictionaries with input_ids and attention_mask"
                )
            return batch
    raise _refusal(ids)


def _is_mask(row: Tensor) -> bool:
    return bool(((row == 0) | (row == 1)).all())


def _stripped(row: Tensor, pad: int, meant: int) -> Tensor:
    """The row without the pad tokens at its ends, but for ``meant`` of them at each."""
    (other,) = (row != pad).nonzero(as_tuple=True)
    if len(other) == 0:
        return row[:0]
    return row[max(0, int(other[0]) - meant) : int(other[-1]) + 1 + meant]


def _glued(rows: Iterable[Tensor], end: int | None, count: int) -> tuple[Tensor, bool]:
    """The first ``count`` tokens of the rows, ``end`` between two of them; and whether that is all."""
    parts = [torch.empty(0, dtype=torch.int64)]
    length = 0
    for row in rows:
        if len(row) == 0:
            continue
        if end is not None and length and int(parts[-1][-1]) != end:
            row = torch.cat([torch.tensor([end]), row])
        parts.append(row)
        length += len(row)
        if length > count:
            break
    return torch.cat(parts)[:count], length <= count


def _length(rows: Iterable[Tensor]) -> int:
    return sum(map(len, rows))


def _many(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _is_list(source: Any) -> bool:
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray))


def _shown(source: Any) -> str:
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def _refusal(source: Any) -> CalibrationError:
    inside = f" of {', '.join(sorted({type(item).__name__ for item in source}))}" if _is_list(source) else ""
    kind = f"{source.dtype} array" if isinstance(source, (Tensor, np.ndarray)) else type(source).__name__
    return CalibrationError(f"{EXPECTED}; got a {kind}{inside}")
