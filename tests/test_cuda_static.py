"""What nvcc makes of each kernel, looked at without a GPU: no register is spilled, nothing is added atomically, the
instructions that a kernel is built on are there, its main loop converts nothing on the slow unit, and as many blocks
fit a multiprocessor as its plan counts on. `tests/sass.py` reads the code; a planted bad kernel shows that each check
can fail.

AWQ_STATIC_ARCHS="75 80 86 89 90a 100 120" in the environment looks at more than `ARCHS` does; a minute each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sass
from sass import CONVERSION, MATRIX, Cubin, Instruction, Kernel

from awq_ext import _library

pytestmark = [
    pytest.mark.skipif(sass.nvcc() is None, reason="needs nvcc"),
    pytest.mark.skipif(
        sass.binaries() is None,
        reason="needs cuobjdump and nvdisasm: the toolkit's, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
    ),
]

SOURCES = sass.REPOSITORY / "csrc" / "cuda"
REGISTERS = 65536  # of a multiprocessor, on every architecture from 7.0 to 12.0


@dataclass(frozen=True)
class Expected:
    """Of the kernels whose symbol `kernels` matches."""

    kernels: str
    needs: dict[str, int] = field(default_factory=dict)  # pattern of an instruction: occurrences in the whole kernel
    in_main: dict[str, int] = field(default_factory=dict)  # the same within the main loops
    threads: int = 0  # of a block, and blocks that share a multiprocessor: do the registers suffice?
    blocks: int = 1


WIDE = r"LDGSTS\.E(\.\w+)*\.128"
HOPPER = {"UBLKCP": 1, "UTMALDG": 1}
DECODE = {"HMMA": 32, "LDSM": 16, r"LDS\.128": 8, WIDE: 8}
EXPECTED = {
    # Eight steps of weights are asked for at once; four products a step and eight tokens, whose x is two matrices.
    "decode": [
        Expected(r"decode_kernel.*ELi1ELi", {WIDE: 8}, DECODE, threads=256, blocks=3),
        Expected(r"decode_kernel.*ELi2ELi", {WIDE: 8}, DECODE, threads=256, blocks=2),
    ],
    "gemm_sm80": [Expected("gemm_sm80_kernel", {WIDE: 6}, {WIDE: 1, "LDSM": 8, "HMMA": 32}, threads=128, blocks=2)],
    "gemm_sm90": [
        Expected(r"gemm_sm90_kernel.*Li(16|32)E", HOPPER, {"HGMMA": 4}, threads=384, blocks=2),
        Expected(r"gemm_sm90_kernel.*Li(64|96|128|192|256)E", HOPPER, {"HGMMA": 4}, threads=384, blocks=1),
    ],
}
# Where the source says the same to several architectures, one or two of them. Kernels in other files have no main loop
# of products, and are looked at for what no kernel may have.
ARCHS = {"decode": ("80", "90a"), "gemm_sm80": ("80", "120"), "gemm_sm90": ("90a",), "search": ("80",)}


def leaves(call: Instruction, loop: tuple[Instruction, ...], kernel: Kernel) -> bool:
    """Whether it calls a function, a division of 64 bits, say. ptxas also leaves a loop by a call to what is behind it,
    and shuffles, where it does not see that a warp is together, in pieces of code that return at once."""
    target = re.match(r"CALL\.\S+ .*?\b0x([0-9a-f]+)", call.text)
    if target is None or loop[0].address <= (address := int(target[1], 16)) <= loop[-1].address + 16:
        return False
    called = [i.name for i in kernel.code if i.address >= address]
    return not any(name.startswith("RET") for name in called[:8])


def complaints(kernel: Kernel, expected: Expected | None) -> list[str]:
    """Everything about the kernel that it should not be like."""
    found = []
    accesses = kernel.count(r"(LDL|STL)\b")
    if kernel.stack or kernel.local or accesses:
        found.append(f"{kernel.stack} bytes of stack, {kernel.local} of local memory, {accesses} accesses to it")
    inner = kernel.loops or [kernel.main]
    slow = [i.text for loop in inner for i in loop if CONVERSION.match(i.text)]
    if slow:
        found.append(f"conversions in the main loop: {slow[:4]}")
    if not kernel.code:
        found.append("no instructions")
    atomics = kernel.count(r"(ATOM|RED)[GS]?\b")
    if atomics:
        found.append(f"{atomics} atomic operations, whose order is any")
    if kernel.overwritten:
        found.append(f"operands of wgmma overwritten: {kernel.overwritten[:4]}")
    calls = [i.text for loop in inner for i in loop if leaves(i, loop, kernel)]
    if calls:
        found.append(f"calls in the main loop: {calls[:4]}")
    if expected is not None:
        for what, code, wanted in (
            ("", kernel.code, expected.needs),
            (" in the main loop", kernel.main, expected.in_main),
        ):
            for pattern, least in wanted.items():
                count = sum(bool(re.match(pattern, i.text)) for i in code)
                if count < least:
                    found.append(f"{count} of {pattern}{what}, expected {least}")
        warps = expected.threads // 32 * expected.blocks
        granted = -(-kernel.registers // 8) * 8 * 32  # a warp gets registers by 256
        if granted * warps > REGISTERS:
            found.append(f"{kernel.registers} registers: too many for {expected.blocks} blocks of {expected.threads}")
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Cubin]:
    """Each file once for each architecture."""
    folder, done = tmp_path_factory.mktemp("cubins"), {}

    def get(source: Path, arch: str) -> Cubin:
        if (source, arch) not in done:
            done[source, arch] = sass.compile_cubin(source, arch, folder / f"{source.stem}.{arch}.cubin")
        return done[source, arch]

    return get


def cases() -> list[tuple[str, str]]:
    more = os.environ.get("AWQ_STATIC_ARCHS", "").split()
    return [
        (path.stem, arch)
        for path in sorted(SOURCES.glob("*.cu"))
        for arch in dict.fromkeys([*ARCHS.get(path.stem, ("90a",)), *more])
    ]


def expected_of(stem: str, arch: str, kernel: Kernel) -> Expected | None:
    """Nothing where the kernel is another, or empty, on this architecture."""
    if int(arch.rstrip("a")) < 80 or (stem == "gemm_sm90" and arch != "90a"):
        return None
    found = [expected for expected in EXPECTED.get(stem, []) if re.search(expected.kernels, kernel.symbol)]
    multiplies = stem in EXPECTED or kernel.count(MATRIX.pattern) > 0
    assert len(found) == multiplies, f"{kernel.name}: {len(found)} entries of EXPECTED.get({stem!r})"
    return found[0] if found else None


@pytest.mark.parametrize(("stem", "arch"), cases())
def test_kernels(stem: str, arch: str, compiled: Callable[[Path, str], Cubin]) -> None:
    cubin = compiled(SOURCES / f"{stem}.cu", arch)
    assert cubin.kernels, "no kernel found"
    assert cubin.warnings == ""
    found = {kernel.name: complaints(kernel, expected_of(stem, arch, kernel)) for kernel in cubin.kernels}
    assert {name: what for name, what in found.items() if what} == {}


def test_every_file_of_the_table_is_there() -> None:
    assert {*EXPECTED, *ARCHS} <= {path.stem for path in SOURCES.glob("*.cu")}


def test_the_library_has_code_for_every_architecture_it_was_built_for() -> None:
    """Machine code, and PTX where CMake was not told "-real": it becomes the code of later devices."""
    path = _library.find(_library.CUDA_LIBRARY)
    if path is None:
        pytest.skip(f"{_library.CUDA_LIBRARY} was not built")
    archs = _library.native().build_info()["cuda_architectures"].split()
    assert archs
    real = {arch.removesuffix("-real") for arch in archs if not arch.endswith("-virtual")}
    assert set(re.findall(r"\.sm_(\w+)\.cubin", sass.cuobjdump(path, "-lelf"))) == real
    virtual = {arch.removesuffix("-virtual") for arch in archs if not arch.endswith("-real")}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", sass.cuobjdump(path, "-lptx"))) == virtual


# Shared memory of a multiprocessor, of which each block costs 1 KiB more: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_KIB = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_blocks_of_every_plan_fit_the_shared_memory(arch: int) -> None:
    """Of decode, two where its plan takes so little; of the others, as many as the table says; always one."""
    plan_cuda = _library.native().plan_cuda
    seen = set()
    for n, k in [(4096, 4096), (28672, 4096), (4096, 14336), (200, 320)]:
        for m in (1, 2, 4, 8, 16, 17, 32, 33, 64, 100, 256, 1024):
            for group in (16, 32, 64, 128, k):
                if k % group:
                    continue
                plan = plan_cuda(m, n, k, group, arch=arch)
                kernel, (_, tokens) = plan["kernel"], plan["tile"]
                blocks = 2 if kernel == "gemm_sm80" or (kernel == "gemm_sm90" and tokens <= 32) else 1
                kib = 1 if arch >= 80 else 0
                assert blocks * (plan["shared_bytes"] / 1024 + kib) <= SHARED_KIB[arch], plan
                assert plan["threads"] in (0, 128, 256, 384) and plan["threads"] * blocks <= 1024
                seen.add(kernel)
    # 9.0 has a kernel of its own for what others multiply by gemm_sm80; before 8.0 there is only decode.
    assert seen >= {"decode", "gemm_sm90" if arch == 90 else "gemm_sm80" if arch >= 80 else "dequantize"}


PLANTED = """
template <bool kBad>
__global__ void __launch_bounds__(1024) spill(const float* x, float* y, int n) {
  constexpr int kMany = kBad ? 96 : 16;  // all alive at once, since what is volatile stays in order
  float v[kMany];
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < kMany; ++i) asm volatile("ld.volatile.global.f32 %0, [%1];" : "=f"(v[i]) : "l"(x + j));
#pragma unroll
    for (int i = 0; i < kMany; ++i) asm volatile("st.volatile.global.f32 [%0], %1;" ::"l"(y + j), "f"(v[i]));
  }
}

