#include "allow_shared.h"
#include "gemm_sm80.cuh"
#include "launch.h"

namespace awq::cuda {
namespace {

template <core::DType kType, int kTokens, bool kSmallGroups>
__global__ void __launch_bounds__(GemmSm80::kThreads, GemmSm80::kBlocks)
    gemm_sm80_kernel(const __grid_constant__ core::LinearArgs args, float* partials) {
#if __CUDA_ARCH__ >= 800
  gemm_sm80_body<kType, kTokens, kSmallGroups>(args, partials);
#elif defined(__CUDA_ARCH__)
  __trap();  // nobody plans this kernel for an older architecture; it must not do nothing
#endif
}

template <core::DType kType, int kTokens, bool kSmallGroups>
cudaError_t launch(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  constexpr auto kKernel = gemm_sm80_kernel<kType, kTokens, kSmallGroups>;
  if (const cudaError_t e = allow_shared<kKernel>(); e != cudaSuccess) return e;
  auto* const partials = static_cast<float*>(plan.splits > 1 ? workspace : nullptr);
  const dim3 blocks(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  kKernel<<<blocks, static_cast<unsigned>(plan.threads), static_cast<std::size_t>(plan.shared_bytes), stream>>>(
      args, partials);
  const cudaError_t e = cudaGetLastError();
  return e != cudaSuccess || partials == nullptr ? e : reduce(args, partials, plan.splits, stream);
}

}  // namespace

cudaError_t gemm_sm80(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  cudaError_t result{};
  const bool small_groups = gemm_sm80_small_groups(args.k, args.group);
  with_gemm_sm80(plan, args.x_type, small_groups, [&]<core::DType kType, int kTokens, bool kSmallGroups>() {
    result = launch<kType, kTokens, kSmallGroups>(args, plan, workspace, stream);
  });
  return result;
}

}  // namespace awq::cuda
