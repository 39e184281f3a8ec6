// The operators on a CPU: check, plan, allocate, run. Nothing may throw inside a parallel body.
#include "../core/cpu.h"

#include <algorithm>
#include <atomic>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../core/compensate.h"
#include "../core/linear.h"
#include "../core/pack.h"
#include "../core/plan.h"
#include "../core/quantize.h"
#include "../core/search.h"
#include "../core/shares.h"
#include "check.h"

namespace awq::ops {
namespace {

using torch::stable::parallel_for;

/// Contiguous, nothing written yet. torch's `new_empty` asks the dispatcher, which takes a tenth of the smallest call.
Tensor new_tensor(const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0; stride *= std::max<std::int64_t>(1, sizes[i])) strides[i] = stride;
  const auto type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(std::ssize(sizes), sizes.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

constexpr std::int64_t kGrainBytes = 1 << 15;  // memory traffic that is worth a thread of its own

std::int64_t grain(std::int64_t bytes_per_item) {
  return std::max<std::int64_t>(1, kGrainBytes / std::max<std::int64_t>(1, bytes_per_item));
}

/// So many words that the calling thread keeps for its next call: 1 MiB or so, or what 64 rows of x take. Given back
/// after each call, they make the C library return memory to the system, that of outputs too, and ask for it again, and
/// the pages that come have to be zeroed: up to a third of the time of a prompt.
std::uint32_t* kept_words(std::int64_t count) {
  static thread_local OptionalTensor kept;
  if (!kept || kept->numel() < count) kept = new_tensor({count}, ScalarType::Float);
  return static_cast<std::uint32_t*>(kept->mutable_data_ptr());
}

/// Layout strips: rows of x become digits, as many rows at a time as the plan says, and then strips are multiplied.
/// Each thread prepares its part for all of them, or all for itself; who is early multiplies what is left.
void run_strips(const core::LinearArgs& args, const core::LinearPlan& plan, const core::Kernels& kernels) {
  core::StripsWork work{};
  work.args = &args, work.digits = plan.digits;
  const core::Segments segments(args.k, args.group);
  const auto shape = [&](std::int64_t row) {
    work.row = row, work.rows = std::min(plan.rows, args.m - row);
    const auto [matrix, most] = core::strips_tiles(work.rows, args.group, plan.digits, kernels);
    work.matrix = matrix, work.tile_rows = core::even_rows(work.rows, most);
  };
  shape(0);  // later turns have not more rows, filled up to whole tiles
  const std::int64_t words = work.tiles() * work.words(args.k);
  const std::int64_t size = core::ceil_div(words + work.tiles() * work.floats(segments.count), 32) * 32;
  const std::int64_t threads =
      std::clamp<std::int64_t>(torch::stable::get_num_threads(), 1, core::ceil_div(plan.tiles, plan.grain));
  const bool apart = core::prepare_apart(plan, args.m, args.n, args.k, threads);
  constexpr std::int64_t kNear = 8192;  // a row or two stay on the stack, for which nobody has to be asked
  std::uint32_t* const far = size > kNear ? kept_words(apart ? threads * size : size) : nullptr;
  const auto place = [&](core::StripsWork& in, std::uint32_t* memory) {
    in.x = memory, in.parameters = reinterpret_cast<float*>(memory + words);
  };
  const auto multiply = [&](const core::StripsWork& by, core::Shares& shares, std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread)
      shares.work(thread, [&](std::int64_t first, std::int64_t last) { kernels.strips_multiply(by, first, last); });
  };
  if (apart) {
    core::Shares shares(plan.tiles, threads);
    parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) noexcept {
      alignas(64) std::uint32_t near[kNear];
      core::StripsWork own = work;
      place(own, far == nullptr ? near : far + begin * size);
      kernels.strips_prepare(own, 0, own.tiles());
      multiply(own, shares, begin, end);
    });
    return;
  }
  alignas(64) std::uint32_t near[kNear];
  place(work, far == nullptr ? near : far);
  for (std::int64_t row = 0; row < args.m; row += work.rows) {
    shape(row);
    parallel_for(0, work.tiles(), grain(args.k * work.tile_rows),
                 [&](std::int64_t begin, std::int64_t end) noexcept { kernels.strips_prepare(work, begin, end); });
    core::Shares shares(plan.tiles, threads);
    parallel_for(0, threads, 1,
                 [&](std::int64_t begin, std::int64_t end) noexcept { multiply(work, shares, begin, end); });
  }
}

