// The kernels on layout strips, at every level, against the product in float64. Bounds follow from strips.h: x is
// rounded to step / 2 once, and sums of segments in float32.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/kernels.h"
#include "core/plan.h"
#include "data.h"
#include "levels.h"
#include "linear_problem.h"
#include "played.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::for_levels;
using test::Random;
using test::Shape;
using test::Types;

namespace {

/// A linear call on a weight in layout strips.
struct Problem : test::LinearProblem {
  Problem(Shape shape_, Types types_, Random& random, std::int64_t pad = 0)
      : LinearProblem("strips", shape_, types_, random, pad) {}
};

const Codes& strips() { return find_layout("strips")->weight; }

/// y in float64, and what |y - expected| may be.
struct Expected {
  Expected(const Problem& p, int digits) : y(static_cast<std::size_t>(p.shape.m * p.shape.n)), bound(y.size()) {
    const auto [m, n, k, group] = p.shape;
    const double limit = digits == 1 ? 127.0 : digits == 2 ? 32639.0 : 127.0 * 65536.0;
    std::int64_t segments = 0;
    std::vector<std::int64_t> first;  // of each segment, and k: by the definition of a segment, not by Segments
    for (std::int64_t g = 0; g < k; g += group)
      for (std::int64_t i = g; i < g + group; i += 128, ++segments) first.push_back(i);
    first.push_back(k);
    for (std::int64_t row = 0; row < m; ++row)
      for (std::int64_t col = 0; col < n; ++col) {
        double sum = 0.0, rounded = 0.0, terms = 0.0;
        for (std::size_t s = 0; s + 1 < first.size(); ++s) {
          double largest = 0.0;
          for (std::int64_t i = first[s]; i < first[s + 1]; ++i)
            largest = std::max(largest, std::fabs(p.x[row * p.stride + i]));
          const double step = std::max(largest / limit, 0x1p-126);
          for (std::int64_t i = first[s]; i < first[s + 1]; ++i) {
            const double x = p.x[row * p.stride + i], scale = p.scale(col, i);
            const int code = p.code(col, i), zero = p.zero(col, i);
            sum += x * (code - zero) * scale;
            // step / 2, and of 1 / step, x / step and step an error in float32 each.
            rounded += (step / 2 + 0x1p-22 * std::fabs(x)) * std::abs(code - zero) * std::fabs(scale);
            terms += (std::fabs(x) + step) * (code + zero) * std::fabs(scale);
          }
        }
        const double bias = p.types.with_bias ? p.bias[col] : 0.0;
        const auto at = static_cast<std::size_t>(row * n + col);
        y[at] = sum + bias;
        // A segment's sums, its zero, its scale and its place among the others: not more than eight roundings and one
        // for every other segment. What s step loses below the normal numbers is less than 2^-100.
        bound[at] = test::unit_roundoff(p.types.x) * (std::fabs(y[at]) + rounded) + rounded +
                    static_cast<double>(segments + 8) * 0x1p-23 * (terms + std::fabs(bias)) +
                    test::subnormal_roundoff(p.types.x) + 0x1p-100;
      }
  }

  double worst(const Array& got) const {
    double worst = 0.0;
    for (std::int64_t i = 0; i < got.size(); ++i) {
      const double ratio = std::fabs(got[i] - y[static_cast<std::size_t>(i)]) / bound[static_cast<std::size_t>(i)];
      worst = ratio <= worst ? worst : ratio;  // a NaN becomes the worst
    }
    return worst;
  }

