"""Load a quantized checkpoint into a transformers model, and write one in AutoAWQ's ``gemm`` layout.

The format itself, and the checks on what is read, are in :mod:`awq_ext.format`.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from awq_ext.atomic import replace_directory
from awq_ext.config import QuantConfig
from awq_ext.errors import CheckpointError, UnsupportedModelError
from awq_ext.experts import open_experts
from awq_ext.format import (
    INDEX,
    LEGACY_QUANT_FILES,
    QUANT_KEYS,
    SINGLE,
    Checkpoint,
    read_json,
    stated_quantization,
    without,
)
from awq_ext.hub import resolve
from awq_ext.layouts import FLOATS, check_scales, layouts
from awq_ext.linear import AwqLinear
from awq_ext.names import Names
from awq_ext.relayout import Converted, Target
from awq_ext.scaled import ScaledActivation, insert_scaled_activations
from awq_ext.storage import NAME_OF, TensorInfo, Writer, bytes_of, write_order
from awq_ext.swap import as_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Checkpoint", "QuantConfig", "is_quantized", "load_quantized", "resolve", "save_quantized"]

SHARD_PATTERN = "model-?????-of-?????.safetensors"
# Keys of config.json that would have transformers load or choose something else than a plain model of this type: its
# own quantizers, code of the checkpoint, and (a remnant that transformers 4 writes) slow attention.
NOT_FOR_BUILDING = (*QUANT_KEYS, "auto_map", "_attn_implementation_autoset")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# What belongs to a tokenizer or processor, and is copied from the original model as it is.
TOKENIZER_FILES = (
    "*token*.json",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
)


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has at least one AwqLinear."""
    return any(isinstance(module, AwqLinear) for module in model.modules())


# --- loading --------------------------------------------------------------------------------------------------------


