"""Write a directory so that at every moment either the old one or the new one is there, whole."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AT_FDCWD = -100  # <fcntl.h>: paths are relative to the working directory
RENAME_EXCHANGE = 2  # <linux/fs.h>: renameat2 swaps the two names


@contextmanager
def replace_directory(out: Path, *, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Give the block an empty directory beside ``out`` to fill, then put it in ``out``'s place.

    Everything the block wrote is on the disk (fsync) before ``out`` changes. Entries of an existing ``out`` that the
    block did not write are kept, unless ``is_stale(name)``. If the block or anything else fails, ``out`` is what it
    was and the new directory is removed. A killed process leaves ``out`` whole, and at worst a directory
    ``.<name>.<random>.partial`` beside it, which the next call for the same ``out`` removes.

    Raises OSError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    partial, lock = _make_partial(out)
    try:
        yield partial
        for entry in partial.rglob("*"):
            sync(entry)
        if out.exists():
            shutil.copymode(out, partial)
            for name in os.listdir(out):
                if not is_stale(name) and not os.path.lexists(partial / name):
                    _link(out / name, partial / name)
        sync(partial)
        _swap(partial, out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the unfinished directory, or after the swap the old one
        if lock is not None:
            os.close(lock)


def _make_partial(out: Path) -> tuple[Path, int | None]:
    """A new directory beside ``out``, and the descriptor that locks it: None where the filesystem has no such locks."""
    while True:
        partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        try:
            return partial, _lock(partial)
        except (FileNotFoundError, BlockingIOError):
            continue  # before it was locked, another process has taken it for abandoned
        except OSError:
            return partial, None


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left beside ``out``: the directories that are not locked any more. Where the
    filesystem has no such locks (NFS), they cannot be told from those in use, and stay."""
    for partial in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError):
            lock = _lock(partial)
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int:
    """A descriptor of a directory that holds the lock on it for as long as it is open, so until the process dies.

    Raises BlockingIOError if another process holds it, FileNotFoundError if the directory is gone, OSError if the
    filesystem has no such locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(directory)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync(path: Path) -> None:
    """Wait until a file, or the list of a directory's files, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    """A second name for a file (or for every file of a tree); a copy where the filesystem has no hard links."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(new: Path, out: Path) -> None:
    """``out`` becomes ``new``; what was ``out`` is then at ``new`` or removed."""
    if not out.exists() or not os.listdir(out):
        os.rename(new, out)
    elif not _exchange(new, out):
        # Two renames: between them `out` is missing, but the old directory is whole beside it.
        old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
        os.rename(out, old)
        try:
            os.rename(new, out)
        except OSError:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step. False where the C library, the kernel or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and (
        renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), ctypes.c_uint(RENAME_EXCHANGE)) == 0
    )
