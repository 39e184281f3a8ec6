// The choice of CUDA kernels, for GPUs of every kind and shapes of every size, without a GPU.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "catch.hpp"
#include "core/layout.h"
#include "cuda/plan.h"

using namespace awq;
using core::ceil_div;
using core::DType;
using cuda::CudaKernel;
using cuda::CudaPlan;
using cuda::Gpu;
using cuda::plan_cuda;

namespace {

struct Shape {
  std::int64_t m, n, k, group;
};

std::vector<Shape> shapes() {
  constexpr std::int64_t kHuge = std::int64_t{1} << 31;
  std::vector<Shape> all;
  for (const std::int64_t m : {std::int64_t{1}, std::int64_t{2}, std::int64_t{8}, std::int64_t{9}, std::int64_t{16},
                               std::int64_t{17}, std::int64_t{64}, std::int64_t{65}, std::int64_t{300},
                               std::int64_t{2000}, std::int64_t{2001}, std::int64_t{100000}, kHuge})
    for (const std::int64_t n : {std::int64_t{8}, std::int64_t{64}, std::int64_t{72}, std::int64_t{136},
                                 std::int64_t{4096}, std::int64_t{28672}, std::int64_t{151936}, kHuge})
      for (const std::int64_t k : {std::int64_t{16}, std::int64_t{48}, std::int64_t{96}, std::int64_t{4096},
                                   std::int64_t{11008}, std::int64_t{28672}, std::int64_t{1} << 20, kHuge})
        for (const std::int64_t group : {std::int64_t{1}, std::int64_t{8}, std::int64_t{16}, std::int64_t{32},
                                         std::int64_t{48}, std::int64_t{64}, std::int64_t{128}, k})
          if (k % group == 0) all.push_back({m, n, k, group});
  return all;
}

}  // namespace

TEST_CASE("CUDA: every plan covers the outputs, and its launch is within the device's limits") {
  std::int64_t kernels[4] = {};
  const auto all = shapes();
  for (const Gpu& gpu : cuda::kGpus)
    for (const DType x_type : {DType::f16, DType::bf16})
      for (const DType scale_type : {DType::f32, DType::f16, DType::bf16})
        for (const Shape& s : all) {
          const auto [m, n, k, group] = s;
          const CudaPlan plan = plan_cuda(m, n, k, group, x_type, scale_type, gpu);
          CAPTURE(gpu.arch, m, n, k, group, int(x_type), int(scale_type), plan.name);
          ++kernels[static_cast<int>(plan.kernel)];
          REQUIRE(std::strlen(plan.why) > 0);
          REQUIRE(std::strlen(plan.name) > 0);
          if (plan.kernel == CudaKernel::dequantize) {
            REQUIRE((plan.workspace_bytes == 0 && plan.grid_x == 0));
            continue;
          }
          REQUIRE((plan.tile_n > 0 && plan.tile_n % 16 == 0 && plan.tile_m > 0 && plan.tile_m % 8 == 0));
          REQUIRE((plan.splits >= 1 && plan.cluster >= 1 && plan.cluster <= 8));
          REQUIRE((plan.cluster == 1 || (gpu.arch >= 90 && gpu.arch < 120)));
          REQUIRE((plan.threads >= 32 && plan.threads <= 1024 && plan.threads % 32 == 0));
          REQUIRE((plan.shared_bytes > 0 && plan.shared_bytes <= gpu.shared_bytes));
          REQUIRE((plan.grid_x >= 1 && plan.grid_x <= std::numeric_limits<int>::max()));
          REQUIRE((plan.grid_y >= 1 && plan.grid_y <= 65535));
          REQUIRE(plan.grid_x % plan.cluster == 0);
          // Blocks for every tile, or as many as the device holds, which then take tile after tile.
          const std::int64_t tiles = ceil_div(n, plan.tile_n) * ceil_div(m, plan.tile_m);
          const std::int64_t blocks = plan.grid_x * plan.grid_y;
          if (plan.kernel == CudaKernel::gemm_sm90)
            REQUIRE((blocks == tiles * plan.cluster || (plan.cluster == 1 && blocks < tiles && blocks >= gpu.sms)));
          else
            REQUIRE(blocks == tiles * plan.splits);
          // Sums that blocks of several launches or clusters leave for each other.
          const bool through_memory = plan.splits > 1 && plan.cluster == 1;
          REQUIRE(plan.workspace_bytes == (through_memory ? plan.splits * m * n * 4 : 0));
          REQUIRE((!through_memory || m <= 65535));  // the kernel that adds them has rows along the grid's y
          // No part of k is empty: each has a step of 64.
          REQUIRE(std::max<std::int64_t>(plan.splits, plan.cluster) <= ceil_div(k, 64));
        }
  for (const std::int64_t count : kernels) CHECK(count > 0);
}

