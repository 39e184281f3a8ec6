#include "gpu.h"

#include <array>
#include <mutex>

namespace awq::cuda {
namespace {

cudaError_t ask(int device, Gpu& gpu) {
  int major = 0, minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } asked[] = {{&major, cudaDevAttrComputeCapabilityMajor},
               {&minor, cudaDevAttrComputeCapabilityMinor},
               {&gpu.sms, cudaDevAttrMultiProcessorCount},
               {&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : asked)
    if (const cudaError_t e = cudaDeviceGetAttribute(value, attribute, device); e != cudaSuccess) return e;
  gpu.arch = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace

cudaError_t gpu_of(int device, Gpu& gpu) {
  static std::mutex mutex;
  static std::array<Gpu, 64> known{};
  if (device < 0 || device >= static_cast<int>(known.size())) return ask(device, gpu);
  const std::lock_guard lock(mutex);
  Gpu& remembered = known[static_cast<std::size_t>(device)];
  if (remembered.arch == 0) {
    Gpu fresh{};
    if (const cudaError_t e = ask(device, fresh); e != cudaSuccess) return e;
    remembered = fresh;
  }
  gpu = remembered;
  return cudaSuccess;
}

}  // namespace awq::cuda
