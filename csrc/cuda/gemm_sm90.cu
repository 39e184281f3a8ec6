#include <cudaTypedefs.h>

#include "allow_shared.h"
#include "gemm_sm90.cuh"
#include "launch.h"

namespace awq::cuda {
namespace {

template <DType kType, int kTokens>
__global__ void __launch_bounds__(kSm90Threads, sm90_blocks(kTokens))
    gemm_sm90_kernel(const __grid_constant__ core::LinearArgs args, const __grid_constant__ Sm90Cut cut,
                     const __grid_constant__ TensorMap x) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  gemm_sm90_body<kType, kTokens>(args, cut, &x);
#elif defined(__CUDA_ARCH__)
  __trap();  // nobody plans this kernel for another architecture; built for 9.0 without 90a, it must not do nothing
#endif
}

/// The driver's function that makes tensor maps, without linking the driver.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    const bool good = e == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(good ? function : nullptr);
  }();
  return encoder;
}

/// x in boxes of one slice of `tokens` rows, swizzled as wgmma_descriptor says. What lies outside of x becomes zeros.
cudaError_t encode_x(const core::LinearArgs& a, int tokens, TensorMap& map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(a.k), static_cast<cuuint64_t>(a.m)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(a.x_stride) * 2};
  const cuuint32_t box[2] = {kSm90Slice, static_cast<cuuint32_t>(tokens)}, element_strides[2] = {1, 1};
  const auto type = a.x_type == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(&map), type, 2, const_cast<void*>(a.x), sizes, strides,
                                 box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <DType kType, int kTokens>
cudaError_t launch(const core::LinearArgs& args, const CudaPlan& plan, cudaStream_t stream) {
  constexpr auto kKernel = gemm_sm90_kernel<kType, kTokens>;
  if (const cudaError_t e = allow_shared<kKernel>(); e != cudaSuccess) return e;
  const CudaProblem problem{args.m, args.n, args.k, args.group, args.x_type, args.scale_type};
  TensorMap map;
  if (const cudaError_t e = encode_x(args, kTokens, map); e != cudaSuccess) return e;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(plan.grid_x);
  config.blockDim = kSm90Threads;
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, args, Sm90Cut(problem, kTokens, plan.stages, plan.cluster), map);
}

}  // namespace

cudaError_t gemm_sm90(const core::LinearArgs& args, const CudaPlan& plan, void*, cudaStream_t stream) {
  cudaError_t result = cudaErrorInvalidValue;
  with_gemm_sm90(plan.tile_m, args.x_type,
                 [&]<DType kType, int kTokens>() { result = launch<kType, kTokens>(args, plan, stream); });
  return result;
}

}  // namespace awq::cuda
