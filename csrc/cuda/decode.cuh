// The decode kernel: y = x W^T for at most 16 rows of x, on every GPU since sm_75. Reading W is nearly all the work
// there is: it is read once, and as much of it as possible is under way at any time.
//
// A block has `strips` strips of 16 rows of W. Its eight warps are parts x strips: warp (part, strip) takes every
// parts-th step of 64 along k of its strip. The 16 bytes that a lane has of a step are the first operand of four
// products of 16 x 16 codes by 8 or 16 rows of x ("tokens"), which come from two stages of shared memory. Codes are
// multiplied as q - z, without error (dequant.cuh), and summed in float32; each group's sum is multiplied by its scale
// once, in float32. Parts of k, in a block, then in a cluster or by reduce.cuh, are added in a fixed order: the same
// bytes every time.
//
// Each lane has kDecodeAhead copies of its own 16 bytes under way, in a circle in shared memory. In registers they
// would not be: a warp waits for loads by six counters, for each until all loads on it have ended (Jia et al.,
// Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, on control information), so that the oldest
// load of a circle is waited for together with the youngest on its counter. Groups of asynchronous copies end in order.
#pragma once
#include <bit>
#include <cmath>

#include "../core/layout.h"
#include "../core/linear.h"
#include "decode.h"
#include "dequant.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "unrolled.cuh"

namespace awq::cuda {

/// What part of W a warp multiplies: `count` steps, the i-th of them step first + i * parts of k, of one strip. All
/// that counts along k, and blocks, fit 32 bits (decode.h).
struct DecodeShare {
  int strip, parts, part;
  std::uint32_t row;      // of W, the first of the strip
  int rank;               // of the block, of those that share k
  int begin, end, steps;  // of the block, and all
  int first, count;       // of the warp

  AWQ_DEVICE DecodeShare(const core::LinearArgs& a, const DecodeCut& cut) {
    const int warp = ptx::thread() / 32;
    const auto block = static_cast<std::uint32_t>(ptx::block_x());
    strip = warp & ((1 << cut.strips_log) - 1), parts = decode_parts(cut.strips_log), part = warp >> cut.strips_log;
    row = ((block >> cut.splits_log << cut.strips_log) + static_cast<std::uint32_t>(strip)) * core::kFragmentRows;
    rank = static_cast<int>(block & ((1u << cut.splits_log) - 1));
    steps = static_cast<int>((static_cast<std::uint32_t>(a.k) + kDecodeStep - 1) / kDecodeStep);
    begin = steps * rank >> cut.splits_log, end = steps * (rank + 1) >> cut.splits_log;
    first = begin + part;
    count = row < a.n && first < end ? (end - first + parts - 1) >> (3 - cut.strips_log) : 0;
  }
};

/// Begins to copy one stage of x: kDecodeAhead * parts steps from `step` on, of all rows, zeros behind the end of k.
/// Piece c (16 bytes) of row i lies at c ^ i % 8, so that the eight rows of a matrix are in distinct banks. Steps from
/// `end` on are not touched.
AWQ_DEVICE void copy_stage(const core::LinearArgs& a, ptx::Shared stage, int pieces_log, int step, int end) {
  const auto* const x = static_cast<const std::uint16_t*>(a.x) + std::int64_t{step} * kDecodeStep;
  const int left = static_cast<int>(a.k) - step * kDecodeStep;
#pragma unroll 1
  for (int i = ptx::thread(); i < static_cast<int>(a.m) << pieces_log; i += kDecodeThreads) {
    const int row = i >> pieces_log, piece = i & ((1 << pieces_log) - 1), count = left - piece * 8;
    if (step + piece / 8 < end)
      ptx::copy_async(stage + static_cast<ptx::Shared>(i ^ (row & 7)) * 16,
                      x + row * a.x_stride + (count > 0 ? piece * 8 : 0),
                      count < 0   ? 0
                      : count < 8 ? count * 2
                                  : 16);
  }
}

/// Scales and zeros of the two rows of a lane, r and r + 8 of a strip. Four lanes have the same two rows: each loads
/// those of another unit (kUnit along k, in one group), and when a unit is multiplied, all four get them from that
/// lane.
template <int kUnit>
class DecodeGroups {
 public:
  static constexpr int kUnits = kDecodeStep / kUnit;  // of a step

