#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/quantize.h"
#include "core/search.h"
#include "data.h"
#include "levels.h"
#include "search_problem.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::exact_loss;
using test::for_levels;
using test::gram_matrix;
using test::Loss;
using test::Random;
using test::rounding_bound;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();  // scratch may hold anything

std::vector<float> packed_triangle(const float* gram, std::int64_t stride, std::int64_t k, std::int64_t panel) {
  std::vector<float> triangle(static_cast<std::size_t>(triangle_size(k, panel)));
  pack_triangle(gram, stride, k, panel, triangle.data());
  return triangle;
}

/// What rounding one group within [lo, hi] does to it.
std::vector<float> group_error(const float* w, std::int64_t group, float lo, float hi, Rounding to) {
  const GroupParameters p = group_parameters(lo, hi, to);
  std::vector<float> d;
  for (std::int64_t i = 0; i < group; ++i) d.push_back(dequantize_code(round_code(w[i], p), p) - w[i]);
  return d;
}

}  // namespace

TEST_CASE("the packed triangle holds each pair of channels once, doubled off the diagonal") {
  Random random(20);
  for (const std::int64_t panel : {8, 16, 64})
    for (const std::int64_t k : {1, 7, 8, 33, 64, 100}) {
      const std::int64_t stride = k + 3;  // a block of a larger matrix
      const auto gram = random.floats((k - 1) * stride + k, -1.0, 1.0);
      const auto triangle = packed_triangle(gram.data(), stride, k, panel);
      int wrong = 0;
      for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < padded(k, panel); ++j) {
          const float entry = triangle[static_cast<std::size_t>((j / panel * k + i) * panel + j % panel)];
          const float full = j < k ? gram[static_cast<std::size_t>(std::min(i, j) * stride + std::max(i, j))] : 0.0f;
          wrong += entry != (i > j || j >= k ? 0.0f : (i == j ? full : 2 * full));
        }
      CAPTURE(panel, k);
      CHECK(wrong == 0);
    }
}

TEST_CASE("gram_loss is d G d^T at every level") {
  Random random(21);
  for (const std::int64_t k : {1, 4, 33, 64, 100, 200}) {
    const auto gram = gram_matrix(k, 2 * k + 3, random);
    for_levels([&](const Kernels& kernels) {
      const std::int64_t ld = padded(k, kernels.panel);
      const auto triangle = packed_triangle(gram.data(), k, k, kernels.panel);
      for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 11, 13, 48}) {
        std::vector<float> d(static_cast<std::size_t>(rows * ld));
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t i = 0; i < k; ++i)
            d[static_cast<std::size_t>(r * ld + i)] = static_cast<float>(random.uniform(-0.1, 0.1));
        std::vector<double> loss(static_cast<std::size_t>(rows), -1.0);
        kernels.gram_loss(d.data(), rows, triangle.data(), k, loss.data());
        for (std::int64_t r = 0; r < rows; ++r) {
          const Loss expected = exact_loss(d.data() + r * ld, gram.data(), k, k);
          CAPTURE(k, rows, r, expected.value);
          REQUIRE(std::fabs(loss[static_cast<std::size_t>(r)] - expected.value) <= rounding_bound(expected, k));
        }
      }
    });
  }
}

TEST_CASE(
    "diagonal_loss is gram_loss of a matrix that is zero off its diagonal, and reads no further, at every level") {
  Random random(28);
  for (const std::int64_t k : {1, 4, 33, 64, 100, 200, 301}) {
    const auto diagonal = random.floats(k, 0.0, 3.0);
    std::vector<float> gram(static_cast<std::size_t>(k * k));
    for (std::int64_t i = 0; i < k; ++i)
      gram[static_cast<std::size_t>(i * (k + 1))] = diagonal[static_cast<std::size_t>(i)];
    for_levels([&](const Kernels& kernels) {
      const std::int64_t ld = padded(k, kernels.panel);
      for (const std::int64_t rows : {0, 1, 5}) {
        std::vector<float> d(static_cast<std::size_t>(rows * ld), kNan);
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t i = 0; i < k; ++i)
            d[static_cast<std::size_t>(r * ld + i)] = static_cast<float>(random.uniform(-0.1, 0.1));
        std::vector<double> loss(static_cast<std::size_t>(rows), -1.0);
        kernels.diagonal_loss(d.data(), rows, diagonal.data(), k, loss.data());
        for (std::int64_t r = 0; r < rows; ++r) {
          const Loss expected = exact_loss(d.data() + r * ld, gram.data(), k, k);
          CAPTURE(k, rows, r, expected.value);
          REQUIRE(std::fabs(loss[static_cast<std::size_t>(r)] - expected.value) <= rounding_bound(expected, k));
        }
      }
    });
  }
}

