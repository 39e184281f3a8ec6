// The sums of products x^T x that calibration takes of the inputs of a linear: what one call is made of.
#pragma once
#include <cstdint>

namespace awq::core {

struct GramArgs {
  const float* x;         // [t, k], rows x_stride apart
  float* sums;            // [k, k]
  std::uint32_t* packed;  // scratch of Kernels::gram_size words
  std::int64_t t, k, x_stride;
  bool bfloat16;  // x is rounded to bfloat16 first; products and sums are float32 all the same
};

}  // namespace awq::core
