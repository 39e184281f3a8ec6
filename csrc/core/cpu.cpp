#include "cpu.h"

#include <array>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace awq::core {
namespace {

/// The level that AWQ_EXT_ISA asks for, or nullptr.
const char* wanted_level() { return std::getenv("AWQ_EXT_ISA"); }

#if defined(__x86_64__) && defined(__linux__)
/// Whether this process has AMX's tiles and products of bytes. Without permission the first use would be fatal
/// (Linux, Documentation/arch/x86/xstate.rst).
bool tiles_permitted() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  const char* wanted = wanted_level();
  if (wanted != nullptr && std::strcmp(wanted, "amx_int8") != 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
    CpuFeatures f;
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;  // older clangs do not know its name
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    f.avx_vnni = f.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
    f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.avx512_bf16 = f.avx512_vnni && __builtin_cpu_supports("avx512bf16");
#if defined(__linux__)
    f.amx_int8 = f.avx512_bf16 && tiles_permitted();
#endif
#elif defined(__aarch64__) && defined(__linux__)
    f.neon_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which headers before Linux 5.6 do not name
    f.neon_i8mm = f.neon_dotprod && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    const auto has = [](const char* feature) {
      int value = 0;
      std::size_t size = sizeof value;
      return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    f.neon_dotprod = has("hw.optional.arm.FEAT_DotProd");
    f.neon_i8mm = f.neon_dotprod && has("hw.optional.arm.FEAT_I8MM");
#endif
    return f;
  }();
  return features;
}

const Kernels* const* all_kernels() {
  static const std::array<const Kernels*, 8> levels = [] {
    std::array<const Kernels*, 8> list{};
    std::size_t count = 0;
#if defined(__x86_64__)
    if (cpu_features().amx_int8) list[count++] = &amx_int8_kernels();
    if (cpu_features().avx512_bf16) list[count++] = &avx512_bf16_kernels();
    if (cpu_features().avx512_vnni) list[count++] = &avx512_vnni_kernels();
    if (cpu_features().avx512) list[count++] = &avx512_kernels();
    if (cpu_features().avx_vnni) list[count++] = &avx_vnni_kernels();
    if (cpu_features().avx2) list[count++] = &avx2_kernels();
#elif defined(__aarch64__)
    if (cpu_features().neon_i8mm) list[count++] = &neon_i8mm_kernels();
    if (cpu_features().neon_dotprod) list[count++] = &neon_dotprod_kernels();
#endif
    list[count] = &portable_kernels();
    return list;
  }();
  return levels.data();
}

const Kernels& best_kernels() {
  static const Kernels& best = []() -> const Kernels& {
    const Kernels* const* levels = all_kernels();
    const char* wanted = wanted_level();
    for (const Kernels* const* level = levels; wanted != nullptr && *level != nullptr; ++level)
      if (std::strcmp((*level)->name, wanted) == 0) return **level;
    return **levels;
  }();
  return best;
}

}  // namespace awq::core
