// The decode kernel, played without a GPU.
#include <algorithm>
#include <limits>
#include <utility>

#include "cuda/decode.h"
#include "cuda/dequant.cuh"
#include "linear_case.h"
#include "play.h"

using namespace awq;
using core::DType;
using cuda::CudaPlan;
using test::LinearCase;
using test::Shape;
using test::Types;

namespace {

constexpr cuda::Gpu kHopper{90, 132, 227 << 10}, kAda{89, 128, 99 << 10};

cuda::CudaProblem problem(const LinearCase& c) {
  return {c.shape.m, c.shape.n, c.shape.k, c.shape.group, c.types.x, c.types.scale};
}

/// The launch is early, as after a kernel that writes x.
void play(const core::LinearArgs& args, CudaPlan plan, const simt::Options& options) {
  simt::Buffer<float> partials(static_cast<std::size_t>(plan.workspace_bytes / 4), "workspace");
  partials.global().uninitialised();
  plan.early = true;
  simt::play(args, plan, partials.data(), options);
}

/// Sixteen products at a time into a unit's sum; that, scaled, into a warp's; parts and splits; bias.
double additions(const LinearCase& c, const CudaPlan& plan) {
  const double steps = static_cast<double>(core::ceil_div(c.shape.k, cuda::kDecodeStep));
  return std::min(static_cast<double>(c.shape.k), 64.0) + steps / plan.splits + 8 + plan.splits + 4;
}

double check(LinearCase& c, const CudaPlan& plan, std::initializer_list<std::uint64_t> seeds = {0, 1, 2}) {
  CAPTURE(plan.tile_n, plan.tile_m, plan.splits, plan.cluster);
  REQUIRE(cuda::decode_can(problem(c), kHopper));
  return c.check(
      {additions(c, plan)},
      [&](const core::LinearArgs& args, const simt::Options& options) { play(args, plan, options); }, seeds);
}

}  // namespace

TEST_CASE("decode: every number of rows, in every cut of the work") {
  // k = 1088 is 17 steps: with one strip more than one stage of eight parts never is, with eight strips it is.
  for (std::int64_t m = 1; m <= cuda::kDecodeRows; ++m)
    for (int strips_log = m <= 2 ? 0 : m <= 6 ? 1 : m <= 12 ? 2 : 3; strips_log <= 3; ++strips_log) {
      const DType x = m % 2 == 0 ? DType::f16 : DType::bf16;
      LinearCase c({m, 136, 1088, 64}, {x, DType::f16, DType::f32, m % 3 != 0, m % 4 != 0}, 8 * (m % 2));
      check(c, cuda::decode_plan(problem(c), kHopper, strips_log, 1), {0, 1, 7});
      for (const cuda::Gpu& gpu : {kHopper, kAda})
        check(c, cuda::decode_plan(problem(c), gpu, strips_log, m % 5 == 0 ? 8 : m % 5 == 1 ? 4 : 2), {0, 1, 9});
    }
}

TEST_CASE("decode: groups and ends of k and n") {
  struct Case {
    std::int64_t n, k, group;
  };
  for (const Case& s : {Case{8, 1, 1}, Case{24, 7, 7}, Case{64, 63, 63}, Case{8, 65, 65}, Case{24, 200, 200},
                        Case{72, 1025, 1025}, Case{8, 16, 16}, Case{40, 80, 16}, Case{64, 96, 32}, Case{136, 144, 48},
                        Case{24, 240, 80}, Case{64, 288, 96}, Case{8, 336, 112}, Case{64, 128, 64}, Case{72, 576, 192},
                        Case{64, 1152, 128}, Case{24, 2560, 320}, Case{16, 4160, 32}, Case{16, 2064, 16}})
    for (const DType x : {DType::f16, DType::bf16})
      for (const DType scale : test::kFloatTypes)
        for (const std::int64_t m : {3, 11}) {
          LinearCase c({m, s.n, s.k, s.group}, {x, scale, scale, scale != DType::f16, m == 3}, 16 - s.k % 8);
          check(c, cuda::decode_plan(problem(c), kHopper), {0, 1, 2});
        }
}

TEST_CASE("decode: a wide weight, as planned") {
  for (const cuda::Gpu& gpu : {kHopper, kAda})
    for (const std::int64_t m : {1, 16}) {
      const DType x = m == 1 ? DType::f16 : DType::bf16;
      LinearCase c({m, 4096, 128, 128}, {x, x, x, true, true});
      check(c, cuda::decode_plan(problem(c), gpu), {0, 1});
    }
}

