// y = x W^T + bias for a 4-bit weight in layout gemm or strips: what every CPU kernel gets and promises.
#pragma once
#include <cstdint>

#include "types.h"

namespace awq::core {

struct LinearArgs {
  const void* x;                 // [m, k] of x_type, rows x_stride elements apart, elements of a row adjacent
  const std::uint32_t* qweight;  // as layout.h says; gemm: [k, n/8], nibble i of word c is column 8c + kAwqOrder[i]
  const void* scales;            // [k/group, n] of scale_type, in the order of the layout
  const std::uint32_t* qzeros;   // gemm: [k/group, n/8]; nullptr: every zero is 8
  const void* bias;              // [n] of bias_type, or nullptr
  void* y;                       // [m, n] of x_type, contiguous
  std::int64_t m, n, k, group, x_stride;
  DType x_type, scale_type, bias_type;
  bool strips = false;  // the layout is strips
};

/// The definition: one sum per output, in order of k, in float32 (float64 where x is), weights exact in that type.
/// Computes output columns [begin, end), begin a multiple of eight.
void linear_reference(const LinearArgs& args, std::int64_t begin, std::int64_t end) noexcept;

}  // namespace awq::core
