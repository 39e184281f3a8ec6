// y = x W^T + bias for more than a few rows of x, on sm_90a. Of three warp groups one asks the copy engines for what
// the others need, a step of k at a time; these turn codes into the first operand of wgmma in their registers, 64 rows
// of W each, and multiply it with x where the copies have put it.
//
// Up to kSm90Exact rows of x, W is q - z, exact in 16 bits, and what a group adds is multiplied by s in float32. With
// more rows the matrix units set the pace, and W is s (q - z), rounded to 16 bits once: what dequantize gives.
#pragma once
#include <array>
#include <cmath>

#include "dequant.cuh"
#include "gemm_sm90.h"
#include "reduce.cuh"

namespace awq::cuda {

/// A stage of the ring, and the parity of the phase that its barriers are in.
struct Sm90Turn {
  int stage = 0, parity = 0;

  AWQ_DEVICE Sm90Turn next(int stages) const {
    return stage + 1 == stages ? Sm90Turn{0, parity ^ 1} : Sm90Turn{stage + 1, parity};
  }
};

/// A run of memory of which a lane copies `piece` bytes in every so many steps; the last piece may be shorter.
struct Sm90Run {
  const char* from;
  int piece, last, steps;
  int to;    // in the first stage
  int left;  // steps that this piece is still for
};

template <DType kType, int kTokens>
class GemmSm90 {
 public:
  AWQ_DEVICE GemmSm90(const core::LinearArgs& args, const Sm90Cut& cut, const TensorMap* map)
      : a_(args),
        cut_(cut),
        map_(map),
        shared_(ptx::dynamic_shared()),
        rank_(cut.cluster == 1 ? 0 : ptx::cluster_rank()),
        first_step_(cut.steps * rank_ / cut.cluster),
        end_step_(cut.steps * (rank_ + 1) / cut.cluster) {}

  AWQ_DEVICE void run() const {
    if (ptx::thread() == 0) {
      for (int stage = 0; stage < cut_.stages; ++stage) {
        ptx::barrier_init(at(cut_.full(stage)), copying_lanes());
        ptx::barrier_init(at(cut_.empty(stage)), kMultiplying / 32);
      }
      ptx::fence_barriers();
    }
    ptx::sync_threads();
    if (ptx::thread() < kMultiplying) {
      ptx::take_registers<sm90_multiply_registers(kTokens)>();
      multiply_all();
    } else {
      ptx::give_registers<sm90_copy_registers(kTokens)>();
      if (ptx::thread() < kMultiplying + copying_lanes()) copy_all();
      ptx::sync_warp();
      if (cut_.cluster != 1) meet(), meet();
    }
  }

 private:
  static constexpr bool kExact = kTokens <= kSm90Exact;
  static constexpr int kMultiplying = 128 * kSm90Panels;  // threads
  using Sums = float[kTokens / 2];                        // of one of these, see wgmma
  using Weights = std::uint32_t[4][4];                    // of a step, for four wgmma

  AWQ_DEVICE ptx::Shared at(int offset) const { return shared_ + static_cast<ptx::Shared>(offset); }

