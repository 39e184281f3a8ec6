#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "quantize.h"

namespace awq::core {

void pack_triangle(const float* gram, std::int64_t stride, std::int64_t k, std::int64_t panel, float* triangle) {
  for (std::int64_t j0 = 0; j0 < padded(k, panel); j0 += panel)
    for (std::int64_t i = 0; i < k; ++i)
      for (std::int64_t j = j0; j < j0 + panel; ++j) {
        const bool inside = j < k && i <= j;
        *triangle++ = inside ? gram[i * stride + j] * (i == j ? 1.0f : 2.0f) : 0.0f;
      }
}

std::int64_t moments_size(const SearchArgs& a, std::int64_t size) {
  return a.diagonal ? size : triangle_size(size, a.kernels->panel);
}

void pack_moments(const SearchArgs& a, const float* gram, std::int64_t stride, std::int64_t size, float* moments) {
  if (a.diagonal)
    std::copy_n(gram, size, moments);
  else
    pack_triangle(gram, stride, size, a.kernels->panel, moments);
}

void weight_means(const SearchArgs& a, std::int64_t begin, std::int64_t end, float* w_mean) noexcept {
  constexpr std::int64_t kColumns = 256;  // sums held at a time, so that nothing is allocated on a worker thread
  for (std::int64_t g = begin; g < end; ++g)
    for (std::int64_t first = 0; first < a.group; first += kColumns) {
      const std::int64_t count = std::min(kColumns, a.group - first);
      double sum[kColumns] = {};
      for (std::int64_t row = 0; row < a.n; ++row) {
        const float* w = a.w + row * a.k + g * a.group;
        float largest = 0.0f;
        for (std::int64_t i = 0; i < a.group; ++i) largest = std::max(largest, std::fabs(w[i]));
        const float inverse = 1.0f / (largest + 1e-6f);
        for (std::int64_t i = 0; i < count; ++i) sum[i] += std::fabs(w[first + i]) * inverse;
      }
      for (std::int64_t i = 0; i < count; ++i)
        w_mean[g * a.group + first + i] =
            static_cast<float>(sum[i] / static_cast<double>(std::max<std::int64_t>(1, a.n)));
    }
}

namespace {

/// loss[r] = d_r G d_r^T for rows of d [rows, padded(size)].
void losses(const SearchArgs& a, const float* d, std::int64_t rows, const float* moments, std::int64_t size,
            double* loss) {
  (a.diagonal ? a.kernels->diagonal_loss : a.kernels->gram_loss)(d, rows, moments, size, loss);
}

/// One scale for all channels with the same tie number: the geometric mean.
void apply_tie(const std::int64_t* tie, std::int64_t k, std::vector<double>& scale) {
  const auto last = *std::max_element(tie, tie + k);
  std::vector<double> log_sum(static_cast<std::size_t>(last + 1));
  std::vector<std::int64_t> count(static_cast<std::size_t>(last + 1));
  for (std::int64_t i = 0; i < k; ++i) {
    log_sum[static_cast<std::size_t>(tie[i])] += std::log(scale[static_cast<std::size_t>(i)]);
    ++count[static_cast<std::size_t>(tie[i])];
  }
  for (std::int64_t i = 0; i < k; ++i) {
    const auto t = static_cast<std::size_t>(tie[i]);
    scale[static_cast<std::size_t>(i)] = std::exp(log_sum[t] / static_cast<double>(count[t]));
  }
}

}  // namespace

void scale_candidates(const float* x_mean, const float* w_mean, const std::int64_t* tie, std::int64_t k,
                      std::int64_t grid, bool duo, float* candidates) {
  std::fill(candidates, candidates + k, 1.0f);
  if (k == 0) return;
  float* out = candidates + k;
  std::vector<double> scale(static_cast<std::size_t>(k));
  for (int with_w = 0; with_w < (duo ? 2 : 1); ++with_w)
    for (std::int64_t step = 1; step <= grid; ++step, out += k) {
      const double ratio = static_cast<double>(step) / static_cast<double>(grid);
      for (std::int64_t i = 0; i < k; ++i) {
        const double x = std::pow(static_cast<double>(x_mean[i]), ratio);
        const double w = with_w ? std::pow(static_cast<double>(w_mean[i]), 1.0 - ratio) + 1e-4 : 1.0;
        scale[static_cast<std::size_t>(i)] = std::max(x / w, 1e-4);
      }
      if (tie != nullptr) apply_tie(tie, k, scale);
      const auto [smallest, largest] = std::minmax_element(scale.begin(), scale.end());
      const double middle = std::sqrt(*smallest) * std::sqrt(*largest);
      for (std::int64_t i = 0; i < k; ++i) {
        const auto value = static_cast<float>(scale[static_cast<std::size_t>(i)] / middle);
        out[i] = std::isfinite(value) && value > 0.0f ? value : 1.0f;
      }
    }
}

std::int64_t scale_scratch_size(const SearchArgs& a) { return kSearchRows * padded(a.k, a.kernels->panel); }

void scale_losses(const SearchArgs& a, const float* moments, const float* candidate, const float* inv_candidate,
                  std::int64_t begin, std::int64_t end, float* scratch, double* loss) noexcept {
  const std::int64_t ld = padded(a.k, a.kernels->panel);
  bool finite[kSearchRows];
  for (std::int64_t row = begin; row < end; ++row) {
    float* d = scratch + (row - begin) * ld;
    finite[row - begin] =
        a.kernels->quantization_error(a.w + row * a.k, candidate, inv_candidate, d, a.k, a.group, a.to);
    std::fill(finite[row - begin] ? d + a.k : d, d + ld, 0.0f);
  }
  losses(a, scratch, end - begin, moments, a.k, loss);
  for (std::int64_t row = begin; row < end; ++row)
    if (!finite[row - begin]) loss[row - begin] = std::numeric_limits<double>::infinity();
}

std::int64_t clip_scratch_size(const SearchArgs& a, std::int64_t grid) {
  // errors of grid + 1 candidates, then their losses as doubles
  return (grid + 1) * padded(a.group, a.kernels->panel) + 2 * (grid + 1);
}

namespace {

/// Tries ranges[0 .. count) for one group; returns the best one's index and its loss.
struct ClipGroup {
  const SearchArgs& args;
  const float* w;
  const float* moments;
  std::int64_t candidates;
  float* scratch;

