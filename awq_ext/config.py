"""The quantization config of a checkpoint, in every dialect that 4-bit files come with.

Sources: AutoAWQ ``awq/models/_config.py``; GPTQModel ``gptqmodel/quantization/config.py``; compressed-tensors
``src/compressed_tensors/quantization/quant_config.py`` and ``quant_args.py``; auto-round
``auto_round/export/export_to_autoround/export.py`` and ``auto_round/inference/backend.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from awq_ext.errors import CheckpointError
from awq_ext.linear import W_BIT

GPTQ = ("gptq", "gptq_v2")
COMPRESSED = "compressed-tensors"
# Other names that configs have for layouts: what a reader did with the gemm layout at load, and what the two projects
# call a layout that they share.
SAME = {"exllama": "gemm", "ipex": "gemm", "pack-quantized": COMPRESSED}
SHARED = frozenset({"gemv_fast", "llm-awq"})


@dataclass(frozen=True)
class QuantConfig:
    """What a ``quantization_config`` says.

    ``version`` is the layout's name in :func:`awq_ext.layouts.layouts`, None if the config does not say.
    ``group_size`` -1 means one group over all of in_features. ``modules_to_not_convert`` are names, or parts of names,
    of linears that are not quantized; they inform other readers, this one goes by the tensors present.
    """

    group_size: int = 128
    bits: int = W_BIT
    zero_point: bool = True
    version: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], where: str) -> QuantConfig:
        """Read the config of AutoAWQ, llm-awq, GPTQ, auto-round or compressed-tensors; unknown keys are ignored.

        Synonyms: bits | w_bit, group_size | q_group_size, version | format | checkpoint_format, zero_point | not sym,
        quant_method | method. What is missing or null has the default. Raises CheckpointError, which names ``where``
        and the key.
        """
        key, method = _first(d, "quant_method", "method")
        if method is None:
            method = "gptq" if "desc_act" in d and "version" not in d and "format" not in d else "awq"
        if method == COMPRESSED:
            return cls._from_compressed(d, where)
        if method == "intel/auto-round":  # until 2025
            method = "auto-round"
        if method not in ("awq", "gptq", "auto-round"):
            raise _fail(where, key, f"'awq', 'gptq', 'auto-round' or '{COMPRESSED}'", method)

        key, bits = _first(d, "bits", "w_bit")
        _check_bits(where, key, bits)
        key, zero_point = _first(d, "zero_point", "sym")
        if zero_point is None:
            zero_point = cls.zero_point
        elif not isinstance(zero_point, bool):
            raise _fail(where, key, "true or false", zero_point)
        elif key == "sym":
            zero_point = not zero_point
        return cls(
            _group_size(where, *_first(d, "group_size", "q_group_size")),
            W_BIT,
            zero_point,
            _version(d, str(method), where),
            _names(where, *_first(d, "modules_to_not_convert")),
        )

    @classmethod
    def _from_compressed(cls, d: Mapping[str, Any], where: str) -> QuantConfig:
        key, form = _first(d, "format")
        if form not in (None, "pack-quantized"):
            raise _fail(where, key, "'pack-quantized' (4-bit weights)", form)
        _check_transforms(where, d.get("transform_config"))
        groups = d.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        if len(schemes) != 1 or not isinstance(schemes[0], dict) or not isinstance(schemes[0].get("weights"), dict):
            raise _fail(where, "config_groups", "one scheme with 'weights' for all quantized linears", groups)
        weights = schemes[0]["weights"]
        where = f"{where}: config_groups"
        _check_bits(where, "num_bits", weights.get("num_bits"))
        if weights.get("type") not in (None, "int"):
            raise _fail(where, "type", "'int'", weights.get("type"))
        strategy = weights.get("strategy")
        if strategy not in (None, "group", "channel"):
            raise _fail(where, "strategy", "'group' or 'channel'", strategy)
        if weights.get("actorder") not in (None, False, "weight", "static"):
            raise _fail(where, "actorder", "null, 'weight' or 'static' (groups of neighbours)", weights["actorder"])
        symmetric = weights.get("symmetric")
        if symmetric is not None and not isinstance(symmetric, bool):
            raise _fail(where, "symmetric", "true or false", symmetric)
        size = -1 if strategy == "channel" else _group_size(where, "group_size", weights.get("group_size"))
        return cls(size, W_BIT, symmetric is False, COMPRESSED, _names(where, "ignore", d.get("ignore")))

    def allows(self, layout: str) -> bool:
        """Whether tensors in this layout agree with the config."""
        if self.version == "marlin" and layout == "gemm":  # GPTQModel names what its kernel makes of these tensors
            return True
        return self.version in (None, layout) or {self.version, layout} <= SHARED

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of the layout's own project, as it stands in config.json."""
        skipped = list(self.modules_to_not_convert)
        if self.version == COMPRESSED:
            return self._to_compressed(skipped)
        if self.version in GPTQ:
            fields: dict[str, Any] = {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": self.group_size,
                "desc_act": False,
                "sym": not self.zero_point,
                "checkpoint_format": self.version,
                "lm_head": False,
            }
            if skipped:  # GPTQModel's way to say it: patterns of full names, "-:" to leave one out
                fields["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
            return fields
        fields = {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": self.version or "gemm",
            "modules_to_not_convert": skipped or None,
        }
        return fields | ({"backend": "llm-awq"} if self.version == "llm-awq" else {})

    def _to_compressed(self, skipped: Sequence[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": not self.zero_point,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": COMPRESSED,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": {"group_0": scheme},
            # Its readers look at every Linear, the head included.
            "ignore": sorted({*skipped, "lm_head"}),
        }


def _check_transforms(where: str, transforms: Any) -> None:
    """Rotations of weights are done when a file is written, those of activations would have to be done at run time."""
    try:
        schemes = (transforms or {}).get("config_groups") or {}
        places = {part.get("location") for scheme in schemes.values() for part in scheme.get("apply") or ()}
    except (AttributeError, TypeError):
        raise _fail(where, "transform_config", "an object with 'config_groups'", transforms) from None
    online = places - {"weight_input", "weight_output"}
    if online:
        expected = "without transforms of activations, which awq_ext does not do"
        raise _fail(where, "transform_config", expected, sorted(map(str, online)))


def _first(d: Mapping[str, Any], *keys: str) -> tuple[str, Any]:
    """The first key that has a value, and that; the first of all with None if none has."""
    return next(((key, d[key]) for key in keys if d.get(key) is not None), (keys[0], None))


def _fail(where: str, key: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(f"{where}: '{key}' must be {expected}, got {repr(got)[:200]}")


def _check_bits(where: str, key: str, bits: object) -> None:
    if bits is not None and (type(bits) is not int or bits != W_BIT):
        raise _fail(where, key, f"{W_BIT} (the only width that awq_ext computes with)", bits)


def _group_size(where: str, key: str, size: object) -> int:
    if size is None:
        return QuantConfig.group_size
    if type(size) is not int or not (1 <= size < 2**31 or size == -1):
        raise _fail(where, key, "a positive integer, or -1 for one group over in_features", size)
    return size


def _names(where: str, key: str, names: object) -> tuple[str, ...]:
    if names is None:
        return ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _fail(where, key, "a list of strings", names)
    return tuple(names)


def _version(d: Mapping[str, Any], method: str, where: str) -> str | None:
    """The layout that a config of AutoAWQ, GPTQ or auto-round names."""
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format", "checkpoint_format")
    key, version = _first(d, *keys)
    if version is None and method == "auto-round":
        return _auto_round_version(d, where)
    if version is None:
        return "gptq" if method == "gptq" else None
    if not isinstance(version, str) or len(version) > 100:
        raise _fail(where, key, "the name of a layout", version)
    version = version.lower()
    return SAME.get(version, version)


def _auto_round_version(d: Mapping[str, Any], where: str) -> str:
    """The layout of auto-round's packing, such as "auto_round:auto_gptq".

    Its own, "auto_round" with or without a kernel's name, is that of GPTQ but for zero points, which are stored as they
    are; GPTQModel's packing is the same. Nothing else tells them from those less one of AutoGPTQ's.
    """
    key, packing = _first(d, "packing_format", "backend")
    if not isinstance(packing, str):
        raise _fail(where, key, "the name of a packing, as 'auto_round:auto_gptq'", packing)
    if "awq" in packing:
        return "gemm"
    return "gptq" if "gptq" in packing and "gptqmodel" not in packing else "gptq_v2"