  /// All threads of all blocks of the cluster.
  AWQ_DEVICE static void meet() {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  /// The last tile may have one panel only. Both warp groups then multiply it, and one stores nothing.
  AWQ_DEVICE int existing(int panel) const { return panel < cut_.panels ? panel : cut_.panels - 1; }
  /// Columns of the scales of a panel.
  AWQ_DEVICE int columns(int panel) const {
    const std::int64_t rest = a_.n - std::int64_t{panel} * kSm90Panel;
    return rest < kSm90Panel ? static_cast<int>(rest) : kSm90Panel;
  }

  /// Calls work(first panel, first row of x) for the tiles of this block: every so many that there are blocks, or one
  /// tile of a cluster. Tiles are numbered along x first, so that those under way at a time share weights.
  template <class Work>
  AWQ_DEVICE void for_tiles(Work work) const {
    const auto blocks = static_cast<int>(ptx::grid_x()) / cut_.cluster;
    for (int tile = static_cast<int>(ptx::block_x()) / cut_.cluster; tile < cut_.tiles; tile += blocks)
      work(tile / cut_.token_tiles * kSm90Panels, tile % cut_.token_tiles * kTokens);
  }

  // --- lanes that copy: the first one x, each other its own part of a panel -----------------------------------------

  AWQ_DEVICE int copying_lanes() const { return 1 + kSm90Panels * (a_.qzeros == nullptr ? 2 : 3); }

  AWQ_DEVICE void copy_all() const {
    const int lane = ptx::thread() - kMultiplying;
    if (lane == 0) ptx::prefetch_tensor_map(map_);
    Sm90Turn turn{0, 1};  // of barriers that have never been used, the phase before the first one has ended
    for_tiles([&](int first_panel, int first_token) {
      Sm90Run run = run_of(lane, first_panel);
      for (int step = first_step_; step != end_step_; ++step, turn = turn.next(cut_.stages)) {
        const ptx::Shared full = at(cut_.full(turn.stage));
        ptx::barrier_wait(at(cut_.empty(turn.stage)), turn.parity);
        if (lane == 0) {
          ptx::barrier_expect(full, static_cast<std::uint32_t>(cut_.x_bytes));
          ptx::copy_tensor(at(cut_.x(turn.stage)), map_, first_token, step * kSm90Step, full);
        } else {
          const auto bytes = static_cast<std::uint32_t>(step + 1 == cut_.steps ? run.last : run.piece);
          ptx::barrier_expect(full, bytes);
          ptx::copy_bulk(at(run.to + turn.stage * kSm90Panels * cut_.panel_bytes), run.from, bytes, full);
          if (--run.left == 0) run.from += run.piece, run.left = run.steps;
        }
      }
    });
  }

  /// What lane 1, 2, ... copies of a tile: the first panel's codes and the second's, scales of each, zeros of each.
  AWQ_DEVICE Sm90Run run_of(int lane, int first_panel) const {
    const int i = (lane - 1) % kSm90Panels, part = (lane - 1) / kSm90Panels;
    const int panel = existing(first_panel + i), to = cut_.panel(0, i);
    if (part < 1)
      return piece_of(a_.qweight, panel, cut_.steps * std::int64_t{kSm90Codes}, kSm90Codes, kSm90Codes, 1, to);
    // Of a group; the last panel may have fewer columns of scales.
    const int full = part == 1 ? kSm90Panel * cut_.scale_bytes : kSm90Panel / 2;
    const int bytes = part == 1 ? columns(panel) * cut_.scale_bytes : full;
    const int last_groups = cut_.groups - (cut_.steps - 1) / cut_.group_steps * cut_.step_groups;
    return piece_of(part == 1 ? a_.scales : a_.qzeros, panel, cut_.groups * std::int64_t{full},
                    cut_.step_groups * bytes, last_groups * bytes, cut_.group_steps,
                    to + (part == 1 ? cut_.scales : cut_.zeros));
  }

  /// Of row `row` of a matrix, the piece of this block's first step.
  AWQ_DEVICE Sm90Run piece_of(const void* matrix, int row, std::int64_t stride, int piece, int last, int steps,
                              int to) const {
    const char* from = static_cast<const char*>(matrix) + row * stride + first_step_ / steps * std::int64_t{piece};
    return {from, piece, last, steps, to, steps - first_step_ % steps};
  }

  // --- warp groups that multiply ------------------------------------------------------------------------------------

  AWQ_DEVICE static int group() { return ptx::thread() / 128; }
  AWQ_DEVICE static int lane() { return ptx::thread() % 32; }
  /// The first of this thread's two rows in its panel; the other is eight further.
  AWQ_DEVICE static int row() { return ptx::thread() / 32 % 4 * 16 + lane() / 4; }

  AWQ_DEVICE void multiply_all() const {
    Sm90Turn turn;
    for_tiles([&](int first_panel, int first_token) {
      const int panel = first_panel + group();
      Sums sums = {};
      multiply(columns(existing(panel)), turn, sums);
      const Bias bias = biases(panel);
      if (cut_.cluster == 1) {
        for (int i = 0; i < kTokens / 8; ++i) finish(panel, first_token + 8 * i, bias, eight(sums, i));
      } else {
        add_and_finish(panel, first_token, bias, sums);
      }
    });
  }

  /// While the matrix units work at a step, the next one's weights are made.
  AWQ_DEVICE void multiply(int columns, Sm90Turn& turn, Sums& sums) const {
    Weights w, next;
    Sums part;
    if (first_step_ != end_step_) prepare(first_step_, turn, columns, next);
    for (int step = first_step_; step != end_step_; ++step) {
      const ptx::Shared panel = at(cut_.panel(turn.stage, group()));
      const std::uint64_t x = ptx::wgmma_descriptor(at(cut_.x(turn.stage)));
      const auto add_part = [&](int i) {
        const float s[2] = {scale(panel, group_of(step, i), columns, row()),
                            scale(panel, group_of(step, i), columns, row() + 8)};
        ptx::wgmma_wait<0>();
        ptx::wgmma_settle(part);
        for (int j = 0; j < kTokens / 2; ++j) sums[j] = std::fma(s[j % 4 / 2], part[j], sums[j]);
      };
      for (int i = 0; i < 16; ++i) w[i / 4][i % 4] = next[i / 4][i % 4];
      for (int i = 0; i < 4; ++i) {
        ptx::wgmma_fence();
        if constexpr (kExact)
          ptx::wgmma<kType, kTokens>(part, w[i], x + static_cast<unsigned>(2 * i), !begins(i));
        else
          ptx::wgmma<kType, kTokens>(sums, w[i], x + static_cast<unsigned>(2 * i), true);
        ptx::wgmma_commit();
        if constexpr (kExact)
          if (i != 3 && begins(i + 1)) add_part(i);
      }
      const Sm90Turn after = turn.next(cut_.stages);
      if (step + 1 != end_step_) prepare(step + 1, after, columns, next);
      if constexpr (kExact) {
        add_part(3);
      } else {
        ptx::wgmma_wait<0>();
        ptx::wgmma_settle(sums);
      }
      ptx::sync_warp();
      if (lane() == 0) ptx::barrier_arrive(at(cut_.empty(turn.stage)));
      turn = after;
    }
  }

  /// The weights of a step, once they have come.
  AWQ_DEVICE void prepare(int step, Sm90Turn turn, int columns, Weights& w) const {
    ptx::barrier_wait(at(cut_.full(turn.stage)), turn.parity);
    const ptx::Shared panel = at(cut_.panel(turn.stage, group()));
    const auto words = ptx::load_shared<Vector>(panel + static_cast<ptx::Shared>(ptx::thread() % 128 * 16));
    ZeroPair zero;
    std::uint32_t s[2];
    for (int i = 0; i < 4; ++i) {
      if (begins(i)) {
        const int g = group_of(step, i);
        zero = zeros(panel, g);
        if constexpr (!kExact)
          for (int half = 0; half < 2; ++half)
            s[half] = ptx::load_shared<std::uint16_t>(scale_place(panel, g, columns, row() + 8 * half)) * 0x10001u;
      }
      dequantize_word<kType>(words.word[i], zero, w[i]);
      if constexpr (!kExact)
        for (int j = 0; j < 4; ++j) w[i][j] = ptx::mul_pair<kType>(w[i][j], s[j % 2]);
    }
  }

  /// A step is four times 16 of k. Whether a group begins with number i (or the next step, i = 4).
  AWQ_DEVICE bool begins(int i) const { return i * cut_.step_groups % 4 == 0; }
  /// Which of the step's groups number i is in. What is beyond k meets zeros of x, but must not be NaN.
  AWQ_DEVICE int group_of(int step, int i) const {
    const int here = i * cut_.step_groups / 4, last = cut_.groups - 1 - step * cut_.step_groups;
    return cut_.step_groups == 1 || here < last ? here : last;
  }

  AWQ_DEVICE ZeroPair zeros(ptx::Shared panel, int g) const {
    if (a_.qzeros == nullptr) return zero_pair<kType>(kSymmetricZeros);
    const int byte = row() / 16 * 8 + row() % 8;
    const ptx::Shared word = panel + static_cast<ptx::Shared>(cut_.zeros + g * (kSm90Panel / 2) + byte / 4 * 4);
    return zero_pair<kType>(ptx::load_shared<std::uint32_t>(word) >> (byte % 4 * 8) & 0xffu);
  }

  /// See core::fragment_scale. Rows that do not exist share the scale of one that does.
  AWQ_DEVICE ptx::Shared scale_place(ptx::Shared panel, int g, int columns, int row) const {
    const int r = row % 16, strip = row - r;
    const int place = row >= columns ? 0 : columns - strip < 16 ? row : strip + r % 8 * 2 + r / 8;
    return panel + static_cast<ptx::Shared>(cut_.scales + (g * columns + place) * cut_.scale_bytes);
  }

  AWQ_DEVICE float scale(ptx::Shared panel, int g, int columns, int row) const {
    const ptx::Shared place = scale_place(panel, g, columns, row);
    if (a_.scale_type == DType::f32) return ptx::load_shared<float>(place);
    const auto bits = ptx::load_shared<std::uint16_t>(place);
    return a_.scale_type == DType::f16 ? ptx::to_float<DType::f16>(bits) : ptx::to_float<DType::bf16>(bits);
  }

  // --- sums become outputs ------------------------------------------------------------------------------------------

  /// This thread's sums of eight rows of x: of two of them, for each of its two rows of W.
  using Eight = std::array<float, 4>;
  using Bias = std::array<float, 2>;

  AWQ_DEVICE static Eight eight(const Sums& sums, int i) {
    return {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
  }

  AWQ_DEVICE Bias biases(int panel) const {
    const std::int64_t first = std::int64_t{panel} * kSm90Panel + row();
    const auto bias = [&](std::int64_t i) {
      return a_.bias == nullptr || i >= a_.n ? 0.0f : constant_as_float(a_.bias, a_.bias_type, i);
    };
    return {bias(first), bias(first + 8)};
  }

  /// The sums of the blocks of a cluster are added in their order; each block does a part of that.
  AWQ_DEVICE void add_and_finish(int panel, int first_token, const Bias& bias, const Sums& sums) const {
    const auto place = [&](int i) { return at((i * kMultiplying + ptx::thread()) * 16); };
    ptx::sync_some(1, kMultiplying);  // nobody needs the ring any more
    for (int i = 0; i < kTokens / 8; ++i) ptx::store_shared(place(i), eight(sums, i));
    meet();
    for (int i = rank_; i < kTokens / 8; i += cut_.cluster) {
      Eight sum{};
      for (int block = 0; block < cut_.cluster; ++block) {
        const auto part = ptx::load_cluster<Eight>(place(i), block);
        for (std::size_t j = 0; j < 4; ++j) sum[j] += part[j];
      }
      finish(panel, first_token + 8 * i, bias, sum);
    }
    meet();  // shared memory ends with its block
  }

  /// Two lanes with neighbouring rows of W exchange sums, so that each has neighbours in y, and the warp stores 16 of
  /// them, 32 bytes, in four rows of y at a time.
  AWQ_DEVICE void finish(int panel, int first_token, const Bias& bias, const Eight& sum) const {
    const std::uint32_t upper = ptx::round_pair<kType>(sum[0] + bias[0], sum[1] + bias[0]);
    const std::uint32_t lower = ptx::round_pair<kType>(sum[2] + bias[1], sum[3] + bias[1]);
    const bool odd = row() % 2 != 0;
    const std::uint32_t other = ptx::shuffle_xor(odd ? upper : lower, 4);
    const std::uint32_t left = odd ? other : upper, right = odd ? lower : other;
    const std::int64_t column = std::int64_t{panel} * kSm90Panel + row() + (odd ? 7 : 0);
    const std::int64_t token = first_token + lane() % 4 * 2;
    if (column >= a_.n) return;
    auto* y = static_cast<std::uint32_t*>(a_.y) + (token * a_.n + column) / 2;
    if (token < a_.m) ptx::store(y, (left & 0xffffu) | right << 16);
    if (token + 1 < a_.m) ptx::store(y + a_.n / 2, left >> 16 | (right & 0xffff0000u));
  }

  const core::LinearArgs& a_;
  const Sm90Cut& cut_;
  const TensorMap* map_;  // of x, in boxes of kTokens rows and one step
  ptx::Shared shared_;
  int rank_;                   // of this block in its cluster
  int first_step_, end_step_;  // of this block
};

/// In blocks of kSm90Threads: any number of them, or a cluster for each tile. cut is for kTokens.
template <DType kType, int kTokens>
AWQ_DEVICE void gemm_sm90_body(const core::LinearArgs& args, const Sm90Cut& cut, const TensorMap* map) {
  GemmSm90<kType, kTokens>(args, cut, map).run();
}

}  // namespace awq::cuda
