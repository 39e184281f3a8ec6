// Which CUDA kernel a linear call gets, and why: a pure function, which needs neither a GPU nor its toolkit.
#pragma once
#include <cstdint>

#include "../core/types.h"

namespace awq::cuda {

using core::DType;

/// What a plan depends on of a device.
struct Gpu {
  int arch;          // compute capability, major and minor digit: 75, 80, 86, 89, 90, 100, 120
  int sms;           // multiprocessors
  int shared_bytes;  // the most shared memory that a block may ask for
};

/// One GPU of each architecture, for those who ask without having one: T4, A100, A10G, L40S, H200, B200, RTX 5090.
inline constexpr Gpu kGpus[] = {{75, 40, 64 << 10},   {80, 108, 163 << 10},  {86, 80, 99 << 10},  {89, 142, 99 << 10},
                                {90, 132, 227 << 10}, {100, 148, 227 << 10}, {120, 170, 99 << 10}};

/// The one of that architecture, or nullptr.
constexpr const Gpu* find_gpu(int arch) {
  for (const Gpu& gpu : kGpus)
    if (gpu.arch == arch) return &gpu;
  return nullptr;
}

/// y = x W^T of x [m, k] of x_type and W [n, k] in layout fragments, in groups of `group` along k.
struct CudaProblem {
  std::int64_t m, n, k, group;
  DType x_type, scale_type;
};

/// Whether there are kernels for such groups: no 16 along k, which an instruction multiplies, may belong to two.
constexpr bool fragments_can_have(std::int64_t k, std::int64_t group) { return group == k || group % 16 == 0; }

enum class CudaKernel : std::uint8_t { dequantize, decode, gemm_sm80, gemm_sm90 };

/// A kernel and its launch. Each kernel's own header says how it cuts its work; what it does not need stays as it is.
struct CudaPlan {
  CudaKernel kernel = CudaKernel::dequantize;
  const char* name = "dequantize";      // of the kernel
  const char* why = "";                 // this kernel
  int tile_n = 0, tile_m = 0;           // rows of W and of x that a block has
  int cluster = 1;                      // blocks of a cluster
  int splits = 1;                       // parts of k, each of other blocks
  int stages = 0;                       // of the ring in shared memory
  std::int64_t grid_x = 0, grid_y = 0;  // blocks
  int threads = 0;                      // of a block
  int shared_bytes = 0;                 // of a block
  std::int64_t workspace_bytes = 0;     // temporary global memory
  bool early = false;                   // begins while the kernels before it in the stream still run; decode only
};

/// body.operator()<x's type>(), for the types of x that kernels multiply.
template <class Body>
void with_x_type(DType type, const Body& body) {
  type == DType::f16 ? body.template operator()<DType::f16>() : body.template operator()<DType::bf16>();
}

/// The plan for a call with at least one output. What no kernel can do, or not fast enough, is a dequantized weight and
/// torch's own matrix product (CudaKernel::dequantize).
CudaPlan plan_cuda(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, DType x_type, DType scale_type,
                   const Gpu& gpu);

}  // namespace awq::cuda
