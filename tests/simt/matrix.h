// Arithmetic of 16-bit floats and the matrix units.
#pragma once
#include <bit>
#include <cstdint>

#include "core/types.h"
#include "memory.h"

namespace simt {

using awq::core::DType;

/// v rounded once to a 16-bit type (to nearest, ties to even). On the way float keeps whether anything was cut off in
/// its last bit ("round to odd"), so that the second rounding cannot mistake what lies beside a tie for a tie.
template <DType kType>
inline std::uint16_t round_once(double v) {
  auto f = static_cast<float>(v);
  if (f != v && v == v) {
    auto bits = std::bit_cast<std::uint32_t>(f);
    const double magnitude = v < 0 ? -v : v, rounded = f < 0 ? -f : f;
    if (rounded > magnitude) --bits;
    f = std::bit_cast<float>(bits | 1u);
  }
  if constexpr (kType == DType::f16)
    return awq::core::float_to_half(f);
  else
    return awq::core::float_to_bfloat(f);
}

/// op of the low halves and of the high halves, each rounded once. Double holds a product of 16-bit floats exactly, and
/// so many more bits of a sum than twice the type's that its own rounding does no harm (Figueroa, "When is double
/// rounding innocuous?", 1995).
template <DType kType, class Op>
inline std::uint32_t each_half(std::uint32_t a, std::uint32_t b, Op op) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
  std::uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto x = static_cast<std::uint16_t>(a >> shift), y = static_cast<std::uint16_t>(b >> shift);
    double v;
    if constexpr (kType == DType::f16)
      v = op(awq::core::half_to_float(x), awq::core::half_to_float(y));
    else
      v = op(awq::core::bfloat_to_float(x), awq::core::bfloat_to_float(y));
    result |= static_cast<std::uint32_t>(round_once<kType>(v)) << shift;
  }
  return result;
}

/// d [rows][columns] += a [rows][16] b [columns][16]^T: at most 64 rows, and columns a multiple of 8 up to 256.
/// Products are exact (of bf16: unless float cannot hold them); each is added to d in float32, in order of k. A GPU
/// adds in an order and with a precision of its own; tests allow for that in their bounds.
void multiply(DType type, int rows, int columns, float* d, const std::uint16_t* a, const std::uint16_t* b);

void load_matrices(std::uint32_t* r, int count, std::uint32_t row, Where where);

void mma(DType type, float* d, const std::uint32_t* a, const std::uint32_t* b, Where where);

}  // namespace simt
