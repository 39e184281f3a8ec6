"""Safetensors files: headers checked before anything is allocated, tensors read into memory of one's own, streamed out.

A file is 8 bytes (the length of the header, little-endian), the header, and the tensors' bytes one after another. The
header is a JSON object of ``name: {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}``, with offsets from the
end of the header, and optionally ``"__metadata__"``, an object of strings. Source: the format's description and
``safetensors/src/tensor.rs`` in github.com/huggingface/safetensors, whose checks are all made here too.

Why not that package: it maps files, and a mapped file that somebody truncates kills the process (SIGBUS), while pread
only returns less; it takes the last of two entries with one name; and it writes only what is all in memory.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from awq_ext.bounded_json import Scanner, no_duplicates
from awq_ext.errors import CheckpointError

# The format's dtypes in its order of alignment (files are written largest first): bits of an element, torch's dtype.
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "C64": (64, torch.complex64),
    "F64": (64, torch.float64),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
}
_ONE_OF_EACH = {name: name for name in DTYPES}  # so that tensors share the text of their dtype
NAME_OF = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}

# What is often found under the name of a safetensors file, by its first bytes.
OTHER_FILES = {
    b"version ": "a pointer of git-lfs to the real one; run 'git lfs pull' in its directory",
    b"PK\3\4": "a zip file, perhaps a pickle of torch.save; awq_ext reads no pickles, because one can run any code",
    b"\x80\2": "a pickle; awq_ext reads none, because one can run any code",
    b"<": "a web page, perhaps an error message; get the file again",
}

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
# Bytes of Python objects made of one header: enough for 70,000 tensors. What a checkpoint makes of them takes half as
# much again, so that a file can cause 64 MiB at most above its own size.
MAX_HEADER_MEMORY = 40 * 2**20
MAX_METADATA_BYTES = 2**20
MAX_ENTRY_BYTES = 4096
MAX_DIMENSIONS = 64
ENTRY_MEMORY = 320  # bytes of a TensorInfo without name and dimensions, and of its place in a dict that has to grow


@dataclass(frozen=True)
class Source:
    """A file as it was when its header was read."""

    file: Path
    stamp: tuple[int, ...]

    @classmethod
    def of(cls, file: Path) -> Source:
        """The file as it is now. Raises CheckpointError if it is not a regular file that can be opened."""
        with _Reading(file) as reading:
            return cls(file, reading.stamp)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file's header describes it.

    ``shape`` is in elements, ``dtype`` in the format's spelling ("I32", "F16"), ``begin`` and ``end`` are the positions
    of its bytes in the file. An unknown dtype is kept as it stands: such a tensor cannot be read, but the others can.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    source: Source

    @property
    def shard(self) -> str:
        """The name of its file, without the directory."""
        return self.source.file.name

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def read(self) -> Tensor:
        """The tensor on the CPU, in memory of its own.

        Raises CheckpointError if torch has no such dtype, if there is too little memory, or as :meth:`read_into`.
        """
        _, dtype = DTYPES.get(self.dtype, (0, None))
        if dtype is None:
            raise CheckpointError(f"{self}: torch has no dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        try:
            raw = torch.empty(self.nbytes, dtype=torch.uint8)
        except RuntimeError as error:  # torch's way to say that there is no memory
            raise CheckpointError(f"{self}: {self.nbytes} bytes of memory cannot be had: {error}") from error
        self.read_into(bytes_of(raw))
        # A byte that is neither 0 nor 1 is no bool in C++.
        return (raw != 0 if dtype == torch.bool else raw.view(dtype)).reshape(self.shape)

    def read_into(self, buffer: memoryview | bytearray, skip: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from the ``skip``-th on.

        Raises CheckpointError if the file cannot be read, is truncated, or changed since its header was read;
        ValueError if the tensor has fewer bytes than that.
        """
        view = _flat(buffer)
        if skip < 0 or skip + len(view) > self.nbytes:
            raise ValueError(f"{self}: has {self.nbytes} bytes, asked for {len(view)} from byte {skip} on")
        with _Reading(self.source.file) as reading:
            if reading.stamp != self.source.stamp:
                raise CheckpointError(f"{self}: the file changed since it was opened; open the checkpoint again")
            reading.fill(view, self.begin + skip, self.name)

    def __str__(self) -> str:
        return f"{self.source.file}: {self.name}"


@dataclass(frozen=True)
class Header:
    """What a file says about itself, checked: tensors by name in the header's order, and the writer's remarks."""

    source: Source
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


