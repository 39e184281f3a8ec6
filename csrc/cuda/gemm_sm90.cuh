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
#include "unrolled.cuh"

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
  static constexpr int kMultiplying = 128 * kSm90Panels;        // threads
  using Sums = float[kTokens / 2];                              // of one of these, see wgmma
  using Weights = std::uint32_t[4][4];                          // of a slice, for four wgmma
  static constexpr int kSlices = sm90_slices(kTokens);          // of a step
  static constexpr int kSliceBytes = kTokens * kSm90Slice * 2;  // of x

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
          for (int i = 0; i < kSlices; ++i)
            ptx::copy_tensor(at(cut_.x(turn.stage) + i * kSliceBytes), map_, first_token,
                             (step * kSlices + i) * kSm90Slice, full);
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
      return piece_of(a_.qweight, panel, cut_.slices * std::int64_t{kSm90Codes}, kSlices * kSm90Codes,
                      (cut_.slices - (cut_.steps - 1) * kSlices) * kSm90Codes, 1, to);
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
      if (cut_.step_groups == 1)
        multiply<true>(columns(existing(panel)), turn, sums);
      else
        multiply<false>(columns(existing(panel)), turn, sums);
      const Bias bias = biases(panel);
      if (cut_.cluster == 1) {
        for (int i = 0; i < kTokens / 8; ++i) finish(panel, first_token + 8 * i, bias, eight(sums, i));
      } else {
        add_and_finish(panel, first_token, bias, sums);
      }
    });
  }

  /// Where a thread finds in a panel's part of a stage what it needs for its two rows.
  struct Places {
    int codes, zeros, scales;
    int zero_shift, scale_shift;  // of the word there
  };

  AWQ_DEVICE Places places(int columns) const {
    const int strip = row() / 16 * 16, r = row() % 16, zero = strip / 2 + r;
    // See core::fragment_scale: two rows of a whole strip are neighbours. In half a strip there is no second row; what
    // is beyond has the scales of the first rows, since the place must hold some.
    const int scale = strip + 16 <= columns ? strip + 2 * r : strip < columns ? strip + r : 0;
    return {ptx::thread() % 128 * 16, cut_.zeros + zero / 4 * 4, cut_.scales + scale / 2 * 2 * cut_.scale_bytes,
            zero % 4 * 8, scale % 2 * 16};
  }

  /// Of a group, for the rows of a thread.
  struct Parameters {
    ZeroPair zero;
    std::uint32_t scale[2];  // twice each, in 16 bits
  };

  /// While the matrix units work at a slice, the next one's weights are half made. kOneGroup: no step meets two groups.
  template <bool kOneGroup>
  AWQ_DEVICE void multiply(int columns, Sm90Turn& turn, Sums& sums) const {
    const Places places = this->places(columns);
    Weights w, codes;
    Sums part;
    Parameters of_group;
    const auto begin = [&](int step, int slice, Sm90Turn at_turn) {
      if (slice == 0) ptx::barrier_wait(at(cut_.full(at_turn.stage)), at_turn.parity);
      load_codes(step, slice, at_turn.stage, places, codes);
      if (begins<kOneGroup>(4 * slice))
        of_group = parameters(at_turn.stage, places, group_of<kOneGroup>(step, 4 * slice), columns);
    };
    if (first_step_ != end_step_) begin(first_step_, 0, turn);
    for (int step = first_step_; step != end_step_; ++step) {
      const Sm90Turn after = turn.next(cut_.stages);
      unrolled<kSlices>([&](auto slice) {
        for (int i = 0; i < 4; ++i) {
          const int sixteen = 4 * slice + i;
          if (i != 0 && begins<kOneGroup>(sixteen))
            of_group = parameters(turn.stage, places, group_of<kOneGroup>(step, sixteen), columns);
          for (int j = 0; j < 4; ++j) {
            w[i][j] = ptx::sub_pair<kType>(codes[i][j], of_group.zero.row[j % 2]);
            if constexpr (!kExact) w[i][j] = ptx::mul_pair<kType>(w[i][j], of_group.scale[j % 2]);
          }
        }
        const std::uint64_t x = ptx::wgmma_descriptor(at(cut_.x(turn.stage) + slice * kSliceBytes));
        if constexpr (kOneGroup) ptx::wgmma_fence();
        for (int i = 0; i < 4; ++i) {
          const int sixteen = 4 * slice + i;
          if constexpr (!kOneGroup) ptx::wgmma_fence();
          if constexpr (kExact)
            ptx::wgmma<kType, kTokens>(part, w[i], x + static_cast<unsigned>(2 * i), !begins<kOneGroup>(sixteen));
          else
            ptx::wgmma<kType, kTokens>(sums, w[i], x + static_cast<unsigned>(2 * i), true);
          if (i == 3 || !kOneGroup) ptx::wgmma_commit();
          if constexpr (kExact)
            if (i != 3 && begins<kOneGroup>(sixteen + 1))
              add_part<kOneGroup>(step, sixteen, turn.stage, places, columns, part, sums);
        }
        if (slice + 1 != kSlices)
          begin(step, slice + 1, turn);
        else if (step + 1 != end_step_)
          begin(step + 1, 0, after);
        if constexpr (kExact) {
          if (begins<kOneGroup>(4 * slice + 4)) {
            add_part<kOneGroup>(step, 4 * slice + 3, turn.stage, places, columns, part, sums);
          } else {
            ptx::wgmma_wait<0>();
            ptx::wgmma_settle(part);
          }
        } else {
          ptx::wgmma_wait<0>();
          ptx::wgmma_settle(sums);
        }
        for (int i = 0; i < 4; ++i) ptx::wgmma_settle(w[i], shared_);
      });
      ptx::sync_warp();
      if (lane() == 0) ptx::barrier_arrive(at(cut_.empty(turn.stage)));
      turn = after;
    }
  }

  /// The codes of a slice, with the offsets that zeros have too.
  AWQ_DEVICE void load_codes(int step, int slice, int stage, const Places& places, Weights& codes) const {
    // There may be half a step at the end of k. Its other half are zeros of x, and codes are any.
    const bool there = slice == 0 || step * kSlices + slice < cut_.slices;
    const auto words =
        ptx::load_shared<Vector>(at(cut_.panel(stage, group()) + places.codes + (there ? slice * kSm90Codes : 0)));
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) {
        codes[i][2 * j] = offset_codes<kType, false>(words.word[i] >> (8 * j));
        codes[i][2 * j + 1] = offset_codes<kType, true>(words.word[i] >> (8 * j));
      }
  }

  AWQ_DEVICE Parameters parameters(int stage, const Places& places, int g, int columns) const {
    Parameters p;
    const ptx::Shared panel = at(cut_.panel(stage, group()));
    std::uint32_t zeros = kSymmetricZeros;
    if (a_.qzeros != nullptr)
      zeros = ptx::load_shared<std::uint32_t>(panel + places.zeros + g * (kSm90Panel / 2)) >> places.zero_shift & 0xffu;
    p.zero = zero_pair<kType>(zeros);
    if constexpr (!kExact) {
      const auto pair = ptx::load_shared<std::uint32_t>(panel + places.scales + g * columns * 2) >> places.scale_shift;
      p.scale[0] = (pair & 0xffffu) * 0x10001u;
      p.scale[1] = (pair >> 16) * 0x10001u;
    }
    return p;
  }

  /// Once the matrix units have done a group's part of a step, of which the number `sixteen` is the last: sums += s
  /// part.
  template <bool kOneGroup>
  AWQ_DEVICE void add_part(int step, int sixteen, int stage, const Places& places, int columns, Sums& part,
                           Sums& sums) const {
    const ptx::Shared from = at(cut_.panel(stage, group())) + places.scales +
                             group_of<kOneGroup>(step, sixteen) * columns * cut_.scale_bytes;
    float s[2];
    if (a_.scale_type == DType::f32) {
      const auto pair = ptx::load_shared<std::uint64_t>(from) >> (2 * places.scale_shift);
      s[0] = std::bit_cast<float>(static_cast<std::uint32_t>(pair));
      s[1] = std::bit_cast<float>(static_cast<std::uint32_t>(pair >> 32));
    } else {
      const auto pair = ptx::load_shared<std::uint32_t>(from) >> places.scale_shift;
      const auto low = static_cast<std::uint16_t>(pair), high = static_cast<std::uint16_t>(pair >> 16);
      const bool half = a_.scale_type == DType::f16;
      s[0] = half ? ptx::to_float<DType::f16>(low) : ptx::to_float<DType::bf16>(low);
      s[1] = half ? ptx::to_float<DType::f16>(high) : ptx::to_float<DType::bf16>(high);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(part);
    for (int j = 0; j < kTokens / 2; ++j) sums[j] = std::fma(s[j % 4 / 2], part[j], sums[j]);
  }

  // A step is cut into pieces of 16, what a wgmma takes, numbered from 0. Whether a group begins with such a one (or
  // the next step, after the last), and which of the step's groups it belongs to: what is beyond k meets zeros of x,
  // but the group must be one that exists.
  template <bool kOneGroup>
  AWQ_DEVICE bool begins(int sixteen) const {
    return sixteen * (kOneGroup ? 1 : cut_.step_groups) % (4 * kSlices) == 0;
  }
  template <bool kOneGroup>
  AWQ_DEVICE int group_of(int step, int sixteen) const {
    if constexpr (kOneGroup) return 0;
    const int here = sixteen * cut_.step_groups / (4 * kSlices), last = cut_.groups - 1 - step * cut_.step_groups;
    return here < last ? here : last;
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
  const TensorMap* map_;  // of x, in boxes of kTokens rows and one slice
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
