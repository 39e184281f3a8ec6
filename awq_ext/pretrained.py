"""Models and tokenizers from a directory or the hub, with errors that say what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from awq_ext.checkpoint import load_quantized
from awq_ext.errors import CheckpointError, UnsupportedModelError
from awq_ext.format import read_json, stated_quantization
from awq_ext.hub import resolve

if TYPE_CHECKING:
    pass


def load_any(
    path_or_repo: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a directory or hub repository, quantized by AWQ or not.

    Raises CheckpointError or UnsupportedModelError if they cannot be loaded completely.
    """
    path = resolve(path_or_repo)
    tokenizer = load_tokenizer(path)  # first: it is quick, and a missing one is the commoner mistake
    if is_quantized_directory(path):
        return load_quantized(path, device=device, dtype=dtype), tokenizer
    return load_float(path, dtype).to(device), tokenizer


def is_quantized_directory(path: Path) -> bool:
    """Whether a checkpoint directory says that its weights are quantized (by whatever method).

    Raises CheckpointError if it is no model directory.
    """
    config = read_json(path, "config.json")
    if config is None:
        raise CheckpointError(f"{path} has no config.json, so it is not a model directory, or not a complete one")
    return stated_quantization(path, config)[0] is not None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint directory, without running code from it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, TypeError or KeyError, as it happens
        raise CheckpointError(
            f"no tokenizer can be loaded from {path}: {_first_line(error)}\n"
            "Copy the tokenizer files (tokenizer.json, tokenizer_config.json) of the original model into it"
        ) from error
    return tokenizer


def load_float(path: Path, dtype: torch.dtype | str) -> Any:
    """A model that is not quantized, in evaluation mode on the CPU; ``dtype`` "auto" keeps the stored one.

    Code from the directory is not run.

    Raises CheckpointError if its weights are missing, damaged or pickled, UnsupportedModelError if transformers has
    no such causal language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as above
        raise UnsupportedModelError(f"{path / 'config.json'}: {_first_line(error)}") from error
    try:
        model, info = from_safetensors(path, config=config, dtype=dtype)
    except Exception as error:  # as above
        raise CheckpointError(f"{path} cannot be loaded: {_first_line(error)}") from error
    check_complete(path, info)
    return model.eval()


def from_safetensors(path: Path, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """transformers' causal language model, without running code from the directory, and what it says of loading.

    ``options`` go to its ``from_pretrained``, and what that raises comes through. See `check_complete`.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    model, info = loaded
    return model, info


def check_complete(path: Path, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError if files lack a tensor of the model, which transformers fills with random numbers.

    ``info`` is what it says of loading.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of the model, the first of them {missing[0]}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
