"""The exceptions a user meets. Each message says what is wrong, what was expected, what was got and what to do."""

from __future__ import annotations


class AwqError(Exception):
    """Base of every error that awq_ext raises on purpose; the command line prints it without a traceback."""


class CheckpointError(AwqError, ValueError):
    """A checkpoint directory is missing, damaged, or not of a kind that can be read."""


class UnsupportedModelError(AwqError, ValueError):
    """The model's architecture or state (already quantized, fp8) cannot be quantized."""


class CalibrationError(AwqError, ValueError):
    """The calibration data is missing, too short, or gives activations that are not finite."""


class LibraryError(AwqError, ImportError):
    """The compiled operator library cannot be found or loaded."""
