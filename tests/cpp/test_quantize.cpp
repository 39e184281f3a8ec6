#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "core/quantize.h"
#include "data.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::Random;

namespace {

/// Buffers of one quantize call.
struct Quantized {
  Quantized(std::int64_t n, std::int64_t k, std::int64_t group, DType scale_type, std::int64_t bits = 4)
      : n(n),
        k(k),
        group(group),
        bits(bits),
        q(static_cast<std::size_t>(n * k), 255),
        scales(scale_type, n * (k / group)),
        zeros(static_cast<std::size_t>(n * (k / group)), 255) {}

  std::int64_t run(const Array& w, std::int64_t stride, const float* range, bool zero_point, std::int64_t begin,
                   std::int64_t end) {
    const Rounding to{zero_point, scales.type(), last_code(bits)};
    return quantize_rows({w.data(), range, q.data(), scales.data(), zeros.data(), n, k, group, stride, w.type(), to},
                         begin, end);
  }
  std::int64_t run(const Array& w, bool zero_point) { return run(w, k, nullptr, zero_point, 0, n); }

  int code(std::int64_t row, std::int64_t col) const { return q[static_cast<std::size_t>(row * k + col)]; }
  int zero(std::int64_t row, std::int64_t g) const { return zeros[static_cast<std::size_t>(row * (k / group) + g)]; }
  double scale(std::int64_t row, std::int64_t g) const { return scales[row * (k / group) + g]; }
  double value(std::int64_t row, std::int64_t col) const {
    return (code(row, col) - zero(row, col / group)) * scale(row, col / group);
  }

  int last() const { return (1 << bits) - 1; }

