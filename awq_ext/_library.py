"""Finds and loads the compiled operator libraries, once, and explains itself where that fails."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from awq_ext.errors import LibraryError

OPS_LIBRARY = "libawq_ops.so"
CUDA_LIBRARY = "libawq_ops_cuda.so"

_loaded: dict[str, Path] = {}


def search_path() -> list[Path]:
    """Directories that may hold the libraries: $AWQ_LIB_DIR (a developer's build directory), then the package."""
    override = os.environ.get("AWQ_LIB_DIR")
    package_dirs = [Path(p) for p in sys.modules["awq_ext"].__path__]
    return ([Path(override)] if override else []) + package_dirs


def find(name: str) -> Path | None:
    return next((directory / name for directory in search_path() if (directory / name).is_file()), None)


def loaded() -> dict[str, Path]:
    """Name -> path of the operator libraries that this process has loaded."""
    return dict(_loaded)


def load() -> None:
    """Load the CPU library, and the CUDA one if it was built and torch has CUDA. Raises LibraryError."""
    if _loaded:
        return
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise LibraryError(f"awq_ext needs torch >= 2.10, found {torch.__version__}. Run: pip install 'torch>=2.10'")
    path = find(OPS_LIBRARY)
    if path is None:
        places = "\n  ".join(str(directory) for directory in search_path())
        raise LibraryError(
            f"{OPS_LIBRARY} was not found in\n  {places}\n"
            "It is compiled when the package is installed: run 'pip install .' in a checkout (with torch installed), "
            "or set AWQ_LIB_DIR to a build directory that has it."
        )
    if torch._C._dispatch_has_kernel("awq_ext::linear"):
        raise LibraryError(
            "another library has already registered operators in the torch namespace 'awq_ext'. "
            f"Remove it from this process; awq_ext would load {path}."
        )
    _load_one(path)
    cuda_path = find(CUDA_LIBRARY)
    if cuda_path is not None and torch.version.cuda is not None:
        _load_one(cuda_path)


def _load_one(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise LibraryError(f"{path} could not be loaded under torch {torch.__version__}: {error}") from error
    _loaded[path.name] = path


def native() -> ModuleType:
    """The torch-free helper module (build facts, CPU features, kernel plans). Raises LibraryError if absent."""
    override = os.environ.get("AWQ_LIB_DIR")
    package_path = sys.modules["awq_ext"].__path__
    if override and override not in package_path:
        package_path.insert(0, override)
    try:
        return importlib.import_module("awq_ext._native")
    except ImportError as error:
        raise LibraryError(
            f"awq_ext._native is not built for this Python ({sys.version.split()[0]}): {error}. "
            "The operators work without it; reinstall with 'pip install .' to have it."
        ) from error
