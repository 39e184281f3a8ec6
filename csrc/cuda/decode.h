// The decode kernel: few rows of x, every weight read once. What it can do, and how it cuts its work (decode.cuh).
#pragma once
#include <bit>
#include <cstdint>

#include "../core/layout.h"
#include "plan.h"

namespace awq::cuda {

inline constexpr int kDecodeThreads = 256, kDecodeWarps = kDecodeThreads / 32;
inline constexpr int kDecodeRows = 16;   // of x, at most
inline constexpr int kDecodeStep = 64;   // along k: what one 16-byte load of each lane of a warp covers of 16 rows
inline constexpr int kDecodeAhead = 8;   // steps whose weights a warp has under way, and between two barriers
inline constexpr int kDecodeStages = 2;  // of x in shared memory

/// A block has 2^strips_log strips of 16 rows of W, and its warps are that many times decode_parts: the warps of a
/// strip have other steps each.
AWQ_HOST_DEVICE constexpr int decode_parts(int strips_log) { return kDecodeWarps >> strips_log; }

/// log2 of the pieces of 16 bytes of a row of x in a stage: kDecodeAhead steps for each part.
AWQ_HOST_DEVICE constexpr int decode_pieces_log(int strips_log) { return 9 - strips_log; }
static_assert(1 << decode_pieces_log(0) == kDecodeAhead * kDecodeWarps * kDecodeStep * 2 / 16);

/// Floats from a token's sums to the next one's, in the exchange between warps: the four more put the stores of a warp,
/// to tokens 2t and rows r (t = 0 .. 3, r = 0 .. 7), into distinct banks.
inline constexpr int kDecodeSumStride = 16 + 4;
static_assert(kDecodeRows * kDecodeSumStride * 4 <= kDecodeAhead * 512);

/// Where things lie in shared memory, in bytes from its start: the words that warps have under way, and afterwards
/// their sums; the stages of x; a line of zeros for rows that x does not have.
inline constexpr int kDecodeX = kDecodeWarps * kDecodeAhead * 512;
AWQ_HOST_DEVICE constexpr int decode_zeros(int m, int strips_log) {
  return kDecodeX + kDecodeStages * (m << (decode_pieces_log(strips_log) + 4));
}
AWQ_HOST_DEVICE constexpr int decode_shared_bytes(int m, int strips_log) {
  return decode_zeros(m, strips_log) + (m % 8 == 0 ? 0 : 128);
}
static_assert(decode_shared_bytes(16, 3) == 64 << 10);  // what every GPU has

/// Groups of 16, or 32, of any multiple of them, or one; sums are float32, so scales and x may be of any magnitude.
inline bool decode_can(const CudaProblem& p, const Gpu& gpu) {
  const bool type = p.x_type == DType::f16 || (p.x_type == DType::bf16 && gpu.arch >= 80);
  return gpu.arch >= 75 && type && p.scale_type != DType::f64 && p.m <= kDecodeRows && p.n % 8 == 0 &&
         p.n <= (1 << 30) && p.k > 0 && p.k <= (1 << 20) && fragments_can_have(p.k, p.group);
}

/// The longest piece of k, of 16, 32 or 64, that is in one group wherever it begins (at its multiples). One group is
/// like groups of 64: what is behind its end is zeros.
constexpr int decode_unit(std::int64_t k, std::int64_t group) {
  return group == k || group % 64 == 0 ? 64 : group % 32 == 0 ? 32 : 16;
}

/// Where blocks of a cluster read each other's shared memory, and are known to be good at it: CUTLASS has clusters of
/// one on sm_120.
constexpr bool has_clusters(int arch) { return arch >= 90 && arch < 120; }

/// How the kernel cuts its work, for the kernel: strips and splits of the plan, and how unit u of k (decode_unit) finds
/// its group, u * reciprocal / 2^31 rounded down: for groups of d units that is u / d with c = 2^31 / d rounded up. For
/// c d = 2^31 + e, e < d, the product is u / d + u e / (d 2^31), and less than u / d + 1 / d, because u < 2^16 (k is at
/// most 2^20) and d <= 2^15 (there are two groups at least).
struct DecodeCut {
  int strips_log, splits_log;
  std::uint32_t groups, reciprocal;
};

inline DecodeCut decode_cut(const CudaPlan& plan, std::int64_t k, std::int64_t group) {
  const auto log = [](int n) { return static_cast<int>(std::bit_width(static_cast<unsigned>(n))) - 1; };
  const auto d = static_cast<std::uint32_t>(group / decode_unit(k, group));
  return {log(plan.tile_n / 16), log(plan.splits), static_cast<std::uint32_t>(k / group),
          group == k ? 0 : ((std::uint32_t{1} << 31) + d - 1) / d};
}

/// The kernel with 2^strips_log strips to a block and `splits`, a power of two, blocks that share k.
inline CudaPlan decode_plan(const CudaProblem& p, const Gpu& gpu, int strips_log, int splits) {
  CudaPlan plan;
  plan.kernel = CudaKernel::decode, plan.name = "decode";
  plan.why = "few rows: every weight is read once, and the rows wait for it in shared memory";
  plan.tile_n = 16 << strips_log, plan.tile_m = p.m <= 8 ? 8 : 16;
  plan.splits = splits, plan.cluster = has_clusters(gpu.arch) ? splits : 1;
  plan.stages = kDecodeStages;
  plan.grid_x = core::ceil_div(p.n, plan.tile_n) * splits, plan.grid_y = 1;
  plan.threads = kDecodeThreads;
  plan.shared_bytes = decode_shared_bytes(static_cast<int>(p.m), strips_log);
  if (plan.cluster < splits) plan.workspace_bytes = splits * p.m * p.n * 4;
  return plan;
}

/// What is expected to take the least time, counted in bytes that a multiprocessor reads in that time: the work of the
/// busiest one. Each of its blocks begins; reads its share of W; and m rows of x, from the second cache, at twice the
/// speed. A block that runs alone has not enough under way to read at full speed, and nothing hides its beginning: it
/// takes half as long again. More strips mean fewer reads of x; more splits give more multiprocessors something to do,
/// and cost an exchange of sums, or where there are no clusters a second kernel. The costs are estimates, not measured.
inline CudaPlan decode_plan(const CudaProblem& p, const Gpu& gpu) {
  constexpr std::int64_t kBegin = 4 << 10, kExchange = 4 << 10, kSecondKernel = 32 << 10;
  constexpr int kReserved = 1 << 10;  // of shared memory, for each block
  const std::int64_t steps = core::ceil_div(p.k, kDecodeStep);
  CudaPlan best;
  std::int64_t least = 0;
  for (int strips_log = 0; strips_log <= 3; ++strips_log)
    for (int splits = 1; splits <= 8 && splits <= steps; splits *= 2) {
      const CudaPlan plan = decode_plan(p, gpu, strips_log, splits);
      if (plan.shared_bytes > gpu.shared_bytes) continue;
      const std::int64_t blocks = core::ceil_div(plan.grid_x, gpu.sms);  // of one multiprocessor
      const bool alone = blocks == 1 || 2 * (plan.shared_bytes + kReserved) > gpu.shared_bytes + kReserved;
      const std::int64_t share = core::ceil_div(steps, splits) * kDecodeStep;
      const std::int64_t work = blocks * (kBegin + share * plan.tile_n / 2 + share * p.m);
      const std::int64_t sharing = splits == 1        ? 0
                                   : plan.cluster > 1 ? splits * kExchange
                                                      : kSecondKernel + plan.workspace_bytes / gpu.sms;
      const std::int64_t cost = (alone ? work * 3 / 2 : work) + sharing;
      if (least == 0 || cost < least) least = cost, best = plan;
    }
  return best;
}

/// body.operator()<x's type, tiles of eight tokens, unit>(): which instance of the kernel a plan means.
template <class Body>
void with_decode(const CudaPlan& plan, DType x_type, int unit, const Body& body) {
  with_x_type(x_type, [&]<DType kType>() {
    const auto with_unit = [&]<int kTiles>() {
      switch (unit) {
        case 16: return body.template operator()<kType, kTiles, 16>();
        case 32: return body.template operator()<kType, kTiles, 32>();
        default: return body.template operator()<kType, kTiles, 64>();
      }
    };
    plan.tile_m <= 8 ? with_unit.template operator()<1>() : with_unit.template operator()<2>();
  });
}

}  // namespace awq::cuda
