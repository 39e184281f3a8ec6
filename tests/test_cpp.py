"""C++ callers: the core's own tests under sanitizers, built by clang and on an emulated Arm CPU, and a LibTorch program
that runs the operators without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import awq_ext
from awq_ext import _library

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "cpp-tests"
CLANG_BUILD = REPOSITORY / "build" / "cpp-tests-clang"
SIMT_BUILD = REPOSITORY / "build" / "cpp-tests-simt"
ARM_BUILD = REPOSITORY / "build" / "cpp-tests-aarch64"
CORE_ONLY = ["-DAWQ_OPS=OFF", "-DAWQ_NATIVE=OFF", "-DAWQ_TESTS=ON", "-DAWQ_WERROR=ON"]
CORE_TARGETS = ["awq_core_tests", "awq_fuzz_pack"]


def run(*command: str | Path, timeout: int = 800) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed; its whole output is in the failure otherwise."""
    words = [str(word) for word in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert result.returncode == 0, f"{' '.join(words)}\nexited with {result.returncode}:\n{result.stdout}"
    return result


def compiler() -> str:
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if path is None:
        pytest.skip("needs a C++ compiler")
    return path


def missing(what: str) -> None:
    """CI must run these tests; elsewhere a tool that is not installed skips them."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have {what}")
    pytest.skip(f"needs {what}")


def build_tests(build: Path, *options: str, targets: list[str] = CORE_TARGETS) -> None:
    """Configures and builds the C++ tests, as CONTRIBUTING.md says; the build is kept for the next time."""
    if shutil.which("cmake") is None or shutil.which("ctest") is None:
        missing("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").is_file() else []
    configure = ["cmake", "-S", str(REPOSITORY), "-B", str(build), *generator, *CORE_ONLY, *options]
    configured = subprocess.run(configure, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    if configured.returncode and "needs Catch2" in configured.stdout:
        missing("Catch2 (apt-get install catch2)")
    if configured.returncode and "needs Boost.Context" in configured.stdout:
        missing("Boost.Context (apt-get install libboost-context-dev)")
    assert configured.returncode == 0, configured.stdout
    run("cmake", "--build", build, "--target", *targets, "--parallel", str(min(4, os.cpu_count() or 1)))


@pytest.mark.slow
def test_core_under_sanitizers() -> None:
    compiler()
    build_tests(BUILD, "-DAWQ_SANITIZE=ON")
    run("ctest", "--test-dir", BUILD, "--output-on-failure", "--no-tests=error", "-R", "|".join(CORE_TARGETS))


@pytest.mark.slow
def test_cuda_kernels_played_on_the_cpu() -> None:
    """Not under sanitizers, which would make it several times as slow: the interpreter has checks of its own."""
    compiler()
    build_tests(SIMT_BUILD, targets=["awq_simt_tests"])
    run("ctest", "--test-dir", SIMT_BUILD, "--output-on-failure", "--no-tests=error", "-R", "awq_simt_tests")


@pytest.mark.slow
def test_core_built_by_clang() -> None:
    """Optimised: what kernels say in words of one compiler only, the other must understand. CI need not have it."""
    for program in ("clang++", "cmake"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    build_tests(CLANG_BUILD, "-DCMAKE_CXX_COMPILER=clang++", targets=["awq_core_tests"])
    run("ctest", "--test-dir", CLANG_BUILD, "--output-on-failure", "--no-tests=error", "-R", "awq_core_tests")


@pytest.mark.slow
def test_core_on_an_emulated_arm_cpu() -> None:
    """Every level of an AArch64 CPU, the same bits as on x86 where the tests say so. CI need not have the tools."""
    for program in ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    build_tests(ARM_BUILD, f"--toolchain={REPOSITORY / 'tests' / 'cpp' / 'aarch64.cmake'}")
    ran = run("ctest", "--test-dir", ARM_BUILD, "--output-on-failure", "--no-tests=error", "-V")
    assert all(f"level: {level}" in ran.stdout for level in ("neon_i8mm", "neon_dotprod", "portable"))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript is not supported on Python 3.14 and later")
def test_libtorch_program(tmp_path: Path) -> None:
    """A C++ program loads the library and a scripted AwqLinear, and calls the op through the dispatcher."""
    include = [Path(path) for path in cpp_extension.include_paths()]
    if not any((path / "torch" / "script.h").is_file() for path in include):
        pytest.skip("needs torch's C++ headers (torch/script.h)")
    library_dirs = cpp_extension.library_paths()
    program = tmp_path / "main"
    run(
        compiler(),
        "-std=c++20",
        "-O0",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in include),
        REPOSITORY / "tests" / "cpp" / "torchscript" / "main.cpp",
        *(f"-L{path}" for path in library_dirs),
        *(f"-Wl,-rpath,{path}" for path in library_dirs),
        "-Wl,--no-as-needed,--allow-shlib-undefined",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        "-o",
        program,
    )
    torch.manual_seed(0)
    layer = awq_ext.AwqLinear.from_linear(torch.nn.Linear(128, 72), group_size=32)
    x = torch.randn(5, 128)
    torch.jit.script(layer).save(str(tmp_path / "module.pt"))
    torch.save(x, tmp_path / "input.pt")
    with torch.no_grad():
        torch.save(layer(x), tmp_path / "expected.pt")
    library = _library.loaded()[_library.OPS_LIBRARY]
    output = run(program, library, *(tmp_path / f"{name}.pt" for name in ("module", "input", "expected"))).stdout
    assert output.count(": right") == 3, output
