// The matrix product by mma.sync, played without a GPU.
#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/gemm_sm80.h"
#include "linear_case.h"
#include "play.h"

using namespace awq;
using core::DType;
using cuda::CudaPlan;
using cuda::CudaProblem;
using cuda::Gpu;
using test::LinearCase;
using test::Shape;
using test::Types;

namespace {

constexpr Gpu kAmpere{80, 108, 163 << 10}, kAda{89, 128, 99 << 10};
constexpr auto kHalf = DType::f16, kBrain = DType::bf16, kFloat = DType::f32;
constexpr int kBothTiles[] = {32, 64};

/// A row of x is a multiple of 16 bytes.
LinearCase make(Shape shape, Types types, std::uint32_t seed = 1) {
  return LinearCase(shape, types, 8 + (8 - shape.k % 8) % 8, seed);
}

CudaProblem problem(const LinearCase& c) {
  return {c.shape.m, c.shape.n, c.shape.k, c.shape.group, c.types.x, c.types.scale};
}

void play(const core::LinearArgs& args, const CudaPlan& plan, const simt::Options& options) {
  simt::Buffer<float> partials(static_cast<std::size_t>(plan.workspace_bytes / 4), "workspace");
  partials.global().uninitialised();
  simt::play(args, plan, partials.data(), options);
}

/// Products of a group, in the end scaled and added to those of others, at least once a step; parts of k; bias.
double additions(const LinearCase& c, const CudaPlan& plan) {
  const double group = static_cast<double>(c.shape.group), k = static_cast<double>(c.shape.k);
  return group + 2.0 * std::max(k / group, k / 64.0) + plan.splits + 2.0;
}

double check(LinearCase& c, const CudaPlan& plan, std::initializer_list<std::uint64_t> seeds = {0, 1, 2}) {
  CAPTURE(plan.tile_m, plan.splits);
  REQUIRE(cuda::gemm_sm80_can(problem(c), kAda));
  return c.check(
      {additions(c, plan)},
      [&](const core::LinearArgs& args, const simt::Options& options) { play(args, plan, options); }, seeds);
}

/// In tiles of both widths.
void check(LinearCase& c, int splits = 1, std::initializer_list<std::uint64_t> seeds = {0, 1, 2}) {
  for (const int tokens : kBothTiles) check(c, cuda::gemm_sm80_plan(problem(c), tokens, splits), seeds);
}

/// Types by turns, so that every pair of them meets.
Types types_of(int i) {
  constexpr DType kX[] = {kHalf, kBrain}, kScale[] = {kHalf, kBrain, kFloat}, kBias[] = {kFloat, kHalf, kBrain};
  return {kX[i % 2], kScale[i % 3], kBias[i / 2 % 3], i % 4 != 3, i % 5 != 4};
}

}  // namespace

TEST_CASE("gemm_sm80: rows and columns that no tile divides") {
  int i = 0;
  for (const std::int64_t m : {17, 31, 33, 64, 65, 130, 329})
    for (const std::int64_t n : {8, 24, 64, 136}) {
      LinearCase c = make({m, n, m < 329 ? 192 : 64, 64}, types_of(i++));
      check(c, 1, {0, 1});
    }
  LinearCase wide = make({17, 4096, 64, 64}, {kHalf, kHalf, kHalf});
  check(wide, cuda::gemm_sm80_plan(problem(wide), kAda), {0, 1});
}

TEST_CASE("gemm_sm80: groups and ends of k") {
  constexpr std::int64_t kOf[][2] = {{16, 16},  {48, 16},  {80, 16},  {128, 16},  {192, 32},  {96, 32},
                                     {144, 48}, {192, 96}, {240, 80}, {128, 64},  {384, 128}, {384, 192},
                                     {37, 37},  {64, 64},  {65, 65},  {100, 100}, {200, 200}, {129, 129}};
  int i = 0;
  for (const auto& [k, group] : kOf) {
    LinearCase c = make({19, 72, k, group}, types_of(i++));
    check(c, 1, {0, 1});
  }
}

TEST_CASE("gemm_sm80: every pair of types") {
  for (int i = 0; i < 12; ++i) {
    LinearCase c = make({20, 40, 128, i < 6 ? 64 : 32}, types_of(i), 7u + static_cast<unsigned>(i));
    check(c, 1, {2});
  }
}