  /// Ends [lo * (1 - t * lo_step), hi * (1 - t * hi_step)] for t = 0 .. candidates - 1; the first among equals wins.
  void best(float lo, float hi, double lo_step, double hi_step, float& best_lo, float& best_hi, double& best_loss) {
    const std::int64_t g = args.group, ld = padded(g, args.kernels->panel);
    auto* loss = reinterpret_cast<double*>(scratch);
    float* errors = scratch + 2 * candidates;
    for (std::int64_t t = 0; t < candidates; ++t) {
      const GroupParameters p = group_parameters(shrunk(lo, t * lo_step), shrunk(hi, t * hi_step), args.to);
      float* d = errors + t * ld;
      args.kernels->rounding_error(w, p, g, d);
      std::fill(d + g, d + ld, 0.0f);
    }
    losses(args, errors, candidates, moments, g, loss);
    for (std::int64_t t = 0; t < candidates; ++t)
      if (loss[t] < best_loss) {
        best_loss = loss[t];
        best_lo = shrunk(lo, t * lo_step);
        best_hi = shrunk(hi, t * hi_step);
      }
  }

  static float shrunk(float end, double by) { return static_cast<float>(static_cast<double>(end) * (1.0 - by)); }
};

}  // namespace

void clip_rows(const SearchArgs& a, const float* moments, std::int64_t grid, double max_shrink, std::int64_t begin,
               std::int64_t end, float* scratch, float* range) noexcept {
  const std::int64_t groups = a.k / a.group;
  const double step = max_shrink / static_cast<double>(grid);
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t row = begin; row < end; ++row) {
      const float* w = a.w + row * a.k + g * a.group;
      const auto [low, high] = std::minmax_element(w, w + a.group);
      float lo = std::min(*low, 0.0f), hi = std::max(*high, 0.0f);
      double loss = std::numeric_limits<double>::infinity();
      ClipGroup group{a, w, moments + g * moments_size(a, a.group), grid + 1, scratch};
      group.best(lo, hi, step, step, lo, hi, loss);
      if (a.to.zero_point) {
        group.best(lo, hi, step, 0.0, lo, hi, loss);
        group.best(lo, hi, 0.0, step, lo, hi, loss);
      }
      range[(row * groups + g) * 2] = lo;
      range[(row * groups + g) * 2 + 1] = hi;
    }
}

}  // namespace awq::core