class _Reading:
    """An open regular file, read by position. Errors of the system become CheckpointError."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> _Reading:
        try:
            # Without O_NONBLOCK, opening a FIFO waits for a writer.
            self.descriptor = os.open(self.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or what the file system cannot spell
            raise CheckpointError(f"{self.file} cannot be opened: {error}") from error
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.descriptor)
            raise CheckpointError(f"{self.file} must be a file, got {_kind(found.st_mode)}")
        self.size = found.st_size
        self.stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def fill(self, view: memoryview, position: int, what: str) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{self.file}: {what} cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.file} is damaged or truncated: {what} must have {len(view)} bytes from byte {position} on, "
                    f"got {done}; get the file again"
                )
            done += count


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((kind for test, kind in kinds.items() if test(mode)), "a device")


def _flat(buffer: memoryview | bytes | bytearray) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # memoryview casts nothing that is empty


def read_file(file: Path, most: int) -> bytearray:
    """All bytes of a regular file. Raises CheckpointError if it cannot be read or has more than ``most`` bytes."""
    with _Reading(file) as reading:
        if reading.size > most:
            raise CheckpointError(f"{file} has {reading.size} bytes, expected {most} at most")
        content = bytearray(reading.size)
        reading.fill(memoryview(content), 0, "the file")
    return content


# --- headers --------------------------------------------------------------------------------------------------------


def read_header(file: Path) -> Header:
    """The header of a safetensors file, of which every number has been held against the others and the file's length.

    Raises CheckpointError, naming file and tensor, if the file is not a regular one or cannot be read; if the header is
    longer than the file or 100 MB, or no JSON of the form above; if a name comes twice or is not printable; if a shape
    does not fit its number of bytes; if tensors overlap, leave gaps, or do not end where the file ends; and if the
    header would take more than 40 MiB of memory.
    """
    with _Reading(file) as reading:
        prefix = bytearray(8)
        reading.fill(memoryview(prefix), 0, "the length of the header")
        (length,) = struct.unpack("<Q", prefix)
        most = min(MAX_HEADER_BYTES, reading.size - 8)
        if length > most:
            for beginning, what in OTHER_FILES.items():
                if prefix.startswith(beginning):
                    raise CheckpointError(f"{file} is no safetensors file, but {what}")
            raise CheckpointError(
                f"{file} is damaged or truncated: the header has {length} bytes, expected {most} at most (the file has "
                f"{reading.size}); get the file again"
            )
        text = bytearray(length)
        reading.fill(memoryview(text), 8, "the header")
        source = Source(file, reading.stamp)
    try:
        header = _parse_header(text, source)
        _check_coverage(header, 8 + length, reading.size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or truncated: {error}; get the file again") from error
    return header


def _unsigned(digits: str) -> int:
    if digits[0] == "-" or len(digits) > 19:  # what 63 bits can hold
        raise ValueError(f"expected whole numbers of up to 19 digits, got {digits[:24]}")
    return int(digits)


def _no_number(text: str) -> float:
    raise ValueError(f"expected whole numbers, got {text[:24]}")


_ENTRY = json.JSONDecoder(
    object_pairs_hook=no_duplicates, parse_int=_unsigned, parse_float=_no_number, parse_constant=_no_number
)


def _parse_header(text: bytes | bytearray, source: Source) -> Header:
    data = 8 + len(text)
    header = Header(source, {})
    has_metadata, memory = False, 0
    scanner = Scanner(text)
    for name in scanner.members():
        if name == METADATA:
            if has_metadata:
                raise ValueError(f"{METADATA} comes twice")
            has_metadata = True
            begin = scanner.at
            for key in scanner.members():
                value = scanner.value(MAX_METADATA_BYTES)
                if not isinstance(value, str) or key in header.metadata:
                    raise ValueError(f"{METADATA} must hold one text for each key, got {value!r:.40} for {key!r}")
                if scanner.at - begin > MAX_METADATA_BYTES:
                    raise ValueError(f"{METADATA} must have {MAX_METADATA_BYTES} bytes at most")
                header.metadata[key] = value
                memory += 100 + sys.getsizeof(key) + sys.getsizeof(value)
            continue
        if not name.isprintable():  # so that messages about it cannot do anything to a terminal or a log
            raise ValueError(f"names of tensors must be printable, got {name!r}")
        if name in header.tensors:
            raise ValueError(f"{name} comes twice")
        tensor = _parse_entry(name, scanner.value(MAX_ENTRY_BYTES, _ENTRY), data, source)
        header.tensors[name] = tensor
        memory += ENTRY_MEMORY + sys.getsizeof(name) + 40 * len(tensor.shape)
        memory += 0 if tensor.dtype in DTYPES else sys.getsizeof(tensor.dtype)
        if memory > MAX_HEADER_MEMORY:
            raise ValueError(f"more than {len(header.tensors)} tensors in one file; split it into shards")
    scanner.end()
    return header


def _parse_entry(name: str, entry: Any, data: int, source: Source) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must be an object of dtype, shape and data_offsets, got {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype.isprintable() or len(dtype) > 32:
        raise ValueError(f"{name}: dtype must be a text, got {dtype!r:.80}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"{name}: {what} must be a list of whole numbers, got {numbers!r:.80}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name}: shape must have {MAX_DIMENSIONS} dimensions at most, got {len(shape)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name}: data_offsets must be [begin, end], got {offsets!r:.80}")
    bits, extent = DTYPES.get(dtype, (0, None))[0], 1
    for size in shape:
        extent *= max(size, 1)
        if extent > 2**56:  # also where another dimension is 0: strides are products, too
            raise ValueError(f"{name}: shape {shape!r:.80} is too large")
    expected = 0 if 0 in shape else extent * bits
    if bits and expected != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{name}: {shape!r:.80} {dtype} takes {expected / 8:.10g} bytes, but data_offsets {offsets} has "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, _ONE_OF_EACH.get(dtype, dtype), tuple(shape), data + offsets[0], data + offsets[1], source)


def _check_coverage(header: Header, data: int, size: int) -> None:
    """Each tensor begins where the one before it ends, the last one ends where the file ends."""
    position, before = data, "the header"
    for tensor in sorted(header.tensors.values(), key=attrgetter("begin", "end")):
        if tensor.begin != position:
            what = "overlaps" if tensor.begin < position else "leaves a gap after"
            raise ValueError(
                f"{tensor.name} {what} {before}: it must begin at {position - data}, got {tensor.begin - data}"
            )
        position, before = tensor.end, tensor.name
    if position != size:
        raise ValueError(f"it must have {position} bytes, up to the end of {before}, got {size}")


# --- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a new safetensors file front to back: the header at once, then the tensors' bytes as they come.

    ``tensors`` are (name, dtype as in :data:`DTYPES`, shape) in the order in which :meth:`write` will get their data.
    Leaving it as a context manager closes the file, and after a normal end checks that all was written. A file
    that is not complete is not readable as a safetensors file.

    Raises CheckpointError for what :func:`read_header` would refuse and for data that is too much, too little or out of
    order; OSError where the system cannot write, or if the file exists.
    """

    def __init__(
        self,
        file: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.file = file
        entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
        position, names = 0, []
        for name, dtype, shape in tensors:
            if dtype not in DTYPES:
                raise CheckpointError(f"{file}: {name} cannot be written as {dtype!r}, expected {', '.join(DTYPES)}")
            begin, position = position, position + _nbytes(dtype, shape)
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, position]}
            names.append(name)
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        try:
            header = _parse_header(text, Source(file, ()))
            if list(header.tensors) != names:
                raise ValueError(f"the names of tensors must be different, and not {METADATA}")
            if len(text) > MAX_HEADER_BYTES:
                raise ValueError(f"the header has {len(text)} bytes, expected {MAX_HEADER_BYTES} at most")
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be written: {error}") from error
        self._left = [(name, tensor.nbytes) for name, tensor in header.tensors.items()]  # still to come
        self._left.reverse()  # the current one last
        self._output = open(file, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            self._write(memoryview(struct.pack("<Q", len(text)) + text))
        except BaseException:
            self._output.close()
            raise

    def write(self, name: str, data: memoryview | bytes | bytearray) -> None:
        """The next bytes of tensor ``name``: the one begun last, or the next one after it is complete."""
        view = _flat(data)
        while self._left and self._left[-1][1] == 0 and self._left[-1][0] != name:
            self._left.pop()
        expected, left = self._left[-1] if self._left else ("nothing more", 0)
        if expected != name or len(view) > left:
            raise CheckpointError(
                f"{self.file}: expected {left} bytes of {expected} at most, got {len(view)} bytes of {name}"
            )
        self._write(view)
        self._left[-1] = (name, left - len(view))

    def close(self) -> None:
        """Raises CheckpointError if data is missing."""
        self._output.close()
        missing = next(((name, left) for name, left in reversed(self._left) if left), None)
        if missing is not None:
            raise CheckpointError(f"{self.file}: {missing[1]} bytes of {missing[0]} were not written")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._output.close()

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._output.write(view) :]


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    """The bytes that a tensor takes, if its shape makes any sense."""
    bits = DTYPES[dtype][0]
    for size in shape:
        bits *= size
    return bits // 8


def write_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The names of tensors (dtype, shape) in the order in which safetensors writes them.

    Large elements first, so that each tensor is aligned for its elements; then by name.
    """
    alignment = list(DTYPES)
    return sorted(tensors, key=lambda name: (-alignment.index(tensors[name][0]), name))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file has them: on the CPU, contiguous; a copy only where it has to be one."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _flat(array)
