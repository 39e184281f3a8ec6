// Every kernel of every level against the product in float64, with bounds that follow from how each kernel adds.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/kernels.h"
#include "core/linear.h"
#include "data.h"
#include "linear_problem.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::Random;
using test::Shape;
using test::Types;

namespace {

/// A linear call on a weight in layout gemm.
struct Problem : test::LinearProblem {
  Problem(Shape shape_, Types types_, Random& random, std::int64_t pad = 0)
      : LinearProblem("gemm", shape_, types_, random, pad) {}
};

/// y in float64 from codes, not words; `direct` = sum |x| |q - z| s and `split` = sum |x| (q + z) s bound the terms
/// that are added when (q - z) s is formed first, and when sums of q x and z x are subtracted at the end of a group.
struct Expected {
  explicit Expected(const Problem& p)
      : y(static_cast<std::size_t>(p.shape.m * p.shape.n)), direct(y.size()), split(y.size()) {
    const auto [m, n, k, group] = p.shape;
    std::vector<double> weight(static_cast<std::size_t>(n)), wide(weight.size());
    for (std::int64_t i = 0; i < k; ++i) {
      for (std::int64_t col = 0; col < n; ++col) {
        const int code = p.q[static_cast<std::size_t>(col * k + i)];
        const int zero = p.z[static_cast<std::size_t>(col * p.groups + i / group)];
        const double scale = p.scales[i / group * n + col];
        weight[static_cast<std::size_t>(col)] = (code - zero) * scale;
        wide[static_cast<std::size_t>(col)] = (code + zero) * scale;
      }
      for (std::int64_t row = 0; row < m; ++row) {
        const double xi = p.x[row * p.stride + i];
        double* out = &y[static_cast<std::size_t>(row * n)];
        double* sum_direct = &direct[static_cast<std::size_t>(row * n)];
        double* sum_split = &split[static_cast<std::size_t>(row * n)];
        for (std::int64_t col = 0; col < n; ++col) {
          const double w = weight[static_cast<std::size_t>(col)];
          out[col] += xi * w;
          sum_direct[col] += std::fabs(xi * w);
          sum_split[col] += std::fabs(xi) * wide[static_cast<std::size_t>(col)];
        }
      }
    }
    for (std::int64_t i = 0; p.types.with_bias && i < m * n; ++i) {
      y[static_cast<std::size_t>(i)] += p.bias[i % n];
      direct[static_cast<std::size_t>(i)] += std::fabs(p.bias[i % n]);
      split[static_cast<std::size_t>(i)] += std::fabs(p.bias[i % n]);
    }
  }

  std::vector<double> y, direct, split;
};

/// Largest and mean |y - expected| / bound, bound = u_out |expected| + 2 (k + 4) u32 sum of |terms|: no chain of
/// additions is longer than k, and zeros, scale and bias add at most four roundings.
struct Ratio {
  double largest = 0.0, sum = 0.0;
  std::int64_t count = 0;

  void add(const Array& y, const std::vector<double>& expected, const std::vector<double>& terms, std::int64_t k) {
    const double out = test::unit_roundoff(y.type()), least = test::subnormal_roundoff(y.type());
    for (std::int64_t i = 0; i < y.size(); ++i) {
      const auto j = static_cast<std::size_t>(i);
      const double bound = out * std::fabs(expected[j]) + 2.0 * static_cast<double>(k + 4) * 0x1p-24 * terms[j] + least;
      const double ratio = std::fabs(y[i] - expected[j]) / bound;
      largest = ratio <= largest ? largest : ratio;  // a NaN becomes the largest
      sum += ratio;
    }
    count += y.size();
  }
  double mean() const { return sum / static_cast<double>(count); }
};

/// Runs one kernel over its strips, `piece` strips a call (0: all of them).
Array run(const Problem& p, const Kernels& kernels, bool decode, std::int64_t piece = 0) {
  const auto [m, n, k, group] = p.shape;
  const std::int64_t strips = (n + kernels.strip - 1) / kernels.strip;
  Array y(p.types.x, m * n);
  const LinearArgs args = p.args(y);
  std::vector<float> x(static_cast<std::size_t>(m * k)), sums(static_cast<std::size_t>(m * p.groups)),
      acc(static_cast<std::size_t>(decode ? strips * m * kernels.strip : 0),
          std::numeric_limits<float>::quiet_NaN());  // scratch may hold anything
  for (std::int64_t row = 0; row < m; ++row)
    kernels.prepare_row(args, row, x.data() + row * k, sums.data() + row * p.groups);
  const LinearWork work{&args, x.data(), sums.data(), acc.data()};
  if (piece == 0) piece = strips;
  for (std::int64_t begin = 0; begin < strips; begin += piece)
    (decode ? kernels.linear_decode : kernels.linear_gemm)(work, begin, std::min(begin + piece, strips));
  return y;
}

/// Calls body(kernels, decode) for both kernels of every level.
template <class Body>
void for_kernels(Body body) {
  for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level)
    for (const bool decode : {true, false}) {
      CAPTURE((*level)->name, decode);
      body(**level, decode);
    }
}

