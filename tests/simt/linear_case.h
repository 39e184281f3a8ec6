// A linear call in layout fragments for the interpreter of kernels, and what its result has to be.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "cpp/catch.hpp"
#include "cpp/linear_problem.h"
#include "simt/simt.h"

namespace awq::test {

/// Random to begin with; x, q, z, scales and bias may be set before check(). Between the rows of x, `pad` elements, is
/// NaN.
class LinearCase : public LinearProblem {
 public:
  LinearCase(Shape shape_, Types types_, std::int64_t pad = 8, std::uint32_t seed = 1)
      : LinearCase(shape_, types_, pad, Random(seed)) {}

  /// What a term goes through on its way into y: float32 additions, at most; and whether its weight is rounded to x's
  /// type before.
  struct Arithmetic {
    double additions;
    bool rounded_weights = false;
  };

  /// run(args, options) plays the kernel. Under every seed all of y must be written, the same each time, and each
  /// element within its bound of the product in float64,
  ///     u_y |y| + 2 additions u_float32 sum |x w|  (+ 2 u_x sum |x w| where weights are rounded).
  /// Where the product is NaN or infinite, y is; where it may round to infinity, y may be. Returns the largest error in
  /// units of its bound.
  template <class Run>
  double check(Arithmetic arithmetic, Run run, std::initializer_list<std::uint64_t> seeds = {0, 1, 2}) {
    CAPTURE(shape.m, shape.n, shape.k, shape.group, stride, int(types.x), int(types.scale), types.zeros);
    prepare();
    const auto bytes = [](const Array& a) { return static_cast<std::size_t>(a.size() * core::size_of(a.type())); };
    simt::Global global_x(x.data(), bytes(x), false, "x"), global_bias(bias.data(), bytes(bias), false, "bias"),
        global_scales(ordered.data(), bytes(ordered), false, "scales"),
        global_words(words.data(), words.size() * 4, false, "qweight"),
        global_zeros(zeros.data(), zeros.size() * 4, false, "qzeros");
    global_bias.weights(), global_scales.weights(), global_words.weights(), global_zeros.weights();
    y = Array(types.x, shape.m * shape.n);
    double worst = 0.0;
    bool first = true;
    for (const std::uint64_t seed : seeds) {
      CAPTURE(seed);
      Array again(types.x, shape.m * shape.n);
      simt::Global global_y(again.data(), bytes(again), true, "y");
      global_y.uninitialised();
      core::LinearArgs args = LinearProblem::args(again);
      args.scales = ordered.data();
      run(args, simt::Options{.seed = seed});
      REQUIRE(global_y.all_written());
      if (first)
        worst = judge(again, arithmetic), y = again;
      else
        REQUIRE(again == y);
      first = false;
    }
    return worst;
  }

  Array y{DType::f32, 0};  // of the last check()

 private:
  LinearCase(Shape shape_, Types types_, std::int64_t pad, Random random)
      : LinearProblem("fragments", shape_, types_, random, pad) {
    for (std::int64_t row = 0; row + 1 < shape.m; ++row)
      for (std::int64_t i = shape.k; i < stride; ++i) x.set(row * stride + i, std::numeric_limits<double>::quiet_NaN());
  }

  void prepare() {
    pack();
    for (std::int64_t g = 0; g < groups; ++g)
      for (std::int64_t col = 0; col < shape.n; ++col)
        ordered.set(core::fragment_scale(shape.n, groups, g, col), scales[g * shape.n + col]);
  }

  double judge(const Array& got, Arithmetic arithmetic) const {
    const auto [m, n, k, group] = shape;
    const double out = unit_roundoff(types.x), largest = types.x == DType::f16 ? 65520.0 : 0x1.ffp127;
    const double relative = 2.0 * arithmetic.additions * 0x1p-24 + (arithmetic.rounded_weights ? 2.0 * out : 0.0);
    std::vector<double> w(static_cast<std::size_t>(k));
    double worst = 0.0;
    for (std::int64_t col = 0; col < n; ++col) {
      for (std::int64_t i = 0; i < k; ++i)
        w[static_cast<std::size_t>(i)] = (code(col, i) - zero(col, i)) * scale(col, i);
      for (std::int64_t row = 0; row < m; ++row) {
        double sum = types.with_bias ? bias[col] : 0.0, terms = std::fabs(sum);
        for (std::int64_t i = 0; i < k; ++i) {
          const double term = x[row * stride + i] * w[static_cast<std::size_t>(i)];
          sum += term, terms += std::fabs(term);
        }
        const double value = got[row * n + col],
                     bound = out * std::fabs(sum) + relative * terms + subnormal_roundoff(types.x);
        CAPTURE(row, col, value, sum, bound);
        if (std::isnan(sum)) {
          REQUIRE(std::isnan(value));
        } else if (std::isinf(value)) {
          REQUIRE(std::signbit(value) == std::signbit(sum));
          REQUIRE(std::fabs(sum) + bound >= largest);
        } else {
          const double ratio = std::fabs(value - sum) / bound;
          REQUIRE(ratio <= 1.0);
          worst = std::max(worst, ratio);
        }
      }
    }
    return worst;
  }
};

}  // namespace awq::test
