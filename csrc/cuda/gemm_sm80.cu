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
cudaError_t launch(const core::LinearArgs& args, unsigned blocks, int splits, float* workspace, cudaStream_t stream) {
  constexpr auto kKernel = gemm_sm80_kernel<kType, kTokens, kSmallGroups>;
  if (const cudaError_t e = allow_shared<kKernel>(); e != cudaSuccess) return e;
  kKernel<<<dim3(blocks, static_cast<unsigned>(splits)), GemmSm80::kThreads,
            GemmSm80{kTokens, kSmallGroups}.shared_bytes(), stream>>>(args, splits > 1 ? workspace : nullptr);
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess) return e;
  return splits > 1 ? reduce(args, workspace, splits, stream) : cudaSuccess;
}

}  // namespace

cudaError_t gemm_sm80(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  using core::DType;
  const bool small_groups = gemm_sm80_small_groups(args.k, args.group);
  const auto choose = [&]<DType kType>() {
    const auto go = [&]<int kTokens, bool kSmallGroups>() {
      return launch<kType, kTokens, kSmallGroups>(args, static_cast<unsigned>(plan.grid_x), plan.splits,
                                                  static_cast<float*>(workspace), stream);
    };
    if (plan.tile_m == 32)
      return small_groups ? go.template operator()<32, true>() : go.template operator()<32, false>();
    return small_groups ? go.template operator()<64, true>() : go.template operator()<64, false>();
  };
  return args.x_type == DType::f16 ? choose.template operator()<DType::f16>()
                                   : choose.template operator()<DType::bf16>();
}

}  // namespace awq::cuda