constexpr std::int64_t kColumns[] = {8, 24, 72, 136, 576};
constexpr std::int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 66, 67};
struct Depth {
  std::int64_t k, group;
};
constexpr Depth kDepths[] = {{4, 4}, {36, 4}, {96, 32}, {128, 64}, {256, 128}, {72, 72}, {300, 300}};

}  // namespace

TEST_CASE("the reference is the product of x with the dequantized weight") {
  Random random(10);
  for (const DType x_type : {DType::f64, DType::f32, DType::f16, DType::bf16})
    for (const Shape& shape : {Shape{3, 24, 96, 32}, Shape{1, 8, 4, 4}, Shape{5, 72, 72, 72}})
      for (const bool zeros : {true, false})
        for (const bool bias : {true, false}) {
          const Problem p(shape, {x_type, DType::bf16, DType::f32, zeros, bias}, random, 1);
          const Expected expected(p);
          Array y(x_type, shape.m * shape.n), pieces(x_type, shape.m * shape.n);
          linear_reference(p.args(y), 0, shape.n);
          for (std::int64_t col = 0; col < shape.n; col += 8) linear_reference(p.args(pieces), col, col + 8);
          CHECK(y == pieces);
          if (x_type == DType::f64) {
            for (std::int64_t i = 0; i < y.size(); ++i)
              REQUIRE(std::fabs(y[i] - expected.y[static_cast<std::size_t>(i)]) <= 1e-13);
          } else {
            Ratio ratio;
            ratio.add(y, expected.y, expected.direct, shape.k);
            CHECK(ratio.largest <= 1.0);
          }
        }
}

TEST_CASE("every kernel stays within its rounding bound for every shape") {
  Random random(11);
  std::size_t turn = 0;  // dtypes, zeros, bias and stride take turns; the next test has their full product
  std::size_t kernels = 0;
  for_kernels([&](const Kernels&, bool) { ++kernels; });
  std::vector<Ratio> total(kernels);
  for (const std::int64_t n : kColumns)
    for (const Depth& depth : kDepths)
      for (const std::int64_t m : kRows) {
        const std::size_t t = turn++;
        const Types types{test::kFloatTypes[t % 3], test::kFloatTypes[t / 3 % 3], test::kFloatTypes[t / 9 % 3],
                          t % 5 != 0, t % 7 != 0};
        const Problem p({m, n, depth.k, depth.group}, types, random, t % 4 == 0 ? 3 : 0);
        const Expected expected(p);
        CAPTURE(m, n, depth.k, depth.group, int(types.x), int(types.scale), int(types.bias), types.zeros,
                types.with_bias, p.stride);
        std::size_t kernel = 0;
        for_kernels([&](const Kernels& kernels, bool decode) {
          const Array y = run(p, kernels, decode);
          Ratio ratio;
          ratio.add(y, expected.y, decode ? expected.split : expected.direct, depth.k);
          REQUIRE(ratio.largest <= 1.0);
          if (types.x == DType::f32) {
            total[kernel].sum += ratio.sum;
            total[kernel].count += ratio.count;
          }
          ++kernel;
        });
      }
  // The bound is for the worst case. On random data float32 errors are far smaller, and a drift shows here first.
  for (const Ratio& ratio : total)
    if (ratio.count > 0) {
      CHECK(ratio.mean() < 0.01);
    }
}

TEST_CASE("every combination of dtypes, zeros and bias") {
  Random random(12);
  for (const std::int64_t m : {3, 9})
    for (const DType x_type : test::kFloatTypes)
      for (const DType scale_type : test::kFloatTypes)
        for (const DType bias_type : test::kFloatTypes)
          for (const bool zeros : {true, false})
            for (const bool bias : {true, false}) {
              const Problem p({m, 72, 96, 32}, {x_type, scale_type, bias_type, zeros, bias}, random);
              const Expected expected(p);
              CAPTURE(m, int(x_type), int(scale_type), int(bias_type), zeros, bias);
              for_kernels([&](const Kernels& kernels, bool decode) {
                Ratio ratio;
                ratio.add(run(p, kernels, decode), expected.y, decode ? expected.split : expected.direct, 96);
                CHECK(ratio.largest <= 1.0);
              });
            }
}

TEST_CASE("any split of the strips gives the same bits") {
  Random random(13);
  for (const std::int64_t m : {1, 3, 67}) {
    const Problem p({m, 584, 96, 32}, {DType::f16, DType::f16, DType::f16}, random, 5);
    for_kernels([&](const Kernels& kernels, bool decode) {
      const Array whole = run(p, kernels, decode);
      for (const std::int64_t piece : {1, 2, 3}) CHECK(run(p, kernels, decode, piece) == whole);
    });
  }
}