  AWQ_DEVICE DecodeGroups(const core::LinearArgs& a, const DecodeCut& cut, const DecodeShare& share)
      : stride_(4 * share.parts),
        reciprocal_(cut.reciprocal),
        wide_(a.scale_type == DType::f32),
        half_(a.scale_type == DType::f16),
        with_zeros_(a.qzeros != nullptr) {
    const int t = ptx::thread() % 4, r = ptx::thread() % 32 / 4, size = wide_ ? 4 : 2;
    const int units = static_cast<int>((a.k + kUnit - 1) / kUnit), end = share.end * kUnits;
    unit_ = (share.first + t / kUnits * share.parts) * kUnits + t % kUnits;
    end_ = share.count == 0 ? 0 : end < units ? end : units;

    const std::int64_t groups = cut.groups, column = share.row + r,
                       place = core::fragment_scale(a.n, groups, 0, column);
    scales_ = static_cast<const char*>(a.scales) + place * size;
    scale_stride_ = static_cast<std::uint32_t>(core::fragment_scale(a.n, groups, 1, column) - place) * size;
    // In a strip of eight rows there is no r + 8; anything may stand for it.
    high_ = share.row + 16 <= a.n ? size : 0;
    zeros_ = reinterpret_cast<const std::uint8_t*>(a.qzeros) + share.row / core::kPanelColumns * groups * kZeroBytes +
             share.row % core::kPanelColumns / 2 + r;
  }

  /// Begins to load the next four units.
  AWQ_DEVICE void load() {
    Raw raw{0, 0, kSymmetricZeros};
    if (unit_ < end_) {
      const auto g = static_cast<std::uint32_t>(std::uint64_t{static_cast<std::uint32_t>(unit_)} * reciprocal_ >> 31);
      const char* const low = scales_ + std::uint64_t{g} * scale_stride_;
      if (wide_) {
        raw.low = ptx::load_constant(reinterpret_cast<const std::uint32_t*>(low));
        raw.high = ptx::load_constant(reinterpret_cast<const std::uint32_t*>(low + high_));
      } else {
        raw.low = ptx::load_constant(reinterpret_cast<const std::uint16_t*>(low));
        raw.high = ptx::load_constant(reinterpret_cast<const std::uint16_t*>(low + high_));
      }
      if (with_zeros_) raw.zeros = ptx::load_constant(zeros_ + std::uint64_t{g} * kZeroBytes);
    }
    raw_ = raw;
    unit_ += stride_;
  }

  /// From here on unit() is about those.
  AWQ_DEVICE void take() { now_ = {to_float(raw_.low), to_float(raw_.high), raw_.zeros}; }

  struct Unit {
    float low, high;
    std::uint32_t zeros;
  };
  AWQ_DEVICE Unit unit(int of_four) const {
    const int lane = (ptx::thread() % 32 & ~3) + of_four;
    return {ptx::shuffle(now_.low, lane), ptx::shuffle(now_.high, lane), ptx::shuffle(now_.zeros, lane)};
  }

 private:
  static constexpr int kZeroBytes = core::kFragmentZeros.tile_words() * 4;

  AWQ_DEVICE float to_float(std::uint32_t bits) const {
    const float half = ptx::to_float<DType::f16>(static_cast<std::uint16_t>(bits));
    return half_ ? half : std::bit_cast<float>(wide_ ? bits : bits << 16);
  }