TEST_CASE("decode: calls at random") {
  test::Random random(16);
  const auto below = [&](std::int64_t end) { return static_cast<std::int64_t>(random.bits() % end); };
  int played = 0;
  for (int i = 0; i < 100; ++i) {
    const std::int64_t group = below(5) == 0 ? 1 + below(900) : 16 * (1 + below(12));
    const std::int64_t k = group % 16 == 0 ? group * (1 + below(1500 / group + 1)) : group;
    const std::int64_t steps = core::ceil_div(k, cuda::kDecodeStep);
    LinearCase c({1 + below(16), 8 * (1 + below(40)), k, group},
                 {below(2) == 0 ? DType::f16 : DType::bf16, test::kFloatTypes[below(3)], test::kFloatTypes[below(3)],
                  below(3) != 0, below(2) == 0},
                 (8 - k % 8) % 8 + 8 * below(3), random.bits());
    int splits = 1 << below(4);
    while (splits > steps) splits /= 2;
    const cuda::Gpu& gpu = below(2) == 0 ? kHopper : kAda;
    const CudaPlan plan = cuda::decode_plan(problem(c), gpu, static_cast<int>(below(4)), splits);
    if (plan.shared_bytes > gpu.shared_bytes) continue;
    check(c, plan, {random.bits(), random.bits()});
    ++played;
  }
  REQUIRE(played > 60);
}

TEST_CASE("a word of codes becomes q - z, exactly, for every code, zero and place") {
  const auto all = [&]<DType kType>() {
    for (std::uint32_t low = 0; low < 16; ++low)
      for (std::uint32_t high = 0; high < 16; ++high)
        for (std::uint32_t code = 0; code < 16; ++code)
          for (int place = 0; place < 8; ++place) {
            // The other nibbles are as far from it as can be.
            const std::uint32_t others = (15 - code) * 0x11111111u & ~(15u << 4 * place);
            std::uint32_t a[4];
            cuda::dequantize_word<kType>(others | code << 4 * place, cuda::zero_pair<kType>(low | high << 4), a);
            for (int i = 0; i < 8; ++i) {
              const auto bits = static_cast<std::uint16_t>(a[i % 4] >> (i / 4 * 16));
              const auto q = static_cast<int>(i == place ? code : 15 - code);
              const auto z = static_cast<int>(i % 2 == 0 ? low : high);
              REQUIRE(core::load_as<float>(&bits, kType, 0) == static_cast<float>(q - z));
            }
          }
  };
  all.operator()<DType::f16>();
  all.operator()<DType::bf16>();
}

TEST_CASE("decode: what is not a number in one row of x stays there") {
  for (const DType x : {DType::f16, DType::bf16})
    for (const std::int64_t m : {1, 3, 9, 16})
      for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        LinearCase c({m, 72, 192, 64}, {x, DType::f16, DType::f16, true, true});
        const CudaPlan plan = cuda::decode_plan(problem(c), kHopper, 3, 2);
        check(c, plan, {0});
        const test::Array before = c.y;
        const std::int64_t row = m / 2;
        for (const std::int64_t i : {0, 100, 191}) c.x.set(row * c.stride + i, bad);
        check(c, plan, {0, 1});
        for (std::int64_t i = 0; i < m * c.shape.n; ++i) {
          const bool same = c.y[i] == before[i];
          REQUIRE(same == (i / c.shape.n != row));
        }
      }
}

TEST_CASE("decode: extreme values") {
  // Sums of halves would be infinite long before the end; y is too, where float16 cannot have it.
  for (const DType x : {DType::f16, DType::bf16})
    for (const double scale : {1e-4, 0.01, 10.0})
      for (const int zero : {0, 15, -1}) {
        LinearCase c({2, 24, 8192, 128}, {x, DType::f16, DType::f32, true, false});
        for (std::int64_t i = 0; i < c.x.size(); ++i) c.x.set(i, i % c.stride < c.shape.k ? 200.0 : c.x[i]);
        for (std::int64_t i = 0; i < c.scales.size(); ++i) c.scales.set(i, scale);
        if (zero >= 0) std::fill(c.z.begin(), c.z.end(), static_cast<std::uint8_t>(zero));
        check(c, cuda::decode_plan(problem(c), kHopper), {0, 1});
      }
  // From group to group, as far apart as scales may be.
  LinearCase c({4, 64, 1024, 64}, {DType::bf16, DType::f32, DType::f32, true, true});
  for (std::int64_t i = 0; i < c.scales.size(); ++i) c.scales.set(i, i % 3 == 0 ? 1e-4 : i % 3 == 1 ? 10.0 : 1.0);
  check(c, cuda::decode_plan(problem(c), kHopper));
}

