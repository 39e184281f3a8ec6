"""What the compiled libraries ask of the process they are loaded into: C shims of torch 2.10 and the C/C++ runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from awq_ext import _library, ops

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMA_PAGE = REPOSITORY / "csrc" / "ops" / "schema.cpp"
RUNTIME_VERSION = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")  # libc, libm, libstdc++, libgcc name theirs so
LINKER_SYMBOLS = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
RUNTIME_LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|ld-linux[\w-]*)\.so\.\d+$")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (binutils)")
    return path


def output_of(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, timeout=300, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(params=[_library.OPS_LIBRARY, _library.CUDA_LIBRARY])
def library(request: pytest.FixtureRequest) -> Path:
    """Each operator library that was built, whether or not this torch could load it."""
    path = _library.find(request.param)
    if path is None:
        pytest.skip(f"{request.param} was not built")
    return path


def undefined_symbols(library: Path) -> list[str]:
    return [line.split()[-1] for line in output_of(tool("nm"), "-D", "--undefined-only", library).splitlines()]


def torch_symbols(library: Path) -> list[str]:
    return [s for s in undefined_symbols(library) if not RUNTIME_VERSION.search(s) and s not in LINKER_SYMBOLS]


def test_only_c_shims_of_torch_are_imported(library: Path) -> None:
    symbols = torch_symbols(library)
    assert symbols, "no symbol of torch: nm's output was misread"
    foreign = [symbol for symbol in symbols if not re.match(r"(aoti_)?torch_\w+$", symbol)]
    assert foreign == []


def test_every_shim_is_declared_for_torch_2_10(library: Path, tmp_path: Path) -> None:
    """torch's headers hide what is newer than the target version, so the preprocessor knows what 2.10 has."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "shims.cpp"
    source.write_text('#include "ops/stable.h"\n')
    include = [f"-I{path}" for path in (REPOSITORY / "csrc", *cpp_extension.include_paths())]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    text = output_of(compiler, "-std=c++20", "-E", "-P", target, "-DTORCH_STABLE_ONLY", "-DUSE_CUDA", *include, source)
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))
    assert [symbol for symbol in torch_symbols(library) if symbol not in declared] == []


def test_needs_libtorch_by_name_and_carries_no_path(library: Path) -> None:
    dynamic = output_of(tool("readelf"), "-d", "-W", library)
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    of_torch = [name for name in needed if not RUNTIME_LIBRARIES.match(name)]
    cuda = ["libtorch_cuda.so"] if library.name == _library.CUDA_LIBRARY else []
    assert sorted(of_torch) == sorted(["libtorch_cpu.so", *cuda])


def test_every_operator_of_the_schema_page_has_its_kernels() -> None:
    """Registration errors can pass in silence, so the dispatcher itself is asked."""
    names = re.findall(r'm\.def\(\s*"(\w+)\(', SCHEMA_PAGE.read_text())
    assert len(names) >= 8
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in names:
        assert has_kernel(f"awq_ext::{name}", "CPU"), f"awq_ext::{name} has no CPU kernel"
        assert has_kernel(f"awq_ext::{name}", "Meta"), f"awq_ext::{name} has no fake kernel"
        wrapper = getattr(ops, name, None)
        assert callable(wrapper), f"awq_ext.ops has no {name}"
    registered = {n for n in map(str, torch._C._dispatch_get_all_op_names()) if n.startswith("awq_ext::")}
    assert registered == {f"awq_ext::{name}" for name in names}


def test_every_operator_has_its_cuda_kernel() -> None:
    if _library.CUDA_LIBRARY not in _library.loaded():
        pytest.skip(f"{_library.CUDA_LIBRARY} is not loaded (not built, or this torch has no CUDA)")
    source = "".join(path.read_text() for path in (REPOSITORY / "csrc" / "ops").glob("cuda*.cpp"))
    names = re.findall(r'm\.impl\("(\w+)"', source)
    assert len(names) >= 12
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"awq_ext::{name}", "CUDA"), name


def test_cuda_code_only_enqueues() -> None:
    """On the stream it is given. Nothing waits, allocates or copies, so that all of it can be captured in a graph."""
    sources = sorted((REPOSITORY / "csrc" / "cuda").glob("*"))
    launches = 0
    for path in sources:
        text = path.read_text()
        forbidden = r"cuda\w*(?:Synchronize|Malloc|Free|Memcpy|Memset|StreamCreate|Event)\w*"
        assert re.findall(forbidden, text) == [], path
        given = [inside.split(",")[-1].strip() for inside in re.findall(r"<<<(.*?)>>>", text, re.DOTALL)]
        given += ["stream"] * text.count("config.stream = stream;")
        assert given == ["stream"] * (text.count("<<<") + text.count("cudaLaunchKernelEx(")), path
        launches += len(given)
    assert launches >= 5


def test_copies_of_16_bytes_have_no_cache_policy() -> None:
    """With one, compilers have made illegal instructions of cp.async, on several architectures; not of bulk copies."""
    text = "".join(path.read_text() for path in (REPOSITORY / "csrc" / "cuda").glob("*.cuh"))
    copies = re.findall(r'"(cp\.async\.c[ag]\.[^"]*)"', text)
    assert copies and not [copy for copy in copies if "L2" in copy or "policy" in copy]


def kernel_objects() -> list[Path]:
    """Objects compiled with their own flags: in the developer's build directory, else in those of `pip install .`."""
    override = os.environ.get("AWQ_LIB_DIR")
    roots = [Path(override)] if override else sorted((REPOSITORY / "build").glob("cp*"))
    objects = "CMakeFiles/awq_core.dir/csrc/core/kernels_[!p]*.o"
    return [path for root in roots for path in sorted(root.glob(objects))]


def test_kernel_objects_export_no_shared_functions() -> None:
    """An inline function emitted with AVX flags, say, could be the copy that the linker keeps for every CPU."""
    objects = kernel_objects()
    if not objects:
        pytest.skip("needs the object files of a build (AWQ_LIB_DIR, or build/cp* of an installation from a checkout)")
    for path in objects:
        symbols = [line.split() for line in output_of(tool("nm"), path).splitlines()]
        # The reference to the exception handler's personality is data that every object shares.
        weak = [s[-1] for s in symbols if s[-2] in "WVu" and not s[-1].startswith("DW.ref.")]
        assert weak == [], f"{path}: compile these without such flags, or inline them always (AWQ_HOST_DEVICE)"
        defined = [s[-1] for s in symbols if s[-2] == "T"]
        assert len(defined) == 1, f"{path}: only the level's table may be visible, got {defined}"
