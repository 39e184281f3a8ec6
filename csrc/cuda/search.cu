// The kernels of search.cuh and product.cuh, and their launches.
#include <algorithm>

#include "launch.h"
#include "product.cuh"
#include "search.cuh"

namespace awq::cuda {
namespace {

/// A kernel that calls one body; as few registers as let kBlocks blocks share a multiprocessor. The bodies stride by
/// the grid, so that any number of blocks does the work.
template <auto kBody, int kBlocks, class Args>
__global__ void __launch_bounds__(kThreads, kBlocks) search_kernel(const __grid_constant__ Args args) {
  kBody(args);
}

template <auto kBody, int kBlocks = 1, class Args>
cudaError_t launch(const Args& args, std::int64_t items, std::int64_t items_of_block, int shared, cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  const std::int64_t blocks = (items + items_of_block - 1) / items_of_block;
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>(blocks, std::numeric_limits<int>::max()));
  search_kernel<kBody, kBlocks, Args><<<grid, kThreads, static_cast<std::size_t>(shared), stream>>>(args);
  return cudaGetLastError();
}

/// One after another, up to the first that cannot be started.
template <class... Launches>
cudaError_t in_turn(const Launches&... launches) {
  cudaError_t error = cudaSuccess;
  ((error = launches(), error == cudaSuccess) && ...);
  return error;
}

}  // namespace

cudaError_t weight_means(const MeanArgs& a, cudaStream_t stream) {
  return in_turn([&] { return launch<mean_inverse_body>(a, a.n * (a.k / a.group), kWarps, 0, stream); },
                 [&] { return launch<mean_sums_body>(a, mean_chunks(a.n) * a.k, kThreads, 0, stream); },
                 [&] { return launch<mean_body>(a, a.k, kThreads, 0, stream); });
}

cudaError_t scale_candidates(const CandidateArgs& a, cudaStream_t stream) {
  const std::int64_t scales = a.count * a.k;
  return in_turn([&] { return launch<raw_scales_body>(a, scales, kThreads, 0, stream); },
                 [&] { return launch<tied_scales_body>(a, a.tie == nullptr ? 0 : scales, kThreads, 0, stream); },
                 [&] { return launch<candidates_body>(a, a.count, 1, kTotalsShared, stream); });
}

cudaError_t scale_errors(const ScaleErrorArgs& a, cudaStream_t stream) {
  return launch<scale_error_body>(a, a.items, kWarps, 0, stream);
}

cudaError_t losses(const LossArgs& a, cudaStream_t stream) {
  if (a.gram_stride == 0) return launch<diagonal_loss_body>(a, a.batches * a.rows, kWarps, 0, stream);
  const std::int64_t tiles = a.batches * product_tiles(a.rows) * product_tiles(a.k);
  return in_turn([&] { return launch<loss_body, 2>(a, tiles, 1, kProductShared, stream); },
                 [&] { return launch<row_loss_body>(a, a.batches * a.rows, kThreads, 0, stream); });
}

cudaError_t total_losses(const TotalArgs& a, cudaStream_t stream) {
  return launch<total_body>(a, a.count, 1, kTotalsShared, stream);
}

cudaError_t choose_scale(const TotalArgs& a, cudaStream_t stream) {
  return launch<choose_scale_body>(a, a.k, kThreads, 0, stream);
}

cudaError_t clip_start(const ClipArgs& a, cudaStream_t stream) {
  return in_turn([&] { return launch<clip_poison_body>(a, a.k, kWarps, 0, stream); },
                 [&] { return launch<clip_start_body>(a, a.n * a.groups(), kWarps, 0, stream); });
}

cudaError_t clip_errors(const ClipArgs& a, cudaStream_t stream) {
  return launch<clip_error_body>(a, a.items(), kWarps, 0, stream);
}

cudaError_t clip_choose(const ClipArgs& a, cudaStream_t stream) {
  return launch<clip_choose_body>(a, a.rows * a.groups(), kThreads, 0, stream);
}

cudaError_t add_gram(const core::GramArgs& a, cudaStream_t stream) {
  const std::int64_t side = product_tiles(a.k);
  return launch<gram_body, 2>(a, side * side, 1, kProductShared, stream);
}

}  // namespace awq::cuda
