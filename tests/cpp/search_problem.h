// What tests of the searches share: Gram matrices as calibration makes them, and losses in float64 with their bound.
#pragma once
#include <cmath>
#include <vector>

#include "data.h"

namespace awq::test {

/// A symmetric positive semidefinite matrix, as mean x^T x of `tokens` rows of x with a few loud channels.
inline std::vector<float> gram_matrix(std::int64_t k, std::int64_t tokens, Random& random) {
  std::vector<double> sum(static_cast<std::size_t>(k * k)), x(static_cast<std::size_t>(k));
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < k; ++i)
      x[static_cast<std::size_t>(i)] = random.uniform(-1.0, 1.0) * (i % 7 == 0 ? 8.0 : 1.0) + 0.1;
    for (std::int64_t i = 0; i < k; ++i)
      for (std::int64_t j = 0; j < k; ++j)
        sum[static_cast<std::size_t>(i * k + j)] += x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(j)];
  }
  std::vector<float> gram;
  for (const double value : sum) gram.push_back(static_cast<float>(value / static_cast<double>(tokens)));
  return gram;
}

struct Loss {
  double value = 0.0;      // d G d^T
  double magnitude = 0.0;  // sum |d_i| |G_ij| |d_j|: what float32 rounding errors are proportional to
};

inline Loss exact_loss(const float* d, const float* gram, std::int64_t stride, std::int64_t k) {
  Loss loss;
  for (std::int64_t i = 0; i < k; ++i)
    for (std::int64_t j = 0; j < k; ++j) {
      const double term = double{d[i]} * gram[i * stride + j] * d[j];
      loss.value += term;
      loss.magnitude += std::fabs(term);
    }
  return loss;
}

inline double rounding_bound(const Loss& loss, std::int64_t k) {
  return 2.0 * static_cast<double>(k + 8) * 0x1p-24 * loss.magnitude;
}

}  // namespace awq::test
