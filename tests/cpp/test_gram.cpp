#include <cmath>
#include <limits>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/gram.h"
#include "core/kernels.h"
#include "data.h"

using namespace awq::core;
using awq::test::Random;

namespace {

constexpr std::int64_t kGap = 3;  // numbers between the rows of x
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// x [t, k] with NaN between the rows and nothing behind the last, and sums [k, k], NaN left of the diagonal.
struct Problem {
  std::int64_t t, k;
  std::vector<float> x, sums;

  Problem(std::int64_t t_, std::int64_t k_, Random& random)
      : t(t_), k(k_), x(random.floats(t_ > 0 ? (t_ - 1) * (k_ + kGap) + k_ : 0, -2.0, 2.0)) {
    sums = random.floats(k * k, -100.0, 100.0);
    for (std::int64_t i = 0; i < k; ++i)
      for (std::int64_t j = 0; j < i; ++j) sums[static_cast<std::size_t>(i * k + j)] = kNan;
    for (std::int64_t row = 0; row + 1 < t; ++row)
      for (std::int64_t i = 0; i < kGap; ++i) x[static_cast<std::size_t>(row * (k + kGap) + k + i)] = kNan;
  }
};

/// The sums afterwards; `backwards`: what may be done in any order is done in the other.
std::vector<float> add(const Kernels& kernels, const Problem& p, bool bfloat16, bool backwards = false) {
  std::vector<float> sums = p.sums;
  GramArgs args{p.x.data(), sums.data(), nullptr, p.t, p.k, p.k + kGap, bfloat16};
  std::vector<std::uint32_t> packed(static_cast<std::size_t>(kernels.gram_size(args)), 0xffffffffu);
  args.packed = packed.data();
  const std::int64_t blocks = (p.k + kernels.gram_block - 1) / kernels.gram_block;
  for (std::int64_t n = 0; n < blocks; ++n) {
    const std::int64_t block = backwards ? blocks - 1 - n : n;
    kernels.gram_pack(args, block, block + 1);
  }
  for (std::int64_t n = 0; n < blocks * blocks; ++n) {
    const std::int64_t item = backwards ? blocks * blocks - 1 - n : n;
    if (item / blocks <= item % blocks) kernels.gram_add(args, item / blocks, item % blocks);
  }
  return sums;
}

template <class Body>
void for_levels(Body body) {
  for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level)
    for (const bool bfloat16 : {false, true}) {
      CAPTURE((*level)->name, bfloat16);
      body(**level, bfloat16);
    }
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

}  // namespace

TEST_CASE("gram sums are those of the definition, on and right of the diagonal") {
  Random random(60);
  for (const auto& [t, k] : {std::pair<std::int64_t, std::int64_t>{0, 5},
                             {1, 1},
                             {3, 7},
                             {2, 16},
                             {5, 48},
                             {129, 47},
                             {257, 50},
                             {300, 97},
                             {515, 200}}) {
    const Problem p(t, k, random);
    for_levels([&, t = t, k = k](const Kernels& kernels, bool bfloat16) {
      const std::vector<float> sums = add(kernels, p, bfloat16), again = add(kernels, p, bfloat16, true);
      const auto factor = [&](std::int64_t row, std::int64_t i) {
        const float x = p.x[static_cast<std::size_t>(row * (k + kGap) + i)];
        return double{bfloat16 ? bfloat_to_float(float_to_bfloat(x)) : x};
      };
      int wrong = 0, different = 0;
      for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j) {
          const auto at = static_cast<std::size_t>(i * k + j);
          different += !same(sums[at], again[at]);
          if (j < i) {
            wrong += !std::isnan(sums[at]);
            continue;
          }
          double want = p.sums[at], size = std::fabs(want);
          for (std::int64_t row = 0; row < t; ++row)
            want += factor(row, i) * factor(row, j), size += std::fabs(factor(row, i) * factor(row, j));
          wrong += !(std::fabs(sums[at] - want) <= static_cast<double>(t + 1) * 0x1p-23 * size);
        }
      CAPTURE(t, k);
      CHECK(wrong == 0);
      CHECK(different == 0);
    });
  }
}

TEST_CASE("a gram of what bfloat16 holds is exact, whatever rounds it") {
  Random random(61);
  Problem p(77, 101, random);
  for (float& x : p.x) x = std::isnan(x) ? x : static_cast<float>(random.bits() % 511) - 255.0f;  // sums below 2^24
  for (float& sum : p.sums) sum = std::isnan(sum) ? sum : 1.0f;
  const std::vector<float> want = add(portable_kernels(), p, false);
  for_levels([&](const Kernels& kernels, bool bfloat16) {
    const std::vector<float> got = add(kernels, p, bfloat16);
    bool equal = true;
    for (std::size_t i = 0; i < want.size(); ++i) equal &= same(got[i], want[i]);
    CHECK(equal);
  });
}

TEST_CASE("rounding to bfloat16: ties to even, overflow to infinity; NaN and infinity stay in their row and column") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr std::int64_t k = 70;
  struct Case {
    float x, factor;
  };
  for (const Case& c : {Case{1.00390625f, 1.0f},
                        {1.01171875f, 1.015625f},
                        {1.00390637f, 1.0078125f},
                        {-0.0f, 0.0f},
                        {3.4e38f, kInfinity},
                        {-kInfinity, -kInfinity},
                        {kNan, kNan}}) {
    Random random(62);
    Problem p(5, k, random);
    for (float& x : p.x) x = 1.0f;
    for (float& sum : p.sums) sum = 0.0f;
    for (std::int64_t row = 0; row < 5; ++row) p.x[static_cast<std::size_t>(row * (k + kGap) + 60)] = c.x;
    for_levels([&](const Kernels& kernels, bool bfloat16) {
      if (!bfloat16 && c.x != c.factor && !std::isnan(c.x)) return;
      const std::vector<float> sums = add(kernels, p, bfloat16);
      for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = i; j < k; ++j) {
          const float want = i != 60 && j != 60 ? 5.0f : i == j ? 5.0f * c.factor * c.factor : 5.0f * c.factor;
          CAPTURE(i, j, c.x);
          if (i == j && i == 60 && std::isfinite(want))
            REQUIRE(std::fabs(sums[static_cast<std::size_t>(i * k + j)] - want) < 1e-5f);
          else
            REQUIRE(same(sums[static_cast<std::size_t>(i * k + j)], want));
        }
    });
  }
}
