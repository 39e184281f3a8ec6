#include "allow_shared.h"
#include "decode.cuh"
#include "launch.h"

namespace awq::cuda {
namespace {

/// Three blocks to a multiprocessor, as far as registers go; two where the sums are for twice the tokens.
template <DType kType, int kTiles, int kUnit>
__global__ void __launch_bounds__(kDecodeThreads, kTiles == 1 ? 3 : 2)
    decode_kernel(const __grid_constant__ core::LinearArgs args, const __grid_constant__ DecodeCut cut,
                  float* partials) {
#if __CUDA_ARCH__ >= 800
  decode_body<kType, kTiles, kUnit>(args, cut, partials);
#elif defined(__CUDA_ARCH__)
  if constexpr (kType == DType::f16)
    decode_body<kType, kTiles, kUnit>(args, cut, partials);
  else
    __trap();  // sm_75 has no products of bfloat16: nobody plans this
#endif
}

template <DType kType, int kTiles, int kUnit>
cudaError_t launch(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  constexpr auto kKernel = decode_kernel<kType, kTiles, kUnit>;
  if (const cudaError_t e = allow_shared<kKernel>(); e != cudaSuccess) return e;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid_x));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (plan.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  }
  if (plan.early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  auto* const partials = static_cast<float*>(plan.workspace_bytes > 0 ? workspace : nullptr);
  const cudaError_t e = cudaLaunchKernelEx(&config, kKernel, args, decode_cut(plan, args.k, args.group), partials);
  return e != cudaSuccess || partials == nullptr ? e : reduce(args, partials, plan.splits, stream);
}

}  // namespace

cudaError_t decode(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.grid_x == 0) return cudaSuccess;
  cudaError_t result{};
  with_decode(plan, args.x_type, decode_unit(args.k, args.group), [&]<DType kType, int kTiles, int kUnit>() {
    result = launch<kType, kTiles, kUnit>(args, plan, workspace, stream);
  });
  return result;
}

}  // namespace awq::cuda
