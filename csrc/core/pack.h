// Packing codes into words and back, for every layout of the table.
#pragma once
#include <cstdint>

#include "layout.h"
#include "types.h"

namespace awq::core {

/// Work is cut into blocks along one axis of the codes [n, k]; any split of the blocks among threads gives the same
/// bytes. Words are a little-endian word matrix as layout.h describes, at any address; q is [n, k] row-major, one code
/// a byte. Packing and repacking cut along the target's outer axis, so that each thread writes rows of words of its
/// own.
inline constexpr std::int64_t kBlock = 128;  // codes

/// How many blocks codes [n, k] are cut into along `axis`.
constexpr std::int64_t block_count(Axis axis, std::int64_t n, std::int64_t k) {
  return ceil_div(axis == Axis::n ? n : k, kBlock);
}

/// Packs blocks [begin, end) of block_count(to.outer, n, k). Returns false if a code there is above 15.
bool pack_blocks(const Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 std::int64_t begin, std::int64_t end) noexcept;

/// Unpacks blocks [begin, end) of block_count(Axis::n, n, k).
void unpack_blocks(const Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept;

/// Repacks blocks [begin, end) of block_count(to.outer, n, k). Codes outside [n, k] that `from` pads with are dropped.
void repack_blocks(const Codes& from, const Codes& to, const void* source, void* target, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept;

struct DequantizeArgs {
  const std::uint32_t* qweight;  // layout gemm, strips or fragments
  const std::uint32_t* qzeros;   // of that layout too, or nullptr: every zero is 8
  const void* scales;            // [groups, n] of scale_type, in the order of the layout
  void* w;                       // [n, k] of w_type
  std::int64_t n, k, group;
  DType scale_type, w_type;
  Order order = Order::awq;  // of the layout: awq (gemm), strips or fragments

  /// Rows that begin and end of dequantize_rows are multiples of (n apart).
  AWQ_HOST_DEVICE constexpr std::int64_t row_block() const { return order == Order::awq ? 8 : kBlock; }
};

/// Dequantizes output rows [begin, end).
void dequantize_rows(const DequantizeArgs& args, std::int64_t begin, std::int64_t end) noexcept;

}  // namespace awq::core
