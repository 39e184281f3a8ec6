// The decode kernel, played without a GPU.
#include <cmath>
#include <limits>

#include "cuda/decode.cuh"
#include "linear_case.h"

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

/// body.operator()<x's type, tiles of tokens, unit>(), as decode.cu chooses them.
template <class Body>
void dispatch(const core::LinearArgs& args, const CudaPlan& plan, Body body) {
  const auto with_unit = [&]<DType kType, int kTiles>() {
    switch (cuda::decode_unit(args.k, args.group)) {
      case 16: return body.template operator()<kType, kTiles, 16>();
      case 32: return body.template operator()<kType, kTiles, 32>();
      default: return body.template operator()<kType, kTiles, 64>();
    }
  };
  const auto with_tiles = [&]<DType kType>() {
    plan.tile_m <= 8 ? with_unit.template operator()<kType, 1>() : with_unit.template operator()<kType, 2>();
  };
  args.x_type == DType::f16 ? with_tiles.template operator()<DType::f16>()
                            : with_tiles.template operator()<DType::bf16>();
}

/// The kernel, and the one that adds if there is no cluster. The launch is early, as after a kernel that writes x.
void play(const core::LinearArgs& args, const CudaPlan& plan, const simt::Options& options) {
  simt::Buffer<float> partials(static_cast<std::size_t>(plan.workspace_bytes / 4));
  partials.global().uninitialised();
  float* const workspace = plan.workspace_bytes > 0 ? partials.data() : nullptr;
  const cuda::DecodeCut cut = cuda::decode_cut(plan, args.k, args.group);
  dispatch(args, plan, [&]<DType kType, int kTiles, int kUnit>() {
    simt::run({.grid_x = plan.grid_x,
               .grid_y = plan.grid_y,
               .threads = plan.threads,
               .cluster = plan.cluster,
               .shared_bytes = static_cast<std::uint32_t>(plan.shared_bytes),
               .registers = 128,
               .early = true},
              options, [&] { cuda::decode_body<kType, kTiles, kUnit>(args, cut, workspace); });
    if (workspace != nullptr)
      simt::run({.grid_x = core::ceil_div(args.m * args.n, 4 * cuda::kReduceThreads), .threads = cuda::kReduceThreads},
                options, [&] { cuda::reduce_body<kType>(args, workspace, plan.splits); });
  });
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
                        Case{64, 1280, 128}, Case{24, 2560, 320}, Case{16, 4160, 32}, Case{16, 2064, 16}})
    for (const DType x : {DType::f16, DType::bf16})
      for (const DType scale : test::kFloatTypes)
        for (const std::int64_t m : {3, 11}) {
          // Rows at any element: only rows 16 bytes apart are copied in such pieces.
          LinearCase c({m, s.n, s.k, s.group}, {x, scale, scale, scale != DType::f16, m == 3}, s.k % 3);
          check(c, cuda::decode_plan(problem(c), kHopper), {0, 1, 2});
        }
}