TEST_CASE("gemm_sm80: blocks share k") {
  // Parts of unequal lengths, which begin and end within groups, and shorter than the ring.
  for (const int splits : {2, 3, 7}) {
    for (const std::int64_t group : {640, 128, 64, 32, 80}) {
      LinearCase c = make({33, 136, 640, group}, types_of(static_cast<int>(group / 16) + splits));
      check(c, splits, {0, 1});
    }
  }
}

TEST_CASE("gemm_sm80: copies that end early, late or at random moments, threads in any order") {
  LinearCase c = make({40, 72, 640, 128}, {kHalf, kHalf, kHalf});
  check(c, 1, {0, 1, 2, 3, 4, 5, 6, 7});
  LinearCase small = make({40, 72, 448, 32}, {kBrain, kFloat, kHalf});
  check(small, 2, {0, 1, 2, 3, 4, 5, 6, 7});
}

TEST_CASE("gemm_sm80: what is not finite stays in its row or column") {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
  for (const std::int64_t group : {64, 16}) {
    LinearCase c = make({35, 40, 112 - 48 * (group == 64), group}, {kHalf, kBrain, kFloat});
    c.x.set(3 * c.stride + 5, kNan);
    c.x.set(34 * c.stride + 1, kInfinity);
    c.scales.set(7, kNan);
    check(c, 1, {0, 1});
    const std::int64_t n = c.shape.n;
    std::int64_t finite = 0;
    for (std::int64_t i = 0; i < c.shape.m * n; ++i) finite += std::isfinite(c.y[i]);
    CHECK(finite == (c.shape.m - 2) * (n - 1));
  }
}

TEST_CASE("gemm_sm80: weights are exact, and sums are not of 16 bits") {
  for (const DType type : {kHalf, kBrain}) {
    // Whole numbers whose sums a float has; in half they would pass its largest number on the way.
    LinearCase c = make({18, 24, 256, 128}, {type, kFloat, kFloat, true, false});
    for (std::int64_t i = 0; i < c.x.size(); ++i) c.x.set(i, 200.0);
    for (std::int64_t col = 0; col < c.shape.n; ++col)
      for (std::int64_t i = 0; i < c.shape.k; ++i)
        c.q[static_cast<std::size_t>(col * c.shape.k + i)] = i < 128   ? 15
                                                             : i < 255 ? 0
                                                                       : static_cast<std::uint8_t>(col % 16);
    for (std::size_t i = 0; i < c.z.size(); ++i) c.z[i] = i % 2 == 0 ? 0 : 15;
    for (std::int64_t i = 0; i < c.scales.size(); ++i) c.scales.set(i, 1.0);
    for (const int tokens : kBothTiles)
      CHECK(c.check({0.0}, [&](const core::LinearArgs& args, const simt::Options& options) {
        play(args, cuda::gemm_sm80_plan(problem(c), tokens, 1), options);
      }) <= 1.0);
  }
  // A scale of more digits than x's type has.
  LinearCase c = make({17, 8, 64, 64}, {kBrain, kFloat, kFloat, true, false});
  for (std::int64_t i = 0; i < c.scales.size(); ++i) c.scales.set(i, 1.0 + 0x1p-20 * static_cast<double>(i + 1));
  check(c);
}

TEST_CASE("gemm_sm80: a row of x alone gives what it gives among others") {
  const LinearCase all = [] {
    LinearCase c = make({70, 24, 320, 32}, {kHalf, kHalf, kHalf});
    check(c, cuda::gemm_sm80_plan(problem(c), 64, 2), {0});
    return c;
  }();
  for (const std::int64_t row : {0, 31, 64, 69}) {
    LinearCase one = make({1, 24, 320, 32}, {kHalf, kHalf, kHalf});
    one.q = all.q, one.z = all.z, one.scales = all.scales, one.bias = all.bias;
    for (std::int64_t i = 0; i < all.shape.k; ++i) one.x.set(i, all.x[row * all.stride + i]);
    check(one, cuda::gemm_sm80_plan(problem(one), 32, 2), {0});
    for (std::int64_t col = 0; col < all.shape.n; ++col) CHECK(one.y[col] == all.y[row * all.shape.n + col]);
  }
}

TEST_CASE("gemm_sm80: many tiles", "[.slow]") {
  int i = 0;
  for (const std::int64_t m : {17, 31, 33, 64, 65, 130})
    for (const std::int64_t n : {8, 24, 64, 136, 4096 - 8})
      for (const std::int64_t group : {16, 32, 64, 128, 512}) {
        LinearCase c = make({m, n, 512, group}, types_of(i), static_cast<unsigned>(i));
        ++i;
        check(c, cuda::gemm_sm80_plan(problem(c), kAda), {0, 1, 2});
      }
}