  std::vector<double> y, bound;
};

/// Runs the kernels on `rows` rows at a time, and on `piece` tiles and strips a call (0: all of them).
Array run(const Problem& p, const Kernels& kernels, int digits, std::int64_t piece = 0, std::int64_t rows = kStripsRows,
          bool matrix = false) {
  const auto [m, n, k, group] = p.shape;
  Array y(p.types.x, m * n);
  const LinearArgs args = p.args(y);
  const Segments segments(k, group);
  StripsWork work{};
  work.args = &args, work.digits = digits, work.matrix = matrix;
  for (work.row = 0; work.row < m; work.row += work.rows) {
    work.rows = std::min(rows, m - work.row);
    work.tile_rows = even_rows(work.rows, matrix ? kernels.matrix_rows : kernels.strips_rows[digits - 1]);
    std::vector<std::uint32_t> x(static_cast<std::size_t>(work.tiles() * work.words(k)), 0xa5a5a5a5u);
    std::vector<float> parameters(static_cast<std::size_t>(work.tiles() * work.floats(segments.count)),
                                  std::numeric_limits<float>::quiet_NaN());  // scratch may hold anything
    work.x = x.data(), work.parameters = parameters.data();
    const auto pieces = [&](std::int64_t count, auto kernel) {
      for (std::int64_t begin = 0; begin < count; begin += piece == 0 ? count : piece)
        kernel(work, begin, piece == 0 ? count : std::min(begin + piece, count));
    };
    pieces(work.tiles(), kernels.strips_prepare);
    pieces(ceil_div(n, kStripColumns), kernels.strips_multiply);
  }
  return y;
}

/// Whether the level rounds a * b + c once: those that do promise the same bits.
bool fuses([[maybe_unused]] const Kernels& kernels) {
#if defined(__aarch64__)
  return true;
#else
  return std::string(kernels.name) != "portable";
#endif
}

struct Depth {
  std::int64_t k, group;
};
constexpr Depth kDepths[] = {{16, 16},   {64, 32},   {24, 8},    {128, 64}, {256, 128}, {512, 256}, {120, 24},
                             {400, 200}, {300, 300}, {129, 129}, {37, 37},  {1, 1},     {8, 8}};

}  // namespace

TEST_CASE("strips: every kernel stays within its rounding bound for every shape") {
  Random random(30);
  std::size_t turn = 0;
  for (const std::int64_t n : {8, 24, 40, 136})
    for (const Depth& depth : kDepths)
      for (const std::int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33}) {
        const std::size_t t = turn++;
        const Types types{test::kFloatTypes[t % 3], test::kFloatTypes[t / 3 % 3], test::kFloatTypes[t / 9 % 3],
                          t % 5 != 0, t % 7 != 0};
        const Problem p({m, n, depth.k, depth.group}, types, random, t % 4 == 0 ? 3 : 0);
        CAPTURE(m, n, depth.k, depth.group, int(types.x), int(types.scale), int(types.bias), types.zeros,
                types.with_bias, p.stride);
        for (const int digits : {1, 2, 3}) {
          const Expected expected(p, digits);
          for_levels([&](const Kernels& kernels) { REQUIRE(expected.worst(run(p, kernels, digits)) <= 1.0); });
        }
      }
}

TEST_CASE("strips: more rows than a tile, a block or a turn has, and more values than a block") {
  Random random(31);
  for (const Shape& shape :
       {Shape{65, 40, 64, 32}, Shape{130, 72, 256, 128}, Shape{700, 8, 40, 40}, Shape{3, 40, 4096 + 128, 128},
        Shape{9, 40, 2048 + 64, 32}, Shape{2, 8, 5001, 5001}, Shape{5, 33, 1024, 8}}) {
    const Problem p(shape, {DType::f32, DType::f16, DType::f32}, random);
    CAPTURE(shape.m, shape.n, shape.k, shape.group);
    for (const int digits : {1, 2, 3}) {
      const Expected expected(p, digits);
      for_levels([&](const Kernels& kernels) { CHECK(expected.worst(run(p, kernels, digits)) <= 1.0); });
    }
  }
}

