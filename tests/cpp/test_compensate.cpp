#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "catch.hpp"
#include "core/compensate.h"
#include "core/cpu.h"
#include "core/quantize.h"
#include "data.h"

using namespace awq;
using namespace awq::core;
using test::Random;

namespace {

struct Problem {
  std::int64_t n, k, group;
  std::vector<float> w, gram;

  Problem(std::int64_t n, std::int64_t k, std::int64_t group, std::int64_t tokens) : n(n), k(k), group(group) {
    Random random(static_cast<unsigned>(k + n));
    for (std::int64_t i = 0; i < n * k; ++i) w.push_back(static_cast<float>(random.uniform(-1.0, 1.0)));
    std::vector<double> sum(static_cast<std::size_t>(k * k)), x(static_cast<std::size_t>(k));
    for (std::int64_t t = 0; t < tokens; ++t) {
      const double common = random.uniform(-1.0, 1.0);
      for (std::int64_t i = 0; i < k; ++i)
        x[static_cast<std::size_t>(i)] = (random.uniform(-1.0, 1.0) + common) * (i % 7 == 0 ? 8.0 : 1.0);
      for (std::int64_t i = 0; i < k; ++i)
        for (std::int64_t j = 0; j < k; ++j)
          sum[static_cast<std::size_t>(i * k + j)] += x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(j)];
    }
    for (const double value : sum) gram.push_back(static_cast<float>(value / static_cast<double>(tokens)));
  }
};

struct Rounded {
  std::vector<std::uint8_t> q, zeros;
  std::vector<float> scales;
  bool operator==(const Rounded& o) const { return q == o.q && zeros == o.zeros && scales == o.scales; }
};

std::vector<float> factor_of(const Kernels& level, const Problem& p, const std::vector<std::int64_t>& order) {
  std::vector<double> a(static_cast<std::size_t>(p.k * p.k));
  std::vector<float> factor(a.size(), std::numeric_limits<float>::quiet_NaN());  // below the diagonal it is not read
  const double lambda = damp_gram(p.gram.data(), order.data(), p.k, 0.01, a.data());
  for (std::int64_t row = 0; row < p.k; row += kFactorBlock) {
    factor_panel(a.data(), p.k, row, lambda);
    for (std::int64_t next = row + kFactorBlock; next < p.k; next += kFactorBlock)
      factor_trailing(level, a.data(), p.k, row, next);
  }
  factor_rows(a.data(), p.k, factor.data());
  return factor;
}

Rounded round(const Kernels& level, const Problem& p, std::int64_t passes, float last = 15.0f) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(p.k));
  compensation_order(p.gram.data(), p.k, true, order.data());
  const std::vector<float> factor = factor_of(level, p, order);
  const auto codes = static_cast<std::size_t>(p.n * p.k), groups = static_cast<std::size_t>(p.n * p.k / p.group);
  Rounded out{std::vector<std::uint8_t>(codes, 99), std::vector<std::uint8_t>(groups, 99), std::vector<float>(groups)};
  const CompensateArgs args{p.w.data(),
                            nullptr,
                            p.gram.data(),
                            factor.data(),
                            order.data(),
                            out.q.data(),
                            out.scales.data(),
                            out.zeros.data(),
                            p.n,
                            p.k,
                            p.group,
                            passes,
                            {true, DType::f32, last},
                            true};
  std::vector<float> scratch(static_cast<std::size_t>(compensate_scratch_size(args)),
                             std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t row = 0; row < p.n; row += kCompensateRows)
    REQUIRE(compensate_rows(level, args, row, std::min(row + kCompensateRows, p.n), scratch.data()) == -1);
  return out;
}

double loss(const Problem& p, const Rounded& r, std::int64_t row) {
  std::vector<double> d;
  for (std::int64_t i = 0; i < p.k; ++i) {
    const auto at = static_cast<std::size_t>(row * p.k + i), g = static_cast<std::size_t>((row * p.k + i) / p.group);
    d.push_back((double{static_cast<float>(r.q[at])} - r.zeros[g]) * r.scales[g] - p.w[at]);
  }
  double sum = 0.0;
  for (std::int64_t i = 0; i < p.k; ++i)
    for (std::int64_t j = 0; j < p.k; ++j)
      sum += d[static_cast<std::size_t>(i)] * p.gram[static_cast<std::size_t>(i * p.k + j)] *
             d[static_cast<std::size_t>(j)];
  return sum;
}

}  // namespace

