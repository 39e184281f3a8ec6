// A word of codes in layout "fragments" -> four registers of the matrix units: (q - z) of two neighbours along k each,
// as f16 or bf16, exactly. Used with ptx.cuh by every kernel that multiplies such weights, and by their tests.
//
// Nibble i of the word and nibble i + 4 are the pair of register a[i] (layout.h): a[0] and a[2] are of one row, a[1]
// and a[3] of the row eight below. All steps work on both nibbles of a pair at once, in the two halves of a register.
//
// A code becomes a float by being put, as it is, into the lowest bits of the mantissa of a power of two:
//   f16, 10 bits of mantissa:  0x6400 is 1024, whose last bit is worth 1: 0x6400 | q is 1024 + q;
//                              0x5400 is 64, whose bit 4 is worth 64 * 2^-10 * 2^4 = 1: 0x5400 | q << 4 is 64 + q;
//   bf16, 7 bits of mantissa:  0x4300 is 128, whose last bit is worth 1: 0x4300 | q is 128 + q. Four bits further up, a
//                              code would reach into the exponent, so odd nibbles are moved down first.
// Zeros get the same offset, which the subtraction takes off again: (c + q) - (c + z) is a whole number from -15 to 15,
// every one of which both types have, and a result that a type has is not rounded (IEEE 754). q = z gives +0.
#pragma once
#include "ptx.cuh"

namespace awq::cuda {

using core::DType;

/// Two nibbles of a word, 0 and 4 (kOdd = false) or 1 and 5, each plus the offset of its place.
template <DType kType, bool kOdd>
AWQ_DEVICE std::uint32_t offset_codes(std::uint32_t word) {
  if constexpr (kType == DType::bf16)
    return ptx::select_or(kOdd ? word >> 4 : word, 0x000f000fu, 0x43004300u);
  else
    return kOdd ? ptx::select_or(word, 0x00f000f0u, 0x54005400u) : ptx::select_or(word, 0x000f000fu, 0x64006400u);
}

/// The zeros of two rows, as dequantize_word subtracts them.
struct ZeroPair {
  std::uint32_t row[2];
};

/// From a byte of "fragments.zeros": the lower nibble is the zero of row r, the upper one that of row r + 8. A byte of
/// 0x88 is for weights without zeros.
template <DType kType>
AWQ_DEVICE ZeroPair zero_pair(std::uint32_t byte) {
  const std::uint32_t both = byte * 0x00010001u;
  return {{offset_codes<kType, false>(both), offset_codes<kType, true>(both)}};
}

inline constexpr std::uint32_t kSymmetricZeros = 0x88;

/// a[i] = (q - z) of the pair (i, i + 4) of nibbles.
template <DType kType>
AWQ_DEVICE void dequantize_word(std::uint32_t word, const ZeroPair& zero, std::uint32_t (&a)[4]) {
  const std::uint32_t upper = word >> 8;
  a[0] = ptx::sub_pair<kType>(offset_codes<kType, false>(word), zero.row[0]);
  a[1] = ptx::sub_pair<kType>(offset_codes<kType, true>(word), zero.row[1]);
  a[2] = ptx::sub_pair<kType>(offset_codes<kType, false>(upper), zero.row[0]);
  a[3] = ptx::sub_pair<kType>(offset_codes<kType, true>(upper), zero.row[1]);
}

}  // namespace awq::cuda
