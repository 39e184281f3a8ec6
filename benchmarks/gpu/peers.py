"""Other projects' 4-bit products on the inputs of ours, as steps of `steps.py`. Their code stays outside of here:
`peers.sh DIR` fetches it, `--peers DIR` builds it there.

- tinygemm: torch's `_weight_int4pack_mm`, bfloat16 only; its weight is (q - 8) * scale + zero in bfloat16.
- marlin: IST-DASLab/marlin, float16, groups of 128, every zero 8.
- autoawq: AutoAWQ_kernels: `gemm_forward_cuda` in eight parts of k, as AutoAWQ calls it; its products `gemv_fast`.
- gptqmodel: GPTQModel's Marlin, of vLLM's, with zeros, float16.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Contestant, Weight, table
from timing import Call, copies
from torch import Tensor

from awq_ext import ops


class Absent(Exception):
    """The peer is not here."""


def folder(args: argparse.Namespace, name: str) -> Path:
    path = None if args.peers is None else args.peers / name
    if path is None or not path.is_dir():
        raise Absent(f"absent: no {name} in the directory of --peers (peers.sh fetches it)")
    return path


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def transposed_64(groups: Tensor) -> Tensor:
    """[G, n] with each 64 columns as 8 x 8, transposed: how Marlin reads scales and zeros of groups."""
    return groups.view(len(groups), -1, 8, 8).transpose(2, 3).reshape(len(groups), -1).contiguous()


# --- torch -----------------------------------------------------------------------------------------------------------


def tinygemm(_: None, weight: Weight, dtype: torch.dtype) -> Contestant:
    words = (weight.q[:, ::2] << 4 | weight.q[:, 1::2]).contiguous()
    scale = weight.scales.float()
    zero = (8 - weight.zeros.float()) * scale
    both = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    packed = copies(torch.ops.aten._convert_weight_to_int4pack(words, 8), both)

    def of(x: Tensor) -> Call:
        return lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i][0], weight.group, packed[i][1])

    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), limit=3.0)  # it rounds scales and zeros


# --- IST-DASLab/marlin -----------------------------------------------------------------------------------------------


def marlin_library(source: Path) -> Any:
    """Its CUDA file needs nothing of torch; the function has a C++ name."""
    file = source / "marlin" / "marlin_cuda_kernel.cu"
    arch = architecture()
    library = source / f"marlin_{arch}.so"
    if not library.exists():
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-shared", "-Xcompiler=-fPIC"]
        generate = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        subprocess.run(["nvcc", *flags, generate, "-o", str(library), str(file)], check=True)
    return ctypes.CDLL(str(library))["_Z11marlin_cudaPKvS0_PvS1_iiiS1_iiP11CUstream_stiiii"]


def marlin(function: Any, weight: Weight, dtype: torch.dtype) -> Contestant:
    n, k = weight.q.shape
    packed = copies(ops.pack(weight.q, layout="marlin"), transposed_64(weight.scales.t().contiguous()))
    locks = torch.zeros(n // 128 * 16, dtype=torch.int32, device=weight.q.device)
    address = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731

    def of(x: Tensor) -> Call:
        def call(i: int) -> Tensor:
            words, scales = packed[i]
            y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            sizes = (len(x), n, k, address(locks), weight.group, x.device.index or 0, stream, -1, -1, -1, 16)
            status = function(address(x), address(words), address(y), address(scales), *sizes)
            if status:
                raise RuntimeError(f"marlin refused {n} x {k}: {status}")
            return y

        return call

    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), limit=3.0)  # its sums meet in float16


# --- AutoAWQ_kernels -------------------------------------------------------------------------------------------------

AUTOAWQ_BINDING = """
#include <torch/extension.h>
#include "quantization/gemm_cuda.h"
#include "quantization_new/gemm/gemm_cuda.h"
#include "quantization_new/gemv/gemv_cuda.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("gemm", &gemm_forward_cuda);
  m.def("fast_gemm", &gemm_forward_cuda_prefill);
  m.def("fast_gemv", &gemv_forward_cuda_decode);
}
"""


def autoawq_library(source: Path) -> Any:
    from torch.utils import cpp_extension

    binding = source / "binding.cpp"
    binding.write_text(AUTOAWQ_BINDING)
    files = [
        "quantization/gemm_cuda_gen.cu",
        "quantization_new/gemm/gemm_cuda.cu",
        "quantization_new/gemv/gemv_cuda.cu",
    ]
    undefine = [f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
    flags = ["-O3", "-DENABLE_BF16", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", *undefine]
    return cpp_extension.load(
        "autoawq_kernels",
        [str(binding), *(str(source / file) for file in files)],
        extra_include_paths=[str(source)],
        extra_cuda_cflags=flags,
    )


def autoawq_gemm(library: Any, weight: Weight, dtype: torch.dtype) -> Contestant:
    packed = copies(ops.pack(weight.q), weight.scales.t().contiguous(), ops.pack(weight.zeros))
    of = lambda x: lambda i: library.gemm(x, *packed[i], 8)  # noqa: E731
    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), limit=5.0)  # eight sums in float16


def autoawq_fast(library: Any, weight: Weight, dtype: torch.dtype) -> Contestant:
    n, k = weight.q.shape
    groups = -(-weight.scales.shape[1] // 8) * 8  # it pads them
    scales = torch.zeros(groups, n, dtype=torch.float16, device=weight.q.device)
    scales[: weight.scales.shape[1]] = weight.scales.t()
    scaled = torch.zeros_like(scales)
    scaled[: weight.scales.shape[1]] = -(weight.scales * weight.zeros).t()
    packed = copies(ops.pack(weight.q, layout="gemv_fast"), scales, scaled)

    def of(x: Tensor) -> Call:
        rows = x[:, None] if len(x) < 8 else x[None]  # as AutoAWQ chooses: sequences of one token, fewer than eight
        if len(x) < 8:
            return lambda i: library.fast_gemv(rows, *packed[i], len(x), n, k, weight.group).view(len(x), n)
        return lambda i: library.fast_gemm(rows, *packed[i]).view(len(x), n)

    # It launches on the default stream, which no graph captures; it adds in float16.
    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), graph=False, limit=20.0)


# --- GPTQModel's Marlin ----------------------------------------------------------------------------------------------


def gptqmodel_library(source: Path) -> Any:
    from torch.utils import cpp_extension

    kernels = source / "gptqmodel_ext" / "marlin"
    subprocess.run([sys.executable, "generate_kernels.py"], cwd=kernels, check=True)
    files = ["marlin_torch_fp16.cpp", "gptq_marlin_fp16.cu", "gptq_marlin_repack.cu", "awq_marlin_repack.cu"]
    undefine = [f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
    cpp_extension.load(
        "gptqmodel_marlin_fp16",
        [*(str(kernels / file) for file in files), *(str(path) for path in sorted(kernels.glob("kernel_fp16_*.cu")))],
        extra_include_paths=[str(kernels)],
        extra_cuda_cflags=["-O3", "--expt-relaxed-constexpr", "-static-global-template-stub=false", *undefine],
        is_python_module=False,
    )
    types = source / "gptqmodel" / "utils" / "marlin_scalar_type.py"
    spec = importlib.util.spec_from_file_location("marlin_scalar_type", types)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return torch.ops.gptqmodel_marlin_fp16, module.scalar_types.uint4.id


def gptqmodel(library: Any, weight: Weight, dtype: torch.dtype) -> Contestant:
    space, four_bits = library
    n, k = weight.q.shape
    words = space.awq_marlin_repack(ops.pack(weight.q), k, n, 4)
    zeros = ops.pack(transposed_64(weight.zeros.t().contiguous()).t().contiguous())
    packed = copies(words, transposed_64(weight.scales.t().contiguous()), zeros)
    locks = torch.zeros(
        max(128, torch.cuda.get_device_properties(0).multi_processor_count), dtype=torch.int32, device=weight.q.device
    )
    none = torch.empty(0, dtype=torch.int32, device=weight.q.device)

    def of(x: Tensor) -> Call:
        def call(i: int) -> Tensor:
            words, scales, zeros = packed[i]
            tail = (none, none, locks, four_bits, len(x), n, k, True, False, True, False)
            return space.gptq_marlin_gemm_fp16(x, None, words, None, scales, None, zeros, *tail)

        return call

    return Contestant(of, len(packed), sum(t.nbytes for t in packed[0]), limit=2.0)


# --- steps -----------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    of: Callable[[Any, Weight, torch.dtype], Contestant]  # the first is what `load` has returned
    load: Callable[[argparse.Namespace], Any]
    dtype: torch.dtype = torch.float16
    symmetric: bool = False

    def __call__(self, name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
        args.dtypes, args.groups = [self.dtype], [128]
        yield from table(name, partial(self.of, self.load(args)), args, self.symmetric)


def autoawq_library_of(args: argparse.Namespace) -> Any:
    return autoawq_library(folder(args, "AutoAWQ_kernels") / "awq_ext")


PEERS = {
    "tinygemm": Peer(tinygemm, lambda args: None, torch.bfloat16),
    "marlin": Peer(marlin, lambda args: marlin_library(folder(args, "marlin")), symmetric=True),
    "autoawq": Peer(autoawq_gemm, autoawq_library_of),
    "autoawq-fast": Peer(autoawq_fast, autoawq_library_of),
    "gptqmodel": Peer(gptqmodel, lambda args: gptqmodel_library(folder(args, "GPTQModel"))),
}
