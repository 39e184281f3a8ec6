"""Builds the libraries and the programs beside this file for the GPU that is here, into `build/gpu` of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BUILD = REPOSITORY / "build" / "gpu"


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device")
        sys.exit(3)
    major, minor = torch.cuda.get_device_capability()
    options = [
        f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}{'a' if major == 9 else ''}-real",
        "-DAWQ_CUDA=ON",
        "-DAWQ_BENCHMARKS=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    subprocess.run(["cmake", "-S", str(REPOSITORY), "-B", str(BUILD), "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count())], check=True)


if __name__ == "__main__":
    main()