TEST_CASE("quantization_error is what quantize does, with the same bits at every level") {
  Random random(22);
  struct Depth {
    std::int64_t k, group;
  };
  for (const Depth& depth : {Depth{32, 4}, Depth{96, 32}, Depth{256, 128}, Depth{77, 77}, Depth{300, 300}})
    for (const DType scale_type : test::kFloatTypes)
      for (const bool zero_point : {true, false})
        for (const double magnitude : {1.0, 1e-6, 3000.0}) {
          const std::int64_t k = depth.k, group = depth.group;
          const Rounding to{zero_point, scale_type, last_code(2 + random.bits() % 7)};
          CAPTURE(k, group, int(scale_type), zero_point, magnitude, to.last);
          const auto w = random.floats(k, -0.7 * magnitude, magnitude), scale = random.floats(k, 0.25, 4.0);
          std::vector<float> inverse, expected;
          Array scaled(DType::f32, k);
          for (std::int64_t i = 0; i < k; ++i) {
            const auto j = static_cast<std::size_t>(i);
            inverse.push_back(1.0f / scale[j]);
            scaled.set(i, w[j] * scale[j]);
          }
          std::vector<std::uint8_t> q(static_cast<std::size_t>(k)), zeros(static_cast<std::size_t>(k / group));
          Array scales(scale_type, k / group);
          REQUIRE(quantize_rows(
                      {scaled.data(), nullptr, q.data(), scales.data(), zeros.data(), 1, k, group, k, DType::f32, to},
                      0, 1) == -1);
          for (std::int64_t i = 0; i < k; ++i) {
            const auto j = static_cast<std::size_t>(i);
            const float code = static_cast<float>(q[j] - zeros[static_cast<std::size_t>(i / group)]);
            expected.push_back(code * static_cast<float>(scales[i / group]) * inverse[j] - w[j]);
          }
          for_levels([&](const Kernels& kernels) {
            std::vector<float> d(static_cast<std::size_t>(k));
            REQUIRE(kernels.quantization_error(w.data(), scale.data(), inverse.data(), d.data(), k, group, to));
            CHECK(std::memcmp(d.data(), expected.data(), d.size() * sizeof(float)) == 0);
          });
        }
}

TEST_CASE("quantization_error refuses a group whose scale is not finite") {
  for_levels([&](const Kernels& kernels) {
    for (const float bad : {kNan, kInfinity, -kInfinity, 1e7f})
      for (const std::size_t place : {0u, 31u, 32u, 63u})
        for (const bool zero_point : {true, false}) {
          std::vector<float> w(64, 0.5f), ones(64, 1.0f), d(64);
          w[place] = bad;
          CHECK_FALSE(kernels.quantization_error(w.data(), ones.data(), ones.data(), d.data(), 64, 32,
                                                 {zero_point, DType::f16}));
        }
  });
}

TEST_CASE("weight_means: the mean over rows of |w| relative to the largest of its group") {
  Random random(23);
  constexpr std::int64_t n = 5, k = 96, group = 32;
  auto w = random.floats(n * k, -1.0, 1.0);
  std::fill_n(w.begin() + 2 * k, group, 0.0f);  // a dead group
  const SearchArgs args{w.data(), n, k, group, {true, DType::f16}, &portable_kernels()};
  std::vector<float> means(k, -1.0f);
  for (std::int64_t g = 0; g < k / group; ++g) weight_means(args, g, g + 1, means.data());
  for (std::int64_t i = 0; i < k; ++i) {
    double sum = 0.0;
    for (std::int64_t row = 0; row < n; ++row) {
      double largest = 0.0;
      for (std::int64_t j = i / group * group; j < (i / group + 1) * group; ++j)
        largest = std::max(largest, std::fabs(double{w[static_cast<std::size_t>(row * k + j)]}));
      sum += std::fabs(double{w[static_cast<std::size_t>(row * k + i)]}) / (largest + 1e-6);
    }
    CHECK(std::fabs(means[static_cast<std::size_t>(i)] - sum / n) <= 1e-6);
  }
}