  struct Raw {
    std::uint32_t low, high, zeros;
  };
  int stride_, unit_, end_;                         // of this lane's units
  std::uint32_t reciprocal_, scale_stride_, high_;  // bytes from group to group, and to the scale of r + 8
  bool wide_, half_, with_zeros_;
  const char* scales_;  // of r, in group 0
  const std::uint8_t* zeros_;
  Raw raw_;
  Unit now_;
};

/// The end: sums of a lane (those of mma), of this warp, become sums of the block, of all that share k, and y.
template <DType kType, int kTiles>
AWQ_DEVICE void decode_finish(const core::LinearArgs& a, const DecodeCut& cut, const DecodeShare& share,
                              ptx::Shared shared, const float (&sum)[kTiles][4], float* partials) {
  const int lane = ptx::thread() % 32, m = static_cast<int>(a.m);
  const int strips = 1 << cut.strips_log, splits = 1 << cut.splits_log;
  // [part][strip][token][row of W], where the warp had its words.
  const auto place = [&](int part, int token, int row) {
    const int warp = part * strips + row / 16;
    return shared + static_cast<ptx::Shared>(warp * kDecodeAhead * 512 + (token * kDecodeSumStride + row % 16) * 4);
  };
  ptx::sync_warp();  // its lanes have read their words
  for (int tile = 0; tile < kTiles; ++tile)
    for (int i = 0; i < 4; ++i) {
      const int token = tile * 8 + lane % 4 * 2 + i % 2, row = share.strip * 16 + lane / 4 + i / 2 * 8;
      ptx::store_shared(place(share.part, token, row), sum[tile][i]);
    }
  ptx::sync_threads();

  // f(token, row) for four neighbouring rows of W at a time, each by one thread.
  const auto for_fours = [&](int begin, int by, auto f) {
#pragma unroll 1
    for (int i = begin; i < m * strips * 4; i += by) f(i >> (cut.strips_log + 2), (i & (strips * 4 - 1)) * 4);
  };
  const auto add = [](float(&total)[4], const Vector& four) {
    for (int i = 0; i < 4; ++i) total[i] += std::bit_cast<float>(four.word[i]);
  };
  const std::int64_t column = share.row - static_cast<std::uint32_t>(share.strip) * 16;
  const bool cluster = splits > 1 && partials == nullptr;
  for_fours(ptx::thread(), kDecodeThreads, [&](int token, int row) {
    float total[4] = {};
    for (int part = 0; part < share.parts; ++part) add(total, ptx::load_shared<Vector>(place(part, token, row)));
    Vector four;
    for (int i = 0; i < 4; ++i) four.word[i] = std::bit_cast<std::uint32_t>(total[i]);
    if (cluster)
      ptx::store_shared(place(0, token, row), four);
    else if (column + row < a.n && partials == nullptr)
      store_four<kType>(a, token, column + row, total);
    else if (column + row < a.n)
      ptx::store(reinterpret_cast<Vector*>(partials + (share.rank * a.m + token) * a.n + column + row), four);
  });
  if (!cluster) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  // The blocks take turns.
  for_fours(ptx::thread() + share.rank * kDecodeThreads, splits * kDecodeThreads, [&](int token, int row) {
    float total[4] = {};
    for (int rank = 0; rank < splits; ++rank) add(total, ptx::load_cluster<Vector>(place(0, token, row), rank));
    if (column + row < a.n) store_four<kType>(a, token, column + row, total);
  });
  ptx::cluster_arrive();
  ptx::cluster_wait();  // nobody reads this block's sums any more
}

/// kTiles tiles of eight tokens; kUnit: what is sure to be in one group (64 also for one group of any size).
/// Blocks that share k are neighbours along x: a cluster, or any blocks that leave their sums in partials
/// [splits][m][n].
template <DType kType, int kTiles, int kUnit>
AWQ_DEVICE void decode_body(const core::LinearArgs& a, const DecodeCut& cut, float* partials) {
  static_assert(kUnit == 16 || kUnit == 32 || kUnit == 64);
  const int lane = ptx::thread() % 32, m = static_cast<int>(a.m), pieces_log = decode_pieces_log(cut.strips_log);
  const DecodeShare share(a, cut);
  const ptx::Shared shared = ptx::dynamic_shared();
  const auto stage = [&](int i) {
    return shared + kDecodeX + static_cast<ptx::Shared>(i % kDecodeStages * m << (pieces_log + 4));
  };

  // The circle: [slot][lane] of this warp. A lane reads what it has copied itself, and needs no barrier for that.
  const ptx::Shared words = shared + static_cast<ptx::Shared>((ptx::thread() / 32 * kDecodeAhead * 32 + lane) * 16);
  const auto* next = reinterpret_cast<const Vector*>(a.qweight) +
                     (share.row / core::kPanelColumns * share.steps + share.first) * 128 +
                     share.row % core::kPanelColumns * 2 + lane;
  const auto copy_step = [&](auto s) {
    ptx::copy_async(words + s * 512, next, 16);
    next += share.parts * 128;
  };

  // W is nobody's output, and may be read before earlier kernels have ended. Copies are waited for in order, group by
  // group: group i is step i, and the first of a stage's groups is also the stage of x.
  constexpr int kBefore = kDecodeAhead / 2;
  unrolled<kBefore>([&](auto s) {
    if (s < share.count) copy_step(s);
  });
  DecodeGroups<kUnit> groups(a, cut, share);
  groups.load();
  ptx::wait_for_earlier_kernels();
  copy_stage(a, stage(0), pieces_log, share.begin, share.end);
  unrolled<kDecodeAhead>([&](auto s) {
    if (s >= kBefore && s < share.count) copy_step(s);
    ptx::copy_async_commit();
  });
  const ptx::Shared zeros = shared + decode_zeros(m, cut.strips_log);
  if (m % 8 != 0 && ptx::thread() < 8) ptx::store_shared(zeros + ptx::thread() * 16, Vector{});
  ptx::let_next_kernel_start();

  // Row lane % 8 of matrix lane / 8 of a tile of x: matrices 0 .. 3 are 8 values along k each. Rows from m on are
  // zeros.
  const ptx::Shared piece = static_cast<ptx::Shared>(lane / 8 ^ lane % 8) * 16;
  float sum[kTiles][4] = {};
  ptx::Shared x[kTiles], x_step[kTiles];

  const auto step = [&](auto s, bool more) {
    ptx::copy_async_wait<kDecodeAhead - 1>();
    const auto w = ptx::load_shared<Vector>(words + s * 512);
    std::uint32_t b[kTiles][2][4];
    for (int tile = 0; tile < kTiles; ++tile) {
      ptx::load_matrices(b[tile][0], x[tile]);
      ptx::load_matrices(b[tile][1], x[tile] ^ 64);
      x[tile] += x_step[tile];
    }
    constexpr int kUnits = kDecodeStep / kUnit, kWords = 4 / kUnits;
    unrolled<kUnits>([&](auto u) {
      constexpr int kOfFour = (s * kUnits + u) % 4;
      if constexpr (kOfFour == 0) groups.take();
      const auto unit = groups.unit(kOfFour);
      if constexpr (kOfFour == 0) groups.load();
      const ZeroPair zero = zero_pair<kType>(unit.zeros);
      float d[kTiles][4] = {};
      unrolled<kWords>([&](auto v) {
        constexpr int kWord = u * kWords + v;
        std::uint32_t codes[4];
        dequantize_word<kType>(w.word[kWord], zero, codes);
        for (int tile = 0; tile < kTiles; ++tile) {
          const std::uint32_t(&matrices)[4] = b[tile][kWord / 2];
          const std::uint32_t pair[2] = {matrices[kWord % 2 * 2], matrices[kWord % 2 * 2 + 1]};
          ptx::mma<kType>(d[tile], codes, pair);
        }
      });
      for (int tile = 0; tile < kTiles; ++tile)
        for (int i = 0; i < 4; ++i) sum[tile][i] = std::fma(d[tile][i], i < 2 ? unit.low : unit.high, sum[tile][i]);
    });
    if (more) copy_step(s);
  };

  const int stage_steps = kDecodeAhead * share.parts;
  int left = share.count;
  for (int c = 0; share.begin + c * stage_steps < share.end; ++c) {
    ptx::copy_async_wait<kDecodeAhead - 1>();
    ptx::sync_threads();  // stage c is full, and c - 1 is not used any more
    copy_stage(a, stage(c + 1), pieces_log, share.begin + (c + 1) * stage_steps, share.end);
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = tile * 8 + lane % 8;
      const ptx::Shared begin = stage(c) + (static_cast<ptx::Shared>(row) << (pieces_log + 4)) + share.part * 128;
      x[tile] = piece + (row < m ? begin : zeros);
      x_step[tile] = row < m ? share.parts * 128 : 0;
    }
    unrolled<kDecodeAhead>([&](auto s) {
      if (s < left) step(s, s + kDecodeAhead < left);
      ptx::copy_async_commit();
    });
    left -= kDecodeAhead;
  }
  decode_finish<kType>(a, cut, share, shared, sum, partials);
}

}  // namespace awq::cuda
