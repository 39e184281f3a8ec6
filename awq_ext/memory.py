"""The memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys


def peak() -> float:
    """The most that this process has had in memory, in GB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def give_back() -> None:
    """Have the C library return memory that was freed to the system.

    glibc keeps what lies between pieces in use, and more with every block: 100 MB, where a block has 7 MB of weights.
    It is not asked first how much that is: it counts what it has returned before, too, and takes as long to count.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