Tensor linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, OptionalTensor qzeros, OptionalTensor bias,
              std::int64_t group_size, std::string layout, std::string activation) {
  const LinearShape shape = check_linear(x, qweight, scales, qzeros, bias, group_size, layout, activation);
  STD_TORCH_CHECK(layout != "fragments", "awq_ext::linear: layout 'fragments' is for CUDA, got qweight ",
                  describe(qweight), "; repack qweight and qzeros to 'strips' or 'gemm', and scales too ",
                  "(awq_ext.layouts.repack_scales)");
  const auto [n, k, group, groups] = shape.w;
  Tensor y = new_tensor(output_sizes(x, n), x.scalar_type());
  if (shape.m == 0 || n == 0) return y;

  core::LinearArgs args{};
  const Tensor rows = as_rows(x, args.x_stride);
  const Tensor weight = as_contiguous(qweight), scale = as_contiguous(scales);
  const OptionalTensor zero = contiguous_or_none(qzeros), offset = contiguous_or_none(bias);
  args.x = rows.const_data_ptr();
  args.qweight = words_of(weight);
  args.scales = scale.const_data_ptr();
  args.qzeros = zero ? words_of(*zero) : nullptr;
  args.bias = offset ? offset->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.m = shape.m, args.n = n, args.k = k, args.group = group;
  args.x_type = float_type("linear", "x", x, true);
  args.scale_type = float_type("linear", "scales", scales);
  args.bias_type = offset ? float_type("linear", "bias", *offset) : core::DType::f32;

  args.strips = layout == "strips";

  const core::Kernels& kernels = core::best_kernels();
  const core::LinearPlan plan = args.strips
                                    ? core::plan_strips(args.m, n, k, group, args.x_type, shape.activation, kernels)
                                    : core::plan_linear(args.m, n, k, args.x_type, kernels);
  if (plan.kernel == core::LinearKernel::reference) {
    parallel_for(0, plan.tiles, plan.grain, [&](std::int64_t begin, std::int64_t end) noexcept {
      core::linear_reference(args, begin * plan.tile, std::min(end * plan.tile, n));
    });
    return y;
  }

  if (plan.kernel == core::LinearKernel::strips) {
    run_strips(args, plan, kernels);
    return y;
  }

  const bool decode = plan.kernel == core::LinearKernel::decode;
  const std::int64_t prepared = args.m * k, sums = args.m * groups;
  const std::int64_t scratch = decode ? plan.tiles * args.m * plan.tile : 0;
  Tensor work = new_tensor({prepared + sums + scratch}, ScalarType::Float);
  auto* x_float = static_cast<float*>(work.mutable_data_ptr());
  const core::LinearWork job{&args, x_float, x_float + prepared, x_float + prepared + sums};
  parallel_for(0, args.m, grain(k * 8), [&](std::int64_t begin, std::int64_t end) noexcept {
    for (std::int64_t row = begin; row < end; ++row)
      kernels.prepare_row(args, row, x_float + row * k, x_float + prepared + row * groups);
  });
  const auto run = decode ? kernels.linear_decode : kernels.linear_gemm;
  parallel_for(0, plan.tiles, plan.grain, [&](std::int64_t begin, std::int64_t end) noexcept { run(job, begin, end); });
  return y;
}