template <bool kBad>
__global__ void convert(const unsigned* x, const float* s, double* y, int n, long long stride) {
  float d[4] = {};
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%4, %5}, "
                 "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(x[4 * i]), "r"(x[4 * i + 1]), "r"(x[4 * i + 2]), "r"(x[4 * i + 3]));
    if (kBad) sum += static_cast<double>(s[i]) * d[0] + static_cast<double>(stride / (x[i] + 1ll));
  }
  if (kBad) atomicAdd(y, sum);
  y[threadIdx.x] = sum + d[0] + d[1] + d[2] + d[3];
}

template __global__ void spill<false>(const float*, float*, int);
template __global__ void convert<false>(const unsigned*, const float*, double*, int, long long);
template __global__ void spill<true>(const float*, float*, int);
template __global__ void convert<true>(const unsigned*, const float*, double*, int, long long);
"""


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_a_planted_kernel_is_caught(arch: str, compiled: Callable[[Path, str], Cubin], tmp_path: Path) -> None:
    source = tmp_path / f"planted_{arch}.cu"
    source.write_text(PLANTED)
    cubin = compiled(source, arch)
    good, bad = (
        {name: next(k for k in cubin.kernels if f"{name}ILb{flag}E" in k.symbol) for name in ("spill", "convert")}
        for flag in (0, 1)
    )
    expected = Expected("", {WIDE: 1}, {"HMMA": 1}, threads=1024)
    assert complaints(good["spill"], None) == complaints(good["convert"], None) == []
    assert [text.split()[1:3] for text in complaints(bad["spill"], None)] == [["bytes", "of"]]
    assert [text.partition(":")[0] for text in complaints(bad["convert"], None)] == [
        "conversions in the main loop",
        "1 atomic operations, whose order is any",
        "calls in the main loop",
    ]
    assert good["convert"].loops and not good["spill"].loops
    missing = complaints(good["spill"], expected)
    assert len(missing) == 2 and "128" in missing[0] and "HMMA in the main loop" in missing[1]
    crowded = Expected("", threads=1024, blocks=2 + REGISTERS // (good["convert"].registers * 1024))
    assert "too many" in "".join(complaints(good["convert"], crowded))


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("IMAD.U32 R88, RZ, RZ, UR4", True),
        ("LDS.128 R84, [R2]", False),
        ("LDS.128 R85, [R2]", True),
        ("LDC.64 R87, c[0x0][0x210]", True),
        ("LDC.64 R86, c[0x0][0x210]", False),
        ("LOP3.LUT P0, R91, R4, 0xf, RZ, 0xc0, !PT", True),
        ("HADD2 R92, R88, -R90", False),
        ("ISETP.NE.AND P0, PT, R89, RZ, PT", False),
        ("STS.128 [R2], R88", False),
    ],
)
def test_an_operand_in_flight_keeps_its_registers(text: str, bad: bool) -> None:
    product, wait = "HGMMA.64x128x16.F32 R24, R88, gdesc[UR16], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"

    def kernel(*texts: str) -> Kernel:
        return Kernel("k", 168, 0, 0, 0, tuple(sass.Instruction(16 * i, t) for i, t in enumerate(texts)))

    assert bool(kernel(product, text, wait).overwritten) == bad
    assert not kernel(text, product, wait, text).overwritten
    assert bool(complaints(kernel(product, text, wait), None)) == bad
