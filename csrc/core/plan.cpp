#include "plan.h"

#include <algorithm>

namespace awq::core {
namespace {

// Below this many multiply-adds a thread costs more to wake than it saves (a few microseconds each).
constexpr std::int64_t kWorkPerThread = 1 << 16;

// Up to this many rows, unpacking the words anew for every row or two beats unpacking to memory
// (benchmarks/linear_cpu.py).
constexpr std::int64_t kDecodeRows = 4;

}  // namespace

LinearPlan plan_linear(std::int64_t m, std::int64_t n, std::int64_t k, DType x_type, const Kernels& kernels) {
  LinearPlan plan{};
  plan.tile = kernels.strip;
  if (x_type == DType::f64) {
    plan.kernel = LinearKernel::reference, plan.name = "reference";
    plan.why = "float64 x: the definition, with float64 sums";
    plan.tile = 8;
  } else if (m <= kDecodeRows) {
    plan.kernel = LinearKernel::decode, plan.name = "decode";
    plan.why = "few rows: words are unpacked in registers, once for every row or two";
  } else {
    plan.kernel = LinearKernel::gemm, plan.name = "gemm";
    plan.why = "many rows: a block of weights is unpacked to float32 once for 64 rows";
  }
  plan.tiles = (n + plan.tile - 1) / plan.tile;
  plan.grain = std::max<std::int64_t>(1, kWorkPerThread / std::max<std::int64_t>(1, m * k * plan.tile));
  return plan;
}

}  // namespace awq::core