Tensor dequantize(const Tensor& qweight, const Tensor& scales, OptionalTensor qzeros, std::int64_t group_size,
                  std::string layout, std::optional<ScalarType> dtype) {
  const auto [n, k, group, groups] = check_weight("dequantize", qweight, scales, qzeros, group_size, layout);
  const core::DType w_type = scale_type("dequantize", dtype ? *dtype : scales.scalar_type());
  Tensor w = new_tensor({n, k}, to_scalar_type(w_type));
  const Tensor weight = as_contiguous(qweight), scale = as_contiguous(scales);
  const OptionalTensor zero = contiguous_or_none(qzeros);
  const core::DequantizeArgs args{words_of(weight),
                                  zero ? words_of(*zero) : nullptr,
                                  scale.const_data_ptr(),
                                  w.mutable_data_ptr(),
                                  n,
                                  k,
                                  group,
                                  float_type("dequantize", "scales", scales),
                                  w_type,
                                  codes_of("dequantize", layout).order};
  const std::int64_t rows = args.row_block();
  parallel_for(0, core::ceil_div(n, rows), grain(k * rows * 3),
               [&, n = n](std::int64_t begin, std::int64_t end) noexcept {
                 core::dequantize_rows(args, begin * rows, std::min(end * rows, n));
               });
  return w;
}

/// Notes a row that failed, unless `row` is -1: the first one stays, whatever thread met it.
void lower(std::atomic<std::int64_t>& bad, std::int64_t row) noexcept {
  std::int64_t first = bad.load();
  while (row >= 0 && row < first && !bad.compare_exchange_weak(first, row)) {
  }
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& w, std::int64_t group_size, std::int64_t w_bit,
                                            bool zero_point, OptionalTensor range, std::optional<ScalarType> dtype) {
  const auto [n, k, group, groups] = check_float_weight("quantize", w, group_size);
  check_range("quantize", range, w, {n, k, group, groups});
  const core::Rounding to = check_rounding("quantize", w_bit, zero_point, dtype);
  Tensor q = new_tensor({n, k}, ScalarType::Byte);
  Tensor scales = new_tensor({n, groups}, to_scalar_type(to.scale_type));
  Tensor zeros = new_tensor({n, groups}, ScalarType::Byte);
  std::int64_t stride = 0;
  const Tensor rows = as_rows(w, stride);
  const OptionalTensor ends = contiguous_or_none(range);
  const core::QuantizeArgs args{rows.const_data_ptr(),
                                ends ? static_cast<const float*>(ends->const_data_ptr()) : nullptr,
                                static_cast<std::uint8_t*>(q.mutable_data_ptr()),
                                scales.mutable_data_ptr(),
                                static_cast<std::uint8_t*>(zeros.mutable_data_ptr()),
                                n,
                                k,
                                group,
                                stride,
                                float_type("quantize", "w", w),
                                to};
  std::atomic<std::int64_t> bad{n};
  parallel_for(0, n, grain(k * 5), [&](std::int64_t begin, std::int64_t end) noexcept {
    lower(bad, core::quantize_rows(args, begin, end));
  });
  STD_TORCH_CHECK(bad == n, "awq_ext::quantize: row ", bad.load(),
                  " of w (or of range) has a NaN, an infinity, or values too large for a scale of the dtype asked for; "
                  "weights must be finite");
  return {q, scales, zeros};
}

/// Blocks are worth a thread of their own where they hold enough codes.
std::int64_t block_grain(core::Axis axis, std::int64_t n, std::int64_t k) {
  return grain(core::kBlock * (axis == core::Axis::n ? k : n));
}

