"""The memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys


def peak() -> float:
    """The most that this process has had in memory, in GB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


class _Allocator(ctypes.Structure):
    """glibc's struct mallinfo2, of <malloc.h>."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*"abcdefgh", "free", "j"))


def give_back() -> None:
    """Have the C library return memory that was freed to the system, if it is much.

    glibc keeps what lies between pieces in use, and more with every block: 100 MB, where a block has 7 MB of weights.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim"):
        library.mallinfo2.restype = _Allocator
        if library.mallinfo2().free > 32 * 2**20:
            library.malloc_trim(ctypes.c_size_t(0))
