"""The memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

SMALL = 0.9
"""Less than this, in GB, `give_back_near_peak` leaves alone. A process that imported torch and transformers has 0.3."""

NEAR = 64e-3
"""And what is further than this from the most ever, in GB."""


def peak() -> float:
    """The most that this process has had in memory, in GB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def current() -> float:
    """What this process has in memory, in GB, as Linux says; 0 elsewhere."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9 if statm.exists() else 0.0


def give_back() -> None:
    """Have the C library return memory that was freed to the system.

    glibc keeps what lies between pieces in use, and more with every block: 100 MB, where a block has 7 MB of weights.
    It is not asked first how much that is: it counts what it has returned before, too, and takes as long to count.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def give_back_near_peak() -> None:
    """`give_back` if the process has much in memory, and about as much as it ever had: the peak hardly grows.

    Not otherwise: memory got from the system again is a page fault and zeros for every 4 KiB, which are a tenth of the
    time that SmolLM2-135M takes if all is given back after every second batch. Batches of larger models take longer.
    """
    if current() > max(SMALL, peak() - NEAR):
        give_back()