TEST_CASE("the rows of x do not touch each other, whatever one of them holds") {
  Random random(14);
  constexpr double bad_values[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                                   -65504.0};
  for (const DType type : test::kFloatTypes)
    for (const std::int64_t m : {2, 5, 9, 67})
      for (const double bad : bad_values) {
        const Problem good({m, 136, 64, 32}, {type, DType::f16, DType::f16}, random);
        Problem spoiled = good;
        const std::int64_t row = m / 2;
        spoiled.x.set(row * 64 + 33, bad);
        CAPTURE(int(type), m, bad);
        for_kernels([&](const Kernels& kernels, bool decode) {
          const Array before = run(good, kernels, decode), after = run(spoiled, kernels, decode);
          int touched = 0;
          bool nan = true;
          for (std::int64_t i = 0; i < m * 136; ++i)
            if (i / 136 != row)
              touched += before[i] != after[i];
            else
              nan &= std::isnan(after[i]);
          CHECK(touched == 0);
          if (std::isnan(bad)) {
            CHECK(nan);
          }
        });
      }
}

TEST_CASE("a row alone gives what it gives among others") {
  Random random(15);
  const Problem p({67, 136, 96, 32}, {}, random);
  for_kernels([&](const Kernels& kernels, bool decode) {
    const Array all = run(p, kernels, decode);
    int different = 0;
    for (std::int64_t row = 0; row < 67; ++row) {
      Problem one = p;
      one.shape.m = 1;
      for (std::int64_t i = 0; i < 96; ++i) one.x.set(i, p.x[row * 96 + i]);
      const Array y = run(one, kernels, decode);
      for (std::int64_t col = 0; col < 136; ++col) different += y[col] != all[row * 136 + col];
    }
    CHECK(different == 0);
  });
}

TEST_CASE("x with a single one reads a weight exactly, at the extremes of float16 scales too") {
  Random random(16);
  constexpr std::int64_t n = 72, k = 64;
  Problem p({k, n, k, 32}, {DType::f32, DType::f16, DType::f16, true, false}, random);
  for (std::int64_t i = 0; i < k * k; ++i) p.x.set(i, i / k == i % k);
  const double extremes[] = {65504.0, 0x1p-24, 0x1p-14, -65504.0, 0.0};
  for (std::int64_t i = 0; i < p.scales.size(); ++i) p.scales.set(i, extremes[i % 5]);
  const Expected expected(p);
  for_kernels([&](const Kernels& kernels, bool decode) {
    const Array y = run(p, kernels, decode);
    int wrong = 0;
    for (std::int64_t i = 0; i < y.size(); ++i) wrong += y[i] != expected.y[static_cast<std::size_t>(i)];
    CHECK(wrong == 0);
  });
}

TEST_CASE("codes equal to their zeros: the product cancels to the bias") {
  Random random(17);
  Problem p({6, 72, 128, 64}, {}, random);
  for (std::size_t i = 0; i < p.q.size(); ++i) p.q[i] = p.z[i / 64];
  p.pack();
  const Expected expected(p);
  for_kernels([&](const Kernels& kernels, bool decode) {
    Ratio ratio;
    ratio.add(run(p, kernels, decode), expected.y, decode ? expected.split : expected.direct, 128);
    CHECK(ratio.largest <= 1.0);
  });
}

TEST_CASE("prepare_row converts exactly and sums each group") {
  Random random(18);
  for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level)
    for (const DType type : test::kFloatTypes)
      for (const Depth& depth : {Depth{7, 7}, Depth{36, 4}, Depth{96, 32}, Depth{300, 100}}) {
        const Problem p({3, 8, depth.k, depth.group}, {type}, random, 2);
        Array y(type, 3 * 8);
        const LinearArgs args = p.args(y);
        for (std::int64_t row = 0; row < 3; ++row) {
          std::vector<float> x(static_cast<std::size_t>(depth.k)), sums(static_cast<std::size_t>(p.groups));
          (*level)->prepare_row(args, row, x.data(), sums.data());
          for (std::int64_t i = 0; i < depth.k; ++i)
            REQUIRE(static_cast<double>(x[static_cast<std::size_t>(i)]) == p.x[row * p.stride + i]);
          for (std::int64_t g = 0; g < p.groups; ++g) {
            double sum = 0.0, magnitude = 0.0;
            for (std::int64_t i = g * depth.group; i < (g + 1) * depth.group; ++i) {
              sum += p.x[row * p.stride + i];
              magnitude += std::fabs(p.x[row * p.stride + i]);
            }
            REQUIRE(std::fabs(sums[static_cast<std::size_t>(g)] - sum) <=
                    static_cast<double>(depth.group) * 0x1p-24 * magnitude);
          }
        }
      }
}
