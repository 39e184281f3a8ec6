// The searches and the sums of calibration on a CUDA device.
#include "cuda.h"

namespace awq::ops {
namespace {

[[noreturn]] void refuse_search(const char* op, const char* tensors) {
  STD_TORCH_CHECK(false, "awq_ext::", op, ": the search runs on a CPU; move its tensors (", tensors,
                  ") there with .cpu() first");
}

std::tuple<Tensor, Tensor> search_scale(const Tensor&, const Tensor&, const Tensor&, std::int64_t, std::int64_t,
                                        std::int64_t, bool, bool, OptionalTensor, OptionalTensor,
                                        std::optional<ScalarType>) {
  refuse_search("search_scale", "w, x_mean, gram, tie, row_weight");
}

Tensor scale_candidates(const Tensor&, const Tensor&, std::int64_t, std::int64_t, bool, OptionalTensor) {
  refuse_search("scale_candidates", "w, x_mean, tie");
}

Tensor scale_losses(const Tensor&, const Tensor&, const Tensor&, std::int64_t, std::int64_t, bool, OptionalTensor,
                    std::optional<ScalarType>) {
  refuse_search("scale_losses", "w, candidates, gram, row_weight");
}

Tensor search_clip(const Tensor&, const Tensor&, std::int64_t, std::int64_t, std::int64_t, double, bool,
                   std::optional<ScalarType>) {
  refuse_search("search_clip", "w, gram");
}

std::tuple<Tensor, Tensor, Tensor> quantize_compensated(const Tensor&, const Tensor&, std::int64_t, std::int64_t, bool,
                                                        OptionalTensor, double, bool, std::int64_t, bool,
                                                        std::optional<ScalarType>) {
  refuse_search("quantize_compensated", "w, gram, range");
}

void add_gram(const Tensor&, const Tensor&, bool) {
  STD_TORCH_CHECK(false, "awq_ext::add_gram: runs on a CPU; for sums and x on CUDA call sums.addmm_(x.T, x)");
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
