#include "plan.h"

#include <optional>

#include "decode.h"
#include "gemm_sm80.h"
#include "gemm_sm90.h"

namespace awq::cuda {
namespace {

// Rows of x up to which gemm_sm90 is taken, for weights of at least so many elements. Computed, not measured: a product
// at 0.9 of the library's speed wins up to m = 231 * 0.9 / (1 - 0.9), see gemm_sm80_most_tokens for the formula; a
// smaller weight takes less time than the launch of one more kernel.
constexpr std::int64_t kSm90Most = 2000, kSm90Small = std::int64_t{16} << 20;

/// The weight is dequantized to x's type, and torch multiplies.
CudaPlan plan_dequantize(const char* why) {
  CudaPlan plan;
  plan.why = why;
  return plan;
}

std::optional<CudaPlan> plan_gemm_sm90(const CudaProblem& p, const Gpu& gpu) {
  if (!gemm_sm90_can(p, gpu) || (p.m > kSm90Most && p.n >= kSm90Small / p.k)) return std::nullopt;
  CudaPlan plan = gemm_sm90_plan(p, gpu);
  plan.why = "many rows of x share each weight that is unpacked for wgmma";
  return plan;
}

}  // namespace

CudaPlan plan_cuda(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, DType x_type, DType scale_type,
                   const Gpu& gpu) {
  const CudaProblem p{m, n, k, group, x_type, scale_type};
  if (m <= 0 || n <= 0 || k <= 0) return plan_dequantize("nothing to multiply");
  if (x_type != DType::f16 && x_type != DType::bf16)
    return plan_dequantize("the kernels multiply float16 and bfloat16 only");
  if (decode_can(p, gpu)) return decode_plan(p, gpu);
  if (const auto plan = plan_gemm_sm90(p, gpu)) return *plan;
  const bool gemm = gemm_sm80_can(p, gpu);
  if (gemm && m <= gemm_sm80_most_tokens(gpu.arch)) return gemm_sm80_plan(p, gpu);
  if (gemm) return plan_dequantize("so many rows that torch's product is worth one more pass over the weight");
  if (gpu.arch < 80) return plan_dequantize("before sm_80 the kernels have float16 and few rows only");
  return plan_dequantize("the kernels have no such groups or sizes");
}

}  // namespace awq::cuda
