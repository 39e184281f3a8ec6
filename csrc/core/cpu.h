// Which instruction sets this CPU has, and the kernels that follow from it.
#pragma once
#include "kernels.h"

namespace awq::core {

struct CpuFeatures {
  bool avx2 = false;      // AVX2, FMA and F16C
  bool avx_vnni = false;  // with avx2: VPDPBUSD for its vectors, as laptops have it that lack AVX-512
  bool avx512 = false;    // F, BW, DQ, VL
  bool avx512_vnni = false;
  bool avx512_bf16 = false;   // with avx512_vnni
  bool amx_int8 = false;      // with avx512_bf16: tiles and products of their bytes, and the kernel lets this process
  bool neon_dotprod = false;  // of Arm: SDOT, optional in ARMv8.2
  bool neon_i8mm = false;     // with neon_dotprod: SMMLA
};

/// Asked of the CPU once. With AMX, and unless AWQ_EXT_ISA names another level, Linux is then asked to let the process
/// have its registers: from then on stacks for signals must have room for them (some 11 KiB; AT_MINSIGSTKSZ).
const CpuFeatures& cpu_features();

/// The best level this CPU can run; the environment variable AWQ_EXT_ISA=<name of a level> lowers it (read
/// once, at the first call; a level that the CPU lacks or an unknown name is ignored).
const Kernels& best_kernels();

/// Every level this CPU can run, best first, nullptr at the end. For tests and benchmarks.
const Kernels* const* all_kernels();

}  // namespace awq::core
