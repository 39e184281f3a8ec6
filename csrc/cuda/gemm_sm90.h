// The Hopper GEMM (gemm_sm90.cuh) seen from outside: which calls it can take, how it cuts them up, what it keeps where.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "../core/layout.h"
#include "plan.h"

namespace awq::cuda {

inline constexpr int kSm90Panel = core::kFragments.tile_n;      // rows of W of a warp group: those of a wgmma
inline constexpr int kSm90Panels = 2;                           // warp groups that multiply
inline constexpr int kSm90Slice = core::kFragments.tile_k;      // of k: 128 bytes of x, all that a swizzle spans
inline constexpr int kSm90Codes = kSm90Panel * kSm90Slice / 2;  // bytes of a panel's codes in a slice
inline constexpr int kSm90Threads = 128 * (kSm90Panels + 1);
inline constexpr int kSm90Tokens[] = {16, 32, 64, 96, 128, 192, 256};  // rows of x in a tile
inline constexpr int kSm90Exact = 64;                                  // with more of them, weights are rounded
inline constexpr int kSm90Clusters[] = {1, 2, 4};

/// Blocks that a multiprocessor is to hold: where the sums leave registers for two, these hide each other's waits. A
/// warp scheduler has 512 registers for each lane. A block brings it a warp of each of three warp groups, so that a
/// thread starts with a third of them or, of two blocks, a sixth, in whole eights; then the warp group that copies
/// gives of its own to the others.
constexpr int sm90_blocks(int tokens) { return tokens <= 32 ? 2 : 1; }
constexpr int sm90_registers(int tokens) { return sm90_blocks(tokens) == 2 ? 80 : 168; }
constexpr int sm90_copy_registers(int tokens) { return sm90_blocks(tokens) == 2 ? 48 : 56; }
constexpr int sm90_multiply_registers(int tokens) { return sm90_blocks(tokens) == 2 ? 96 : 224; }

/// Slices of k in a step. With few rows of x it is instructions that count, and what is done once for a step is spread
/// over two.
constexpr int sm90_slices(int tokens) { return tokens <= kSm90Exact ? 2 : 1; }

/// How the kernel cuts a call up, and the shared memory of its blocks: a ring of stages, each all that a step of k
/// needs; copies fill some while others are used. First the tiles of x, whose swizzle wants multiples of 1024 bytes;
/// then, for each stage and panel, codes, scales and zeros; then two barriers a stage.
struct Sm90Cut {
  int cluster;      // blocks that share the steps of a tile
  int stages;       // of the ring
  int slices;       // of k
  int steps;        // of k
  int groups;       // of k
  int step_groups;  // that a step meets, each with scales and zeros
  int group_steps;  // that a group meets
  int panels;       // of W
  int token_tiles;  // of x
  int tiles;
  int scale_bytes;                          // of one scale
  int x_bytes, scales, zeros, panel_bytes;  // of a stage; where a panel has scales and zeros, and its end
  int all_x_bytes, barriers;                // of all stages; where the barriers are

  constexpr Sm90Cut(const CudaProblem& p, int tokens, int stages_, int cluster_)
      : cluster(cluster_),
        stages(stages_),
        slices(static_cast<int>(core::ceil_div(p.k, kSm90Slice))),
        steps(static_cast<int>(core::ceil_div(slices, sm90_slices(tokens)))),
        groups(static_cast<int>(p.k / p.group)),
        step_groups(p.group == p.k ? 1 : static_cast<int>(core::ceil_div(step(tokens), p.group))),
        group_steps(static_cast<int>(core::ceil_div(p.group, step(tokens)))),
        panels(static_cast<int>(core::ceil_div(p.n, kSm90Panel))),
        token_tiles(static_cast<int>(core::ceil_div(p.m, tokens))),
        tiles(static_cast<int>(core::ceil_div(panels, kSm90Panels)) * token_tiles),
        scale_bytes(core::size_of(p.scale_type)),
        x_bytes(tokens * step(tokens) * 2),
        scales(sm90_slices(tokens) * kSm90Codes),
        zeros(scales + step_groups * kSm90Panel * scale_bytes),
        panel_bytes(zeros + step_groups * kSm90Panel / 2),
        all_x_bytes(stages * x_bytes),
        barriers(all_x_bytes + stages * kSm90Panels * panel_bytes) {}