  std::int64_t n, k, group, bits;
  std::vector<std::uint8_t> q;
  Array scales;
  std::vector<std::uint8_t> zeros;
};

/// One group by the definition in float64: the scale is the exact one as its type rounds it (upwards below the normal
/// range), the zero is the nearest whole number, each code the nearest of all values. `slack` covers float32
/// arithmetic before rounding.
void check_group(const Quantized& result, const Array& w, std::int64_t stride, std::int64_t row, std::int64_t g,
                 double lo, double hi, bool zero_point) {
  constexpr double slack = 1e-6;
  lo = std::min(lo, 0.0), hi = std::max(hi, 0.0);
  const double s = result.scale(row, g);
  const int z = result.zero(row, g);
  const int last = result.last(), middle = (last + 1) / 2;
  const double exact = zero_point ? (hi - lo) / last : std::max(-lo, hi) / (middle - 1);
  const DType type = result.scales.type();
  if (lo == hi) {
    REQUIRE(s == 1.0);
  } else if (type != DType::f32 && exact < (type == DType::f16 ? 0x1p-14 : 0x1p-126)) {
    REQUIRE(s >= exact * (1 - slack));
    REQUIRE(s - exact <= 2 * test::subnormal_roundoff(type) * (1 + slack));
  } else {
    REQUIRE(std::fabs(s - exact) <= exact * (test::unit_roundoff(type) + slack));
  }
  REQUIRE((z >= 0 && z <= last));
  if (zero_point) {
    REQUIRE(std::fabs(z - std::clamp<double>(-lo / s, 0.0, last)) <= 0.5 + (last + 1) * slack);
  } else {
    REQUIRE(z == middle);
  }
  // What the codes cannot reach at the ends: half a step from rounding z, and what rounding s down takes from all
  // steps.
  const double largest_error = s * (0.5 + last * test::unit_roundoff(type) + 2 * (last + 1) * slack);
  int wrong = 0;
  for (std::int64_t i = 0; i < result.group; ++i) {
    const std::int64_t col = g * result.group + i;
    const double x = w[row * stride + col], error = std::fabs(x - result.value(row, col));
    double nearest = std::numeric_limits<double>::infinity();
    for (int code = 0; code <= last; ++code) nearest = std::min(nearest, std::fabs(x - (code - z) * s));
    wrong += result.code(row, col) > last || error > nearest + s * 2 * (last + 1) * slack;
    wrong += x >= lo && x <= hi && error > largest_error;
  }
  REQUIRE(wrong == 0);
}

struct Shape {
  std::int64_t n, k, group, stride;
};

/// Quantizes w with rows `stride` apart and checks every group; `range` is empty or [n, groups, 2].
void check_all(const Array& w, Shape s, DType scale_type, bool zero_point, const std::vector<float>& range,
               std::int64_t bits = 4) {
  Quantized result(s.n, s.k, s.group, scale_type, bits);
  REQUIRE(result.run(w, s.stride, range.empty() ? nullptr : range.data(), zero_point, 0, s.n) == -1);
  for (std::int64_t row = 0; row < s.n; ++row)
    for (std::int64_t g = 0; g < s.k / s.group; ++g) {
      double lo = std::numeric_limits<double>::infinity(), hi = -lo;
      for (std::int64_t i = 0; i < s.group; ++i) {
        lo = std::min(lo, w[row * s.stride + g * s.group + i]);
        hi = std::max(hi, w[row * s.stride + g * s.group + i]);
      }
      if (!range.empty()) {
        const float* ends = &range[static_cast<std::size_t>((row * (s.k / s.group) + g) * 2)];
        lo = ends[0], hi = ends[1];
      }
      check_group(result, w, s.stride, row, g, lo, hi, zero_point);
    }
}

constexpr Shape kShapes[] = {{3, 128, 32, 128}, {2, 256, 128, 259}, {5, 33, 11, 33}, {2, 600, 300, 600}, {4, 8, 1, 9}};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("round_even is nearest with ties to even") {
  for (int i = -4 * 40; i <= 4 * 40; ++i) {
    const float x = static_cast<float>(i) / 4;
    REQUIRE(round_even(x) == std::nearbyint(x));
    REQUIRE(round_even(std::nextafter(x, 100.0f)) == std::nearbyint(std::nextafter(x, 100.0f)));
    REQUIRE(round_even(std::nextafter(x, -100.0f)) == std::nearbyint(std::nextafter(x, -100.0f)));
  }
}

TEST_CASE("every group is rounded as defined, for all dtypes, ranges and strides") {
  Random random(5);
  for (const Shape& s : kShapes)
    for (const DType w_type : test::kFloatTypes)
      for (const DType scale_type : test::kFloatTypes)
        for (const bool zero_point : {true, false})
          for (const bool with_range : {false, true}) {
            CAPTURE(s.n, s.k, s.group, int(w_type), int(scale_type), zero_point, with_range);
            const Array w(w_type, (s.n - 1) * s.stride + s.k, random, -0.7, 1.1);
            std::vector<float> range;
            for (std::int64_t i = 0; with_range && i < s.n * (s.k / s.group); ++i) {
              range.push_back(static_cast<float>(random.uniform(-0.6, 0.2)));  // sometimes above zero: widened
              range.push_back(static_cast<float>(random.uniform(0.3, 1.5)));
            }
            check_all(w, s, scale_type, zero_point, range);
          }
}

TEST_CASE("every group is rounded as defined, to every number of bits") {
  Random random(9);
  for (std::int64_t bits = 2; bits <= 8; ++bits)
    for (const DType scale_type : test::kFloatTypes)
      for (const bool zero_point : {true, false})
        for (const bool with_range : {false, true}) {
          CAPTURE(bits, int(scale_type), zero_point, with_range);
          const Array w(DType::f32, 3 * 96, random, -0.7, 1.1);
          std::vector<float> range;
          for (std::int64_t i = 0; with_range && i < 9; ++i) range.insert(range.end(), {-0.2f, 0.5f});
          check_all(w, {3, 96, 32, 96}, scale_type, zero_point, range, bits);
        }
}

TEST_CASE("a group of one sign does not saturate") {
  Random random(6);
  for (const double sign : {1.0, -1.0})
    for (const bool zero_point : {true, false}) {
      const Array w(DType::f32, 2 * 64, random, std::min(sign * 5, sign * 6), std::max(sign * 5, sign * 6));
      check_all(w, {2, 64, 32, 64}, DType::f16, zero_point, {});
      Quantized result(2, 64, 32, DType::f16);
      REQUIRE(result.run(w, zero_point) == -1);
      for (std::int64_t i = 0; i < 128; ++i)
        CHECK(std::fabs(w[i] - result.value(i / 64, i % 64)) <= 0.51 * result.scale(i / 64, i % 64 / 32));
    }
}

TEST_CASE("weights far outside the given range saturate at its ends") {
  const double far[] = {1.0, 1e6, 1e30, 3e38};
  for (const double x : far)
    for (const auto& [zero_point, bits] : {std::pair{true, 4}, {false, 4}, {true, 8}, {false, 2}}) {
      Array w(DType::f32, 32);
      for (std::int64_t i = 0; i < 32; ++i) w.set(i, i % 2 ? x : -x);
      const std::vector<float> range = {-0x1p-12f, 0x1p-12f};
      Quantized result(1, 32, 32, DType::f16, bits);
      CAPTURE(x, zero_point, bits);
      REQUIRE(result.run(w, 32, range.data(), zero_point, 0, 1) == -1);
      for (std::int64_t i = 0; i < 32; ++i) REQUIRE(result.code(0, i) == (i % 2 ? result.last() : 0));
    }
}

TEST_CASE("a group of zeros has scale 1 and codes equal to its zero") {
  for (const bool zero_point : {true, false})
    for (const double nothing : {0.0, -0.0}) {
      Array w(DType::f32, 64);
      for (std::int64_t i = 0; i < 64; ++i) w.set(i, i < 32 ? nothing : 1.0);
      Quantized result(1, 64, 32, DType::f16);
      REQUIRE(result.run(w, zero_point) == -1);
      CHECK(result.scale(0, 0) == 1.0);
      CHECK(result.zero(0, 0) == (zero_point ? 0 : 8));
      for (std::int64_t i = 0; i < 64; ++i) REQUIRE(result.value(0, i) == (i < 32 ? 0.0 : result.value(0, 63)));
    }
}

TEST_CASE("scales below the normal range still reach the ends of the group's range") {
  Random random(7);
  for (const bool zero_point : {true, false}) {
    for (double magnitude = 1e-9; magnitude < 2e-3; magnitude *= 3)
      check_all(Array(DType::f32, 256, random, -magnitude, magnitude), {2, 128, 32, 128}, DType::f16, zero_point, {});
    for (double magnitude = 1e-41; magnitude < 2e-37; magnitude *= 3)
      check_all(Array(DType::f32, 256, random, -magnitude, magnitude), {2, 128, 32, 128}, DType::bf16, zero_point, {});
  }
}

TEST_CASE("weights so small that no float32 is a fifteenth of them count as zero") {
  for (const float tiny : {0x1p-149f, -0x1p-149f, 0x3p-149f})
    for (const DType scale_type : test::kFloatTypes)
      for (const bool zero_point : {true, false}) {
        CAPTURE(tiny, int(scale_type), zero_point);
        Array w(DType::f32, 32);
        for (std::int64_t i = 0; i < 32; ++i) w.set(i, tiny);
        Quantized result(1, 32, 32, scale_type);
        REQUIRE(result.run(w, zero_point) == -1);
        CHECK(result.scale(0, 0) > 0.0);
        for (std::int64_t i = 0; i < 32; ++i) REQUIRE(result.value(0, i) == 0.0);
      }
}

TEST_CASE("a row whose scale cannot be finite is reported, and the rows before it are written") {
  struct Case {
    DType w_type, scale_type;
    double bad;
  };
  for (const Case& c : {Case{DType::f32, DType::f32, kNan}, Case{DType::f32, DType::f16, kInfinity},
                        Case{DType::f16, DType::f16, kNan}, Case{DType::bf16, DType::bf16, -kInfinity},
                        Case{DType::f32, DType::f16, 1e6}, Case{DType::bf16, DType::f16, -1e30}})
    for (const bool zero_point : {true, false})
      for (const std::int64_t place : {0, 255, 256, 299, 300, 599}) {
        CAPTURE(int(c.w_type), int(c.scale_type), c.bad, zero_point, place);
        Array w(c.w_type, 3 * 600);
        for (std::int64_t i = 0; i < w.size(); ++i) w.set(i, 0.5);
        w.set(600 + place, c.bad);
        Quantized result(3, 600, 300, c.scale_type);
        CHECK(result.run(w, zero_point) == 1);
        CHECK(result.value(0, 599) == result.value(0, 0));
        CHECK(std::fabs(result.value(0, 0) - 0.5) < 0.01);
        CHECK(result.code(2, 0) == 255);  // never reached
        CHECK(result.run(w, 600, nullptr, zero_point, 2, 3) == -1);
        // A finite range does not hide a weight that is not finite.
        if (!std::isfinite(c.bad)) {
          const std::vector<float> range(3 * 2 * 2, 1.0f);
          CHECK(result.run(w, 600, range.data(), zero_point, 0, 3) == 1);
        }
      }
}

TEST_CASE("a range that is not finite is reported") {
  Array w(DType::f32, 4 * 32);
  for (const float bad : {kNan, kInfinity, -kInfinity})
    for (const std::size_t end : {0u, 1u}) {
      std::vector<float> range(4 * 2, 0.25f);
      range[2 * 2 + end] = bad;
      for (const bool zero_point : {true, false}) {
        Quantized result(4, 32, 32, DType::f16);
        CHECK(result.run(w, 32, range.data(), zero_point, 0, 4) == 2);
      }
    }
}

TEST_CASE("any split of the rows gives the same codes") {
  Random random(8);
  const Array w(DType::bf16, 7 * 96, random, -1.0, 1.0);
  Quantized whole(7, 96, 32, DType::f16), pieces(7, 96, 32, DType::f16);
  REQUIRE(whole.run(w, true) == -1);
  for (std::int64_t row = 0; row < 7; row += 2)
    REQUIRE(pieces.run(w, 96, nullptr, true, row, std::min<std::int64_t>(row + 2, 7)) == -1);
  CHECK(pieces.q == whole.q);
  CHECK(pieces.scales == whole.scales);
  CHECK(pieces.zeros == whole.zeros);
}