/// Words for codes [n, k], nothing written yet. Large matrices ask for pages of 2 MiB before that, where they have
/// whole ones: kernels read them as one stream, which small pages make up to a third slower.
Tensor new_words(const core::Codes& codes, std::int64_t n, std::int64_t k) {
  const core::WordShape shape = core::word_shape(codes, n, k);
  Tensor words = new_tensor({shape.rows, shape.cols}, word_type(codes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(words.mutable_data_ptr());
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(words.numel()) * (codes.word_bits / 8u);
  const std::uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return words;
}

Tensor pack(const Tensor& q, std::string layout) {
  const core::Codes& to = check_codes("pack", q, layout);
  const std::int64_t n = q.size(0), k = q.size(1);
  const Tensor codes = as_contiguous(q);
  Tensor words = new_words(to, n, k);
  const auto* source = static_cast<const std::uint8_t*>(codes.const_data_ptr());
  void* target = words.mutable_data_ptr();
  std::atomic<bool> fits{true};
  parallel_for(0, core::block_count(to.outer, n, k), block_grain(to.outer, n, k),
               [&](std::int64_t begin, std::int64_t end) noexcept {
                 if (!core::pack_blocks(to, source, target, n, k, begin, end)) fits = false;
               });
  STD_TORCH_CHECK(fits, "awq_ext::pack: q must hold codes 0..15, got a larger value");
  return words;
}

Tensor unpack(const Tensor& qweight, std::string layout) {
  const core::Codes& from = codes_of("unpack", layout);
  const auto [n, k] = check_words("unpack", qweight, layout);
  const Tensor words = as_contiguous(qweight);
  Tensor q = new_tensor({n, k}, ScalarType::Byte);
  const void* source = words.const_data_ptr();
  auto* target = static_cast<std::uint8_t*>(q.mutable_data_ptr());
  parallel_for(0, core::block_count(core::Axis::n, n, k), block_grain(core::Axis::n, n, k),
               [&, n = n, k = k](std::int64_t begin, std::int64_t end) noexcept {
                 core::unpack_blocks(from, source, target, n, k, begin, end);
               });
  return q;
}

Tensor repack(const Tensor& qweight, std::string src, std::string dst) {
  const core::Codes& from = codes_of("repack", src);
  const auto [n, k] = check_words("repack", qweight, src);
  const core::Codes& to = check_packable("repack", n, k, dst);
  const Tensor words = as_contiguous(qweight);
  Tensor result = new_words(to, n, k);
  const void* source = words.const_data_ptr();
  void* target = result.mutable_data_ptr();
  parallel_for(0, core::block_count(to.outer, n, k), block_grain(to.outer, n, k),
               [&, n = n, k = k](std::int64_t begin, std::int64_t end) noexcept {
                 core::repack_blocks(from, to, source, target, n, k, begin, end);
               });
  return result;
}

// --- searches -------------------------------------------------------------------------------------------------------

/// Refuses NaN, infinities and, if `lowest` is 0, negative numbers.
void check_finite(const char* op, const char* name, const Tensor& t,
                  float lowest = std::numeric_limits<float>::lowest()) {
  const auto* data = static_cast<const float*>(t.const_data_ptr());
  for (std::int64_t i = 0; i < t.numel(); ++i)
    STD_TORCH_CHECK(data[i] >= lowest && data[i] <= std::numeric_limits<float>::max(), "awq_ext::", op, ": ", name,
                    lowest == 0 ? " must be finite and not negative, got " : " must be finite, got ", data[i],
                    " at element ", i);
}

/// Runs body(item, scratch) for items [0, count), each on one thread with that thread's own scratch.
template <class Body>
void for_items(std::int64_t count, std::int64_t scratch_size, const Body& body) {
  const std::int64_t threads = std::min<std::int64_t>(count, torch::stable::get_num_threads());
  if (threads == 0) return;
  Tensor scratch = new_tensor({threads, scratch_size}, ScalarType::Float);
  auto* base = static_cast<float*>(scratch.mutable_data_ptr());
  std::atomic<std::int64_t> next{0};
  parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) noexcept {
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t item; (item = next.fetch_add(1)) < count;) body(item, base + t * scratch_size);
  });
}

/// The weights of rows float32 [n], checked; none counts every row alike.
OptionalTensor checked_row_weight(const char* op, const OptionalTensor& row_weight, const Tensor& w) {
  check_row_weight(op, row_weight, w);
  const OptionalTensor weights = contiguous_or_none(row_weight);
  if (weights) check_finite(op, "row_weight", *weights, 0.0f);
  return weights;
}

