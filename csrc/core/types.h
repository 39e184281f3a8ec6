// Element types and their conversions, in portable scalar form. Vector forms live in the kernels.
#pragma once
#include <bit>
#include <cstdint>

// Functions that device code and every instruction-set level share. On the host they are always inlined: a copy emitted
// from a translation unit with AVX flags could otherwise be the one that the linker keeps for everybody.
#ifdef __CUDACC__
#define AWQ_HOST_DEVICE __host__ __device__
#else
#define AWQ_HOST_DEVICE __attribute__((always_inline))
#endif

namespace awq::core {

enum class DType : std::uint8_t { f32, f16, bf16, f64 };

AWQ_HOST_DEVICE constexpr int size_of(DType t) {
  switch (t) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    default: return 2;
  }
}

/// IEEE binary16 bits -> float, exact. Subnormals are normalised by one float multiplication, which is exact.
AWQ_HOST_DEVICE constexpr float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x400u) {
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
}

/// float -> IEEE binary16 bits, nearest, ties to even; overflow gives infinity, NaN stays NaN (quiet).
AWQ_HOST_DEVICE constexpr std::uint16_t float_to_half(float f) {
  const auto bits = std::bit_cast<std::uint32_t>(f);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // >= 65520 rounds up to infinity
  if (rest < 0x38800000u) {
    // Below 2^-14 the spacing is 2^-24: adding 0.5f aligns that spacing with the last bit of a float in
    // [0.5, 1), so the addition itself does the rounding.
    const float aligned = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u));
  }
  const std::uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

AWQ_HOST_DEVICE constexpr float bfloat_to_float(std::uint16_t b) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16);
}

/// float -> bfloat16 bits, nearest, ties to even; NaN stays NaN (quiet).
AWQ_HOST_DEVICE constexpr std::uint16_t float_to_bfloat(float f) {
  const auto bits = std::bit_cast<std::uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Element i of an array of type t, as T (float or double).
template <class T>
AWQ_HOST_DEVICE inline T load_as(const void* data, DType t, std::int64_t i) {
  switch (t) {
    case DType::f64: return static_cast<T>(static_cast<const double*>(data)[i]);
    case DType::f32: return static_cast<T>(static_cast<const float*>(data)[i]);
    case DType::f16: return static_cast<T>(half_to_float(static_cast<const std::uint16_t*>(data)[i]));
    default: return static_cast<T>(bfloat_to_float(static_cast<const std::uint16_t*>(data)[i]));
  }
}

template <class T>
AWQ_HOST_DEVICE inline void store_as(void* data, DType t, std::int64_t i, T value) {
  switch (t) {
    case DType::f64: static_cast<double*>(data)[i] = static_cast<double>(value); break;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case DType::f16: static_cast<std::uint16_t*>(data)[i] = float_to_half(static_cast<float>(value)); break;
    default: static_cast<std::uint16_t*>(data)[i] = float_to_bfloat(static_cast<float>(value)); break;
  }
}

}  // namespace awq::core