def load_quantized(
    path_or_repo: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Load a quantized checkpoint as a transformers causal language model, in eval mode, on ``device``.

    The checkpoint may be in any layout of :func:`awq_ext.layouts.layouts`; the tensors tell which. Its quantized
    linears become AwqLinear with the same codes, zeros and scales, in the layout for the device. Their scales
    and biases keep their stored dtypes, since rounding float16 scales to bfloat16 would change every weight. The same
    holds for the activations that have ``scales`` in the files and divide by them
    (:class:`awq_ext.scaled.ScaledActivation`). All other weights are cast to ``dtype``: float32, float16 or bfloat16,
    None for the one that config.json names. The model is built without memory for its weights and filled tensor by
    tensor. Code from the checkpoint is never run.

    Raises CheckpointError (see :meth:`Checkpoint.open`; also where tensors and model disagree, naming them),
    UnsupportedModelError if transformers has no such causal language model, ValueError for another dtype.
    """
    stored = Checkpoint.open(path_or_repo, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    checkpoint = Converted(stored, layouts()["gemm"])  # the layout that AwqLinear is filled in
    if dtype is None:
        dtype = _stored_dtype(checkpoint)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    model = skeleton(checkpoint, dtype)
    names = Names(model)
    fused = open_experts(model, stored={names.in_model(name) for name in checkpoint.info})
    _swap_linears(checkpoint, model, fused)
    insert_scaled_activations(checkpoint, model)
    places = Places(checkpoint, model, dtype)
    places.fill(places.of, device)
    model.to(torch.device(device))  # type: ignore[arg-type]  # the buffers that are in no file; linears repack
    check_filled(model)
    model.config.quantization_config = replace(stored.quant, version="gemm", zero_point=True).to_dict()
    return model


def check_filled(model: nn.Module) -> None:
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise UnsupportedModelError(f"{type(model).__name__} keeps weights outside its state dict: {_some(left)}")


def _stored_dtype(checkpoint: Converted) -> torch.dtype:
    """The dtype that config.json names, else that of the largest weight that is not quantized."""
    for fields in _text_fields(checkpoint.config):
        name = fields.get("dtype") or fields.get("torch_dtype")
        if isinstance(name, str) and name in DTYPES:
            return DTYPES[name]
    others = [t for name, t in checkpoint.info.items() if t.dtype in FLOATS and not name.endswith(".scales")]
    largest = max(others, key=lambda t: torch.Size(t.shape).numel(), default=None)
    return torch.float16 if largest is None else FLOATS[largest.dtype]


def _text_fields(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Where config.json describes the language model: at the top, and in the text_config of a multimodal one."""
    return [fields for fields in (config, config.get("text_config")) if isinstance(fields, dict)]


def skeleton(checkpoint: Stored, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary frequencies are in no file).

    Raises UnsupportedModelError if transformers has no such causal language model, CheckpointError if the files that
    describe it make no sense.
    """
    try:
        from accelerate import init_empty_weights
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise CheckpointError(
            f"a model needs transformers and accelerate: pip install 'awq_ext[hf]' ({error})"
        ) from error
    file = checkpoint.path / "config.json"
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file} must name a 'model_type', got {kind!r}")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{file}: the installed transformers has no model of type '{kind}'; try a newer one "
            "(pip install -U transformers). Models that bring their own code are not loaded"
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{file}: transformers has no causal language model of type '{kind}', and only those are loaded"
        )
    for fields in _text_fields(checkpoint.config):
        for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            layers, most = fields.get(key), len(checkpoint.info)  # each layer has a tensor at least
            if isinstance(layers, int) and layers > most:
                raise CheckpointError(f"{file}: '{key}' is {layers}, but the files hold {most} tensors")
    fields = without(checkpoint.config, NOT_FOR_BUILDING)
    fields["dtype"] = fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    try:
        config = CONFIG_MAPPING[kind].from_dict(fields)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()  # init_empty_weights gives each of two tied parameters a tensor of its own
    except Exception as error:  # whatever a wrong value leads to, deep in a model's constructor
        raise CheckpointError(f"{file} does not describe a '{kind}' model: {type(error).__name__}: {error}") from error
    if read_json(checkpoint.path, "generation_config.json") is not None:
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
        except Exception as error:  # whatever a wrong value leads to
            raise CheckpointError(f"{checkpoint.path / 'generation_config.json'} is not valid: {error}") from error
    return model.eval()


def _swap_linears(checkpoint: Converted, model: nn.Module, fused: Mapping[str, str]) -> None:
    """``fused``: the reasons of `open_experts`."""
    modules, names, ignored = dict(model.named_modules()), Names(model), _ignored(model)
    for stored, linear in checkpoint.linears.items():
        name = names.in_model(f"{stored}.weight").removesuffix(".weight")
        module = modules.get(name)
        if module is None and ignored.search(f"{stored}.weight"):
            continue
        where = f"{checkpoint.path}: {stored}"
        if not isinstance(module, nn.Linear):
            got = "no module" if module is None else type(module).__name__
            module = None if module is None else as_linear(module)
        if module is None:
            why = next((f": {reason}" for owner, reason in fused.items() if name.startswith(f"{owner}.")), "")
            raise CheckpointError(f"{where} is quantized in the files, but the model has {got} there, no Linear{why}")
        expected = (module.in_features, module.out_features)
        if expected != (linear.in_features, linear.out_features):
            raise CheckpointError(
                f"{where}: the model's Linear has in_features, out_features {expected}, "
                f"the files {(linear.in_features, linear.out_features)}"
            )
        parent, _, child = name.rpartition(".")
        bias = module.bias is not None
        setattr(modules[parent], child, AwqLinear(*expected, bias=bias, group_size=linear.group_size, device="meta"))


class Stored(Protocol):
    """Tensors in files; those of `linears` (full names) keep their types."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def info(self) -> Mapping[str, TensorInfo | Target]: ...
    @property
    def linears(self) -> Collection[str]: ...
    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...


class Places:
    """Which stored tensor belongs where in a model made by `skeleton`, and in which type."""

    def __init__(self, checkpoint: Stored, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Raises CheckpointError, naming tensors, unless files and model agree on names, shapes and kinds."""
        self.checkpoint, self.model = checkpoint, model
        tensors, names = model.state_dict(keep_vars=True), Names(model)
        stored_as = {names.in_model(name): name for name in checkpoint.info}
        in_model = {stored_as.get(name, name): name for name in tensors}
        state = {name: tensors[there] for name, there in in_model.items()}
        tied: dict[int, list[str]] = {}  # identity of a tensor -> all its names: tied weights have several
        for name, tensor in state.items():
            tied.setdefault(id(tensor), []).append(name)
        wanted = _match(checkpoint, model, state, list(tied.values()))

        float32 = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            float32 |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        in_float32 = re.compile("|".join(rf"(^|\.){part}($|\.)" for part in sorted(float32)) or r"(?!)")

        self.of: dict[str, tuple[str, ...]] = {}
        """For each stored tensor, its names in the model."""
        self._types: dict[str, torch.dtype | None] = {}
        for name in wanted:
            target = state[name]
            self.of[name] = tuple(in_model[other] for other in tied[id(target)])
            if name.rpartition(".")[0] in checkpoint.linears or not target.is_floating_point():
                self._types[name] = None
            elif isinstance(target, nn.Parameter):
                self._types[name] = torch.float32 if in_float32.search(in_model[name]) else dtype
            else:
                self._types[name] = target.dtype

    def values(self, stored: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These stored tensors in the types that the model has them in."""
        for name, value in self.checkpoint.tensors(stored):
            yield name, value.to(self._types[name] or value.dtype)

    def fill(self, stored: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Give these tensors their places in the model. Raises CheckpointError if tied ones differ."""
        tied: dict[tuple[str, ...], tuple[str, Tensor]] = {}  # of the others none is kept here: there may be no room
        for name, value in self.values(stored):
            places = self.of[name]
            first, held = tied.setdefault(places, (name, value)) if len(places) > 1 else (name, value)
            if first == name:
                _assign(self.model, places, value.to(device))
            elif not torch.equal(held, value):
                raise CheckpointError(
                    f"{self.checkpoint.path}: config.json ties {name} to {first}, but their values differ; "
                    "set 'tie_word_embeddings' to false there if they are meant to"
                )

    def clear(self, stored: Iterable[str]) -> None:
        """Put these tensors back on the meta device, with the dtypes in which they are filled."""
        for name in stored:
            *parents, last = self.of[name][0].split(".")
            held = getattr(self.model.get_submodule(".".join(parents)), last)
            dtype = self._types[name] or held.dtype
            _assign(self.model, self.of[name], torch.empty_like(held, dtype=dtype, device="meta"))


def _assign(model: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Put one tensor in all the places where the model has it."""
    parent, _, child = names[0].rpartition(".")
    held = getattr(model.get_submodule(parent), child)
    tensor = nn.Parameter(value, held.requires_grad) if isinstance(held, nn.Parameter) else value
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, tensor)


def _match(checkpoint: Stored, model: PreTrainedModel, state: dict[str, Tensor], tied: list[list[str]]) -> list[str]:
    """The stored names to load; raises CheckpointError unless files and model agree on names, shapes and types."""
    missing = [names[0] for names in tied if not any(name in checkpoint.info for name in names)]
    if missing:
        raise CheckpointError(f"{checkpoint.path} lacks tensors that the model needs: {_some(missing)}")
    ignored = _ignored(model)
    unexpected = [
        name
        for name in checkpoint.info
        if name not in state and not ignored.search(name) and not _is_idle_bias(checkpoint, name)
    ]
    if unexpected:
        raise CheckpointError(f"{checkpoint.path} has tensors that the model does not know: {_some(unexpected)}")
    wanted = [name for name in checkpoint.info if name in state]
    for name in wanted:
        tensor, target = checkpoint.info[name], state[name]
        if tensor.shape != tuple(target.shape) or (tensor.dtype in FLOATS) != target.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path / tensor.shard}: {name} must be {list(target.shape)} {target.dtype}, "
                f"got {list(tensor.shape)} {tensor.dtype}"
            )
    return wanted


