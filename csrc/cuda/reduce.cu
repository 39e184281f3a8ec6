#include <limits>

#include "launch.h"
#include "reduce.cuh"

namespace awq::cuda {
namespace {

template <core::DType kType>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ core::LinearArgs args, const float* partials, int splits) {
  reduce_body<kType>(args, partials, splits);
}

}  // namespace

cudaError_t reduce(const core::LinearArgs& args, const float* partials, int splits, cudaStream_t stream) {
  const std::int64_t columns = core::ceil_div(args.n, kReduceColumns);
  if (args.m == 0 || columns == 0) return cudaSuccess;
  if (args.m > 65535 || columns > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;  // limits of a grid
  const auto kernel =
      args.x_type == core::DType::f16 ? reduce_kernel<core::DType::f16> : reduce_kernel<core::DType::bf16>;
  const dim3 blocks(static_cast<unsigned>(columns), static_cast<unsigned>(args.m));
  kernel<<<blocks, kReduceThreads, 0, stream>>>(args, partials, splits);
  return cudaGetLastError();
}

}  // namespace awq::cuda