/// The loss of each of the scales [count, k] that w is multiplied by before it is rounded: float64 [count].
Tensor losses_of_scales(const core::SearchArgs& args, const Tensor& scales, const Tensor& gram,
                        const OptionalTensor& row_weight) {
  const std::int64_t count = scales.size(0), n = args.n, k = args.k;
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  Tensor inverses = new_tensor({count, k}, ScalarType::Float);
  auto* inverse = static_cast<float*>(inverses.mutable_data_ptr());
  for (std::int64_t i = 0; i < count * k; ++i) inverse[i] = 1.0f / scale[i];
  const Tensor second_moment = as_contiguous(gram);
  Tensor moments = new_tensor({core::moments_size(args, k)}, ScalarType::Float);
  auto* packed = static_cast<float*>(moments.mutable_data_ptr());
  core::pack_moments(args, static_cast<const float*>(second_moment.const_data_ptr()), k, k, packed);

  const std::int64_t blocks = (n + core::kSearchRows - 1) / core::kSearchRows;
  Tensor row_losses = new_tensor({count, n}, ScalarType::Double);
  auto* row_loss = static_cast<double*>(row_losses.mutable_data_ptr());
  for_items(count * blocks, core::scale_scratch_size(args), [&](std::int64_t item, float* scratch) noexcept {
    const std::int64_t c = item / blocks, begin = item % blocks * core::kSearchRows;
    core::scale_losses(args, packed, scale + c * k, inverse + c * k, begin, std::min(begin + core::kSearchRows, n),
                       scratch, row_loss + c * n + begin);
  });
  const auto* importance = row_weight ? static_cast<const float*>(row_weight->const_data_ptr()) : nullptr;
  Tensor losses = new_tensor({count}, ScalarType::Double);
  auto* loss = static_cast<double*>(losses.mutable_data_ptr());
  for (std::int64_t c = 0; c < count; ++c) {
    loss[c] = 0.0;
    for (std::int64_t row = 0; row < n; ++row) {
      const double weight = importance == nullptr ? 1.0 : importance[row];
      if (weight > 0) loss[c] += weight * row_loss[c * n + row];
    }
  }
  return losses;
}

Tensor scale_losses(const Tensor& w, const Tensor& candidates, const Tensor& gram, std::int64_t group_size,
                    std::int64_t w_bit, bool zero_point, OptionalTensor row_weight, std::optional<ScalarType> dtype) {
  const auto [n, k, group, groups] = check_float_weight("scale_losses", w, group_size);
  const bool diagonal = check_gram("scale_losses", gram, w, true);
  check_scales("scale_losses", candidates, w);
  const Tensor weight = as_contiguous(torch::stable::to(w, ScalarType::Float)), scales = as_contiguous(candidates);
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  for (std::int64_t i = 0; i < scales.numel(); ++i)
    STD_TORCH_CHECK(scale[i] > 0 && scale[i] <= std::numeric_limits<float>::max(),
                    "awq_ext::scale_losses: candidates must be finite and positive, got ", scale[i], " at element ", i);
  const core::SearchArgs args{static_cast<const float*>(weight.const_data_ptr()),
                              n,
                              k,
                              group,
                              check_rounding("scale_losses", w_bit, zero_point, dtype),
                              &core::best_kernels(),
                              diagonal};
  return losses_of_scales(args, scales, gram, checked_row_weight("scale_losses", row_weight, w));
}