namespace {

void check_at_random(int calls, std::uint32_t seed) {
  test::Random random(seed);
  const auto below = [&](std::int64_t end) { return static_cast<std::int64_t>(random.bits() % end); };
  for (int i = 0; i < calls; ++i) {
    const std::int64_t group = below(5) == 0 ? 1 + below(700) : 16 * (1 + below(12));
    const std::int64_t k = group % 16 == 0 ? group * (1 + below(700 / group + 1)) : group;
    const std::int64_t steps = core::ceil_div(k, 64);
    LinearCase c =
        make({1 + below(140), 8 * (1 + below(40)), k, group}, types_of(static_cast<int>(below(60))), random.bits());
    const int tokens = kBothTiles[below(2)], splits = static_cast<int>(1 + below(steps < 9 ? steps : 9));
    check(c, cuda::gemm_sm80_plan(problem(c), tokens, splits), {random.bits(), random.bits()});
  }
}

}  // namespace

TEST_CASE("gemm_sm80: calls at random") { check_at_random(60, 80); }

TEST_CASE("gemm_sm80: more calls at random", "[.slow]") { check_at_random(400, 1); }

TEST_CASE("gemm_sm80: plans") {
  const auto plan = [](std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, const Gpu& gpu) {
    return cuda::gemm_sm80_plan({m, n, k, group, kHalf, kHalf}, gpu);
  };
  CHECK(plan(17, 4096, 4096, 128, kAmpere).tile_m == 32);
  CHECK(plan(64, 4096, 4096, 128, kAmpere).tile_m == 64);
  CHECK(plan(96, 4096, 4096, 128, kAmpere).tile_m == 32);
  CHECK(plan(1024, 4096, 4096, 128, kAmpere).splits == 1);
  for (const Gpu& gpu : {kAmpere, kAda})
    for (const std::int64_t m : {17, 64, 100, 1000})
      for (const std::int64_t n : {8, 4096, 11008, 28672})
        for (const std::int64_t k : {64, 4096, 11008, 28672}) {
          const CudaPlan p = plan(m, n, k, 64, gpu);
          CAPTURE(gpu.arch, m, n, k, p.tile_m, p.splits);
          CHECK(p.grid_x * p.tile_m * p.tile_n >= m * n);
          CHECK(p.grid_y == p.splits);
          CHECK(p.workspace_bytes == (p.splits > 1 ? p.splits * m * n * 4 : 0));
          CHECK((p.splits == 1 || (p.grid_x * p.splits <= 2 * gpu.sms && p.splits * 8 * 64 <= k)));
        }
  // Two blocks share the memory of the smallest multiprocessor, and the sums find room in the ring.
  for (const int tokens : kBothTiles)
    for (const bool small : {false, true}) {
      const cuda::GemmSm80 cut{tokens, small};
      CHECK(2 * (cut.shared_bytes() + 1024) <= 100 << 10);
      CHECK(cut.stages() >= 3);
      CHECK(tokens * cuda::GemmSm80::kSumsPitch <= cut.shared_bytes());
    }

  const CudaProblem good{17, 8, 96, 48, kHalf, kFloat};
  CHECK(cuda::gemm_sm80_can(good, kAda));
  const auto with = [&](auto change, Gpu gpu = kAda) {
    CudaProblem p = good;
    change(p, gpu);
    return cuda::gemm_sm80_can(p, gpu);
  };
  CHECK(with([](CudaProblem& p, Gpu&) { p.k = p.group = 37; }));
  CHECK_FALSE(with([](CudaProblem& p, Gpu&) { p.group = 24; }));
  CHECK_FALSE(with([](CudaProblem& p, Gpu&) { p.n = 12; }));
  CHECK_FALSE(with([](CudaProblem& p, Gpu&) { p.x_type = kFloat; }));
  CHECK_FALSE(with([](CudaProblem& p, Gpu&) { p.scale_type = DType::f64; }));
  CHECK_FALSE(with([](CudaProblem& p, Gpu&) { p.m = p.n = std::int64_t{1} << 30; }));
  CHECK_FALSE(with([](CudaProblem&, Gpu& gpu) { gpu.arch = 75; }));
}
