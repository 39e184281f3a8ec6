// Every kernel the CUDA operators run, as one host function each: raw device pointers and a stream, nothing of torch.
//
// A launcher only enqueues work on `stream` of the current device. It neither allocates nor synchronises, so it can be
// captured in a CUDA graph; an empty shape launches nothing. Shapes are checked by the caller (ops/check.h); pointers
// need no alignment beyond that of their element.
#pragma once
#include <cuda_runtime_api.h>

#include "../core/gram.h"
#include "../core/layout.h"
#include "../core/linear.h"
#include "../core/pack.h"
#include "../core/quantize.h"
#include "plan.h"
#include "search.h"

namespace awq::cuda {

/// Codes q [n, k], one a byte, -> words of `to`. Bits above the lowest four of a code are dropped.
cudaError_t pack(const core::Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 cudaStream_t stream);

/// Words of `from` -> codes q [n, k].
cudaError_t unpack(const core::Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   cudaStream_t stream);

/// Words of `from` -> words of `to`, for the same codes [n, k].
cudaError_t repack(const core::Codes& from, const core::Codes& to, const void* source, void* target, std::int64_t n,
                   std::int64_t k, cudaStream_t stream);

/// core::quantize_rows over all rows, bit for bit, except that a group whose scale is not finite gets scale NaN,
/// its zero as code, and stops nothing.
cudaError_t quantize(const core::QuantizeArgs& args, cudaStream_t stream);

/// core::dequantize_rows over all rows, bit for bit (but for the payload of a NaN).
cudaError_t dequantize(const core::DequantizeArgs& args, cudaStream_t stream);

/// y = bias + the sum of `splits` parts, added in that order; partials [splits][m][n], 16-byte aligned. The last step
/// of kernels that share k between blocks.
cudaError_t reduce(const core::LinearArgs& args, const float* partials, int splits, cudaStream_t stream);

/// y = x W^T + bias of a weight in layout fragments, as the plan for it says: y, qweight, qzeros, scales and workspace
/// (of plan.workspace_bytes, or nullptr) are 16-byte aligned; so is x, and x_stride is a multiple of 8.
cudaError_t decode(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t gemm_sm80(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t gemm_sm90(const core::LinearArgs& args, const CudaPlan& plan, void* workspace, cudaStream_t stream);

/// w_mean of core::weight_means; its sums in another order.
cudaError_t weight_means(const MeanArgs& args, cudaStream_t stream);

/// core::scale_candidates. NaN in all of them where x_mean is not finite or is negative.
cudaError_t scale_candidates(const CandidateArgs& args, cudaStream_t stream);

/// d and the verdict of each item; losses() then gives what core::scale_losses does, its sums in another order.
cudaError_t scale_errors(const ScaleErrorArgs& args, cudaStream_t stream);
cudaError_t losses(const LossArgs& args, cudaStream_t stream);

/// The losses of candidates from those of their rows, and from the losses the scale.
cudaError_t total_losses(const TotalArgs& args, cudaStream_t stream);
cudaError_t choose_scale(const TotalArgs& args, cudaStream_t stream);

/// core::clip_rows in steps: start once for all rows; then for some rows at a time and for each pair of steps of the
/// ends: errors, losses() of them (a batch for each group), choose. A group whose weights or whose block of gram are
/// not finite gets the range NaN.
cudaError_t clip_start(const ClipArgs& args, cudaStream_t stream);
cudaError_t clip_errors(const ClipArgs& args, cudaStream_t stream);
cudaError_t clip_choose(const ClipArgs& args, cudaStream_t stream);

/// sums[i, j] += sum over t of x[t, i] x[t, j] for j >= i, for at most kGramRows rows; args.packed is not used.
cudaError_t add_gram(const core::GramArgs& args, cudaStream_t stream);

}  // namespace awq::cuda