def _ignored(model: nn.Module) -> re.Pattern[str]:
    """Names of tensors in files that the model does without: what it says itself, such as layers that predict several
    tokens ahead, and derived values that older versions of transformers stored."""
    said = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return re.compile("|".join(f"(?:{pattern})" for pattern in (r"rotary_emb\.inv_freq$", *said)))


def _is_idle_bias(checkpoint: Stored, name: str) -> bool:
    """Whether this is a quantized linear's bias, and zero. Older versions of AutoGPTQ gave one to every linear, also
    where the model has none; Qwen2's GPTQ files are such (QwenLM/Qwen3, issue 714)."""
    owner = name.removesuffix(".bias")
    if owner == name or owner not in checkpoint.linears:
        return False
    return not any(bool(bias.any()) for _, bias in checkpoint.tensors([name]))


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- writing --------------------------------------------------------------------------------------------------------


def save_quantized(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_size: int | str = "5GB",
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model with AwqLinear modules as an AutoAWQ ``gemm`` checkpoint and return the directory.

    Writes config.json, generation_config.json, model.safetensors (or shards of at most ``max_shard_size`` bytes, or a
    text such as "5GB", with an index), the files of ``tokenizer``, and copies of the tokenizer files in the directory
    ``source`` (usually the original model's). Tied weights are written once; float32 scales are written as float16
    where that is exact.

    All is written beside ``out`` first, read back and synced, then put in its place: an existing checkpoint is
    replaced at the end or, whatever fails, stays as it is. Its files that are no part of a checkpoint are kept.

    Raises CheckpointError if ``out`` is a link, a mount point, a file, a directory of other things or an unquantized
    model; if there is too little space or writing fails; if scales are not finite and non-zero or group sizes differ.
    UnsupportedModelError if the model is no transformers model with an AwqLinear.
    """
    return write_checkpoint(model, out, tokenizer, max_shard_size=max_shard_size, source=source)


def write_checkpoint(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_shard_size: int | str = "5GB",
    source: str | os.PathLike[str] | None,
    read: Callable[[str], Tensor] | None = None,
) -> Path:
    """:func:`save_quantized` of a model whose tensors may be on the meta device if ``read`` gives their values.

    ``read`` is called with the model's name of each of them when it is written, and not before.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"a checkpoint is made of a transformers model, got {type(model).__name__}")
    out = Path(out).expanduser().absolute()
    check_replaceable(out)
    quant = _describe(model)
    tensors, in_model = _tensors_to_write(model, on_meta=read is not None)
    source = None if source is None else Path(source)
    if source is not None and not source.is_dir():
        raise CheckpointError(f"{source}, to copy tokenizer files from, is not a directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(out.parent).free
        if needed > free:
            raise CheckpointError(
                f"{out} needs {needed / 1e9:.2f} GB (an existing checkpoint is replaced only once the new one is "
                f"complete), but {out.parent} has {free / 1e9:.2f} GB free"
            )
        with replace_directory(out, is_stale=is_weight_file) as partial:
            _write_json(partial / "config.json", _config_fields(model, quant))
            if model.can_generate():
                model.generation_config.to_json_file(partial / "generation_config.json")
            _write_weights(
                partial,
                tensors,
                lambda name: read(in_model[name]) if read and tensors[name].is_meta else tensors[name],
                max_shard_size,
            )
            for pattern in TOKENIZER_FILES if source is not None else ():
                for file in source.glob(pattern):  # type: ignore[union-attr]
                    shutil.copyfile(file, partial / file.name)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            Checkpoint.open(partial)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written, and is as it was before: {error}") from error
    return out


def is_weight_file(name: str) -> bool:
    return name in (SINGLE, INDEX, *LEGACY_QUANT_FILES) or fnmatch.fnmatch(name, SHARD_PATTERN)


def check_replaceable(out: Path) -> None:
    """Refuses to put a checkpoint where it would destroy something else."""
    if out.is_symlink():
        raise CheckpointError(f"{out} is a link to {out.resolve()}; give that path itself")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a directory, it may exist already")
    if out.is_mount():
        raise CheckpointError(f"{out} is a mount point and cannot be replaced as a whole; give a directory in it")
    if not any(out.iterdir()):
        return
    config = read_json(out, "config.json")
    if config is None:
        raise CheckpointError(f"{out} is not empty and holds no config.json; it is not a checkpoint to be replaced")
    if stated_quantization(out, config)[0] is None:
        raise CheckpointError(f"{out} holds a model that is not quantized, and would be lost; give another directory")


def _describe(model: PreTrainedModel) -> QuantConfig:
    """The QuantConfig that is true of the model's modules."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, AwqLinear)}
    if not linears:
        raise UnsupportedModelError(f"{type(model).__name__} has no AwqLinear to write; quantize the model first")
    for name, module in model.named_modules():
        if isinstance(module, (AwqLinear, ScaledActivation)) and not module.scales.is_meta:
            check_scales(f"{name}.scales", module.scales.t())
    sizes = {module.group_size for module in linears.values()}
    if len(sizes) > 1 and any(module.group_size != module.in_features for module in linears.values()):
        raise CheckpointError(f"a checkpoint has one group size for all its linears, the model has {sorted(sizes)}")
    # Zeros are always stored (8 everywhere for symmetric rounding), and readers may refuse to look for them at False.
    return QuantConfig(
        group_size=-1 if len(sizes) > 1 else sizes.pop(), zero_point=True, modules_to_not_convert=_skipped(model)
    )


def _skipped(model: PreTrainedModel) -> tuple[str, ...]:
    """Names for readers that convert every Linear: of those that are none here.

    What is no Linear here may be one there, as a router is. AutoAWQ looks for each name in that of a linear within its
    block, transformers 4, vLLM and SGLang in the whole name, transformers 5 at its end: so it is the name within the
    block, where no quantized linear's has it in it, and else the whole. The head they never convert, unless somebody
    has listed it.
    """
    stated = getattr(model.config, "quantization_config", None)
    listed = (stated.get("modules_to_not_convert") if isinstance(stated, dict) else None) or ()
    head, names = model.get_output_embeddings(), Names(model)
    quantized, plain = [], []
    for name, module in model.named_modules():
        there = names.in_files(f"{name}.weight").removesuffix(".weight")
        if isinstance(module, AwqLinear):
            quantized.append(there)
        elif module is head:
            plain += [there] if any(part in there for part in listed) else []
        elif not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            plain.append(there)
    within = {name: re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in plain}
    keys = [name if any(within[name] in other for other in quantized) else within[name] for name in plain]
    return tuple(dict.fromkeys(keys))


def _tensors_to_write(model: PreTrainedModel, on_meta: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tied tensor once, under its first name, as files have it (:mod:`awq_ext.names`).

    Also the model's own name for each. ``on_meta``: tensors may be on the meta device.
    """
    names = Names(model)
    with_scales = (AwqLinear, ScaledActivation)
    scales = {f"{name}.scales" for name, module in model.named_modules() if isinstance(module, with_scales)}
    tensors: dict[str, Tensor] = {}
    in_model: dict[str, str] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta and not on_meta:
            raise UnsupportedModelError(f"{name} is on the meta device, so it has no value to write; load it first")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensor = tensor.detach()
        exact = name in scales and tensor.dtype == torch.float32 and not tensor.is_meta
        if exact and torch.equal(tensor.half().float(), tensor):
            tensor = tensor.half()
        tensors[names.in_files(name)], in_model[names.in_files(name)] = tensor, name
    return tensors, in_model


def _write_weights(
    path: Path, tensors: dict[str, Tensor], read: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        kinds = {name: (NAME_OF[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}
        order = write_order(kinds)
        # Without this remark transformers refuses the file.
        with Writer(path / file, [(name, *kinds[name]) for name in order], {"format": "pt"}) as writer:
            for name in order:
                writer.write(name, bytes_of(read(name)))
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        _write_json(path / INDEX, {"metadata": split.metadata, "weight_map": weight_map})


def _config_fields(model: PreTrainedModel, quant: QuantConfig) -> dict[str, Any]:
    """config.json, readable by transformers 4 and 5 alike."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    fields.pop("_attn_implementation_autoset", None)
    fields["architectures"] = [type(model).__name__]
    fields["dtype"] = fields["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    fields["quantization_config"] = quant.to_dict()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight and getattr(config, "tie_word_embeddings", False):
        fields["tie_word_embeddings"] = False  # loaded from files that contradict their config; both are written
    for name, stored in config.attribute_map.items():  # transformers 4 knows Qwen3-MoE's num_experts by that name only
        if "expert" in name and stored in fields:
            fields.setdefault(name, fields[stored])
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # transformers 4 has these at the top
        apart = ("rope_theta", "partial_rotary_factor")
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        older = names if config.model_type == "gpt_neox" else {}
        for key in apart:
            if key in rope:
                fields.setdefault(key, rope[key])
                fields.setdefault(older.get(key, key), rope[key])
        if rope.get("rope_type", "default") != "default":
            fields.setdefault("rope_scaling", {key: value for key, value in rope.items() if key not in apart})
    return fields


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
