"""AutoAWQ's face: a script written for ``from awq import AutoAWQForCausalLM`` runs with the import changed.

Parameter names and their order are those of AutoAWQ 0.2.9 (``awq/models/auto.py``, ``awq/models/base.py``). What has
no counterpart here is accepted where leaving it out changes no result, and refused where it would.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from awq_ext.checkpoint import load_quantized, save_quantized
from awq_ext.errors import CheckpointError, UnsupportedModelError
from awq_ext.format import Checkpoint
from awq_ext.hub import resolve
from awq_ext.pretrained import check_complete, from_safetensors, is_quantized_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = (None, "auto", "balanced", "balanced_low_0", "sequential")  # device maps that leave the choice to the loader


class AutoAWQForCausalLM(nn.Module):
    """A transformers causal language model with AutoAWQ's methods: ``quantize``, ``save_quantized``, ``generate``.

    Made by :meth:`from_pretrained` (a model to quantize) or :meth:`from_quantized`; the model itself is ``.model``.
    Code that a checkpoint brings along is never run, whatever ``trust_remote_code`` says; only safetensors are read.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, source: Path) -> None:
        super().__init__()
        self.model = model
        self.source = source  # where it was loaded from; its tokenizer files are saved along
        self.train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike[str],
        torch_dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = True,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        **model_init_kwargs: Any,
    ) -> AutoAWQForCausalLM:
        """Load a model that is to be quantized, from a directory or the hub.

        ``torch_dtype`` "auto" keeps the stored one. ``device_map`` must leave the choice open (then: the CPU) or name
        one device. ``download_kwargs`` may hold revision, cache_dir and local_files_only. Further arguments go to
        transformers' ``from_pretrained``; ``low_cpu_mem_usage`` and ``use_cache`` change nothing.

        Raises CheckpointError for a pickled, damaged or quantized model, UnsupportedModelError for an architecture
        that transformers does not know, ValueError for several devices or another key in ``download_kwargs``.
        """
        _only_safetensors(safetensors)
        device = _one_device(device_map, "cpu")
        path = _fetched(model_path, download_kwargs)
        if is_quantized_directory(path):
            raise CheckpointError(f"{path} is quantized already; use from_quantized, or give the original model")
        try:
            model, info = from_safetensors(path, torch_dtype=torch_dtype, **model_init_kwargs)
        except OSError as error:
            raise CheckpointError(f"{path} could not be loaded: {error}") from error
        except ValueError as error:
            raise UnsupportedModelError(f"{path}: {error}") from error
        check_complete(path, info)
        model.to(device)
        model.eval()
        return cls(model, path)

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | os.PathLike[str],
        quant_filename: str = "",
        max_seq_len: int | None = None,
        trust_remote_code: bool = True,
        fuse_layers: bool = True,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = None,
        max_memory: Any = None,
        offload_folder: str | None = None,
        download_kwargs: Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> AutoAWQForCausalLM:
        """Load a quantized checkpoint in whatever layout (see :func:`awq_ext.load_quantized`).

        ``quant_filename`` is checked to be a weight file of the checkpoint. ``device_map`` must leave the choice open
        (then: the first CUDA device, else the CPU) or name one device. ``download_kwargs`` may hold revision,
        cache_dir and local_files_only. ``max_seq_len`` and ``batch_size`` sized AutoAWQ's fused caches, and
        ``use_exllama``, ``use_exllama_v2``, ``use_ipex`` chose its kernels: they change nothing here.

        Raises CheckpointError, UnsupportedModelError as load_quantized does; ValueError for several devices, limits
        of memory, offloading or another key in ``download_kwargs``.
        """
        _only_safetensors(safetensors)
        if fuse_layers:
            _say_unfused()
        if max_memory is not None or offload_folder is not None:
            raise ValueError("max_memory and offload_folder are not supported: a model is on one device, as a whole")
        device = _one_device(device_map, "cuda" if torch.cuda.is_available() else "cpu")
        path = _fetched(quant_path, download_kwargs)
        if quant_filename and quant_filename not in (shards := Checkpoint.open(path).shards):
            raise CheckpointError(f"{path}: {quant_filename!r} is not one of its weight files: {', '.join(shards)}")
        return cls(load_quantized(path, device=device, dtype=torch_dtype), path)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def quant_config(self) -> dict[str, Any] | None:
        """The ``quantization_config`` of a quantized model, else None."""
        return getattr(self.model.config, "quantization_config", None)

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | None = None,
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int = 1024**3,
        **kwargs: Any,
    ) -> None:
        """Quantize the model in place (see :func:`awq_ext.quantize`, which also takes ``kwargs``).

        ``quant_config``: AutoAWQ's ``{"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}``.
        ``calib_data``: a list of texts or of token ids, a text file, or a dataset on the hub (``split`` of it).
        ``n_parallel_calib_samples`` and ``max_chunk_memory`` bounded AutoAWQ's memory; they change nothing here.

        Raises ValueError for ``export_compatible``, another ``text_column`` or a ``w_bit`` that cannot be saved, and
        whatever awq_ext.quantize raises.
        """
        from awq_ext.quantizer import quantize

        if export_compatible:
            raise ValueError("export_compatible is not supported; the model is quantized and packed in one step")
        if text_column != "text":
            raise ValueError(f"text_column {text_column!r} is not supported; pass the texts themselves as calib_data")
        w_bit = (quant_config or {}).get("w_bit", 4)
        if w_bit != 4:
            raise ValueError(f"w_bit must be 4, which is all that checkpoints hold, got {w_bit!r}")
        if isinstance(calib_data, str) and calib_data != "pileval" and split != "train":
            calib_data = f"{calib_data}:{split}"
        quantize(
            self.model,
            tokenizer,
            quant_config=quant_config,
            calibration=calib_data,
            samples=max_calib_samples,
            seq_len=max_calib_seq_len,
            duo_scaling=duo_scaling,
            apply_clip=apply_clip,
            **kwargs,
        )

    def save_quantized(
        self, save_dir: str | os.PathLike[str], safetensors: bool = True, shard_size: int | str = "5GB"
    ) -> None:
        """Write the checkpoint and the original's tokenizer files (see :func:`awq_ext.save_quantized`)."""
        _only_safetensors(safetensors)
        save_quantized(self.model, save_dir, max_shard_size=shard_size, source=self.source)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``, without gradients."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]


def _only_safetensors(safetensors: bool) -> None:
    if not safetensors:
        raise CheckpointError(
            "pickles are neither read nor written, since one can run any code; leave safetensors=True"
        )


def _fetched(path_or_repo: str | os.PathLike[str], download_kwargs: Mapping[str, Any] | None) -> Path:
    known = ("revision", "cache_dir", "local_files_only")
    unknown = [key for key in download_kwargs or () if key not in known]
    if unknown:
        raise ValueError(f"download_kwargs may hold {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return resolve(path_or_repo, **(download_kwargs or {}))


def _one_device(device_map: Any, default: str) -> torch.device:
    """The device that a device_map names for the whole model."""
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ValueError(f"device_map must name one device for the whole model, got {dict(device_map)}")
        device_map = places.pop()
    if device_map in PLACES:
        device_map = default
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map must be a device such as 'cpu' or 'cuda:0', got {device_map!r}: {error}"
        ) from error


@functools.cache  # once a process
def _say_unfused() -> None:
    warnings.warn(
        "fuse_layers=True: awq_ext does not fuse layers; results are the same without", UserWarning, stacklevel=3
    )