TEST_CASE("every level compensates to the same bytes, and no row loses to rounding to nearest") {
  for (const auto& [n, k, group, tokens] :
       {std::array<std::int64_t, 4>{53, 96, 32, 200}, {16, 128, 128, 40}, {1, 7, 7, 30}, {20, 65, 13, 100}}) {
    const Problem p(n, k, group, tokens);
    const float last = last_code(n == 16 ? 8 : n == 20 ? 2 : 4);
    const Rounded want = round(portable_kernels(), p, 3, last);
    for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level) {
      INFO((*level)->name << " [" << n << ", " << k << "]");
      CHECK(round(**level, p, 3, last) == want);
    }
    Rounded nearest = want;
    const QuantizeArgs args{p.w.data(), nullptr, nearest.q.data(), nearest.scales.data(),   nearest.zeros.data(), n, k,
                            group,      k,       DType::f32,       {true, DType::f32, last}};
    REQUIRE(quantize_rows(args, 0, n) == -1);
    for (std::int64_t row = 0; row < n; ++row) {
      CHECK(*std::max_element(want.q.begin(), want.q.end()) <= last);
      CHECK(loss(p, want, row) <= loss(p, nearest, row) * (1.0 + 1e-5));
    }
  }
}

TEST_CASE("the factor is that of the damped gram") {
  const Problem p(1, 77, 77, 300);
  std::vector<std::int64_t> order(static_cast<std::size_t>(p.k));
  compensation_order(p.gram.data(), p.k, true, order.data());
  for (std::size_t t = 1; t < order.size(); ++t)
    CHECK(p.gram[static_cast<std::size_t>(order[t - 1] * (p.k + 1))] <=
          p.gram[static_cast<std::size_t>(order[t] * (p.k + 1))]);
  for (const Kernels* const* level = all_kernels(); *level != nullptr; ++level) {
    const std::vector<float> f = factor_of(**level, p, order);
    double trace = 0.0;
    for (std::int64_t i = 0; i < p.k; ++i) trace += p.gram[static_cast<std::size_t>(i * (p.k + 1))];
    // U^T U with U_tu = pivot_t f_tu: the pivots follow from the diagonal, and everything else has to agree.
    std::vector<double> square(static_cast<std::size_t>(p.k));
    for (std::int64_t u = 0; u < p.k; ++u)
      for (std::int64_t t = 0; t <= u; ++t) {
        const auto at = [&](std::int64_t r, std::int64_t c) {
          return r == c ? 1.0 : double{f[static_cast<std::size_t>(r * p.k + c)]};
        };
        double known = 0.0;
        for (std::int64_t s = 0; s < t; ++s) known += square[static_cast<std::size_t>(s)] * at(s, t) * at(s, u);
        double want = p.gram[static_cast<std::size_t>(order[static_cast<std::size_t>(t)] * p.k +
                                                      order[static_cast<std::size_t>(u)])];
        if (t == u) {
          square[static_cast<std::size_t>(t)] = want + 0.01 * trace / static_cast<double>(p.k) - known;
          CHECK(square[static_cast<std::size_t>(t)] > 0.0);
        } else {
          CHECK(std::fabs(known + square[static_cast<std::size_t>(t)] * at(t, u) - want) < 1e-5 * trace);
        }
      }
  }
}

TEST_CASE("a gram that is not positive, by rounding or by mistake, still gives codes") {
  Problem p(16, 32, 16, 50);
  for (std::size_t i = 0; i < p.gram.size(); ++i) p.gram[i] = i % 33 == 0 ? 1.0f : (i % 2 == 0 ? 5.0f : -5.0f);
  const Rounded r = round(best_kernels(), p, 2);
  CHECK(*std::max_element(r.q.begin(), r.q.end()) <= 15);
  for (const float scale : r.scales) CHECK((std::isfinite(scale) && scale > 0.0f));
}
