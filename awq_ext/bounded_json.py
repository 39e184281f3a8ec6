"""JSON from strangers: read in memory that is in proportion to the text, and refused where it means two things.

Ten megabytes of ``[[],[],[], ...`` are a valid text, and 300 MB of Python objects. So what may be long (the header of a
safetensors file, the index of a checkpoint) is walked with :class:`Scanner`, which holds one small value at a time, and
what may be of any form (config.json) is counted before it is decoded. An object that has a key twice is refused, since
two readers may take two different values from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64  # of arrays and objects in each other; the Python decoder's own limit depends on the caller's stack
MAX_KEY = 1024  # bytes
MAX_PARTS = 500_000  # strings, brackets and commas of one value: they cost 100 bytes of memory each at most

_SPACE = re.compile(rb"[ \t\n\r]*")
_NO_STRUCTURE = re.compile(rb'[^"\[\]{},]*')
# Rounds are limited because the matcher needs memory for each of them; a longer string is matched in several steps.
_PLAIN_KEY = re.compile(rb'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:')  # what most keys are, in one step
# What most values are, in one step: an object of strings, numbers and arrays of numbers.
_FLAT_OBJECT = re.compile(rb'\{[^][{}"]*(?:(?:"[^"\\]*"|\[[^][{}"]*\])[^][{}"]*){0,16}\}')
MAX_FLAT = 4096  # bytes
_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,256}', re.DOTALL)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook``: the object, if no key occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r:.100}")
            seen.add(key)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=no_duplicates)


def loads(text: bytes | bytearray) -> Any:
    """The value of a whole JSON text. Raises ValueError if it is none, has duplicate keys, is too deep or too rich."""
    scanner = Scanner(text)
    value = scanner.value(len(text))
    scanner.end()
    return value


class Scanner:
    """A position in a JSON text. Every method raises ValueError where the text is not what it reads."""

    def __init__(self, text: bytes | bytearray) -> None:
        self.text = text
        self.at = 0

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here, each once the value before it was read.

        The caller reads the value after each key, with :meth:`value` or with :meth:`members` again, and minds keys that
        occur twice.
        """
        self._take(b"{")
        if self._next() == b"}":
            self.at += 1
            return
        while True:
            plain = _PLAIN_KEY.match(self.text, self.at)
            if plain is not None and plain.end(1) - plain.start(1) <= MAX_KEY:
                self.at = plain.end()
                yield plain[1].decode("utf-8")
            else:
                if self._next() != b'"':
                    raise ValueError(f"expected a key in quotes {self._where()}")
                key: str = self._decode(self._string_end(self.at), MAX_KEY, _DECODER)
                self._take(b":")
                yield key
            if self._take(b",}") == b"}":
                return

    def value(self, most: int, decoder: json.JSONDecoder = _DECODER) -> Any:
        """The value that begins here, which takes ``most`` bytes of the text at most."""
        self._next()
        return self._decode(self._value_end(most), most, decoder)

    def end(self) -> None:
        """Nothing but white space is left."""
        if self._next():
            raise ValueError(f"expected the end {self._where()}")

    def _value_end(self, most: int) -> int:
        """Where the value ends, if it is one; what is between its brackets is left to the decoder."""
        flat = _FLAT_OBJECT.match(self.text, self.at)
        if flat is not None and flat.end() - self.at <= min(most, MAX_FLAT):
            return flat.end()
        text, at, depth = self.text, self.at, 0
        for _ in range(MAX_PARTS):
            at = _NO_STRUCTURE.match(text, at).end()  # type: ignore[union-attr]  # it matches always
            if at >= len(text) or at - self.at > most:
                return at
            part = text[at]
            if part in b"[{":
                depth += 1
                if depth > MAX_DEPTH:
                    raise ValueError(f"more than {MAX_DEPTH} arrays and objects in each other {self._where()}")
            elif part in b"]},":
                if depth == 0:  # of what is around the value
                    return at
                depth -= part != ord(b",")
            else:
                at = self._string_end(at) - 1
            at += 1
            if depth == 0:
                return at
        raise ValueError(f"more than {MAX_PARTS} parts in the value {self._where()}")

    def _string_end(self, at: int) -> int:
        """Where the string ends whose opening quote is at ``at``."""
        at += 1
        while True:
            at = _IN_STRING.match(self.text, at).end()  # type: ignore[union-attr]  # it matches always
            if at >= len(self.text):
                raise ValueError(f"a string does not end {self._where()}")
            if self.text[at] == ord(b'"'):
                return at + 1
            if at + 1 >= len(self.text):
                raise ValueError(f"a string does not end {self._where()}")

    def _decode(self, end: int, most: int, decoder: json.JSONDecoder) -> Any:
        if end - self.at > most:
            raise ValueError(f"more than {most} bytes in the value {self._where()}")
        value = decoder.decode(self.text[self.at : end].decode("utf-8"))
        self.at = end
        return value

    def _next(self) -> bytes:
        """Skips white space; the byte after it, empty at the end of the text."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches always
        return bytes(self.text[self.at : self.at + 1])

    def _take(self, expected: bytes) -> bytes:
        found = self._next()
        if not found or found not in expected:
            raise ValueError(f"expected {' or '.join(map(chr, expected))} {self._where()}")
        self.at += 1
        return found

    def _where(self) -> str:
        return f"at byte {self.at}: {bytes(self.text[self.at : self.at + 40])!r}"
