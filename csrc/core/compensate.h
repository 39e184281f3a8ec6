// Error-compensated rounding: codes and scales that lose little in the output together, not weight by weight.
//
// The loss of a row is d G d^T with d = dequantized - w and G = mean x^T x. Three steps lower it:
//  1. Columns are rounded one after another, each to what is best given the errors already made (GPTQ, arXiv
//     2210.17323; OBS). With the damped gram in column order as U^T U, U upper triangular, d G d^T = |U d^T|^2, and the
//     last column is rounded first: column t aims at w_t - sum over u > t of d_u U_tu / U_tt, which makes the t-th
//     component of U d^T zero. This is GPTQ's recursion without the inverse of G.
//  2. Coordinate descent: each code in turn moves to its best value given all the others, then each group's scale.
//  3. A row whose loss is not below that of rounding to nearest is rounded to nearest.
// The gram's columns may be taken in any order; groups stay where they are, so the result is an ordinary AWQ weight.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "quantize.h"
#include "types.h"

namespace awq::core {

struct CompensateArgs {
  const float* w;             // [n, k]
  const float* range;         // [n, groups, 2] or nullptr
  const float* gram;          // [k, k]
  const float* factor;        // [k, k] of compensation_factor
  const std::int64_t* order;  // [k] of compensation_order
  std::uint8_t* q;            // [n, k]
  void* scales;               // [n, groups] of to.scale_type
  std::uint8_t* zeros;        // [n, groups]
  std::int64_t n, k, group, passes;
  Rounding to;
  bool refit_scales;
};

/// The columns in the order of the factor, whose last is rounded first: by rising diagonal of the gram (the loudest
/// input is rounded first), or from the last to the first column.
void compensation_order(const float* gram, std::int64_t k, bool act_order, std::int64_t* order);

inline constexpr std::int64_t kFactorBlock = 32;

/// U of the damped gram in `a` (float64 [k, k], only the upper triangle is used), step by step: damp_gram once; then
/// for each block of kFactorBlock rows from p = 0 factor_panel(p) followed by factor_trailing(p) for all blocks of
/// rows after it, in any order; then factor_rows, which writes U_tu / U_tt as float32. A pivot below the damping, to
/// which only rounding errors of the gram can bring it, is raised to it. Returns the damping: `damping` times the mean
/// of the gram's diagonal.
double damp_gram(const float* gram, const std::int64_t* order, std::int64_t k, double damping, double* a);
void factor_panel(double* a, std::int64_t k, std::int64_t p, double damping) noexcept;
void factor_trailing(const Kernels& level, double* a, std::int64_t k, std::int64_t p, std::int64_t row) noexcept;
void factor_rows(const double* a, std::int64_t k, float* factor) noexcept;

inline constexpr std::int64_t kCompensateRows = 48;  // rows that share each block of the gram while it is in the cache

/// Floats of scratch that one thread needs below.
std::int64_t compensate_scratch_size(const CompensateArgs& args);

/// Rounds rows [begin, end), at most kCompensateRows. Returns -1, or the first row with a scale that is not finite.
/// `level` only says which instructions may be used: every one gives the same bytes.
std::int64_t compensate_rows(const Kernels& level, const CompensateArgs& args, std::int64_t begin, std::int64_t end,
                             float* scratch) noexcept;

}  // namespace awq::core
