"""What nvcc makes of a CUDA file: the registers, memory and instructions of every kernel in it. Needs no GPU.

    python tests/sass.py csrc/cuda/decode.cu [90a]

prints a line for each kernel: registers, bytes on the stack, static shared memory, instructions, and how often what
matters occurs in its main loops. Reference for names of instructions: NVIDIA, CUDA Binary Utilities.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FLAGS = [
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-fmad=false",
    "-I",
    str(REPOSITORY / "csrc"),
]  # as in CMakeLists.txt
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA)\b")
CONVERSION = re.compile(r"(F2F|F2I|I2F)\b")
"""Not F2FP, which rounds two floats into a word: these run on a unit that is a quarter as wide, or narrower."""


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # "HMMA.16816.F32 R4, R8, R12, R4", its predicate left out

    @property
    def name(self) -> str:
        return self.text.split(maxsplit=1)[0]


@dataclass(frozen=True)
class Kernel:
    symbol: str
    registers: int
    stack: int
    local: int
    shared: int  # static
    code: tuple[Instruction, ...]

    @cached_property
    def name(self) -> str:
        """Without parameters, if there is a c++filt."""
        if shutil.which("c++filt") is None:
            return self.symbol
        text = subprocess.run(["c++filt", self.symbol], check=True, capture_output=True, text=True).stdout.strip()
        text = re.sub(r"\(anonymous namespace\)::|awq::\w+::|^void ", "", text)
        return re.sub(r">\(.*", ">", text) if ">(" in text else text.partition("(")[0]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.text)) for i in self.code)

    @cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """The innermost loops that multiply matrices: from the target of a branch back to the branch. Behind the end of
        the kernel there are pieces of its code, of lanes that part, which jump back but are no loops."""
        found = []
        for branch in self.code:
            target = re.match(r"BRA(?:\.\w+)* .*?\b0x([0-9a-f]+)", branch.text)
            if target and int(target[1], 16) <= branch.address:
                body = tuple(i for i in self.code if int(target[1], 16) <= i.address <= branch.address)
                if any(MATRIX.match(i.text) for i in body) and not any(i.name == "EXIT" for i in body):
                    found.append(body)
        inside = lambda a, b: a is not b and b[0].address <= a[0].address and a[-1].address <= b[-1].address  # noqa: E731
        return [loop for loop in found if not any(inside(other, loop) for other in found)]

    @cached_property
    def main(self) -> tuple[Instruction, ...]:
        """From the first instruction of those loops to the last; of a kernel without, from its first product to its
        last one."""
        span = [i for loop in self.loops for i in loop] or [i for i in self.code if MATRIX.match(i.text)]
        if not span:
            return ()
        first, last = min(i.address for i in span), max(i.address for i in span)
        return tuple(i for i in self.code if first <= i.address <= last)

    @cached_property
    def overwritten(self) -> list[str]:
        """What writes to the registers of a wgmma's first operand between it and its wait. The hardware may not have
        read them by then, and ptxas before CUDA 13.3 gives them to others all the same."""
        found = []
        for n, product in enumerate(self.code):
            operand = re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", product.text)
            for later in self.code[n + 1 :] if operand else ():
                if later.name.startswith("WARPGROUP.DEPBAR"):
                    break
                target = re.match(r"(?!HGMMA|\w*SETP)\S+ (?:!?U?P[T\d], )*R(\d+)\b", later.text)
                size = 4 if ".128" in later.name else 2 if re.search(r"\.64|\.WIDE|CS2R", later.name) else 1
                if operand and target and -size < int(target[1]) - int(operand[1]) < 4:
                    found.append(f"{later.text} after {product.text}")
        return found


@dataclass(frozen=True)
class Cubin:
    arch: str
    kernels: tuple[Kernel, ...]
    warnings: str


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def binaries() -> str | None:
    """A PATH with cuobjdump and nvdisasm on it: the environment's, the toolkit's, or with NVIDIA's Python packages."""
    places = [os.environ.get("PATH", "")]
    compiler = nvcc()
    if compiler:
        places.append(str(Path(compiler).resolve().parent))
    wheels = importlib.util.find_spec("nvidia")
    for place in (wheels.submodule_search_locations or []) if wheels else []:
        places += sorted(str(path) for path in Path(place).glob("*/bin"))
    for place in places:
        if shutil.which("cuobjdump", path=place) and shutil.which("nvdisasm", path=place):
            return place + os.pathsep + places[0]
    return None


def cuobjdump(file: Path, option: str) -> str:
    path = binaries()
    assert path is not None
    tool = shutil.which("cuobjdump", path=path)
    assert tool is not None
    command = [tool, option, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


def read(cubin: Path, arch: str = "", warnings: str = "") -> Cubin:
    """The kernels of a cubin or an object file."""
    code: dict[str, tuple[Instruction, ...]] = {}
    for part in cuobjdump(cubin, "-sass").split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\S.*?) ?;", body)
        code[symbol.strip()] = tuple(Instruction(int(address, 16), text) for address, text in lines)
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump(cubin, "-res-usage")
    )
    assert {symbol for symbol, *_ in usage} == {*code}, "every kernel has both, or one was misread"
    kernels = [
        Kernel(symbol, int(registers), int(stack), int(local), int(shared), code[symbol])
        for symbol, registers, stack, shared, local in usage
    ]
    return Cubin(arch, tuple(kernels), warnings)


def compile_cubin(source: Path, arch: str, out: Path, *flags: str) -> Cubin:
    """The kernels of a CUDA file for one architecture, as "90a"."""
    compiler = nvcc()
    assert compiler is not None
    generate = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [compiler, *FLAGS, *flags, generate, "-cubin", "-Xptxas", "-v", "-o", str(out), str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    notes = [line for line in done.stdout.splitlines() if re.search(r"warning|Potential Performance Loss", line)]
    return read(out, arch, "\n".join(notes))


def main() -> None:
    source, arch = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "90a"
    out = Path(os.environ.get("TMPDIR", "/tmp"), f"{source.stem}.{os.getpid()}.cubin")
    try:
        cubin = compile_cubin(source, arch, out)
    finally:
        out.unlink(missing_ok=True)
    print(cubin.warnings)
    for kernel in cubin.kernels:
        counts = collections.Counter(i.name.partition(".")[0] for i in kernel.main)
        print(
            f"{kernel.name}\n    {kernel.registers} registers, {kernel.stack} on the stack, {kernel.local} local, "
            f"{kernel.shared} shared, {len(kernel.code)} instructions; main: {len(kernel.main)}"
        )
        print("    " + " ".join(f"{name} {count}" for name, count in counts.most_common(16)))


if __name__ == "__main__":
    main()
