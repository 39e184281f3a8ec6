"""Files of ``torch.save``, for those who ask for them: a pickle inside a zip archive, read without running anything.

``<top>/data.pkl`` is a pickle of protocol 2 in which a tensor is a call of ``_rebuild_tensor_v2`` on a storage, and
``<top>/data/<key>`` has the storage's bytes, not compressed. Source: torch ``torch/serialization.py _save`` and
``_load``, and ``torch/_weights_only_unpickler.py``.

``torch.load(weights_only=True)`` runs no code of the file, but still does what the pickle says with what it knows:
``bytearray(10**12)`` allocates that much, a compressed storage is mapped as if it were none, and a mapped storage has
whatever length the pickle claims. So the archive and the names in the pickle are looked at before, the lengths after.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq_ext.errors import CheckpointError
from awq_ext.storage import NAME_OF, Header, Source, TensorInfo

# All that a dictionary of dense tensors refers to; torch.load would take some eighty more.
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
MAX_PICKLE_BYTES = 16 * 2**20
MAX_OPCODES = 500_000  # torch.save writes 35 for a tensor; what one of them can allocate is about a hundred bytes
TIES = 4  # tied weights share a storage; so do a million views of one, which would fill a disk when written out


@dataclass(frozen=True)
class Pickled:
    """What a file holds, and where in the file the bytes of each storage are, in the order of the file.

    Tensors in ``content`` are views of the mapped file: to be copied at once, while nobody truncates it.
    """

    source: Source
    content: Any
    storages: tuple[range, ...]

    def places(self, tensors: Iterable[Tensor]) -> dict[int, range]:
        """Address of each storage of these tensors, which are all in the file -> its place in the file.

        The file is mapped as a whole, so addresses differ as places do. Raises CheckpointError if they do not: then
        the pickle claims other lengths than the storages have.
        """
        storages = (tensor.untyped_storage() for tensor in tensors)
        lengths = dict(sorted((storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()))
        if list(lengths.values()) != [len(place) for place in self.storages]:
            raise CheckpointError(
                f"{self.source.file} is damaged: it holds {len(self.storages)} storages with "
                f"{sum(map(len, self.storages))} bytes, but its tensors refer to {len(lengths)} with "
                f"{sum(lengths.values())}; get the file again"
            )
        places = dict(zip(lengths, self.storages, strict=True))
        if len({address - place.start for address, place in places.items()}) > 1:
            raise CheckpointError(f"{self.source.file}: torch.load did not map it; save it again with torch.save")
        return places


def load(file: str | os.PathLike[str], *, allow_pickle: bool) -> Pickled:
    """Read a file with ``torch.load(weights_only=True)``, if ``allow_pickle`` says so.

    Raises CheckpointError without it; if there is no such file; if it is no zip archive (torch's format before 1.6
    included), truncated, compressed, or has records that overlap; if its pickle refers to anything but dictionaries
    and dense tensors or is absurdly long; and for whatever torch.load raises.
    """
    file = Path(file).expanduser()
    source = Source.of(file)
    if not allow_pickle:
        raise CheckpointError(
            f"{file} is a pickle, which awq_ext reads only if told to: pass allow_pickle=True (on the command line "
            "--allow-pickle) if you know where the file comes from. It is then read with torch.load(weights_only=True)"
        )
    try:
        pickle, storages = _read_archive(file)
        _check_pickle(file, pickle)
        content = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{file} is truncated, or is no file of torch.save (a zip archive, since torch 1.6): {error}"
        ) from error
    except Exception as error:  # of zipfile, pickletools and torch: whatever a wrong byte leads to
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {reason}") from error
    return Pickled(source, content, storages)


def read_state_dict(file: str | os.PathLike[str], *, allow_pickle: bool) -> Header:
    """The tensors of a pickled state dict, as :func:`awq_ext.storage.read_header` gives those of a safetensors file.

    That is a plain dictionary of names and tensors such as ``torch.save(model.state_dict(), file)`` writes. Their data
    is not read here but by :meth:`TensorInfo.read`, straight from the file and one at a time. Tied weights come under
    all their names.

    llm-awq's ``--dump_quant`` writes one (``awq/entry.py``), with ``-v2`` at the end of its name: for each linear of
    the decoder blocks ``qweight`` int16, ``scales``, ``scaled_zeros`` and maybe ``bias``, for an activation that it
    scales ``<activation>.scales``, and everything else as it was. Names are those of the transformers class, as in its
    safetensors files, with ``llm.`` in front if the language model is part of a VILA; TinyChat's classes use the same.
    Files from before March 2024 have ``qweight`` int32 and ``qzeros`` int32 of the older layout.

    Raises CheckpointError as :func:`load`, and, naming the tensor, if a name is no printable text or a value is no
    dense contiguous tensor of a type that safetensors has, or if tensors are much larger than the file together.
    """
    pickled = load(file, allow_pickle=allow_pickle)
    path, content = pickled.source.file, pickled.content
    if not isinstance(content, dict) or not len(content):
        raise CheckpointError(f"{path} must hold a dictionary of tensors, got {_describe(content)}")
    if set(dict.keys(content)) == {"scale", "clip"}:
        raise CheckpointError(
            f"{path} holds the results of llm-awq's search and no weights; give it to quantize as search_results "
            "(--search-results), together with the original model"
        )
    # Methods of dict and not of the object: a pickle may give an OrderedDict an attribute called "items".
    for name, tensor in dict.items(content):
        if type(name) is not str or not name.isprintable() or not name:
            raise CheckpointError(f"{path}: names must be printable text, got {_describe(name)}")
        check_dense(f"{path}: {name}", tensor)
    total, size = sum(tensor.nbytes for tensor in dict.values(content)), path.stat().st_size
    if total > TIES * size:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors have {total}: too many share their memory")
    places = pickled.places(dict.values(content))
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in dict.items(content):
        place = places.get(tensor.untyped_storage().data_ptr(), range(0)) if tensor.nbytes else range(0)
        begin = place.start + tensor.storage_offset() * tensor.element_size() if tensor.nbytes else 0
        dtype = NAME_OF[tensor.dtype]
        tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape), begin, begin + tensor.nbytes, pickled.source)
    return Header(pickled.source, tensors)


def check_dense(where: str, value: object) -> None:
    """Raises CheckpointError unless this is a plain contiguous tensor in memory, of a type that safetensors has."""
    # type, and not isinstance: no subclass, no Parameter.
    if type(value) is not Tensor:
        raise CheckpointError(f"{where} must be a tensor, got {_describe(value)}")
    dense = value.layout == torch.strided and not value.is_meta and not value.is_neg() and not value.is_conj()
    if not dense or value.dtype not in NAME_OF or not value.is_contiguous():
        raise CheckpointError(f"{where} must be a dense contiguous tensor, got {_describe(value)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} {value.layout} on {value.device} with strides {value.stride()}"
    return f"{value[:100]!r}" if type(value) is str else f"a {type(value).__name__}"


def _read_archive(file: Path) -> tuple[bytes, tuple[range, ...]]:
    """The pickle, and the places of the storages' bytes."""
    with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        records: dict[str, range] = {}
        tops = {entry.filename.partition("/")[0] for entry in entries}
        limits = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
        for entry, limit in zip(entries, limits, strict=True):
            name = entry.filename.partition("/")[2]
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or name in records or len(tops) > 1:
                raise CheckpointError(
                    f"{file}: {entry.filename!r} must be there once, not compressed and not encrypted, beside all "
                    "other records; this is no file of torch.save"
                )
            # The length of what is between an entry's header and its bytes stands in that header alone.
            stream.seek(entry.header_offset)
            *_, name_length, extra_length = struct.unpack("<26s2H", stream.read(30))
            begin = entry.header_offset + 30 + name_length + extra_length
            if begin + entry.file_size > limit or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{file} is damaged: {entry.filename!r} reaches into what comes after it")
            records[name] = range(begin, begin + entry.file_size)
        pickle = records.get("data.pkl")
        if pickle is None or len(pickle) > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{file} must hold a record data.pkl of {MAX_PICKLE_BYTES} bytes at most, as files of torch.save do; "
                f"got {'none' if pickle is None else len(pickle)}"
            )
        if "byteorder" in records:
            stream.seek(records["byteorder"].start)
            order = stream.read(len(records["byteorder"]))
            if order != b"little":
                raise CheckpointError(f"{file}: byteorder must be little, got {order[:10]!r}")
        stream.seek(pickle.start)
        return stream.read(len(pickle)), tuple(
            record for name, record in records.items() if name.startswith("data/") and len(record)
        )


def _check_pickle(file: Path, pickle: bytes) -> None:
    # GLOBAL is the only opcode for a name that torch's unpickler knows.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        if opcode.name == "GLOBAL" and argument not in GLOBALS:
            raise CheckpointError(
                f"{file}: its pickle refers to {'.'.join(str(argument).split())[:100]!r}, but only dictionaries and "
                "dense tensors are expected there"
            )
        if count >= MAX_OPCODES:
            raise CheckpointError(f"{file}: its pickle has more than {MAX_OPCODES} instructions, which no model needs")
