// The Hopper GEMM, played without a GPU; and how its plans cut calls up.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cuda/gemm_sm90.h"
#include "linear_case.h"
#include "play.h"

using namespace awq;
using core::DType;
using cuda::CudaPlan;
using cuda::CudaProblem;
using cuda::Sm90Cut;
using test::LinearCase;
using test::Shape;
using test::Types;

namespace {

constexpr cuda::Gpu kHopper{90, 132, 227 << 10};

CudaProblem problem(const LinearCase& c) {
  return {c.shape.m, c.shape.n, c.shape.k, c.shape.group, c.types.x, c.types.scale};
}

/// How a call is played: as a plan says, or with fewer stages and blocks, so that both are used again and again.
struct Cut {
  int tokens, stages = 2, cluster = 1;
  std::int64_t blocks = 0;  // 0: one, or a cluster, for each tile
};

Cut cut_of(const CudaPlan& plan) { return {plan.tile_m, plan.stages, plan.cluster, plan.grid_x}; }

CudaPlan plan_of(const CudaProblem& p, const Cut& cut) {
  const Sm90Cut sm90(p, cut.tokens, cut.stages, cut.cluster);
  CudaPlan plan = cuda::sm90_plan(p, kHopper, cut.tokens, cut.cluster);
  plan.stages = cut.stages, plan.shared_bytes = sm90.bytes();
  plan.grid_x = cut.blocks == 0 ? std::int64_t{sm90.tiles} * cut.cluster : cut.blocks;
  return plan;
}

/// Sixteen products at a time come to a sum in float32: where weights are exact that of a step, at most 128, and then
/// that of all steps; blocks of a cluster; bias.
double additions(const LinearCase& c, const Cut& cut) {
  const auto k = static_cast<double>(c.shape.k);
  const double terms = cut.tokens <= cuda::kSm90Exact ? std::min(k, 128.0) + k / 16 + 2 : k;
  return terms + cut.cluster + 2;
}

void check(LinearCase& c, const Cut& cut, std::initializer_list<std::uint64_t> seeds = {0, 1, 2}) {
  CAPTURE(cut.tokens, cut.stages, cut.cluster, cut.blocks);
  REQUIRE(cuda::gemm_sm90_can(problem(c), kHopper));
  c.check(
      {additions(c, cut), cut.tokens > cuda::kSm90Exact},
      [&](const core::LinearArgs& args, const simt::Options& options) {
        simt::play(args, plan_of(problem(c), cut), nullptr, options);
      },
      seeds);
}

/// What makes the rows of x multiples of 16 bytes apart, and more.
std::int64_t pad(std::int64_t k) { return (8 - k % 8) % 8 + 8; }

/// y is x times the weights that dequantize gives, up to the order of additions.
void check_rounded(const LinearCase& c, const Cut& cut) {
  const auto [m, n, k, group] = c.shape;
  const double out = test::unit_roundoff(c.types.x), relative = 2 * additions(c, cut) * 0x1p-24;
  test::Array w(c.types.x, k);
  for (std::int64_t col = 0; col < n; ++col) {
    for (std::int64_t i = 0; i < k; ++i) w.set(i, (c.code(col, i) - c.zero(col, i)) * c.scale(col, i));
    for (std::int64_t row = 0; row < m; ++row) {
      double sum = c.types.with_bias ? c.bias[col] : 0.0, terms = std::fabs(sum);
      for (std::int64_t i = 0; i < k; ++i) {
        sum += c.x[row * c.stride + i] * w[i];
        terms += std::fabs(c.x[row * c.stride + i] * w[i]);
      }
      CAPTURE(row, col, sum, c.y[row * n + col]);
      REQUIRE(std::fabs(c.y[row * n + col] - sum) <=
              out * std::fabs(sum) + relative * terms + test::subnormal_roundoff(c.types.x));
    }
  }
}

}  // namespace

TEST_CASE("gemm_sm90: every tile, of both types") {
  for (const int tokens : cuda::kSm90Tokens)
    for (const DType x : {DType::f16, DType::bf16}) {
      const std::int64_t m = tokens <= 32 ? tokens + 1 : tokens - 3;
      const bool f16 = x == DType::f16;
      LinearCase c({m, f16 ? 136 : 72, 192, 64}, {x, x, x, f16, !f16}, 8);
      check(c, {.tokens = tokens, .stages = 3}, {0, 1, 7});
      if (tokens > cuda::kSm90Exact) check_rounded(c, {.tokens = tokens});
    }
}

