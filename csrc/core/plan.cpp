#include "plan.h"

#include <algorithm>

namespace awq::core {
namespace {

// Below this many multiply-adds a thread costs more to wake than it saves (a few microseconds each).
constexpr std::int64_t kWorkPerThread = 1 << 16;

// Up to this many rows, unpacking the words anew for every row or two beats unpacking to memory
// (benchmarks/linear_cpu.py).
constexpr std::int64_t kDecodeRows = 4;

// Digits of x that are prepared at a time: they are read again for every strip, and should stay in the second cache.
constexpr std::int64_t kPreparedBytes = std::int64_t{1} << 20;

// From so many rows on a matrix unit multiplies: its codes have to be unpacked to memory first (not measured).
constexpr std::int64_t kMatrixFrom = 9;

// Up to so many bytes of digits, and from so many columns a thread on, each thread had better prepare them for itself:
// with two threads that takes about 5 % off 1 to 32 rows of a [1024, 1024] weight (Zen 4). To prepare a value takes as
// long as to multiply it with some 25 columns.
constexpr std::int64_t kApartBytes = std::int64_t{1} << 17;
constexpr std::int64_t kApartColumns = 256;

LinearPlan plan_reference(std::int64_t n) {
  LinearPlan plan{};
  plan.kernel = LinearKernel::reference, plan.name = "reference";
  plan.why = "float64 x: the definition, with float64 sums";
  plan.tile = 8;
  plan.tiles = ceil_div(n, plan.tile);
  return plan;
}

std::int64_t grain(std::int64_t m, std::int64_t k, std::int64_t tile) {
  return std::max<std::int64_t>(1, kWorkPerThread / std::max<std::int64_t>(1, m * k * tile));
}

}  // namespace

std::optional<Activation> find_activation(std::string_view name) {
  if (name == "exact") return Activation::exact;
  if (name == "int16") return Activation::int16;
  if (name == "int8") return Activation::int8;
  return std::nullopt;
}

LinearPlan plan_linear(std::int64_t m, std::int64_t n, std::int64_t k, DType x_type, const Kernels& kernels) {
  LinearPlan plan = plan_reference(n);
  if (x_type != DType::f64) {
    const bool decode = m <= kDecodeRows;
    plan.kernel = decode ? LinearKernel::decode : LinearKernel::gemm, plan.name = decode ? "decode" : "gemm";
    plan.why = decode ? "few rows: words are unpacked in registers, once for every row or two"
                      : "many rows: a block of weights is unpacked to float32 once for 64 rows";
    plan.tile = kernels.strip;
    plan.tiles = ceil_div(n, plan.tile);
  }
  plan.grain = grain(m, k, plan.tile);
  return plan;
}

LinearPlan plan_strips(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, DType x_type,
                       Activation activation, const Kernels& kernels) {
  LinearPlan plan = plan_reference(n);
  if (x_type != DType::f64) {
    plan.kernel = LinearKernel::strips, plan.name = "strips";
    plan.digits = digits_of(activation, x_type);
    plan.why = plan.digits == 1   ? "x as int8: the caller said that is enough"
               : plan.digits == 2 ? "x as int16, two products of eight bits: less is lost than by a 16-bit type"
                                  : "x as integers of 24 bits, three products of eight bits: as exact as float32";
    const auto [matrix, most] = strips_tiles(m, group, plan.digits, kernels);
    if (matrix) {
      plan.name = "strips_matrix";
      plan.why = plan.digits == 1   ? "x as int8: the caller said that is enough; enough rows for the matrix unit"
                 : plan.digits == 2 ? "x as int16, two products of eight bits; enough rows for the matrix unit"
                                    : "x as integers of 24 bits, three products; enough rows for the matrix unit";
    }
    const std::int64_t fit = kPreparedBytes / std::max<std::int64_t>(1, k * plan.digits);
    plan.rows = std::clamp(fit / most * most, std::int64_t{64}, kStripsRows);
    plan.tile_rows = even_rows(std::clamp(m, std::int64_t{1}, plan.rows), most);
    plan.tile = kStripColumns;
    plan.tiles = ceil_div(n, plan.tile);
  }
  plan.grain = grain(m, k, plan.tile);
  return plan;
}

StripsTiles strips_tiles(std::int64_t rows, std::int64_t group, int digits, const Kernels& kernels) {
  if (rows >= kMatrixFrom && kernels.matrix_rows > 0 && matrix_can_have(group)) return {true, kernels.matrix_rows};
  return {false, kernels.strips_rows[digits - 1]};
}

bool prepare_apart(const LinearPlan& plan, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t threads) {
  return m <= plan.rows && m * k * plan.digits <= kApartBytes && n >= threads * kApartColumns;
}

}  // namespace awq::core
