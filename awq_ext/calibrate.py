"""Calibration: text to token windows, and the statistics of what each linear reads, one decoder block at a time."""

from __future__ import annotations

import inspect
import pydoc_data.topics
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq_ext.errors import CalibrationError

BUILTIN_TEXT = "builtin"
"""The source that needs no file: the language reference that every CPython carries."""


def builtin_text() -> tuple[str, str]:
    """Two disjoint halves of CPython's own help topics: one to calibrate on, one to score on."""
    topics = pydoc_data.topics.topics
    # Topics repeat one another, paragraph by paragraph; without repetitions the halves have nothing in common.
    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))
    return text[: len(text) // 2], text[len(text) // 2 :]


def load_text(source: str) -> str:
    """The text of a UTF-8 file, of ``builtin``, or of a dataset on the hub (its first text column, in order).

    Undecodable bytes become U+FFFD. Raises CalibrationError if there is no such file or dataset.
    """
    if source == BUILTIN_TEXT:
        return builtin_text()[0]
    shown = source if len(source) <= 200 else f"{source[:200]}..."
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        meant_as_file = path.exists() or path.suffix or path.is_absolute() or source.startswith((".", "~"))
    except (OSError, RuntimeError) as error:  # not readable, too long for a name (it is text itself?), no such user
        raise CalibrationError(f"calibration text {shown!r} cannot be read as a file: {error}") from error
    if meant_as_file:
        raise CalibrationError(f"calibration text {shown!r} is not a file")
    return _dataset_text(source)


def _dataset_text(source: str) -> str:
    """``name`` or ``name:split`` of a dataset, 'train' unless named."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{source!r} is no file, and reading it as a dataset needs the package datasets: "
            "pip install 'awq_ext[hf]', or pass a text file"
        ) from error
    name, _, split = source.partition(":")
    name = {"pileval": "mit-han-lab/pile-val-backup"}.get(name, name)  # AutoAWQ's short name for its default
    split = split or ("validation" if name == "mit-han-lab/pile-val-backup" else "train")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise CalibrationError(
            f"{source!r} is no file, and could not be read as a dataset ({type(error).__name__}: {error}). "
            "Pass a text file, or 'builtin' for the text that Python itself carries"
        ) from error
    column = (
        "text"
        if "text" in rows.column_names
        else next((n for n, f in rows.features.items() if getattr(f, "dtype", None) == "string"), None)
    )
    if column is None:
        raise CalibrationError(f"dataset {source!r} has no text column, only {rows.column_names}")
    return "\n".join(rows[column])


def windows(source: Any, tokenizer: Any, samples: int, seq_len: int) -> Tensor:
    """The first ``samples`` x ``seq_len`` tokens of the calibration data, in order, int64 [samples, seq_len].

    ``source``: text; a list of texts, joined by newlines; token ids as a tensor or a list; a list of token id lists,
    one after another. No special tokens are added. Raises CalibrationError if there are too few tokens.
    """
    if samples < 1 or seq_len < 1:
        raise CalibrationError(f"samples and seq_len must be positive, got {samples} and {seq_len}")
    need = samples * seq_len
    ids = torch.tensor(list(_token_ids(source, tokenizer, need)), dtype=torch.int64)
    if len(ids) < need:
        raise CalibrationError(
            f"the calibration data has {len(ids)} tokens, but {samples} samples of {seq_len} need {need}. "
            f"Pass more text, or at most {len(ids) // seq_len} samples of {seq_len}"
        )
    return ids[:need].view(samples, seq_len)


def _token_ids(source: Any, tokenizer: Any, need: int) -> Iterable[int]:
    if isinstance(source, str):
        if tokenizer is None:
            raise CalibrationError("calibration text needs a tokenizer; pass one, or pass token ids")
        # Eight characters a token are plenty: a long file need not be tokenized whole to take its beginning. The cut
        # may change the tokens of the word it goes through, so there have to be some to spare.
        enough = need + 64
        ids = tokenizer(source[: 8 * enough], add_special_tokens=False).input_ids
        if len(source) > 8 * enough and len(ids) < enough:
            ids = tokenizer(source, add_special_tokens=False).input_ids
        return ids[:need]
    if is_text(source):
        return _token_ids("\n".join(source), tokenizer, need)
    parts = [_ids(source)]
    if parts == [None] and _is_list(source):
        parts = [_ids(item) for item in source]
    if None in parts:
        inside = f" of {', '.join(sorted({type(item).__name__ for item in source}))}" if _is_list(source) else ""
        kind = f"{source.dtype} tensor" if isinstance(source, Tensor) else type(source).__name__
        raise CalibrationError(
            "calibration must be a file name, text, a list of texts, token ids, or a list of token id lists; "
            f"got a {kind}{inside}"
        )
    return [token for part in parts if part is not None for token in part]


def is_text(source: Any) -> bool:
    """Whether this is text or a list of texts, which takes a tokenizer to read."""
    return isinstance(source, str) or (_is_list(source) and bool(source) and all(isinstance(x, str) for x in source))


def _is_list(source: Any) -> bool:
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray))


def _ids(source: Any) -> list[int] | None:
    """Token ids, or None if these are none. Whole numbers only: a float would be cut down to one without a word."""
    if isinstance(source, Tensor):
        whole = not (source.is_floating_point() or source.is_complex() or source.dtype == torch.bool)
        return source.flatten().tolist() if whole else None
    if _is_list(source) and all(isinstance(token, Integral) for token in source):
        return [int(token) for token in source]
    return None


class Statistics:
    """Of the input x [tokens, k] of a linear: the mean of |x| [k] and the mean of x^T x [k, k], both float32."""

    def __init__(self) -> None:
        self.tokens = 0
        self._abs: Tensor | None = None
        self._gram: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(rows)
        if self._abs is None or self._gram is None:
            self._abs, self._gram = rows.abs().sum(0), rows.T @ rows
        else:
            self._abs += rows.abs().sum(0)
            self._gram.addmm_(rows.T, rows)

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        """(x_mean, gram) on the CPU. Raises CalibrationError naming the linear if they are missing or not finite."""
        if self._abs is None or self._gram is None or self.tokens == 0:
            raise CalibrationError(f"{name} got no calibration token")
        x_mean, gram = self._abs.cpu() / self.tokens, self._gram.cpu() / self.tokens
        if not (torch.isfinite(x_mean).all() and torch.isfinite(gram).all()):
            raise CalibrationError(
                f"the input of {name} is not finite on the calibration data: the model overflows there in "
                "float32, or has NaN weights in front of it"
            )
        return x_mean, gram


@contextmanager
def watching(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, Statistics]]:
    """Statistics of the inputs of these modules while the context is open."""
    statistics = {name: Statistics() for name in readers}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, s=statistics[name]: s.add(args[0]))
        for name, module in readers.items()
    ]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


SENSITIVITY_SAMPLES = 8
"""Windows that `BlockInputs.sensitivity` looks at: an average over thousands of tokens has long settled."""


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class BlockInputs:
    """The hidden states in front of one block, for all calibration windows, moved on block by block.

    ``hidden`` is [samples, seq_len, width] in float32; ``arguments`` are, for every block, the others that the model
    calls it with (masks, rotary embeddings: the same for every batch of windows, since all are full and of one length).
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, batch: int = 4) -> None:
        self.batch = next(size for size in range(min(batch, len(ids)), 0, -1) if len(ids) % size == 0)
        device = next(model.parameters()).device
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states: list[Tensor] = []
        accepted = inspect.signature(model.forward).parameters.values()
        knows_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in accepted)
        options = {"use_cache": False} if knows_cache else {}

        def see(index: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                if index == 0:
                    states.append(hidden.float())
                if len(self.arguments) == index:
                    others = {k: _as_float(v) for k, v in kwargs.items() if k != "hidden_states"}
                    others.update({k: None for k in others if k in ("past_key_values", "past_key_value")})
                    self.arguments.append((tuple(_as_float(a) for a in args[1:]), others))
                if index == len(blocks) - 1 or len(self.arguments) == len(blocks):
                    raise _Stop

            return hook

        hooks = [block.register_forward_pre_hook(see(i), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            for rows in ids.split(self.batch):
                try:
                    model(rows.to(device), **options)
                except _Stop:
                    continue
        finally:
            for hook in hooks:
                hook.remove()
        if len(self.arguments) != len(blocks):
            raise CalibrationError(
                f"the model called {len(self.arguments)} of its {len(blocks)} blocks on the calibration data"
            )
        self.hidden = torch.cat(states)
        self.quantized = torch.empty(0)
        """The hidden states in front of the same block of the quantized model, for who moves them on, too."""

    def run(self, index: int, block: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """The block's output for all windows; hidden: its inputs, None: those of the original model."""
        hidden = self.hidden if hidden is None else hidden
        return torch.cat([self._call(index, block, rows) for rows in hidden.split(self.batch)])

    def stages(self, index: int, block: nn.Module, linears: Mapping[str, nn.Module]) -> list[list[list[str]]]:
        """The names of the linears in the order in which the block calls them.

        Linears that read the same tensor are one list. Lists whose first names differ in their numbers only (the
        experts of a mixture) are one stage, as are those that the block did not call on the windows looked at.
        """
        calls: list[tuple[Tensor, list[str]]] = []  # the tensor is kept, so that no other one can take its place

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if any(name in names for _, names in calls):
                    return
                names = next((names for read, names in calls if read is args[0]), None)
                if names is None:
                    calls.append((args[0], [name]))
                else:
                    names.append(name)

            return hook

        hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
        try:
            self._call(index, block, self.quantized[: self.batch])
        finally:
            for hook in hooks:
                hook.remove()
        stages: dict[str, list[list[str]]] = {}
        for _, names in calls:
            stages.setdefault(re.sub(r"\d+", "#", names[0]), []).append(names)
        called = {name for _, names in calls for name in names}
        missed = [[name] for name in linears if name not in called]
        return [*stages.values(), missed] if missed else list(stages.values())

    def quantized_statistics(
        self, index: int, block: nn.Module, readers: Mapping[str, nn.Module]
    ) -> dict[str, Statistics]:
        """What these modules read in the quantized model; the block is run no further than to the last of them."""
        waiting: set[str] = set()

        def stop_after(name: str) -> Any:
            def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
                waiting.discard(name)
                if not waiting:
                    raise _Stop

            return hook

        with watching(readers) as statistics:
            hooks = [module.register_forward_pre_hook(stop_after(name)) for name, module in readers.items()]
            try:
                for rows in self.quantized.split(self.batch):
                    waiting.update(readers)
                    try:
                        self._call(index, block, rows)
                    except _Stop:
                        continue
            finally:
                for hook in hooks:
                    hook.remove()
        return statistics

    def _call(self, index: int, block: nn.Module, rows: Tensor) -> Tensor:
        args, kwargs = self.arguments[index]
        out = block(rows, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def sensitivity(
        self, index: int, block: nn.Module, linears: Mapping[str, nn.Module], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """How much an error in each output channel of each linear moves the block's output: float32 [n] each.

        It is the diagonal of J^T J, J the derivative of the block's output by the linear's, averaged over tokens:
        the squared gradient of a random-sign projection of the output has that expectation (Hutchinson's estimator).
        So a search that weighs rows by it minimises the error of the block and not of its linears one by one.
        """
        total: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                def add(gradient: Tensor) -> None:
                    square = gradient.detach().reshape(-1, gradient.shape[-1]).square().sum(0)
                    total[name] = total[name] + square if name in total else square

                output.register_hook(add)

            return hook

        hooks = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
        windows = self.hidden[:SENSITIVITY_SAMPLES]
        try:
            with torch.enable_grad():
                for rows in windows.split(self.batch):
                    out = self._call(index, block, rows.detach().clone().requires_grad_(True))
                    signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
                    out.backward(signs)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: square / windows[..., 0].numel() for name, square in total.items()}


def _as_float(value: Any) -> Any:
    """Half-precision tensors as float32, inside tuples and dicts too: blocks are run in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_as_float(item) for item in value)
    if isinstance(value, dict):
        return {key: _as_float(item) for key, item in value.items()}
    return value
