#include "play.h"

#include "cuda/decode.cuh"
#include "cuda/gemm_sm80.cuh"
#include "cuda/gemm_sm90.cuh"
#include "cuda/reduce.cuh"

namespace simt {

using namespace awq;
using core::DType;
using cuda::CudaKernel;

void play(const core::LinearArgs& a, const cuda::CudaPlan& plan, void* workspace, const Options& options,
          Blocks blocks) {
  auto* const partials = static_cast<float*>(plan.workspace_bytes > 0 ? workspace : nullptr);
  const auto run_blocks = [&](Launch launch, std::int64_t tile_blocks, auto body) {
    if (blocks == Blocks::last_tile) launch.first_x = launch.grid_x - tile_blocks;
    run(launch, options, body);
  };
  Launch launch;
  launch.grid_x = plan.grid_x, launch.grid_y = plan.grid_y, launch.threads = plan.threads;
  launch.cluster = plan.cluster, launch.shared_bytes = static_cast<std::uint32_t>(plan.shared_bytes);
  launch.early = plan.early;
  if (plan.kernel == CudaKernel::decode) {
    const cuda::DecodeCut cut = cuda::decode_cut(plan, a.k, a.group);
    cuda::with_decode(plan, a.x_type, cuda::decode_unit(a.k, a.group), [&]<DType kType, int kTiles, int kUnit>() {
      run_blocks(launch, plan.splits, [&] { cuda::decode_body<kType, kTiles, kUnit>(a, cut, partials); });
    });
  } else if (plan.kernel == CudaKernel::gemm_sm80) {
    const bool small = cuda::gemm_sm80_small_groups(a.k, a.group);
    cuda::with_gemm_sm80(plan, a.x_type, small, [&]<DType kType, int kTokens, bool kSmall>() {
      run_blocks(launch, 1, [&] { cuda::gemm_sm80_body<kType, kTokens, kSmall>(a, partials); });
    });
  } else {
    launch.registers = cuda::sm90_registers(plan.tile_m);
    const bool found = cuda::with_gemm_sm90(plan.tile_m, a.x_type, [&]<DType kType, int kTokens>() {
      const cuda::Sm90Cut cut({a.m, a.n, a.k, a.group, a.x_type, a.scale_type}, kTokens, plan.stages, plan.cluster);
      cuda::TensorMap map;
      encode(map, a.x, 2, a.m, a.k, a.x_stride * 2, kTokens, cuda::kSm90Slice, true);
      run_blocks(launch, plan.cluster, [&] { cuda::gemm_sm90_body<kType, kTokens>(a, cut, &map); });
    });
    if (!found) throw Error("gemm_sm90 has no tile of " + std::to_string(plan.tile_m) + " rows of x");
  }
  if (partials == nullptr) return;
  cuda::with_x_type(a.x_type, [&]<DType kType>() {
    run_blocks({.grid_x = core::ceil_div(a.n, cuda::kReduceColumns), .grid_y = a.m, .threads = cuda::kReduceThreads}, 1,
               [&] { cuda::reduce_body<kType>(a, partials, plan.splits); });
  });
}

}  // namespace simt
