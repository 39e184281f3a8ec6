// How gemm_sm80 cuts its work: y = x W^T for more tokens than decode takes, by mma.sync, which every GPU from sm_80 on
// has. Pure: nothing of a toolkit.
//
// A block makes 128 rows of W (output features) times 32 or 64 tokens. A step of 64 k costs it 128 bytes a token but,
// with 4 bits a weight, only 36 a row: few tokens and many rows need the least from memory. Each of the four warps has
// two strips of 16 rows, and all tokens. So a block unpacks a weight once, and a fragment of x that is read from shared
// memory serves two strips; and registers suffice for two sets of sums: of the group at work, whose products are of
// whole numbers q - z, and of the groups that are done, times their scales in float32. No weight is ever rounded,
// whatever the type of scales.
#pragma once
#include <cstdint>

#include "../core/layout.h"
#include "plan.h"

namespace awq::cuda {

struct GemmSm80 {
  int tokens;         // of a block: 32 or 64
  bool small_groups;  // a step has parts of up to four

  static constexpr int kThreads = 128;
  static constexpr int kRows = 128, kStep = core::kFragments.tile_k;
  static constexpr int kPanelRows = core::kFragments.tile_n, kPanels = kRows / kPanelRows;
  static constexpr int kCodeBytes = core::kFragments.tile_words() * 4;      // of a panel in a step
  static constexpr int kZeroBytes = core::kFragmentZeros.tile_words() * 4;  // of a panel in a group
  static constexpr int kBlocks = 2;  // on a multiprocessor at a time, at least: registers and memory are for that

  AWQ_HOST_DEVICE constexpr int groups() const { return small_groups ? 4 : 1; }  // of a step, at most

  // A stage of the ring in shared memory holds a step: x [tokens][64]; codes [panel]; scales [panel][groups][64], of up
  // to four bytes; zeros [panel][groups].
  AWQ_HOST_DEVICE constexpr int codes_at() const { return tokens * kStep * 2; }
  AWQ_HOST_DEVICE constexpr int scales_at() const { return codes_at() + kPanels * kCodeBytes; }
  AWQ_HOST_DEVICE constexpr int zeros_at() const { return scales_at() + groups() * kRows * 4; }
  AWQ_HOST_DEVICE constexpr int stage_bytes() const {
    const std::int64_t bytes = zeros_at() + groups() * kPanels * kZeroBytes;
    return static_cast<int>(core::ceil_div(bytes, 128)) * 128;  // so rows of x are aligned
  }
  /// As many as let two blocks share the 100 KiB of sm_86, sm_89 and sm_120, where a block costs one KiB more.
  AWQ_HOST_DEVICE constexpr int stages() const { return (100 / kBlocks - 1) * 1024 / stage_bytes(); }
  AWQ_HOST_DEVICE constexpr int shared_bytes() const { return stages() * stage_bytes(); }

  /// At the end the ring holds the sums, [tokens][128] floats, and four more a token, so that what a warp stores at
  /// once, eight rows of four pairs of tokens, lies in distinct banks.
  static constexpr int kSumsPitch = (kRows + 4) * 4;
};

/// Whether a step can have parts of several groups: 16, 32, and what is no multiple of a step.
AWQ_HOST_DEVICE constexpr bool gemm_sm80_small_groups(std::int64_t k, std::int64_t group) {
  return group != k && group % GemmSm80::kStep != 0;
}

/// Tokens from which on it pays to dequantize the weight for the matrix product of the vendor's library. Computed, not
/// measured: the detour writes and reads 2.5 bytes a weight, so a kernel of e times the library's speed wins up to
///     m = 1.26 F / B * e / (1 - e),  F operations and B bytes a second,
/// with e = 0.7 on sm_80 (260e12, 1.8e12), 0.8 to 0.9 on those where the matrix units are slow beside everything else,
/// and 0.5 and 0.3 where mma.sync reaches so much of the newer matrix instructions.
constexpr std::int64_t gemm_sm80_most_tokens(int arch) {
  switch (arch / 10) {
    case 8: return arch == 80 ? 430 : arch == 86 || arch == 87 ? 1000 : 2000;
    case 9: return 230;
    case 10:
    case 11: return 120;
    default: return 1500;
  }
}

/// Groups that 16 k never belong to two of. Offsets of rows and steps are ints in the kernel, of elements not.
constexpr bool gemm_sm80_can(const CudaProblem& p, const Gpu& gpu) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const bool types = (p.x_type == DType::f16 || p.x_type == DType::bf16) && p.scale_type != DType::f64;
  const bool sizes = p.m > 0 && p.m <= kMost && p.n > 0 && p.n <= kMost && p.n % 8 == 0 && p.k > 0 && p.k <= kMost &&
                     core::ceil_div(p.m, 32) * core::ceil_div(p.n, GemmSm80::kRows) <= kMost;
  const GemmSm80 largest{64, true};
  return gpu.arch >= 80 && gpu.shared_bytes >= largest.shared_bytes() && types && sizes &&
         fragments_can_have(p.k, p.group);
}

/// In blocks of so many tokens, and so many that share the k of a tile.
constexpr CudaPlan gemm_sm80_plan(const CudaProblem& p, int tokens, int splits) {
  const GemmSm80 cut{tokens, gemm_sm80_small_groups(p.k, p.group)};
  CudaPlan plan;
  plan.kernel = CudaKernel::gemm_sm80;
  plan.name = "gemm_sm80";
  plan.why = "many rows of x share each weight that is unpacked for mma.sync";
  plan.tile_n = GemmSm80::kRows;
  plan.tile_m = tokens;
  plan.splits = splits;
  plan.stages = cut.stages();
  plan.grid_x = core::ceil_div(p.m, tokens) * core::ceil_div(p.n, GemmSm80::kRows);
  plan.grid_y = splits;
  plan.threads = GemmSm80::kThreads;
  plan.shared_bytes = cut.shared_bytes();
  plan.workspace_bytes = splits > 1 ? splits * p.m * p.n * 4 : 0;
  return plan;
}

/// For a call that gemm_sm80_can take. Estimates, not measured.
constexpr CudaPlan gemm_sm80_plan(const CudaProblem& p, const Gpu& gpu) {
  // A block unpacks the weights of a step in about the time that 24 tokens' products take.
  const auto cost = [&](int tokens) { return core::ceil_div(p.m, tokens) * (tokens + 24); };
  const CudaPlan whole = gemm_sm80_plan(p, cost(32) < cost(64) ? 32 : 64, 1);
  // Where tiles are fewer than the blocks that run at a time, several blocks share one, with at least eight steps each.
  const std::int64_t room = std::int64_t{GemmSm80::kBlocks} * gpu.sms / whole.grid_x;
  const std::int64_t most = core::ceil_div(p.k, GemmSm80::kStep) / 8, splits = room < most ? room : most;
  return splits > 1 ? gemm_sm80_plan(p, whole.tile_m, static_cast<int>(splits)) : whole;
}

/// body.operator()<x's type, tokens, small groups>(): which instance of the kernel a plan means.
template <class Body>
void with_gemm_sm80(const CudaPlan& plan, DType x_type, bool small_groups, const Body& body) {
  with_x_type(x_type, [&]<DType kType>() {
    if (plan.tile_m == 32)
      small_groups ? body.template operator()<kType, 32, true>() : body.template operator()<kType, 32, false>();
    else
      small_groups ? body.template operator()<kType, 64, true>() : body.template operator()<kType, 64, false>();
  });
}

}  // namespace awq::cuda
