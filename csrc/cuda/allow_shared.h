// Shared memory beyond the 48 KiB that every kernel may have.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace awq::cuda {

/// Lets kKernel have as much dynamic shared memory as the current device grants, and prefers shared memory to the first
/// cache there, so that two blocks find room. The runtime is asked once per kernel and device.
template <auto kKernel>
cudaError_t allow_shared() {
  static std::atomic<std::uint64_t> asked{0};  // bit d: on device d
  int device = 0, bytes = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if ((asked.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  if (const cudaError_t e = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      e != cudaSuccess)
    return e;
  if (const cudaError_t e = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      e != cudaSuccess)
    return e;
  if (const cudaError_t e =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
      e != cudaSuccess)
    return e;
  asked.fetch_or(bit, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace awq::cuda
