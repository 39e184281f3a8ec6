// The operators on a CUDA device: check, allocate, enqueue. Nothing here waits for the device or reads its memory, so
// every operator can be captured in a CUDA graph; temporaries come from torch's allocator, which knows the stream.
#include "cuda.h"

#include <array>

#include "../cuda/gpu.h"
#include "../cuda/launch.h"
#include "check.h"

namespace awq::ops {
namespace {

using torch::stable::new_empty;

Tensor dequantized(const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros, const WeightShape& shape,
                   const std::string& layout, core::DType type, cudaStream_t stream) {
  Tensor w = new_empty(scales, {shape.n, shape.k}, to_scalar_type(type));
  const Tensor weight = as_contiguous(qweight), scale = as_contiguous(scales);
  const OptionalTensor zero = contiguous_or_none(qzeros);
  const core::DequantizeArgs args{words_of(weight),
                                  zero ? words_of(*zero) : nullptr,
                                  scale.const_data_ptr(),
                                  w.mutable_data_ptr(),
                                  shape.n,
                                  shape.k,
                                  shape.group,
                                  float_type("dequantize", "scales", scales),
                                  type,
                                  codes_of("dequantize", layout).order};
  STD_CUDA_CHECK(cuda::dequantize(args, stream));
  return w;
}

/// y = x w^T + bias by torch's matrix product; x [m, k], w [n, k], bias [n] and y [m, n] are of one dtype. The form
/// that writes to y, because autocast leaves it alone: y keeps the dtype that the operator promises.
void matmul(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const Tensor& y) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(x), from(w), from(bias), from(y)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // takes the returned reference to y, and drops it
}

bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// x [..., k] as kernels read it: rows of adjacent elements, each at a multiple of 16 bytes. Mostly x lies so; what
/// does not is copied, which costs less than to do without the kernels.
Tensor as_aligned_rows(const Tensor& x, std::int64_t m, std::int64_t k, std::int64_t& stride) {
  constexpr std::int64_t kPiece = 8;  // elements of 16 bits in 16 bytes
  const std::int64_t padded_k = core::ceil_div(k, kPiece) * kPiece;
  const Tensor rows = as_rows(x, stride);
  if (m == 1) stride = padded_k;
  // Rows that overlap (an expanded x) are no matrix to the tensor copy engine.
  if (is_aligned(rows.const_data_ptr()) && stride % kPiece == 0 && stride >= k) return rows;
  stride = padded_k;
  Tensor padded = new_empty(x, {m, padded_k});
  Tensor inside = torch::stable::narrow(padded, 1, 0, k);
  torch::stable::copy_(inside, torch::stable::reshape(x, {m, k}));
  return padded;
}

/// y = x W^T + bias for W in layout fragments, if there is a kernel for it.
bool linear_fragments(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros,
                      const OptionalTensor& bias, const LinearShape& shape, Tensor& y, cudaStream_t stream) {
  const auto [n, k, group, groups] = shape.w;
  core::LinearArgs args{};
  args.m = shape.m, args.n = n, args.k = k, args.group = group;
  args.x_type = float_type("linear", "x", x);
  args.scale_type = float_type("linear", "scales", scales);
  cuda::Gpu gpu;
  STD_CUDA_CHECK(cuda::gpu_of(x.get_device_index(), gpu));
  const cuda::CudaPlan plan = cuda::plan_cuda(args.m, n, k, group, args.x_type, args.scale_type, gpu);
  if (plan.kernel == cuda::CudaKernel::dequantize) return false;

  const Tensor weight = as_contiguous(qweight), scale = as_contiguous(scales);
  const OptionalTensor zero = contiguous_or_none(qzeros), offset = contiguous_or_none(bias);
  args.qweight = words_of(weight);
  args.scales = scale.const_data_ptr();
  args.qzeros = zero ? words_of(*zero) : nullptr;
  if (!is_aligned(args.qweight) || !is_aligned(args.scales) || !is_aligned(args.qzeros)) return false;
  const Tensor rows = as_aligned_rows(x, args.m, k, args.x_stride);
  args.x = rows.const_data_ptr();
  args.bias = offset ? offset->const_data_ptr() : nullptr;
  args.bias_type = offset ? float_type("linear", "bias", *offset) : core::DType::f32;
  args.y = y.mutable_data_ptr();
  OptionalTensor workspace;
  if (plan.workspace_bytes > 0) workspace = new_empty(x, {plan.workspace_bytes}, ScalarType::Byte);
  const auto run = plan.kernel == cuda::CudaKernel::decode      ? cuda::decode
                   : plan.kernel == cuda::CudaKernel::gemm_sm80 ? cuda::gemm_sm80
                                                                : cuda::gemm_sm90;
  STD_CUDA_CHECK(run(args, plan, workspace ? workspace->mutable_data_ptr() : nullptr, stream));
  return true;
}

Tensor linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, OptionalTensor qzeros, OptionalTensor bias,
              std::int64_t group_size, std::string layout, std::string activation) {
  const LinearShape whole = check_linear(x, qweight, scales, qzeros, bias, group_size, layout, activation);
  const auto& [m, shape, least] = whole;
  const OnDevice device(x);
  const NoGrad no_grad;
  Tensor y = new_empty(x, output_sizes(x, shape.n));
  if (m == 0 || shape.n == 0) return y;
  if (layout == "fragments" && linear_fragments(x, qweight, scales, qzeros, bias, whole, y, device.stream)) return y;
  const Tensor w = dequantized(qweight, scales, qzeros, shape, layout, float_type("linear", "x", x), device.stream);
  if (bias) bias = torch::stable::to(*bias, x.scalar_type());
  matmul(torch::stable::reshape(x, {m, shape.k}), w, bias, torch::stable::view(y, {m, shape.n}));
  return y;
}

