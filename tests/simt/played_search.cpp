// The CUDA operators of csrc/ops/cuda_search.cpp, as they are, with kernels that are played: awq_played::search_scale
// and so on, for tensors on a CPU. What this tests beyond test_search.cpp are the operators: which memory they ask for,
// what they hand to which kernel, and in which order. Kernels may touch just the memory that an operator has asked
// torch for, as much as it has asked for, and read none of it before it is written.
#include <memory>
#include <vector>

#include "cuda/launch.h"
#include "cuda/product.cuh"
#include "cuda/search.cuh"
#include "ops/check.h"
#include "ops/cuda.h"
#include "simt/simt.h"

namespace {

using torch::stable::Tensor;

/// What the operator that is running has asked for. Memory is not given back before it ends: pieces stay apart.
struct Piece {
  Tensor tensor;
  const char* begin;
  const char* end;
  std::unique_ptr<simt::Global> global;
};
std::vector<Piece> pieces;

std::size_t size_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double || type == ScalarType::Long ? 8 : type == ScalarType::Float ? 4 : 2;
}

/// Lets kernels read an operator's input while this lives; what the operator has asked for itself they may already.
class Input {
 public:
  template <class T>
  Input(const T* data, std::int64_t count) {
    const auto* begin = reinterpret_cast<const char*>(data);
    for (const Piece& piece : pieces)
      if (begin >= piece.begin && begin < piece.end) return;
    if (data != nullptr && count > 0)
      global_ = std::make_unique<simt::Global>(data, static_cast<std::size_t>(count) * sizeof(T), false, "an input");
  }

 private:
  std::unique_ptr<simt::Global> global_;
};

template <class Args>
void play(void (*body)(const Args&), const Args& args, std::uint32_t shared_bytes = 0) {
  static std::uint64_t seed = 0;
  simt::run({.grid_x = 3, .threads = awq::cuda::kThreads, .shared_bytes = shared_bytes}, {.seed = seed++ % 5},
            [&] { body(args); });
}

}  // namespace

// --- torch, as far as it would ask for a device ---------------------------------------------------------------------

AOTITorchError aoti_torch_create_device_guard(std::int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&pieces);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  pieces.clear();  // an operator ends
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_c10_cuda_check_msg(std::int32_t, const char*, const char*, std::uint32_t, bool, char** message) {
  *message = nullptr;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char*) {}

namespace torch::stable {

Tensor watched_new_empty(const Tensor& like, std::vector<std::int64_t> sizes,
                         std::optional<headeronly::ScalarType> dtype = std::nullopt) {
  Tensor t = new_empty(like, sizes, dtype);
  const auto bytes = static_cast<std::size_t>(t.numel()) * size_of(t.scalar_type());
  if (bytes == 0) return t;
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  auto global = std::make_unique<simt::Global>(data, bytes, true, "piece " + std::to_string(pieces.size()));
  global->uninitialised();
  pieces.push_back({t, data, data + bytes, std::move(global)});
  return t;
}

}  // namespace torch::stable

// --- the launches of csrc/cuda/search.cu ----------------------------------------------------------------------------

namespace awq::cuda {

cudaError_t weight_means(const MeanArgs& a, cudaStream_t) {
  const Input w(a.w, a.n * a.k);
  play(mean_inverse_body, a);
  play(mean_sums_body, a);
  play(mean_body, a);
  return cudaSuccess;
}

cudaError_t scale_candidates(const CandidateArgs& a, cudaStream_t) {
  const Input x_mean(a.x_mean, a.k), tie(a.tie, a.k);
  play(raw_scales_body, a);
  if (a.tie != nullptr) play(tied_scales_body, a);
  play(candidates_body, a, kTotalsShared);
  return cudaSuccess;
}

cudaError_t scale_errors(const ScaleErrorArgs& a, cudaStream_t) {
  const Input w(a.w, a.n * a.k), candidates(a.candidates, ((a.first + a.items - 1) / a.n + 1) * a.k);
  play(scale_error_body, a);
  return cudaSuccess;
}

cudaError_t losses(const LossArgs& a, cudaStream_t) {
  const std::int64_t size = a.batches * a.k;
  const Input gram(a.gram, a.gram_stride == 0 ? size : size * size);
  if (a.gram_stride == 0) {
    play(diagonal_loss_body, a);
  } else {
    play(loss_body, a, kProductShared);
    play(row_loss_body, a);
  }
  return cudaSuccess;
}

cudaError_t total_losses(const TotalArgs& a, cudaStream_t) {
  const Input row_weight(a.row_weight, a.n);
  play(total_body, a, kTotalsShared);
  return cudaSuccess;
}

cudaError_t choose_scale(const TotalArgs& a, cudaStream_t) {
  play(choose_scale_body, a);
  return cudaSuccess;
}

cudaError_t clip_start(const ClipArgs& a, cudaStream_t) {
  const Input w(a.w, a.n * a.k), gram(a.gram, a.gram_stride == 0 ? a.k : a.k * a.k);
  play(clip_poison_body, a);
  play(clip_start_body, a);
  return cudaSuccess;
}

cudaError_t clip_errors(const ClipArgs& a, cudaStream_t) {
  const Input w(a.w, a.n * a.k);
  play(clip_error_body, a);
  return cudaSuccess;
}

cudaError_t clip_choose(const ClipArgs& a, cudaStream_t) {
  play(clip_choose_body, a);
  return cudaSuccess;
}

cudaError_t add_gram(const core::GramArgs& a, cudaStream_t) {
  const Input x(a.x, (a.t - 1) * a.x_stride + a.k);
  const simt::Global sums(a.sums, static_cast<std::size_t>(a.k * a.k) * sizeof(float), true, "sums");
  play(gram_body, a, kProductShared);
  return cudaSuccess;
}

}  // namespace awq::cuda

// --- the operators --------------------------------------------------------------------------------------------------

#define new_empty watched_new_empty
#define awq_ext awq_played
#define CUDA CPU
#include "ops/cuda_search.cpp"