TEST_CASE("strips: more digits lose less, as their number says") {
  Random random(32);
  const Problem p({8, 64, 1024, 128}, {DType::f32, DType::f16, DType::f16, true, false}, random);
  double rms[kMostDigits] = {}, all = 0.0;
  for (int digits = 1; digits <= kMostDigits; ++digits) {
    const Expected expected(p, digits);
    const Array y = run(p, best_kernels(), digits);
    for (std::int64_t i = 0; i < y.size(); ++i) {
      const double exact = expected.y[static_cast<std::size_t>(i)];
      rms[digits - 1] += (y[i] - exact) * (y[i] - exact);
      if (digits == 1) all += exact * exact;
    }
  }
  for (double& e : rms) e = std::sqrt(e / all);
  // Of numbers spread evenly in -1 .. 1, an error spread evenly in +- 1/254 is 1/254 of them, and so on.
  CHECK((rms[0] > 1.0 / 400 && rms[0] < 1.0 / 150));
  CHECK((rms[1] > 1.0 / 100000 && rms[1] < 1.0 / 40000));
  CHECK(rms[2] < 1e-6);
}

TEST_CASE("strips: the same bits for any split of the work, any rows beside a row, and every level that fuses") {
  Random random(33);
  for (const Depth& depth : {Depth{256, 128}, Depth{96, 32}, Depth{70, 70}})
    for (const int digits : {1, 2, 3}) {
      const Problem p({67, 136, depth.k, depth.group}, {DType::f32, DType::f16, DType::f16}, random, 5);
      CAPTURE(depth.k, depth.group, digits);
      for_levels([&](const Kernels& kernels) {
        const Array whole = run(p, kernels, digits);
        for (const std::int64_t piece : {1, 2, 3}) CHECK(run(p, kernels, digits, piece) == whole);
        for (const std::int64_t rows : {1, 2, 3, 4, 7, 64}) CHECK(run(p, kernels, digits, 0, rows) == whole);
        if (fuses(kernels)) {
          CHECK(whole == run(p, *all_kernels()[0], digits));
        }
      });
    }
}