TEST_CASE("scale candidates: the identity, powers of the activations, and duo-scaled ones") {
  Random random(24);
  constexpr std::int64_t k = 24, grid = 4;
  auto x_mean = random.floats(k, 0.01, 3.0), w_mean = random.floats(k, 0.05, 1.0);
  x_mean[5] = w_mean[7] = 0.0f;  // dead channels
  for (const bool duo : {false, true}) {
    const std::int64_t count = candidate_count(grid, duo);
    REQUIRE(count == (duo ? 9 : 5));
    std::vector<float> candidates(static_cast<std::size_t>(count * k));
    scale_candidates(x_mean.data(), w_mean.data(), nullptr, k, grid, duo, candidates.data());
    CHECK(std::all_of(candidates.begin(), candidates.begin() + k, [](float c) { return c == 1.0f; }));
    for (std::int64_t c = 1; c < count; ++c) {
      const bool with_w = c > grid;
      const double ratio = static_cast<double>(with_w ? c - grid : c) / grid;
      std::vector<double> scale;
      for (std::size_t i = 0; i < k; ++i)
        scale.push_back(
            std::max(std::pow(x_mean[i], ratio) / (with_w ? std::pow(w_mean[i], 1 - ratio) + 1e-4 : 1.0), 1e-4));
      const auto [smallest, largest] = std::minmax_element(scale.begin(), scale.end());
      const double middle = std::sqrt(*smallest * *largest);
      for (std::size_t i = 0; i < k; ++i) {
        const double value = candidates[static_cast<std::size_t>(c) * k + i];
        CAPTURE(duo, c, i);
        CHECK(std::fabs(value - scale[i] / middle) <= 1e-6 * value);
      }
    }
  }
}

TEST_CASE("tied channels share the geometric mean of their scales") {
  Random random(25);
  constexpr std::int64_t k = 12, grid = 3;
  const auto x_mean = random.floats(k, 0.01, 3.0), w_mean = random.floats(k, 0.05, 1.0);
  const std::vector<std::int64_t> tie = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 11};
  std::vector<float> free(static_cast<std::size_t>(candidate_count(grid, true) * k)), tied(free.size());
  scale_candidates(x_mean.data(), w_mean.data(), nullptr, k, grid, true, free.data());
  scale_candidates(x_mean.data(), w_mean.data(), tie.data(), k, grid, true, tied.data());
  for (std::size_t c = 0; c < free.size() / k; ++c) {
    const float *own = &free[c * k], *shared = &tied[c * k];
    for (std::size_t i = 0; i < k; ++i)
      for (std::size_t j = 0; j < k; ++j)
        if (tie[i] == tie[j]) {
          CHECK(shared[i] == shared[j]);
        }
    // Both are normalised by their own middle, so ratios between ties are what can be compared.
    const double first = std::cbrt(double{own[0]} * own[4] * own[8]),
                 second = std::cbrt(double{own[1]} * own[5] * own[9]);
    CHECK(std::fabs(double{shared[0]} / shared[1] - first / second) <= 1e-5 * first / second);
    CHECK(std::fabs(double{shared[11]} / shared[1] - own[11] / second) <= 1e-5 * own[11] / second);
  }
}

TEST_CASE("dead and extreme channels give candidates that are finite and positive") {
  const float largest = std::numeric_limits<float>::max(), smallest = 0x1p-149f;
  const std::vector<std::vector<float>> means = {{0, 0, 0, 0},
                                                 {0, 1, 2, 3},
                                                 {largest, 0, 1, smallest},
                                                 {largest, largest, largest, largest},
                                                 {1e-30f, 1, 1, 1e30f}};
  auto w_means = means;
  w_means.push_back({1, kNan, 1, 1});  // of a weight that is not finite: its loss, not its scale, rules it out
  w_means.push_back({kInfinity, 1, kNan, 0});
  for (const auto& x_mean : means)
    for (const auto& w_mean : w_means) {
      std::vector<float> candidates(static_cast<std::size_t>(candidate_count(20, true) * 4));
      scale_candidates(x_mean.data(), w_mean.data(), nullptr, 4, 20, true, candidates.data());
      for (const float c : candidates) {
        REQUIRE(c > 0.0f);
        REQUIRE(std::isfinite(c));
      }
    }
}

