"""What is installed, what is loaded, and whether it computes: works when the operator library does not load."""

from __future__ import annotations

import itertools
import platform
import sys
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import awq_ext
from awq_ext import _library
from awq_ext.errors import LibraryError

PACKAGES = ("torch", "safetensors", "huggingface_hub", "transformers", "accelerate", "datasets", "gguf")


def examine() -> dict[str, Any]:
    """Facts about this installation, for people and for bug reports; ``ok`` is False if it cannot compute.

    Keys: ok, problems (texts), python, platform, packages (name -> version or None), libraries (file -> path, loaded),
    build, cpu (features, kernels, threads), cuda, self_check (device -> "ok" or "failed: ...").
    """
    problems = []
    try:
        _library.load()
    except LibraryError as error:
        problems.append(str(error))
    build, features = None, None
    try:
        native = _library.native()
        build, features = native.build_info(), native.cpu_features()
    except LibraryError as error:
        problems.append(str(error))
    checks = {}
    if _library.loaded():
        checks["cpu"] = self_check("cpu")
        if _library.CUDA_LIBRARY in _library.loaded() and torch.cuda.is_available():
            checks["cuda"] = self_check("cuda")
    problems += [f"the self-check on {device} {result}" for device, result in checks.items() if result != "ok"]
    return {
        "ok": bool(checks) and all(result == "ok" for result in checks.values()),
        "problems": problems,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {"awq_ext": awq_ext.__version__} | {name: _version(name) for name in PACKAGES},
        "libraries": {name: _library_state(name) for name in (_library.OPS_LIBRARY, _library.CUDA_LIBRARY)},
        "build": build,
        "cpu": {
            "features": features,
            "kernels": build["cpu_kernels"] if build else None,
            "threads": torch.get_num_threads(),
        },
        "cuda": _cuda_state(),
        "self_check": checks,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _library_state(name: str) -> dict[str, Any]:
    path = _library.loaded().get(name) or _library.find(name)
    return {"path": None if path is None else str(path), "loaded": name in _library.loaded()}


def _cuda_state() -> str:
    if _library.find(_library.CUDA_LIBRARY) is None:
        return "not built"
    if torch.version.cuda is None:
        return "built, torch has no CUDA"
    if _library.CUDA_LIBRARY not in _library.loaded():
        return "built, not loaded"
    if not torch.cuda.is_available():
        return "loaded, no device"
    return f"loaded, {torch.cuda.get_device_name()}"


def self_check(device: str) -> str:
    """ "ok", or "failed: ..." if awq_ext.linear disagrees with its definition on this device.

    The definition, in float64: y = x W^T + bias with W[n, k] = (q[n, k] - z[n, k // g]) * s[n, k // g].
    """
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    rows_of_x = (1, 3, 16, 65)  # one for each way that kernels treat x: a row, some rows, tiles
    layouts = ("gemm", "fragments") if torch.device(device).type == "cuda" else ("gemm",)
    try:
        for dtype, rows, group_size, layout in itertools.product(kinds, rows_of_x, (32, 128), layouts):
            excess = _worst_error(rows, group_size, dtype, device, layout)
            if not excess <= 1:  # a NaN is an error too
                return (
                    f"failed: linear of {rows} rows, group size {group_size}, {dtype}, layout {layout} is off by "
                    f"{excess:.3g} times what rounding allows"
                )
    except Exception as error:  # whatever a broken build does, this is where it is to be told
        return f"failed: {type(error).__name__}: {error}"
    return "ok"


def _worst_error(rows: int, group_size: int, dtype: torch.dtype, device: str, layout: str) -> float:
    """The largest error of linear on random data, over the bound that rounding gives it."""
    from awq_ext import ops
    from awq_ext.layouts import repack_scales

    n, k = 72, 256
    generator = torch.Generator().manual_seed(rows)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)

    q, z = codes(n, k), codes(n, k // group_size)
    scales = (torch.rand(n, k // group_size, generator=generator) + 0.5).to(dtype)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    y = ops.linear(
        x.to(device),
        ops.pack(q, layout=layout).to(device),
        repack_scales(scales.t().contiguous(), "gemm", layout).to(device),
        ops.pack(z, layout=f"{layout}.zeros").to(device),
        bias.to(device),
        group_size=group_size,
        layout=layout,
    )

    each = group_size
    weight = (q.double() - z.double().repeat_interleave(each, 1)) * scales.double().repeat_interleave(each, 1)
    expected = x.double() @ weight.t() + bias.double()
    # Rounding: of each weight to dtype at most, of k sums in float32, of the result to dtype.
    unit, unit_f32 = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    magnitude = x.double().abs() @ weight.abs().t() + bias.double().abs()
    bound = unit * expected.abs() + (unit + 2 * k * unit_f32) * magnitude
    return float(((y.cpu().double() - expected).abs() / bound).max())