TEST_CASE("strips: the same bits on x86 and on Arm") {
  constexpr std::uint64_t kHashes[kMostDigits] = {0xe8d32f099cf9ea92, 0x80ea279487c74bec,
                                                  0x909b31819b0d8706};  // FNV-1a of y
  for_levels([&](const Kernels& kernels) {
    for (int digits = 1; fuses(kernels) && digits <= kMostDigits; ++digits) {
      Random random(38);
      std::uint64_t hash = 0xcbf29ce484222325;
      for (const Depth& depth : {Depth{512, 128}, Depth{96, 32}, Depth{300, 300}})
        for (const DType type : test::kFloatTypes) {
          const Problem p({11, 136, depth.k, depth.group}, {type, DType::f16, DType::bf16}, random, 5);
          const Array y = run(p, kernels, digits);
          const auto* bytes = static_cast<const std::uint8_t*>(y.data());
          for (std::int64_t i = 0; i < y.size() * size_of(type); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
        }
      CHECK(hash == kHashes[digits - 1]);
    }
  });
}

TEST_CASE("strips: what stands in the padding does not matter") {
  Random random(39);
  for (const std::int64_t k : {1, 37, 129, 300})
    for (const int digits : {1, 2, 3}) {
      const Problem p({5, 40, k, k}, {}, random);
      Problem filled = p;
      const std::int64_t whole = ceil_div(k, kOctet) * kOctet;
      std::vector<std::uint8_t> q(static_cast<std::size_t>(40 * whole), 15);
      for (std::int64_t i = 0; i < 40 * k; ++i)
        q[static_cast<std::size_t>(i / k * whole + i % k)] = p.q[static_cast<std::size_t>(i)];
      filled.words = test::pack(strips(), q, 40, whole);
      REQUIRE((filled.words.size() == p.words.size() && filled.words != p.words));
      CAPTURE(k, digits);
      for_levels([&](const Kernels& kernels) { CHECK(run(filled, kernels, digits) == run(p, kernels, digits)); });
    }
}

TEST_CASE("strips: what is not finite spoils its row and no other") {
  Random random(34);
  constexpr double bad_values[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                                   -std::numeric_limits<double>::infinity()};
  for (const DType type : test::kFloatTypes)
    for (const std::int64_t m : {1, 2, 5, 9, 33})
      for (const double bad : bad_values)
        for (const int digits : {1, 2, 3}) {
          const Problem good({m, 136, 256, 64}, {type, DType::f16, DType::f16}, random);
          Problem spoiled = good;
          const std::int64_t row = m / 2;
          spoiled.x.set(row * 256 + 133, bad);
          CAPTURE(int(type), m, bad, digits);
          for_levels([&](const Kernels& kernels) {
            const Array before = run(good, kernels, digits), after = run(spoiled, kernels, digits);
            int touched = 0, finite = 0;
            for (std::int64_t i = 0; i < m * 136; ++i)
              if (i / 136 != row)
                touched += before[i] != after[i];
              else
                finite += std::isfinite(after[i]);
            CHECK(touched == 0);
            CHECK(finite == 0);
          });
        }
}

TEST_CASE("strips: zeros, and numbers at the ends of float32's range") {
  Random random(35);
  for (const double factor : {0.0, 1e-45, 1e-39, 1e-38, 1e-30, 1e30, 3e36, 3.4e38}) {
    Problem p({6, 40, 256, 128}, {DType::f32, DType::f32, DType::f32, true, false}, random);
    const double scale = factor > 1.0 ? 1e-6 : 1.0;  // y must not overflow
    for (std::int64_t i = 0; i < p.x.size(); ++i) p.x.set(i, p.x[i] * factor);
    for (std::int64_t i = 0; i < p.scales.size(); ++i) {
      p.scales.set(i, p.scales[i] * scale);
      p.ordered.set(i, p.ordered[i] * scale);
    }
    CAPTURE(factor);
    for (const int digits : {1, 2, 3}) {
      const Expected expected(p, digits);
      for_levels([&](const Kernels& kernels) {
        const Array y = run(p, kernels, digits);
        CHECK(expected.worst(y) <= 1.0);
        if (factor == 0.0) {
          CHECK(std::all_of(expected.y.begin(), expected.y.end(), [](double v) { return v == 0.0; }));
        }
      });
    }
  }
}

TEST_CASE("strips: digits at both ends, codes and zeros at theirs: no sum overflows") {
  Random random(36);
  for (const double sign : {1.0, -1.0})
    for (const int code : {0, 15}) {
      Problem p({5, 40, 512, 256}, {DType::f32, DType::f16, DType::f16, true, false}, random);
      // Of two digits the lower are by turns 127 and -128 (126.5 * 256 = 127 * 256 - 128).
      for (std::int64_t i = 0; i < p.x.size(); ++i) p.x.set(i, sign * (i % 2 == 0 ? 1.0 : 126.5 * 256.0 / 32639.0));
      std::fill(p.q.begin(), p.q.end(), static_cast<std::uint8_t>(code));
      std::fill(p.z.begin(), p.z.end(), static_cast<std::uint8_t>(15 - code));
      p.pack();
      for (const int digits : {1, 2, 3}) {
        const Expected expected(p, digits);
        for_levels([&](const Kernels& kernels) { CHECK(expected.worst(run(p, kernels, digits)) <= 1.0); });
      }
    }
}

TEST_CASE("strips: the reference gives what it gives for layout gemm") {
  Random random(37);
  for (const Shape& shape :
       {Shape{3, 24, 96, 32}, Shape{2, 136, 256, 128}, Shape{1, 40, 37, 37}, Shape{2, 200, 264, 24}})
    for (const bool zeros : {true, false})
      for (const DType type : {DType::f64, DType::f32}) {
        const Problem p(shape, {type, DType::f16, DType::f32, zeros}, random, 1);
        const std::int64_t m = shape.m, n = shape.n, k = shape.k, group = shape.group;
        CAPTURE(n, k, group, zeros);
        const auto gemm = test::pack(test::gemm_layout(), p.q, n, k);
        const auto gemm_zeros = test::pack(test::gemm_layout(), p.z, n, p.groups);
        Array y(type, m * n), expected(type, m * n);
        linear_reference(p.args(y), 0, n);
        LinearArgs args = p.args(expected);
        args.strips = false, args.qweight = gemm.data(), args.scales = p.scales.data();
        args.qzeros = zeros ? gemm_zeros.data() : nullptr;
        linear_reference(args, 0, n);
        CHECK(y == expected);
      }
}

TEST_CASE("strips: the plan's tiles and turns are what kernels can have") {
  for_levels([&](const Kernels& kernels) {
    for (const DType type : {DType::f64, DType::f32, DType::f16, DType::bf16})
      for (const Activation activation : {Activation::exact, Activation::int16, Activation::int8})
        for (const std::int64_t m : {0, 1, 4, 5, 64, 65, 513, 1 << 20})
          for (const std::int64_t n : {0, 8, 40, 4096})
            for (const std::int64_t k : {0, 1, 4096, 1 << 17}) {
              const LinearPlan plan = plan_strips(m, n, k, 128, type, activation, kernels);
              REQUIRE((plan.tiles * plan.tile >= n && (plan.tiles == 0 || (plan.tiles - 1) * plan.tile < n)));
              REQUIRE((plan.grain >= 1 && std::strlen(plan.why) > 0));
              if (type == DType::f64) {
                REQUIRE(plan.kernel == LinearKernel::reference);
                continue;
              }
              REQUIRE(plan.kernel == LinearKernel::strips);
              const auto [matrix, most] = strips_tiles(m, 128, plan.digits, kernels);
              REQUIRE(std::string(plan.name) == (matrix ? "strips_matrix" : "strips"));
              REQUIRE(most == (matrix ? kernels.matrix_rows : kernels.strips_rows[plan.digits - 1]));
              REQUIRE(plan.digits == (activation == Activation::int8                          ? 1
                                      : activation == Activation::exact && type == DType::f32 ? 3
                                                                                              : 2));
              REQUIRE((plan.tile_rows >= 1 && plan.tile_rows <= most && plan.tile == kStripColumns));
              REQUIRE((plan.rows >= most && plan.rows <= kStripsRows && plan.rows % most == 0));
              REQUIRE((m == 0 ||
                       ceil_div(std::min(m, plan.rows), plan.tile_rows) == ceil_div(std::min(m, plan.rows), most)));
            }
  });
}

#if defined(__x86_64__) && defined(__linux__)
// for_levels has this level where the CPU has it. Elsewhere it is played, a few microseconds an instruction.
TEST_CASE("avx_vnni: played where the CPU lacks it, the same bits as avx2") {
  if (!cpu_features().avx2) return;
  const test::Played played;
  Random random(39);
  for (const Depth& depth : {Depth{256, 128}, Depth{96, 32}, Depth{37, 37}, Depth{24, 8}})
    for (const std::int64_t m : {1, 2, 3, 5, 9})
      for (int digits = 1; digits <= kMostDigits; ++digits) {
        const Problem p({m, 40, depth.k, depth.group}, {DType::f32, DType::f16, DType::f16}, random, 5);
        CAPTURE(depth.k, depth.group, m, digits);
        const Array y = run(p, avx_vnni_kernels(), digits);
        CHECK(y == run(p, avx2_kernels(), digits));
        CHECK(Expected(p, digits).worst(y) <= 1.0);
      }
}

// Likewise, of this level's matrix unit. The rest of it is avx512_bf16.
TEST_CASE("amx_int8: played where the CPU lacks it, the same bits as avx512_vnni") {
  if (!test::Played::can_have_tiles(cpu_features())) return;
  const test::Played played;
  Random random(40);
  for (const Depth& depth : {Depth{256, 128}, Depth{96, 32}, Depth{64, 64}, Depth{640, 128}, Depth{160, 160},
                             Depth{192, 96}, Depth{1088, 1088}, Depth{544, 32}})
    for (const std::int64_t m : {1, 2, 9, 16, 17, 33, 40})
      for (int digits = 1; digits <= kMostDigits; ++digits) {
        REQUIRE(matrix_can_have(depth.group));
        const Problem p({m, 72, depth.k, depth.group}, {DType::f32, DType::f16, DType::f16}, random, 5);
        CAPTURE(depth.k, depth.group, m, digits);
        const Array y = run(p, amx_int8_kernels(), digits, 0, kStripsRows, true);
        CHECK(y == run(p, avx512_vnni_kernels(), digits));
        CHECK(Expected(p, digits).worst(y) <= 1.0);
      }
}

TEST_CASE("amx_int8: the same bits for any split of the work, and beside what is not finite") {
  if (!test::Played::can_have_tiles(cpu_features())) return;
  const test::Played played;
  Random random(41);
  for (int digits = 1; digits <= kMostDigits; ++digits) {
    Problem p({67, 136, 256, 64}, {DType::bf16, DType::f16, DType::f16}, random, 3);
    p.x.set(33 * p.stride + 70, std::numeric_limits<double>::infinity());
    const Array whole = run(p, avx512_vnni_kernels(), digits);
    const auto same = [&](const Array& y) {  // NaN is not NaN
      bool same = true;
      for (std::int64_t i = 0; i < y.size(); ++i)
        same &= i / 136 == 33 ? std::isnan(y[i]) && std::isnan(whole[i]) : y[i] == whole[i];
      return same;
    };
    for (const std::int64_t piece : {0, 1, 3}) CHECK(same(run(p, amx_int8_kernels(), digits, piece, 512, true)));
    for (const std::int64_t rows : {16, 40, 64}) CHECK(same(run(p, amx_int8_kernels(), digits, 0, rows, true)));
  }
}

TEST_CASE("amx_int8: digits at both ends, codes and zeros at theirs: no sum overflows") {
  if (!test::Played::can_have_tiles(cpu_features())) return;
  const test::Played played;
  Random random(42);
  for (const double sign : {1.0, -1.0})
    for (const int code : {0, 15}) {
      Problem p({11, 40, 512, 256}, {DType::f32, DType::f16, DType::f16, true, false}, random);
      for (std::int64_t i = 0; i < p.x.size(); ++i) p.x.set(i, sign * (i % 2 == 0 ? 1.0 : 126.5 * 256.0 / 32639.0));
      std::fill(p.q.begin(), p.q.end(), static_cast<std::uint8_t>(code));
      std::fill(p.z.begin(), p.z.end(), static_cast<std::uint8_t>(15 - code));
      p.pack();
      for (const int digits : {1, 2, 3})
        CHECK(run(p, amx_int8_kernels(), digits, 0, kStripsRows, true) == run(p, avx512_vnni_kernels(), digits));
    }
}

TEST_CASE("amx_int8: many rows go to the matrix unit, where its steps fit the groups") {
  const auto by_matrix = [](std::int64_t rows, std::int64_t group, const Kernels& kernels) {
    const bool matrix = strips_tiles(rows, group, 2, kernels).matrix;
    CHECK(matrix == (strips_tiles(rows, group, 3, kernels).most_rows == 16));
    const LinearPlan plan = plan_strips(rows, 4096, 12 * group, group, DType::bf16, Activation::exact, kernels);
    CHECK(matrix == (std::string(plan.name) == "strips_matrix"));
    return matrix;
  };
  for (const std::int64_t rows : {9, 16, 512}) {
    for (const std::int64_t group : {32, 128, 160, 4096}) CHECK(by_matrix(rows, group, amx_int8_kernels()));
    for (const std::int64_t group : {8, 16, 40, 4080}) CHECK_FALSE(by_matrix(rows, group, amx_int8_kernels()));
    CHECK_FALSE(by_matrix(rows, 128, avx512_bf16_kernels()));
  }
  for (const std::int64_t rows : {1, 5, 8}) CHECK_FALSE(by_matrix(rows, 128, amx_int8_kernels()));
  CHECK(plan_strips(512, 4096, 4096, 128, DType::bf16, Activation::exact, amx_int8_kernels()).tile_rows == 16);
}
#endif
