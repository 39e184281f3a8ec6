"""AWQ (Activation-aware Weight Quantization) for PyTorch: 4-bit weights, the whole road."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from awq_ext import _library
from awq_ext.errors import AwqError, CalibrationError, CheckpointError, LibraryError, UnsupportedModelError

__version__ = "0.1.0"

try:
    _library.load()

    from awq_ext import evaluate, functional, ops
    from awq_ext.auto import AutoAWQForCausalLM
    from awq_ext.checkpoint import load_quantized, save_quantized
    from awq_ext.convert import convert
    from awq_ext.functional import set_cpu_activation
    from awq_ext.linear import AwqLinear, explain
    from awq_ext.quantizer import quantize
    from awq_ext.swap import replace_linears
    from awq_ext.verify import verify
except LibraryError as error:
    # Nothing works without the libraries, but `awq-ext doctor` has to run to say why: so the import warns, and using
    # any of the names raises.
    _why = str(error)
    warnings.warn(f"awq_ext cannot compute: {_why}", RuntimeWarning, stacklevel=2)

    if not TYPE_CHECKING:

        def __getattr__(name: str) -> object:
            if name in __all__:
                raise LibraryError(_why)
            raise AttributeError(f"module 'awq_ext' has no attribute {name!r}")


__all__ = [
    "AutoAWQForCausalLM",
    "AwqError",
    "AwqLinear",
    "CalibrationError",
    "CheckpointError",
    "LibraryError",
    "UnsupportedModelError",
    "convert",
    "evaluate",
    "explain",
    "functional",
    "load_quantized",
    "ops",
    "quantize",
    "replace_linears",
    "save_quantized",
    "set_cpu_activation",
    "verify",
]