/// The scales that a search tries, [candidates, k].
Tensor candidates_of(const char* op, const core::SearchArgs& args, const Tensor& w, const Tensor& x_mean,
                     std::int64_t grid, bool duo_scaling, OptionalTensor tie) {
  const std::int64_t k = args.k;
  check_candidates(op, x_mean, tie, grid, w);
  const OptionalTensor ties = contiguous_or_none(tie);
  const std::int64_t* tie_data = nullptr;
  if (ties) {
    tie_data = static_cast<const std::int64_t*>(ties->const_data_ptr());
    for (std::int64_t i = 0; i < k; ++i)
      STD_TORCH_CHECK(tie_data[i] >= 0 && tie_data[i] < k, "awq_ext::", op, ": tie must hold numbers 0..", k - 1,
                      ", got ", tie_data[i]);
  }
  const Tensor mean = as_contiguous(x_mean);
  check_finite(op, "x_mean", mean, 0.0f);
  Tensor w_mean = new_tensor({k}, ScalarType::Float);
  auto* w_mean_data = static_cast<float*>(w_mean.mutable_data_ptr());
  parallel_for(0, k / args.group, 1, [&](std::int64_t begin, std::int64_t end) noexcept {
    core::weight_means(args, begin, end, w_mean_data);
  });
  Tensor candidates = new_tensor({core::candidate_count(grid, duo_scaling), k}, ScalarType::Float);
  core::scale_candidates(static_cast<const float*>(mean.const_data_ptr()), w_mean_data, tie_data, k, grid, duo_scaling,
                         static_cast<float*>(candidates.mutable_data_ptr()));
  return candidates;
}

Tensor scale_candidates(const Tensor& w, const Tensor& x_mean, std::int64_t group_size, std::int64_t grid,
                        bool duo_scaling, OptionalTensor tie) {
  const auto [n, k, group, groups] = check_float_weight("scale_candidates", w, group_size);
  const Tensor weight = as_contiguous(torch::stable::to(w, ScalarType::Float));
  check_finite("scale_candidates", "w", weight);
  const core::SearchArgs args{static_cast<const float*>(weight.const_data_ptr()), n, k, group, {}, nullptr};
  return candidates_of("scale_candidates", args, w, x_mean, grid, duo_scaling, tie);
}

std::tuple<Tensor, Tensor> search_scale(const Tensor& w, const Tensor& x_mean, const Tensor& gram,
                                        std::int64_t group_size, std::int64_t w_bit, std::int64_t grid,
                                        bool duo_scaling, bool zero_point, OptionalTensor tie,
                                        OptionalTensor row_weight, std::optional<ScalarType> dtype) {
  const auto [n, k, group, groups] = check_float_weight("search_scale", w, group_size);
  const bool diagonal = check_gram("search_scale", gram, w, true);
  const OptionalTensor importance = checked_row_weight("search_scale", row_weight, w);
  const Tensor weight = as_contiguous(torch::stable::to(w, ScalarType::Float));
  const core::SearchArgs args{static_cast<const float*>(weight.const_data_ptr()),
                              n,
                              k,
                              group,
                              check_rounding("search_scale", w_bit, zero_point, dtype),
                              &core::best_kernels(),
                              diagonal};
  const Tensor candidates = candidates_of("search_scale", args, w, x_mean, grid, duo_scaling, tie);
  const Tensor losses = losses_of_scales(args, candidates, gram, importance);
  const auto* loss = static_cast<const double*>(losses.const_data_ptr());
  const double* best = std::min_element(loss, loss + losses.size(0));  // the first of equals
  STD_TORCH_CHECK(*best < std::numeric_limits<double>::infinity(),
                  "awq_ext::search_scale: no candidate has a finite loss; w, gram and row_weight must be finite");
  Tensor scale = new_tensor({k}, ScalarType::Float);
  std::copy_n(static_cast<const float*>(candidates.const_data_ptr()) + (best - loss) * k, k,
              static_cast<float*>(scale.mutable_data_ptr()));
  return {scale, losses};
}