TEST_CASE("scale_losses is the loss of each row, and infinite for a row of which a scale is not finite") {
  Random random(26);
  constexpr std::int64_t n = 50, k = 96, group = 32;
  auto w = random.floats(n * k, -1.0, 1.0);
  const auto gram = gram_matrix(k, 200, random), candidate = random.floats(k, 0.5, 2.0);
  std::vector<float> inverse;
  for (const float c : candidate) inverse.push_back(1.0f / c);
  for_levels([&](const Kernels& kernels) {
    const SearchArgs args{w.data(), n, k, group, {true, DType::f16}, &kernels};
    const auto triangle = packed_triangle(gram.data(), k, k, kernels.panel);
    std::vector<float> scratch(static_cast<std::size_t>(scale_scratch_size(args)), kNan), d(k);
    for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>{0, 48}, {48, 50}, {7, 8}}) {
      std::vector<double> loss(static_cast<std::size_t>(end - begin));
      scale_losses(args, triangle.data(), candidate.data(), inverse.data(), begin, end, scratch.data(), loss.data());
      for (std::int64_t row = begin; row < end; ++row) {
        REQUIRE(kernels.quantization_error(&w[static_cast<std::size_t>(row * k)], candidate.data(), inverse.data(),
                                           d.data(), k, group, {true, DType::f16}));
        const Loss expected = exact_loss(d.data(), gram.data(), k, k);
        CHECK(std::fabs(loss[static_cast<std::size_t>(row - begin)] - expected.value) <= rounding_bound(expected, k));
      }
    }
    auto broken = w;
    broken[3 * k + 5] = 1e7f;  // its scale overflows float16
    const SearchArgs bad{broken.data(), n, k, group, {true, DType::f16}, &kernels};
    double loss[3] = {};
    scale_losses(bad, triangle.data(), candidate.data(), inverse.data(), 2, 5, scratch.data(), loss);
    CHECK(std::isinf(loss[1]));
    CHECK((std::isfinite(loss[0]) && std::isfinite(loss[2])));
  });
}

TEST_CASE("the chosen clip range is never worse than the whole range, nor than any candidate of the first pass") {
  Random random(27);
  struct Case {
    std::int64_t k, group;
    double outlier;
  };
  constexpr std::int64_t n = 9, grid = 10;
  constexpr double max_shrink = 0.5;
  for (const Case& c : {Case{64, 32, 1.0}, Case{128, 64, 4.0}, Case{33, 33, 3.0}, Case{16, 4, 1.0}})
    for (const bool zero_point : {true, false}) {
      const std::int64_t k = c.k, group = c.group;
      const std::int64_t groups = k / group;
      auto w = random.floats(n * k, -0.4, 0.6);
      for (std::int64_t i = 0; i < n * k; i += 13) w[static_cast<std::size_t>(i)] *= static_cast<float>(c.outlier);
      std::fill_n(w.begin(), group, 0.0f);
      for (std::int64_t i = 0; i < group; ++i)
        w[static_cast<std::size_t>(k + i)] = 1.0f + 0.01f * static_cast<float>(i);
      const auto gram = gram_matrix(k, 3 * k, random);
      int narrowed = 0;
      for_levels([&](const Kernels& kernels) {
        const SearchArgs args{w.data(), n, k, group, {zero_point, DType::f16}, &kernels};
        const std::int64_t size = triangle_size(group, kernels.panel);
        std::vector<float> triangles(static_cast<std::size_t>(groups * size));
        for (std::int64_t g = 0; g < groups; ++g)
          pack_triangle(gram.data() + g * group * (k + 1), k, group, kernels.panel, triangles.data() + g * size);
        std::vector<float> scratch(static_cast<std::size_t>(clip_scratch_size(args, grid)), kNan);
        std::vector<float> range(static_cast<std::size_t>(n * groups * 2), -9.0f);
        clip_rows(args, triangles.data(), grid, max_shrink, 0, 5, scratch.data(), range.data());
        clip_rows(args, triangles.data(), grid, max_shrink, 5, n, scratch.data(), range.data());
        for (std::int64_t row = 0; row < n; ++row)
          for (std::int64_t g = 0; g < groups; ++g) {
            const float* weights = &w[static_cast<std::size_t>(row * k + g * group)];
            const float* block = gram.data() + g * group * (k + 1);
            const auto [low, high] = std::minmax_element(weights, weights + group);
            const double lo = std::min(*low, 0.0f), hi = std::max(*high, 0.0f);
            const float* ends = &range[static_cast<std::size_t>((row * groups + g) * 2)];
            const auto loss_of = [&](float from, float to) {
              const auto d = group_error(weights, group, from, to, {zero_point, DType::f16});
              return exact_loss(d.data(), block, k, group);
            };
            CAPTURE(k, group, zero_point, row, g, lo, hi, ends[0], ends[1]);
            REQUIRE((ends[0] <= 0.0f && ends[1] >= 0.0f));
            REQUIRE((ends[0] >= lo && ends[1] <= hi));
            const Loss chosen = loss_of(ends[0], ends[1]);
            narrowed += ends[0] > lo || ends[1] < hi;
            for (std::int64_t t = 0; t <= grid; ++t) {
              const double keep = 1.0 - static_cast<double>(t) * max_shrink / grid;
              const Loss other = loss_of(static_cast<float>(lo * keep), static_cast<float>(hi * keep));
              REQUIRE(chosen.value <= other.value + rounding_bound(chosen, group) + rounding_bound(other, group));
            }
          }
      });
      if (c.outlier > 1.0) {
        CHECK(narrowed > 0);
      }
    }
}