Tensor dequantize(const Tensor& qweight, const Tensor& scales, OptionalTensor qzeros, std::int64_t group_size,
                  std::string layout, std::optional<ScalarType> dtype) {
  const WeightShape shape = check_weight("dequantize", qweight, scales, qzeros, group_size, layout);
  const core::DType type = scale_type("dequantize", dtype ? *dtype : scales.scalar_type());
  const OnDevice device(qweight);
  return dequantized(qweight, scales, qzeros, shape, layout, type, device.stream);
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& w, std::int64_t group_size, std::int64_t w_bit,
                                            bool zero_point, OptionalTensor range, std::optional<ScalarType> dtype) {
  const WeightShape shape = check_float_weight("quantize", w, group_size);
  check_range("quantize", range, w, shape);
  const auto [n, k, group, groups] = shape;
  const core::Rounding to = check_rounding("quantize", w_bit, zero_point, dtype);
  const OnDevice device(w);
  Tensor q = new_empty(w, {n, k}, ScalarType::Byte);
  Tensor scales = new_empty(w, {n, groups}, to_scalar_type(to.scale_type));
  Tensor zeros = new_empty(w, {n, groups}, ScalarType::Byte);
  const Tensor weight = as_contiguous(w);
  const OptionalTensor ends = contiguous_or_none(range);
  const core::QuantizeArgs args{weight.const_data_ptr(),
                                ends ? static_cast<const float*>(ends->const_data_ptr()) : nullptr,
                                static_cast<std::uint8_t*>(q.mutable_data_ptr()),
                                scales.mutable_data_ptr(),
                                static_cast<std::uint8_t*>(zeros.mutable_data_ptr()),
                                n,
                                k,
                                group,
                                k,
                                float_type("quantize", "w", w),
                                to};
  STD_CUDA_CHECK(cuda::quantize(args, device.stream));
  return {q, scales, zeros};
}

Tensor pack(const Tensor& q, std::string layout) {
  const core::Codes& to = check_codes("pack", q, layout);
  const OnDevice device(q);
  const std::int64_t n = q.size(0), k = q.size(1);
  const core::WordShape shape = core::word_shape(to, n, k);
  const Tensor codes = as_contiguous(q);
  Tensor words = new_empty(q, {shape.rows, shape.cols}, word_type(to));
  STD_CUDA_CHECK(cuda::pack(to, static_cast<const std::uint8_t*>(codes.const_data_ptr()), words.mutable_data_ptr(), n,
                            k, device.stream));
  return words;
}

Tensor unpack(const Tensor& qweight, std::string layout) {
  const auto [n, k] = check_words("unpack", qweight, layout);
  const OnDevice device(qweight);
  const Tensor words = as_contiguous(qweight);
  Tensor q = new_empty(qweight, {n, k}, ScalarType::Byte);
  STD_CUDA_CHECK(cuda::unpack(codes_of("unpack", layout), words.const_data_ptr(),
                              static_cast<std::uint8_t*>(q.mutable_data_ptr()), n, k, device.stream));
  return q;
}

Tensor repack(const Tensor& qweight, std::string src, std::string dst) {
  const auto [n, k] = check_words("repack", qweight, src);
  const core::Codes& to = check_packable("repack", n, k, dst);
  const OnDevice device(qweight);
  const core::WordShape shape = core::word_shape(to, n, k);
  const Tensor source = as_contiguous(qweight);
  Tensor target = new_empty(qweight, {shape.rows, shape.cols}, word_type(to));
  STD_CUDA_CHECK(cuda::repack(codes_of("repack", src), to, source.const_data_ptr(), target.mutable_data_ptr(), n, k,
                              device.stream));
  return target;
}

}  // namespace
}  // namespace awq::ops

STABLE_TORCH_LIBRARY_IMPL(awq_ext, CUDA, m) {
  m.impl("linear", TORCH_BOX(&awq::ops::linear));
  m.impl("dequantize", TORCH_BOX(&awq::ops::dequantize));
  m.impl("quantize", TORCH_BOX(&awq::ops::quantize));
  m.impl("pack", TORCH_BOX(&awq::ops::pack));
  m.impl("unpack", TORCH_BOX(&awq::ops::unpack));
  m.impl("repack", TORCH_BOX(&awq::ops::repack));
}