  static constexpr int step(int tokens) { return sm90_slices(tokens) * kSm90Slice; }  // of k
  AWQ_HOST_DEVICE constexpr int x(int stage) const { return stage * x_bytes; }
  AWQ_HOST_DEVICE constexpr int panel(int stage, int i) const {
    return all_x_bytes + (stage * kSm90Panels + i) * panel_bytes;
  }
  AWQ_HOST_DEVICE constexpr int full(int stage) const { return barriers + 16 * stage; }
  AWQ_HOST_DEVICE constexpr int empty(int stage) const { return full(stage) + 8; }
  constexpr int bytes() const { return full(stages); }
};

/// No 16 of k may belong to two groups, nor a step meet a part of one and another; and the tiles must be countable.
constexpr bool gemm_sm90_can(const CudaProblem& p, const Gpu& gpu) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  constexpr int kStep = Sm90Cut::step(kSm90Exact);
  const bool groups = p.group == p.k || p.group % kStep == 0 || (kStep % p.group == 0 && p.group % 16 == 0);
  const bool sizes = p.m > 0 && p.n > 0 && p.k > 0 && p.m <= kMost && p.n <= kMost && p.k <= kMost && p.n % 8 == 0 &&
                     core::ceil_div(p.n, kSm90Panel) * core::ceil_div(p.m, kSm90Tokens[0]) <= kMost;
  const bool types = (p.x_type == DType::f16 || p.x_type == DType::bf16) && p.scale_type != DType::f64;
  return gpu.arch == 90 && groups && sizes && types;
}

/// As many stages as fit; where blocks of a cluster leave sums for each other, that is room enough too.
constexpr CudaPlan sm90_plan(const CudaProblem& p, const Gpu& gpu, int tokens, int cluster) {
  constexpr int kKept = 1024;  // of each block, for the system
  const int blocks = sm90_blocks(tokens), shared = (gpu.shared_bytes + kKept) / blocks - kKept;
  const Sm90Cut cut(p, tokens, shared / Sm90Cut(p, tokens, 1, 1).bytes(), cluster);
  CudaPlan plan;
  plan.kernel = CudaKernel::gemm_sm90;
  plan.name = "gemm_sm90";
  plan.tile_n = kSm90Panels * kSm90Panel;
  plan.tile_m = tokens;
  plan.cluster = cluster;
  plan.stages = cut.stages;
  plan.grid_x = cluster == 1 ? std::min(cut.tiles, gpu.sms * blocks) : std::int64_t{cut.tiles} * cluster;
  plan.grid_y = 1;
  plan.threads = kSm90Threads;
  plan.shared_bytes = cut.bytes();
  return plan;
}

/// Cycles that a plan may take, to compare it with others. Matrix units multiply 64 x 64 x 8 in 16 cycles; two warp
/// groups need some 160 for a slice's codes; 1500 go by before a tile's first product, as many while blocks exchange
/// its sums. Estimates, not measured.
constexpr std::int64_t sm90_cycles(const CudaProblem& p, const Gpu& gpu, int tokens, int cluster) {
  const Sm90Cut cut(p, tokens, 1, cluster);
  const std::int64_t rounds = core::ceil_div(std::int64_t{cut.tiles} * cluster, gpu.sms);
  const std::int64_t slices = core::ceil_div(cut.steps, cluster) * sm90_slices(tokens);
  return rounds * (slices * (std::max(160, 4 * tokens) + 40) + (cluster == 1 ? 1500 : 3000));
}

/// For a call that gemm_sm90_can take: the tiles and clusters of fewest cycles. Blocks share k (clusters) where there
/// are too few tiles for the multiprocessors. Rounded weights are what dequantize gives only if scales have x's type;
/// and beyond k there are none, while the kernel makes some of code 0, which might overflow.
constexpr CudaPlan gemm_sm90_plan(const CudaProblem& p, const Gpu& gpu) {
  int best_tokens = kSm90Tokens[0], best_cluster = 1;
  for (const int tokens : kSm90Tokens) {
    if (tokens > kSm90Exact && (p.scale_type != p.x_type || p.k % kSm90Slice != 0)) break;
    for (const int cluster : kSm90Clusters)
      if (sm90_cycles(p, gpu, tokens, cluster) < sm90_cycles(p, gpu, best_tokens, best_cluster))
        best_tokens = tokens, best_cluster = cluster;
  }
  return sm90_plan(p, gpu, best_tokens, best_cluster);
}

/// body.operator()<x's type, tokens>(), if there is an instance of the kernel with so many; whether there is.
template <class Body>
bool with_gemm_sm90(int tokens, DType x_type, const Body& body) {
  bool found = false;
  with_x_type(x_type, [&]<DType kType>() {
    [&]<std::size_t... kI>(std::index_sequence<kI...>) {
      ((tokens == kSm90Tokens[kI] ? (body.template operator()<kType, kSm90Tokens[kI]>(), found = true) : false), ...);
    }(std::make_index_sequence<std::size(kSm90Tokens)>{});
  });
  return found;
}

}  // namespace awq::cuda