Tensor search_clip(const Tensor& w, const Tensor& gram, std::int64_t group_size, std::int64_t w_bit, std::int64_t grid,
                   double max_shrink, bool zero_point, std::optional<ScalarType> dtype) {
  const auto [n, k, group, groups] = check_float_weight("search_clip", w, group_size);
  const bool diagonal = check_gram("search_clip", gram, w, true);
  check_grid("search_clip", grid);
  check_shrink("search_clip", max_shrink);
  const Tensor weight = as_contiguous(torch::stable::to(w, ScalarType::Float)), second_moment = as_contiguous(gram);
  check_finite("search_clip", "w", weight);
  check_finite("search_clip", "gram", second_moment);
  const core::SearchArgs args{static_cast<const float*>(weight.const_data_ptr()),
                              n,
                              k,
                              group,
                              check_rounding("search_clip", w_bit, zero_point, dtype),
                              &core::best_kernels(),
                              diagonal};
  const std::int64_t size = core::moments_size(args, group);
  Tensor moments = new_tensor({groups, size}, ScalarType::Float);
  auto* packed = static_cast<float*>(moments.mutable_data_ptr());
  const auto* blocks = static_cast<const float*>(second_moment.const_data_ptr());
  for (std::int64_t g = 0; g < groups; ++g)
    core::pack_moments(args, blocks + g * group * (diagonal ? 1 : k + 1), k, group, packed + g * size);
  Tensor range = new_tensor({n, groups, 2}, ScalarType::Float);
  auto* ends = static_cast<float*>(range.mutable_data_ptr());
  const std::int64_t row_blocks = (n + core::kSearchRows - 1) / core::kSearchRows;
  for_items(row_blocks, core::clip_scratch_size(args, grid), [&](std::int64_t item, float* scratch) noexcept {
    const std::int64_t begin = item * core::kSearchRows;
    core::clip_rows(args, packed, grid, max_shrink, begin, std::min(begin + core::kSearchRows, n), scratch, ends);
  });
  return range;
}

std::tuple<Tensor, Tensor, Tensor> quantize_compensated(const Tensor& w, const Tensor& gram, std::int64_t group_size,
                                                        std::int64_t w_bit, bool zero_point, OptionalTensor range,
                                                        double damping, bool act_order, std::int64_t passes,
                                                        bool refit_scales, std::optional<ScalarType> dtype) {
  const char* op = "quantize_compensated";
  const auto [n, k, group, groups] = check_float_weight(op, w, group_size);
  check_gram(op, gram, w);
  check_range(op, range, w, {n, k, group, groups});
  STD_TORCH_CHECK(damping > 0 && damping <= 1, "awq_ext::quantize_compensated: damping must be in (0, 1], got ",
                  damping);
  STD_TORCH_CHECK(passes >= 0 && passes <= 1000, "awq_ext::quantize_compensated: passes must be 0..1000, got ", passes);
  const core::Rounding to = check_rounding(op, w_bit, zero_point, dtype);
  const core::Kernels& level = core::best_kernels();
  const Tensor weight = as_contiguous(torch::stable::to(w, ScalarType::Float)), second_moment = as_contiguous(gram);
  const OptionalTensor ends = contiguous_or_none(range);
  check_finite(op, "w", weight);
  check_finite(op, "gram", second_moment);
  const auto* moments = static_cast<const float*>(second_moment.const_data_ptr());

  Tensor columns = new_tensor({k}, ScalarType::Long), factor = new_tensor({k, k}, ScalarType::Float);
  auto* order = static_cast<std::int64_t*>(columns.mutable_data_ptr());
  core::compensation_order(moments, k, act_order, order);
  {
    Tensor work = new_tensor({k, k}, ScalarType::Double);
    auto* a = static_cast<double*>(work.mutable_data_ptr());
    const double lambda = core::damp_gram(moments, order, k, damping, a);
    for (std::int64_t p = 0; p < k; p += core::kFactorBlock) {
      core::factor_panel(a, k, p, lambda);
      const std::int64_t first = p + core::kFactorBlock;
      for_items((k - first + core::kFactorBlock - 1) / core::kFactorBlock, 0, [&](std::int64_t item, float*) noexcept {
        core::factor_trailing(level, a, k, p, first + item * core::kFactorBlock);
      });
    }
    core::factor_rows(a, k, static_cast<float*>(factor.mutable_data_ptr()));
  }

  Tensor q = new_tensor({n, k}, ScalarType::Byte);
  Tensor scales = new_tensor({n, groups}, to_scalar_type(to.scale_type));
  Tensor zeros = new_tensor({n, groups}, ScalarType::Byte);
  const core::CompensateArgs args{static_cast<const float*>(weight.const_data_ptr()),
                                  ends ? static_cast<const float*>(ends->const_data_ptr()) : nullptr,
                                  moments,
                                  static_cast<const float*>(factor.const_data_ptr()),
                                  order,
                                  static_cast<std::uint8_t*>(q.mutable_data_ptr()),
                                  scales.mutable_data_ptr(),
                                  static_cast<std::uint8_t*>(zeros.mutable_data_ptr()),
                                  n,
                                  k,
                                  group,
                                  passes,
                                  to,
                                  refit_scales};
  std::atomic<std::int64_t> bad{n};
  const std::int64_t blocks = (n + core::kCompensateRows - 1) / core::kCompensateRows;
  for_items(blocks, core::compensate_scratch_size(args), [&](std::int64_t item, float* scratch) noexcept {
    const std::int64_t begin = item * core::kCompensateRows;
    lower(bad, core::compensate_rows(level, args, begin, std::min(begin + core::kCompensateRows, n), scratch));
  });
  STD_TORCH_CHECK(bad == n, "awq_ext::quantize_compensated: row ", bad.load(),
                  " of w (or of range) has a NaN, an infinity, or values too large for a scale of the dtype asked for; "
                  "weights must be finite");
  return {q, scales, zeros};
}

