// The searches on a CUDA device: what their kernels, launches, operators and tests share. No toolkit in here.
#pragma once
#include <cstdint>

#include "../core/gram.h"
#include "../core/quantize.h"
#include "../core/search.h"

namespace awq::cuda {

inline constexpr int kProductTile = 128;  // rows and columns of the sums that a block has at a time
inline constexpr int kProductDepth = 8;   // of one step
inline constexpr int kGramRows = 512;     // rows of x that are summed before they are added to the sums
inline constexpr int kMeanRows = 64;      // rows of w that one thread sums up in w_mean

AWQ_HOST_DEVICE constexpr std::int64_t product_tiles(std::int64_t size) {
  return (size + kProductTile - 1) / kProductTile;
}
AWQ_HOST_DEVICE constexpr std::int64_t mean_chunks(std::int64_t n) { return (n + kMeanRows - 1) / kMeanRows; }
AWQ_HOST_DEVICE constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

/// core::weight_means.
struct MeanArgs {
  const float* w;  // [n, k]
  std::int64_t n, k, group;
  float* inverse;  // [n, groups]: 1 / (largest |w| of the group + 1e-6)
  double* sums;    // [mean_chunks(n), k]
  float* w_mean;   // [k]
};

/// core::scale_candidates.
struct CandidateArgs {
  const float* x_mean;      // [k]
  const float* w_mean;      // [k]
  const std::int64_t* tie;  // [k] or nullptr
  std::int64_t k, grid, count;
  double* scales;     // [count, k]; their logarithms where there is a tie
  double* tied;       // [count, k], or nullptr where there is no tie
  float* candidates;  // [count, k]
};

/// Errors of items [first, first + items): item i is row i % n under candidate i / n.
struct ScaleErrorArgs {
  const float* w;           // [n, k]
  const float* candidates;  // [.., k]
  std::int64_t n, k, group, first, items;
  core::Rounding to;
  float* d;        // [items, k]
  float* verdict;  // [items]: 0, or the loss of an item whose d must not be read: infinity or NaN
};

/// d G d^T for rows of d, batch after batch; the G of a batch is the next k x k block on the diagonal of a matrix.
struct LossArgs {
  const float* d;     // [batches, rows, k]
  const float* gram;  // rows gram_stride apart; 0: its diagonal, and the rest is zero
  std::int64_t batches, rows, k, gram_stride;
  double* partial;       // [batches, product_tiles(k), rows]
  const float* verdict;  // [batches, rows] as in ScaleErrorArgs, or nullptr
  double* loss;          // [batches, rows]
};

/// losses[c] = sum over rows of row_weight * row_loss; then the candidate with the smallest.
struct TotalArgs {
  const double* row_loss;   // [count, n]
  const float* row_weight;  // [n] or nullptr
  const float* candidates;  // [count, k]
  std::int64_t count, n, k;
  double* losses;  // [count]
  float* scale;    // [k]
};

/// One try of core::clip_rows for rows [row, row + rows) of w. Items are numbered group by group, in each row by row,
/// in each candidate by candidate.
struct ClipArgs {
  const float* w;     // [n, k]
  const float* gram;  // [k, k], rows gram_stride apart; 0: its diagonal [k]
  std::int64_t n, k, group, row, rows, gram_stride;
  core::Rounding to;
  std::int64_t candidates;
  double lo_step, hi_step;
  float* poison;       // [k]: 0, or NaN for a row of gram with an entry in its group's block that is not finite
  float* range;        // [n, groups, 2]: the best so far
  double* best;        // [n, groups]: its loss
  float* d;            // [items, group]
  const double* loss;  // [items]

  AWQ_HOST_DEVICE std::int64_t groups() const { return k / group; }
  AWQ_HOST_DEVICE std::int64_t items() const { return groups() * rows * candidates; }
};

// --- the order of work ----------------------------------------------------------------------------------------------
// Where memory allows only a part of it at a time. Each function given enqueues a step.

template <class Add>
void for_gram_rows(core::GramArgs rows, const Add& add) {
  const std::int64_t t = rows.t;
  for (std::int64_t begin = 0; begin < t; begin += kGramRows, rows.x += kGramRows * rows.x_stride) {
    rows.t = smaller(kGramRows, t - begin);
    add(rows);
  }
}

/// errors.items in all, `most` at a time: d, verdict and partial are of that many, loss of all.
template <class Errors, class Losses>
void for_scale_items(ScaleErrorArgs errors, LossArgs losses, std::int64_t most, const Errors& run_errors,
                     const Losses& run_losses) {
  const std::int64_t items = errors.items;
  for (errors.first = 0; errors.first < items; errors.first += most, losses.loss += most) {
    errors.items = losses.rows = smaller(most, items - errors.first);
    run_errors(errors);
    run_losses(losses);
  }
}

/// All rows of w, `most` at a time: d, partial and loss are of that many. Both ends are shrunk together, and then, from
/// the best of those, each alone; symmetric codes have one end.
template <class Errors, class Losses, class Choose>
void for_clip_tries(ClipArgs a, LossArgs losses, std::int64_t most, double step, const Errors& run_errors,
                    const Losses& run_losses, const Choose& run_choose) {
  constexpr bool kEnds[3][2] = {{true, true}, {true, false}, {false, true}};
  for (a.row = 0; a.row < a.n; a.row += most)
    for (int i = 0; i < (a.to.zero_point ? 3 : 1); ++i) {
      a.rows = smaller(most, a.n - a.row), losses.rows = a.rows * a.candidates;
      a.lo_step = kEnds[i][0] ? step : 0.0, a.hi_step = kEnds[i][1] ? step : 0.0;
      run_errors(a);
      run_losses(losses);
      run_choose(a);
    }
}

}  // namespace awq::cuda