TEST_CASE("gemm_sm90: groups, and ends of n and k") {
  struct Case {
    std::int64_t n, k, group;
  };
  for (const DType x : {DType::f16, DType::bf16}) {
    for (const Case& s : {Case{8, 16, 16}, Case{24, 80, 16}, Case{64, 96, 32}, Case{72, 224, 32}, Case{8, 7, 7},
                          Case{40, 65, 65}, Case{136, 200, 200}, Case{64, 384, 128}, Case{24, 320, 320},
                          Case{8, 64, 64}, Case{64, 192, 64}, Case{16, 288, 16}, Case{40, 384, 384}}) {
      const DType scale = s.n % 16 == 0 ? DType::f32 : DType::f16;
      LinearCase c({17, s.n, s.k, s.group}, {x, scale, DType::bf16, s.k != 224}, pad(s.k));
      check(c, {.tokens = 32, .stages = 2}, {0, 1});
    }
    for (const Case& s : {Case{8, 64, 16}, Case{24, 128, 16}, Case{64, 192, 32}, Case{72, 256, 256},
                          Case{136, 256, 128}, Case{40, 384, 128}}) {
      const Cut cut{.tokens = 96, .stages = 2};
      LinearCase c({20, s.n, s.k, s.group}, {x, x, DType::f32, s.k != 192}, 8);
      check(c, cut, {1, 2});
      check_rounded(c, cut);
    }
  }
}

TEST_CASE("gemm_sm90: clusters share k, blocks take one tile after the other") {
  for (const int cluster : {2, 4}) {
    LinearCase c({40, 136, 64 * 7 - 24, 64 * 7 - 24}, {DType::f16, DType::f16, DType::f32}, 8);
    check(c, {.tokens = 32, .stages = 4, .cluster = cluster}, {0, 1, 2, 3});
    LinearCase small({33, 24, 64 * 3, 32}, {DType::bf16, DType::bf16, DType::bf16, false}, 8);  // one block has no step
    check(small, {.tokens = 64, .stages = 3, .cluster = cluster});
    LinearCase rounded({130, 64, 64 * 6, 128}, {DType::f16, DType::f16, DType::f16}, 8);
    check(rounded, {.tokens = 128, .stages = 4, .cluster = cluster}, {1, 5});
  }
  for (const std::int64_t blocks : {1, 2, 3}) {
    LinearCase c({70, 264, 128, 64}, {DType::bf16, DType::f32, DType::f32}, 8);
    check(c, {.tokens = 32, .stages = 3, .blocks = blocks}, {0, 1, 4});
  }
  LinearCase c({300, 136, 192, 64}, {DType::bf16, DType::bf16, DType::f32}, 0);
  check(c, {.tokens = 256, .stages = 2, .blocks = 1}, {1, 6});
}

TEST_CASE("gemm_sm90: as it is planned") {
  for (const std::int64_t m : {17, 31, 33, 64, 65, 128, 130, 256, 329}) {
    LinearCase c({m, m == 31 ? 4096 : 64, m == 31 ? 128 : 512, 128},
                 {m % 2 == 0 ? DType::f16 : DType::bf16, m < 64       ? DType::f32
                                                         : m % 2 == 0 ? DType::f16
                                                                      : DType::bf16},
                 8);
    check(c, cut_of(cuda::gemm_sm90_plan(problem(c), kHopper)), {0, 1});
  }
}

TEST_CASE("gemm_sm90: calls at random") {
  test::Random random(90);
  const auto below = [&](int count) { return static_cast<std::int64_t>(random.uniform(0, count)); };
  int played = 0;
  for (int i = 0; i < 50; ++i) {
    const int tokens = cuda::kSm90Tokens[below(std::size(cuda::kSm90Tokens))];
    const bool exact = tokens <= cuda::kSm90Exact;
    constexpr std::int64_t kGroups[] = {16, 32, 64, 128, 256};
    std::int64_t group = kGroups[below(std::size(kGroups))];
    if (!exact) group = core::ceil_div(group, 64) * 64 / (below(2) == 0 ? 1 : 2);
    const std::int64_t groups = exact ? 1 + below(9) : 2 * (1 + below(3));
    const std::int64_t k = group * groups;
    const DType x = below(2) == 0 ? DType::f16 : DType::bf16;
    LinearCase c(
        {1 + below(300), 8 * (1 + below(40)), k, below(4) == 0 ? k : group},
        {x, exact ? test::kFloatTypes[below(3)] : x, test::kFloatTypes[below(3)], below(3) != 0, below(2) == 0},
        8 * below(3), random.bits());
    if (!cuda::gemm_sm90_can(problem(c), kHopper)) continue;
    const int cluster = cuda::kSm90Clusters[below(3)];
    // A cluster's sums need some room.
    const Cut cut{tokens, static_cast<int>((cluster == 1 ? 2 : 4) + below(3)), cluster, cluster == 1 ? below(4) : 0};
    check(c, cut, {0, random.bits()});
    if (!exact) check_rounded(c, cut);
    ++played;
  }
  REQUIRE(played > 30);
}