// --- calibration ----------------------------------------------------------------------------------------------------

void add_gram(Tensor sums, const Tensor& x, bool bfloat16) {
  check_add_gram(sums, x);
  const std::int64_t k = sums.size(0);
  if (x.size(0) == 0 || k == 0) return;
  core::GramArgs args{};
  const Tensor rows = as_rows(x, args.x_stride);
  args.x = static_cast<const float*>(rows.const_data_ptr());
  args.sums = static_cast<float*>(sums.mutable_data_ptr());
  args.t = x.size(0), args.k = k, args.bfloat16 = bfloat16;
  const core::Kernels& kernels = core::best_kernels();
  Tensor packed = new_tensor({kernels.gram_size(args)}, ScalarType::Int);
  args.packed = words_of(packed);
  const std::int64_t blocks = (k + kernels.gram_block - 1) / kernels.gram_block;
  parallel_for(0, blocks, grain(args.t * kernels.gram_block * 8),
               [&](std::int64_t begin, std::int64_t end) noexcept { kernels.gram_pack(args, begin, end); });
  for_items(blocks * blocks, 0, [&](std::int64_t item, float*) noexcept {
    if (item / blocks <= item % blocks) kernels.gram_add(args, item / blocks, item % blocks);
  });
}

}  // namespace
}  // namespace awq::ops

STABLE_TORCH_LIBRARY_IMPL(awq_ext, CPU, m) {
  m.impl("linear", TORCH_BOX(&awq::ops::linear));
  m.impl("dequantize", TORCH_BOX(&awq::ops::dequantize));
  m.impl("quantize", TORCH_BOX(&awq::ops::quantize));
  m.impl("pack", TORCH_BOX(&awq::ops::pack));
  m.impl("unpack", TORCH_BOX(&awq::ops::unpack));
  m.impl("repack", TORCH_BOX(&awq::ops::repack));
  m.impl("search_scale", TORCH_BOX(&awq::ops::search_scale));
  m.impl("scale_candidates", TORCH_BOX(&awq::ops::scale_candidates));
  m.impl("scale_losses", TORCH_BOX(&awq::ops::scale_losses));
  m.impl("search_clip", TORCH_BOX(&awq::ops::search_clip));
  m.impl("quantize_compensated", TORCH_BOX(&awq::ops::quantize_compensated));
  m.impl("add_gram", TORCH_BOX(&awq::ops::add_gram));
}
