// Which kernel a linear call gets, and why. A pure function, apart from running anything.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "types.h"

namespace awq::core {

enum class LinearKernel : std::uint8_t { reference, decode, gemm };

struct LinearPlan {
  LinearKernel kernel;
  const char* name;  // "reference", "decode", "gemm"
  const char* why;
  std::int64_t tiles;  // pieces of work; each is `tile` output columns, the last may be shorter
  std::int64_t tile;
  std::int64_t grain;  // fewest tiles worth a thread of their own
};

/// m rows of x, an [n, k] weight, x of type x_type, at the given instruction-set level.
LinearPlan plan_linear(std::int64_t m, std::int64_t n, std::int64_t k, DType x_type, const Kernels& kernels);

}  // namespace awq::core
