"""AWQ (Activation-aware Weight Quantization) for PyTorch: 4-bit weights, the whole road."""

from __future__ import annotations

__version__ = "0.1.0"

from awq_ext import _library

_library.load()

from awq_ext import functional, ops  # noqa: E402  (the operators must be registered first)
from awq_ext.auto import AutoAWQForCausalLM  # noqa: E402
from awq_ext.checkpoint import load_quantized, save_quantized  # noqa: E402
from awq_ext.errors import (  # noqa: E402
    AwqError,
    CalibrationError,
    CheckpointError,
    LibraryError,
    UnsupportedModelError,
)
from awq_ext.linear import AwqLinear  # noqa: E402
from awq_ext.quantizer import quantize  # noqa: E402
from awq_ext.swap import replace_linears  # noqa: E402

__all__ = [
    "AutoAWQForCausalLM",
    "AwqError",
    "AwqLinear",
    "CalibrationError",
    "CheckpointError",
    "LibraryError",
    "UnsupportedModelError",
    "functional",
    "load_quantized",
    "ops",
    "quantize",
    "replace_linears",
    "save_quantized",
]