TEST_CASE("CUDA: which kernel a call gets on each architecture") {
  const auto kernel = [](int arch, std::int64_t m, std::int64_t group = 128, DType x_type = DType::f16) {
    for (const Gpu& gpu : cuda::kGpus)
      if (gpu.arch == arch) return plan_cuda(m, 4096, 4096, group, x_type, x_type, gpu).kernel;
    FAIL("no such GPU");
    return CudaKernel::dequantize;
  };
  for (const Gpu& gpu : cuda::kGpus)
    for (const std::int64_t group : {16, 32, 64, 128, 4096}) {
      CAPTURE(gpu.arch, group);
      for (const std::int64_t m : {1, 4, 16}) CHECK(kernel(gpu.arch, m, group) == CudaKernel::decode);
      CHECK(kernel(gpu.arch, 1, 8) == CudaKernel::dequantize);
    }
  CHECK(kernel(75, 17) == CudaKernel::dequantize);
  CHECK(kernel(75, 1, 128, DType::bf16) == CudaKernel::dequantize);
  for (const int arch : {80, 86, 89, 100, 120}) {
    CAPTURE(arch);
    CHECK(kernel(arch, 17) == CudaKernel::gemm_sm80);
    CHECK(kernel(arch, 17, 128, DType::bf16) == CudaKernel::gemm_sm80);
    CHECK(kernel(arch, 1 << 16) == CudaKernel::dequantize);
  }
  for (const std::int64_t m : {17, 64, 65, 256, 2000}) CHECK(kernel(90, m) == CudaKernel::gemm_sm90);
  CHECK(kernel(90, 64, 1024) == CudaKernel::gemm_sm90);
  CHECK(kernel(90, 2001) == CudaKernel::dequantize);
}

TEST_CASE("CUDA: what no kernel multiplies goes to torch, and says why") {
  const Gpu& hopper = *cuda::find_gpu(90);
  const auto why = [&](std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, DType x_type,
                       const Gpu& gpu) {
    const CudaPlan plan = plan_cuda(m, n, k, group, x_type, DType::f16, gpu);
    CHECK(plan.kernel == CudaKernel::dequantize);
    return std::string(plan.why);
  };
  CHECK(why(0, 64, 64, 64, DType::f16, hopper).find("nothing") != std::string::npos);
  CHECK(why(4, 0, 64, 64, DType::f16, hopper).find("nothing") != std::string::npos);
  CHECK(why(4, 64, 0, 1, DType::f16, hopper).find("nothing") != std::string::npos);
  CHECK(why(4, 64, 64, 64, DType::f32, hopper).find("float16 and bfloat16") != std::string::npos);
  CHECK(why(4, 64, 64, 8, DType::f16, hopper).find("groups") != std::string::npos);
  CHECK(why(400, 64, 64, 8, DType::f16, hopper).find("groups") != std::string::npos);
  CHECK(why(1 << 20, 8192, 8192, 64, DType::f16, hopper).find("rows") != std::string::npos);
  CHECK(why(4, 64, 64, 64, DType::bf16, *cuda::find_gpu(75)).find("float16 and few") != std::string::npos);
  CHECK(cuda::find_gpu(33) == nullptr);
}
