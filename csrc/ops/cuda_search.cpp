// The searches and the sums of calibration on a CUDA device, with the choices that a CPU makes: candidates are rounded
// alike, bit for bit, and only the order of sums differs. As everywhere on CUDA, nothing waits for the device and so
// nothing is raised for values: what is not finite gives NaN.
#include <algorithm>

#include "../cuda/launch.h"
#include "check.h"
#include "cuda.h"

namespace awq::ops {
namespace {

using torch::stable::new_empty;

constexpr std::int64_t kErrors = std::int64_t{1} << 26;  // rounding errors held at a time: 256 MiB

const float* floats_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* new_floats_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
double* new_doubles_of(Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

Tensor as_floats(const Tensor& w) { return as_contiguous(torch::stable::to(w, ScalarType::Float)); }

/// How many of `count` pieces of `size` errors each are worked on at a time.
std::int64_t at_a_time(std::int64_t count, std::int64_t size) {
  return std::clamp<std::int64_t>(kErrors / std::max<std::int64_t>(1, size), 1, std::max<std::int64_t>(1, count));
}

/// The scales that a search tries, [candidates, k]. w float32, contiguous.
Tensor candidates_of(const Tensor& w, const WeightShape& shape, const Tensor& x_mean, std::int64_t grid,
                     bool duo_scaling, const OptionalTensor& tie, cudaStream_t stream) {
  const auto [n, k, group, groups] = shape;
  const std::int64_t count = core::candidate_count(grid, duo_scaling);
  Tensor w_mean = new_empty(w, {k}), candidates = new_empty(w, {count, k});
  {
    Tensor inverse = new_empty(w, {n, groups}), sums = new_empty(w, {cuda::mean_chunks(n), k}, ScalarType::Double);
    STD_CUDA_CHECK(cuda::weight_means(
        {floats_of(w), n, k, group, new_floats_of(inverse), new_doubles_of(sums), new_floats_of(w_mean)}, stream));
  }
  const Tensor mean = as_contiguous(x_mean);
  const OptionalTensor ties = contiguous_or_none(tie);
  Tensor scales = new_empty(w, {count, k}, ScalarType::Double);
  OptionalTensor tied;
  if (ties) tied = new_empty(w, {count, k}, ScalarType::Double);
  STD_CUDA_CHECK(cuda::scale_candidates(
      {floats_of(mean), floats_of(w_mean), ties ? static_cast<const std::int64_t*>(ties->const_data_ptr()) : nullptr, k,
       grid, count, new_doubles_of(scales), tied ? new_doubles_of(*tied) : nullptr, new_floats_of(candidates)},
      stream));
  return candidates;
}

/// The losses [count] of candidates [count, k], both contiguous, and with `scale` the one that loses least.
Tensor losses_of(const Tensor& w, const WeightShape& shape, const Tensor& candidates, const Tensor& gram,
                 std::int64_t gram_stride, const OptionalTensor& row_weight, core::Rounding to, Tensor* scale,
                 cudaStream_t stream) {
  const auto [n, k, group, groups] = shape;
  const std::int64_t count = candidates.size(0), items = count * n, most = at_a_time(items, k);
  const Tensor second_moment = as_contiguous(gram);
  const OptionalTensor weights = contiguous_or_none(row_weight);
  Tensor d = new_empty(w, {most, k}), verdict = new_empty(w, {most});
  Tensor partial = new_empty(w, {cuda::product_tiles(k), most}, ScalarType::Double);
  Tensor row_loss = new_empty(w, {count, n}, ScalarType::Double), losses = new_empty(w, {count}, ScalarType::Double);
  cuda::for_scale_items(
      {floats_of(w), floats_of(candidates), n, k, group, 0, items, to, new_floats_of(d), new_floats_of(verdict)},
      {floats_of(d), floats_of(second_moment), 1, most, k, gram_stride, new_doubles_of(partial), floats_of(verdict),
       new_doubles_of(row_loss)},
      most, [&](const cuda::ScaleErrorArgs& a) { STD_CUDA_CHECK(cuda::scale_errors(a, stream)); },
      [&](const cuda::LossArgs& a) { STD_CUDA_CHECK(cuda::losses(a, stream)); });
  const cuda::TotalArgs total{static_cast<const double*>(row_loss.const_data_ptr()),
                              weights ? floats_of(*weights) : nullptr,
                              floats_of(candidates),
                              count,
                              n,
                              k,
                              new_doubles_of(losses),
                              scale == nullptr ? nullptr : new_floats_of(*scale)};
  STD_CUDA_CHECK(cuda::total_losses(total, stream));
  if (scale != nullptr) STD_CUDA_CHECK(cuda::choose_scale(total, stream));
  return losses;
}

Tensor scale_losses(const Tensor& w, const Tensor& candidates, const Tensor& gram, std::int64_t group_size,
                    std::int64_t w_bit, bool zero_point, OptionalTensor row_weight, std::optional<ScalarType> dtype) {
  const char* op = "scale_losses";
  const WeightShape shape = check_float_weight(op, w, group_size);
  const std::int64_t gram_stride = check_gram(op, gram, w, true) ? 0 : w.size(1);
  check_scales(op, candidates, w);
  check_row_weight(op, row_weight, w);
  const core::Rounding to = check_rounding(op, w_bit, zero_point, dtype);
  const OnDevice device(w);
  const NoGrad no_grad;
  return losses_of(as_floats(w), shape, as_contiguous(candidates), gram, gram_stride, row_weight, to, nullptr,
                   device.stream);
}

Tensor scale_candidates(const Tensor& w, const Tensor& x_mean, std::int64_t group_size, std::int64_t grid,
                        bool duo_scaling, OptionalTensor tie) {
  const WeightShape shape = check_float_weight("scale_candidates", w, group_size);
  check_candidates("scale_candidates", x_mean, tie, grid, w);
  const OnDevice device(w);
  const NoGrad no_grad;
  return candidates_of(as_floats(w), shape, x_mean, grid, duo_scaling, tie, device.stream);
}

std::tuple<Tensor, Tensor> search_scale(const Tensor& w, const Tensor& x_mean, const Tensor& gram,
                                        std::int64_t group_size, std::int64_t w_bit, std::int64_t grid,
                                        bool duo_scaling, bool zero_point, OptionalTensor tie,
                                        OptionalTensor row_weight, std::optional<ScalarType> dtype) {
  const char* op = "search_scale";
  const WeightShape shape = check_float_weight(op, w, group_size);
  const std::int64_t gram_stride = check_gram(op, gram, w, true) ? 0 : w.size(1);
  check_candidates(op, x_mean, tie, grid, w);
  check_row_weight(op, row_weight, w);
  const core::Rounding to = check_rounding(op, w_bit, zero_point, dtype);
  const OnDevice device(w);
  const NoGrad no_grad;
  const Tensor weight = as_floats(w);
  const Tensor candidates = candidates_of(weight, shape, x_mean, grid, duo_scaling, tie, device.stream);
  Tensor scale = new_empty(w, {shape.k}, ScalarType::Float);
  const Tensor losses = losses_of(weight, shape, candidates, gram, gram_stride, row_weight, to, &scale, device.stream);
  return {scale, losses};
}

Tensor search_clip(const Tensor& w, const Tensor& gram, std::int64_t group_size, std::int64_t w_bit, std::int64_t grid,
                   double max_shrink, bool zero_point, std::optional<ScalarType> dtype) {
  const char* op = "search_clip";
  const auto [n, k, group, groups] = check_float_weight(op, w, group_size);
  const std::int64_t gram_stride = check_gram(op, gram, w, true) ? 0 : w.size(1);
  check_grid(op, grid);
  check_shrink(op, max_shrink);
  const core::Rounding to = check_rounding(op, w_bit, zero_point, dtype);
  const OnDevice device(w);
  const NoGrad no_grad;
  const Tensor weight = as_floats(w), second_moment = as_contiguous(gram);
  const std::int64_t tries = grid + 1, most = at_a_time(n, k * tries);
  Tensor range = new_empty(weight, {n, groups, 2}), poison = new_empty(weight, {k});
  Tensor best = new_empty(weight, {n, groups}, ScalarType::Double);
  Tensor d = new_empty(weight, {most * tries, k});
  Tensor partial = new_empty(weight, {groups, cuda::product_tiles(group), most * tries}, ScalarType::Double);
  Tensor loss = new_empty(weight, {groups, most * tries}, ScalarType::Double);
  cuda::ClipArgs a{};
  a.w = floats_of(weight), a.gram = floats_of(second_moment);
  a.n = n, a.k = k, a.group = group, a.gram_stride = gram_stride, a.to = to, a.candidates = tries;
  a.poison = new_floats_of(poison), a.range = new_floats_of(range), a.best = new_doubles_of(best);
  a.d = new_floats_of(d), a.loss = new_doubles_of(loss);
  STD_CUDA_CHECK(cuda::clip_start(a, device.stream));
  const cudaStream_t stream = device.stream;
  cuda::for_clip_tries(
      a,
      {a.d, a.gram, groups, most * tries, group, gram_stride, new_doubles_of(partial), nullptr, new_doubles_of(loss)},
      most, max_shrink / static_cast<double>(grid),
      [&](const cuda::ClipArgs& part) { STD_CUDA_CHECK(cuda::clip_errors(part, stream)); },
      [&](const cuda::LossArgs& part) { STD_CUDA_CHECK(cuda::losses(part, stream)); },
      [&](const cuda::ClipArgs& part) { STD_CUDA_CHECK(cuda::clip_choose(part, stream)); });
  return range;
}

std::tuple<Tensor, Tensor, Tensor> quantize_compensated(const Tensor&, const Tensor&, std::int64_t, std::int64_t, bool,
                                                        OptionalTensor, double, bool, std::int64_t, bool,
                                                        std::optional<ScalarType>) {
  STD_TORCH_CHECK(false,
                  "awq_ext::quantize_compensated: runs on a CPU; move its tensors (w, gram, range) there with "
                  ".cpu() first");
}

void add_gram(Tensor sums, const Tensor& x, bool bfloat16) {
  check_add_gram(sums, x);
  const OnDevice device(x);
  const NoGrad no_grad;
  core::GramArgs args{};
  const Tensor rows = as_rows(x, args.x_stride);
  args.x = floats_of(rows), args.sums = new_floats_of(sums);
  args.t = x.size(0), args.k = x.size(1), args.bfloat16 = bfloat16;
  cuda::for_gram_rows(args, [&](const core::GramArgs& part) { STD_CUDA_CHECK(cuda::add_gram(part, device.stream)); });
}

}  // namespace
}  // namespace awq::ops

STABLE_TORCH_LIBRARY_IMPL(awq_ext, CUDA, m) {
  m.impl("search_scale", TORCH_BOX(&awq::ops::search_scale));
  m.impl("scale_candidates", TORCH_BOX(&awq::ops::scale_candidates));
  m.impl("scale_losses", TORCH_BOX(&awq::ops::scale_losses));
  m.impl("search_clip", TORCH_BOX(&awq::ops::search_clip));
  m.impl("quantize_compensated", TORCH_BOX(&awq::ops::quantize_compensated));
  m.impl("add_gram", TORCH_BOX(&awq::ops::add_gram));
}
