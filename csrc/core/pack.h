// Packing codes into words and back, for every layout of the table.
#pragma once
#include <cstdint>

#include "layout.h"
#include "types.h"

namespace awq::core {

/// Work is cut along the rows of the word matrix: any split of [0, word rows) among threads gives the same words.
/// q is [n, k] row-major, one code a byte; words are row-major.

/// Packs word rows [begin, end). Returns false if a code there is above 15.
bool pack_rows(const Layout& layout, const std::uint8_t* q, std::int64_t n, std::int64_t k, std::uint32_t* words,
               std::int64_t begin, std::int64_t end) noexcept;

/// Unpacks word rows [begin, end) into their codes.
void unpack_rows(const Layout& layout, const std::uint32_t* words, std::int64_t n, std::int64_t k, std::uint8_t* q,
                 std::int64_t begin, std::int64_t end) noexcept;

struct DequantizeArgs {
  const std::uint32_t* qweight;  // gemm layout [k, n/8]
  const std::uint32_t* qzeros;   // [groups, n/8] or nullptr: every zero is 8
  const void* scales;            // [groups, n] of scale_type
  void* w;                       // [n, k] of w_type
  std::int64_t n, k, group;
  DType scale_type, w_type;
};

/// Dequantizes output rows [begin, end), both multiples of eight.
void dequantize_rows(const DequantizeArgs& args, std::int64_t begin, std::int64_t end) noexcept;

}  // namespace awq::core