TEST_CASE("decode: a row of a batch is the row alone, where the work is cut alike") {
  LinearCase batch({8, 40, 512, 128}, {DType::f16, DType::f16, DType::f16, true, true});
  check(batch, cuda::decode_plan(problem(batch), kHopper, 2, 2), {0});
  for (std::int64_t row = 0; row < 8; ++row) {
    LinearCase alone({1, 40, 512, 128}, {DType::f16, DType::f16, DType::f16, true, true});
    alone.q = batch.q, alone.z = batch.z, alone.scales = batch.scales, alone.bias = batch.bias;
    for (std::int64_t i = 0; i < 512; ++i) alone.x.set(i, batch.x[row * batch.stride + i]);
    check(alone, cuda::decode_plan(problem(alone), kHopper, 2, 2), {0});
    for (std::int64_t col = 0; col < 40; ++col) REQUIRE(alone.y[col] == batch.y[row * 40 + col]);
  }
}

TEST_CASE("decode: every unit along k finds its group") {
  for (const std::int64_t group : {16, 32, 48, 64, 80, 96, 112, 128, 192, 320, 1024, 524288})
    for (const std::int64_t k : {group, 2 * group, 37 * group, (std::int64_t{1} << 20) / group * group}) {
      if (k > 1 << 20) continue;
      const cuda::DecodeCut cut = cuda::decode_cut({}, k, group);
      const std::int64_t unit = cuda::decode_unit(k, group);
      for (std::int64_t u = 0; u < k / unit; ++u)
        if (static_cast<std::int64_t>(static_cast<std::uint64_t>(u) * cut.reciprocal >> 31) != u * unit / group)
          FAIL(k << " " << group << " " << u);
    }
}

TEST_CASE("decode: what it can do, and how it is cut") {
  const cuda::CudaProblem fits{1, 4096, 4096, 128, DType::f16, DType::f16};
  CHECK(cuda::decode_can(fits, kHopper));
  const auto with = [&](auto set) {
    cuda::CudaProblem p = fits;
    set(p);
    return p;
  };
  constexpr cuda::Gpu kTuring{75, 40, 64 << 10};
  CHECK(cuda::decode_can(with([](auto& p) { p.m = 16; }), kTuring));
  CHECK(!cuda::decode_can(with([](auto& p) { p.m = 17; }), kHopper));
  CHECK(!cuda::decode_can(with([](auto& p) { p.n = 4092; }), kHopper));
  CHECK(!cuda::decode_can(with([](auto& p) { p.group = 8; }), kHopper));
  CHECK(!cuda::decode_can(with([](auto& p) { p.x_type = DType::f32; }), kHopper));
  CHECK(cuda::decode_can(with([](auto& p) { p.x_type = DType::bf16; }), kAda));
  CHECK(!cuda::decode_can(with([](auto& p) { p.x_type = DType::bf16; }), kTuring));
  CHECK(!cuda::decode_can(with([](auto& p) { p.k = p.group = (1 << 20) + 64; }), kHopper));

  for (const cuda::Gpu& gpu : {kTuring, cuda::Gpu{80, 108, 163 << 10}, kAda, kHopper, cuda::Gpu{120, 170, 99 << 10}})
    for (std::int64_t m = 1; m <= 16; ++m)
      for (const std::int64_t n : {8, 1024, 4096, 28672})
        for (const std::int64_t k : {1, 64, 4096, 28672}) {
          const CudaPlan plan = cuda::decode_plan({m, n, k, k, DType::f16, DType::f16}, gpu);
          CAPTURE(gpu.arch, m, n, k, plan.tile_n, plan.splits);
          CHECK(plan.grid_x == core::ceil_div(n, plan.tile_n) * plan.splits);
          CHECK((plan.tile_n <= 128 && plan.tile_m >= m));
          CHECK(plan.splits <= core::ceil_div(k, cuda::kDecodeStep));
          CHECK(plan.shared_bytes <= gpu.shared_bytes);
          CHECK((plan.cluster == plan.splits || plan.workspace_bytes == plan.splits * m * n * 4));
          CHECK((plan.cluster == 1 || cuda::has_clusters(gpu.arch)));
        }
}

TEST_CASE("decode: as planned, on the sizes of models", "[.slow]") {
  for (const cuda::Gpu& gpu : {kHopper, kAda})
    for (const std::int64_t m : {1, 2, 4, 7, 8, 16})
      for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{4096, 4096}, {1024, 8192}, {640, 28672}})
        for (const std::int64_t group : {32, 128}) {
          LinearCase c({m, n, k, group}, {m % 2 == 0 ? DType::f16 : DType::bf16, DType::f16, DType::f16, true, true});
          check(c, cuda::decode_plan(problem(c), gpu), {0, 1});
        }
}