TEST_CASE("gemm_sm90: what is not finite stays in its row; zeros and scales at their ends") {
  for (const int tokens : {32, 128}) {
    LinearCase c({20, 72, 128, 64}, {DType::f16, DType::f16, DType::f16, true, false}, 8);
    for (std::int64_t i = 0; i < c.shape.k; ++i) c.x.set(3 * c.stride + i, 200.0);
    c.x.set(5 * c.stride + 17, std::numeric_limits<double>::quiet_NaN());
    c.x.set(7 * c.stride + 100, std::numeric_limits<double>::infinity());
    for (std::size_t i = 0; i < c.z.size(); ++i) c.z[i] = i % 2 == 0 ? 0 : 15;
    for (std::int64_t i = 0; i < c.scales.size(); ++i) c.scales.set(i, i % 3 == 0 ? 1e-4 : i % 3 == 1 ? 0.1 : 10.0);
    check(c, {.tokens = tokens, .stages = 2}, {0, 1});
  }
}

TEST_CASE("gemm_sm90: long sums", "[.slow]") {
  for (const std::int64_t m : {17, 33, 65, 257})
    for (const DType x : {DType::f16, DType::bf16}) {
      LinearCase c({m, 264, 4096, 128}, {x, x, x}, 8);
      check(c, cut_of(cuda::gemm_sm90_plan(problem(c), kHopper)), {0, 1, 2, 3});
    }
}

TEST_CASE("gemm_sm90: plans fit the device, and cover the call") {
  for (const std::int64_t n : {8, 4096, 11008, 28672})
    for (const std::int64_t k : {16, 4096, 14336})
      for (const std::int64_t group : {std::int64_t{16}, std::int64_t{128}, k})
        for (const std::int64_t m : {17, 32, 33, 64, 65, 100, 128, 129, 256, 257, 1024, 100000})
          for (const DType scale : test::kFloatTypes) {
            const CudaProblem p{m, n, k, group, DType::f16, scale};
            if (k % group != 0) continue;
            REQUIRE(cuda::gemm_sm90_can(p, kHopper));
            const CudaPlan plan = cuda::gemm_sm90_plan(p, kHopper);
            CAPTURE(m, n, k, group, int(scale), plan.tile_m, plan.cluster, plan.stages);
            const Sm90Cut cut(p, plan.tile_m, plan.stages, plan.cluster);
            REQUIRE(plan.kernel == cuda::CudaKernel::gemm_sm90);
            REQUIRE(plan.stages >= 2);
            REQUIRE(plan.shared_bytes == cut.bytes());
            REQUIRE((plan.shared_bytes + 1024) * cuda::sm90_blocks(plan.tile_m) <= kHopper.shared_bytes + 1024);
            REQUIRE(plan.workspace_bytes == 0);
            // The sums of a block, for the others of a cluster, must not reach the barriers.
            REQUIRE(4 * plan.tile_n * plan.tile_m <= cut.barriers);
            REQUIRE(((scale == p.x_type && k % cuda::kSm90Slice == 0) || plan.tile_m <= cuda::kSm90Exact));
            const std::int64_t tiles = core::ceil_div(n, plan.tile_n) * core::ceil_div(m, plan.tile_m);
            REQUIRE(cut.tiles == tiles);
            REQUIRE((plan.cluster == 1 ? plan.grid_x <= tiles : plan.grid_x == tiles * plan.cluster));
          }
  const auto plan = [](std::int64_t m, std::int64_t n, std::int64_t k) {
    return cuda::gemm_sm90_plan({m, n, k, 128, DType::bf16, DType::bf16}, kHopper);
  };
  REQUIRE(plan(17, 4096, 4096).cluster == 4);     // 32 tiles for 132 multiprocessors
  REQUIRE(plan(32, 28672, 4096).cluster == 1);    // enough of them
  REQUIRE(plan(48, 8192, 8192).tile_m == 64);     // one tile along x
  REQUIRE(plan(1024, 8192, 8192).tile_m == 256);  // matrix units set the pace
  REQUIRE(plan(1024, 8192, 8192).grid_x == 132);
}

TEST_CASE("gemm_sm90: what it cannot do") {
  const CudaProblem good{100, 64, 256, 64, DType::f16, DType::f16};
  const auto can = [&](auto change) {
    CudaProblem p = good;
    change(p);
    return cuda::gemm_sm90_can(p, kHopper);
  };
  REQUIRE(can([](CudaProblem&) {}));
  REQUIRE(can([](CudaProblem& p) { p.group = 32; }));
  REQUIRE(can([](CudaProblem& p) { p.k = p.group = 100; }));
  REQUIRE(can([](CudaProblem& p) { p.scale_type = DType::f32; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.n = 60; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.group = 8; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.k = 480, p.group = 48; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.k = 960, p.group = 96; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.k = 960, p.group = 192; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.x_type = p.scale_type = DType::f32; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.m = std::int64_t{1} << 31; }));
  REQUIRE_FALSE(can([](CudaProblem& p) { p.m = p.n = std::int64_t{1} << 22; }));
  REQUIRE_FALSE(cuda::gemm_sm90_can(good, {100, 148, 227 << 10}));
}
