// The two AWQ searches over rows of a weight. Every loss is d G d^T, the mean squared error that an error d of one row
// makes in the output over all calibration tokens, G = mean x^T x. Of a G that is zero off its diagonal the diagonal
// suffices.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace awq::core {

struct SearchArgs {
  const float* w;  // [n, k]
  std::int64_t n, k, group;
  Rounding to;
  const Kernels* kernels;
  bool diagonal = false;  // G is zero off its diagonal
};

/// Floats of a G of size x size, or of a block of it, as the losses below read it; writes them. gram: rows `stride`
/// apart, or the diagonal alone.
std::int64_t moments_size(const SearchArgs& args, std::int64_t size);
void pack_moments(const SearchArgs& args, const float* gram, std::int64_t stride, std::int64_t size, float* moments);

/// Number of scale candidates: the identity, `grid` powers of x_mean, and as many duo-scaled ones.
constexpr std::int64_t candidate_count(std::int64_t grid, bool duo) { return 1 + grid * (duo ? 2 : 1); }

/// w_mean[k] for groups [begin, end): the mean over rows of |w| / (largest |w| of the row's group + 1e-6).
void weight_means(const SearchArgs& args, std::int64_t begin, std::int64_t end, float* w_mean) noexcept;

/// Fills candidates [candidate_count, k] as ops.py search_scale describes; tie is [k] or nullptr.
void scale_candidates(const float* x_mean, const float* w_mean, const std::int64_t* tie, std::int64_t k,
                      std::int64_t grid, bool duo, float* candidates);

inline constexpr std::int64_t kSearchRows = 48;  // rows whose errors are held at a time

/// Floats of scratch that one thread needs below.
std::int64_t scale_scratch_size(const SearchArgs& args);
std::int64_t clip_scratch_size(const SearchArgs& args, std::int64_t grid);

/// loss[r - begin] for rows [begin, end) (at most kSearchRows) under one candidate; moments: all of G packed.
/// Infinity for a row of which a group's scale is not finite.
void scale_losses(const SearchArgs& args, const float* moments, const float* candidate, const float* inv_candidate,
                  std::int64_t begin, std::int64_t end, float* scratch, double* loss) noexcept;

/// range[n, groups, 2] for rows [begin, end); moments: the diagonal blocks of G packed one after another.
void clip_rows(const SearchArgs& args, const float* moments, std::int64_t grid, double max_shrink, std::int64_t begin,
               std::int64_t end, float* scratch, float* range) noexcept;

}  // namespace awq::core
