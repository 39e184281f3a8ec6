// The body of gemm_sm80; gemm_sm80.h says how the work is cut.
//
// Step after step, x, codes, scales and zeros come by asynchronous copies to a ring of stages in shared memory, some
// steps ahead of the products. What lies outside the matrices becomes zeros there: of x, because codes beyond k are
// padding and must add nothing, and of scales, because 0 times what happens to lie there could be NaN. Rows and tokens
// outside mix with no others; their sums are not stored. The weight and rows of x lie at multiples of 16 bytes.
#pragma once
#include <cmath>

#include "../core/linear.h"
#include "dequant.cuh"
#include "gemm_sm80.h"
#include "reduce.cuh"

namespace awq::cuda {

/// The groups of step after step, counted in quarters of steps: 16 k, which no two groups share.
struct GemmSm80Groups {
  int size;   // of a group
  int first;  // the group that the step begins in
  int left;   // what is left of that group when the step begins

  AWQ_DEVICE GemmSm80Groups(const core::LinearArgs& a, int step)
      : size(static_cast<int>(core::ceil_div(a.group, 16))), first(4 * step / size), left(size - 4 * step % size) {}

  /// To the next step; at most `most` groups end in one. A loop without that limit would become a division.
  AWQ_DEVICE void next(int most) {
    left -= 4;
    for (int i = 0; i < most; ++i)
      if (left <= 0) ++first, left += size;
  }
};

/// Copies a block's steps to stages, one after another. Each thread copies the codes that it will unpack itself, and
/// its share of x, scales and zeros for all.
template <GemmSm80 kCut>
class GemmSm80Copies {
 public:
  AWQ_DEVICE GemmSm80Copies(const core::LinearArgs& a, std::int64_t row, std::int64_t token, int step)
      : x_stride_(a.x_stride), groups_(a, step), group_count_(static_cast<int>(a.k) / static_cast<int>(a.group)) {
    // Eight threads a token, sixteen tokens at a time. Piece c of token i lies at piece c ^ (i % 8), so that eight
    // tokens' pieces that are read at once lie in distinct banks.
    const int thread = ptx::thread(), piece = thread % 8, first = thread / 8, k = step * GemmSm80::kStep + 8 * piece;
    x_ = static_cast<const std::uint16_t*>(a.x) + (token + first) * a.x_stride + k;
    x_to_ = first * 128 + (piece ^ first % 8) * 16;
    k_left_ = static_cast<int>(a.k) - k;
    tokens_left_ = static_cast<int>(a.m - token) - first;

    const std::int64_t panel = row / GemmSm80::kPanelRows, steps = core::ceil_div(a.k, GemmSm80::kStep);
    codes_ = a.qweight + (panel * steps + step) * kCodeWords + thread * 4;
    next_panel_ = row + GemmSm80::kPanelRows < a.n ? steps * kCodeWords : 0;

    const int size = core::size_of(a.scale_type);
    scales_ = share(a.scales, GemmSm80::kPanelRows * size, size, a.n, panel, kCut.scales_at());
    zeros_ = share(a.qzeros, GemmSm80::kZeroBytes, 0, a.n, panel, kCut.zeros_at());
  }

  AWQ_DEVICE void copy_step(ptx::Shared stage) {
    const int bytes = k_left_ >= 8 ? 16 : k_left_ > 0 ? 2 * k_left_ : 0;
    for (int i = 0; i < kCut.tokens; i += 16)
      ptx::copy_async(stage + x_to_ + i * 128, x_ + i * x_stride_, i < tokens_left_ ? bytes : 0);
    x_ += GemmSm80::kStep;
    k_left_ -= GemmSm80::kStep;

    const ptx::Shared codes = stage + kCut.codes_at() + ptx::thread() * 16;
    ptx::copy_async(codes, codes_, 16);
    ptx::copy_async(codes + GemmSm80::kCodeBytes, codes_ + next_panel_, next_panel_ > 0 ? 16 : 0);
    codes_ += kCodeWords;

    copy(stage, scales_);
    copy(stage, zeros_);
    groups_.next(kCut.groups());
  }

 private:
  static constexpr int kCodeWords = GemmSm80::kCodeBytes / 4;

  /// Sixteen bytes of the scales or the zeros of a group in a panel.
  struct Share {
    bool has;                   // a thread may have none
    bool inside;                // the matrix
    const unsigned char* from;  // those of the first group
    int pitch;                  // bytes from group to group
    int group;                  // in a step
    int to;                     // in a stage
  };

  /// Of a panel's `line` bytes a group; if it is the last panel, of `column` bytes a column, or of all.
  AWQ_DEVICE Share share(const void* data, int line, int column, std::int64_t n, std::int64_t panel, int to) {
    const int pieces = line / 16, i = ptx::thread() / pieces, offset = ptx::thread() % pieces * 16;
    const int p = i / kCut.groups(), group = i % kCut.groups();
    const std::int64_t columns = n - (panel + p) * GemmSm80::kPanelRows;
    Share s;
    s.has = data != nullptr && p < GemmSm80::kPanels;
    s.pitch = column > 0 && columns < GemmSm80::kPanelRows ? static_cast<int>(columns) * column : line;
    s.inside = columns > 0 && offset < s.pitch;
    s.from = static_cast<const unsigned char*>(data) + (s.inside ? (panel + p) * group_count_ * line + offset : 0);
    s.group = group;
    s.to = to + (p * kCut.groups() + group) * line + offset;
    return s;
  }

  AWQ_DEVICE void copy(ptx::Shared stage, const Share& s) {
    if (!s.has) return;
    const int g = groups_.first + s.group;
    const bool inside = s.inside && g < group_count_;
    ptx::copy_async(stage + s.to, s.from + (inside ? static_cast<std::int64_t>(g) * s.pitch : 0), inside ? 16 : 0);
  }

  const std::uint16_t* x_;
  std::int64_t x_stride_, next_panel_;
  const std::uint32_t* codes_;
  GemmSm80Groups groups_;
  int group_count_, x_to_, k_left_, tokens_left_;
  Share scales_, zeros_;
};

/// Where a lane finds what it needs in a stage.
template <GemmSm80 kCut>
struct GemmSm80Lane {
  int strip, r, t;  // of each panel; row and pair of columns in matrix fragments
  int x, codes, zeros;
  int scale[GemmSm80::kPanels];  // index, of row r; that of row r + 8 comes next

  AWQ_DEVICE GemmSm80Lane(std::int64_t rows_left) {
    const int thread = ptx::thread(), lane = thread % 32;
    strip = thread / 32, r = lane / 4, t = lane % 4;
    // Of load_matrices: eight tokens and the first, then the second eight k; eight more tokens.
    x = (lane / 16 * 8 + lane % 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16;
    codes = kCut.codes_at() + thread * 16;
    zeros = kCut.zeros_at() + (strip * 8 + r) / 4 * 4;
    for (int p = 0; p < GemmSm80::kPanels; ++p) {
      const bool whole = p * GemmSm80::kPanelRows + 16 * strip + 16 <= rows_left;  // see core::fragment_scale
      scale[p] = p * kCut.groups() * GemmSm80::kPanelRows + 16 * strip + (whole ? 2 * r : r);
    }
  }
};

AWQ_DEVICE float load_shared_float(core::DType type, ptx::Shared data, int i) {
  using core::DType;
  if (type == DType::f32) return ptx::load_shared<float>(data + 4 * i);
  const auto bits = ptx::load_shared<std::uint16_t>(data + 2 * i);
  return type == DType::f16 ? ptx::to_float<DType::f16>(bits) : ptx::to_float<DType::bf16>(bits);
}

/// Sums of a thread: of each panel, of each eight tokens, a fragment of mma.
template <int kTokens>
using GemmSm80Sums = float[GemmSm80::kPanels][kTokens / 8][4];

/// A block's sums -> y, or partials if blocks share k. By way of shared memory, because a lane has single rows of W,
/// which are neighbours in y.
template <core::DType kType, GemmSm80 kCut>
AWQ_DEVICE void gemm_sm80_store(const core::LinearArgs& a, float* partials, std::int64_t row, std::int64_t token,
                                const GemmSm80Lane<kCut>& lane, ptx::Shared shared,
                                const GemmSm80Sums<kCut.tokens>& sums) {
  for (int p = 0; p < GemmSm80::kPanels; ++p)
    for (int i = 0; i < kCut.tokens / 8; ++i)
      for (int e = 0; e < 4; ++e)
        ptx::store_shared(shared + (8 * i + 2 * lane.t + e % 2) * GemmSm80::kSumsPitch +
                              (p * GemmSm80::kPanelRows + 16 * lane.strip + lane.r + e / 2 * 8) * 4,
                          sums[p][i][e]);
  ptx::sync_threads();
  const int column = ptx::thread() % 32 * 4;
  if (row + column >= a.n) return;
  for (int i = lane.strip; i < kCut.tokens && token + i < a.m; i += GemmSm80::kThreads / 32) {
    const auto four = ptx::load_shared<Vector>(shared + i * GemmSm80::kSumsPitch + column * 4);
    if (partials != nullptr) {
      ptx::store(reinterpret_cast<Vector*>(partials + ((ptx::block_y() * a.m + token + i) * a.n + row + column)), four);
    } else {
      float sum[4];
      for (int e = 0; e < 4; ++e) sum[e] = std::bit_cast<float>(four.word[e]);
      store_four<kType>(a, token + i, row + column, sum);
    }
  }
}

/// Blocks: x has tiles, those of the same rows of W beside each other, so that a weight comes from memory once; y has
/// parts of k. `partials` is nullptr if there is one part.
template <core::DType kType, int kTokens, bool kSmallGroups>
AWQ_DEVICE void gemm_sm80_body(const core::LinearArgs& a, float* partials) {
  constexpr GemmSm80 kCut{kTokens, kSmallGroups};
  constexpr int kPanels = GemmSm80::kPanels, kStages = kCut.stages();
  const int token_tiles = static_cast<int>(core::ceil_div(a.m, kTokens));
  const int tile = static_cast<int>(ptx::block_x());
  const std::int64_t row = std::int64_t{tile / token_tiles} * GemmSm80::kRows;
  const std::int64_t token = std::int64_t{tile % token_tiles} * kTokens;
  const int steps = static_cast<int>(core::ceil_div(a.k, GemmSm80::kStep));
  const int parts = static_cast<int>(ptx::grid_y()), part = static_cast<int>(ptx::block_y());
  const int longer = steps % parts;  // parts that have a step more than the rest
  const int begin = steps / parts * part + (part < longer ? part : longer);
  const int end = begin + steps / parts + (part < longer ? 1 : 0);

  const ptx::Shared ring = ptx::dynamic_shared();
  GemmSm80Copies<kCut> copies(a, row, token, begin);
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) copies.copy_step(ring + i * kCut.stage_bytes());
    ptx::copy_async_commit();
  }

  const GemmSm80Lane<kCut> lane(a.n - row);
  GemmSm80Groups groups(a, begin);
  GemmSm80Sums<kTokens> sums{}, products{};
  for (int step = begin, at = 0; step < end; ++step) {
    // This step is there, for all threads; and all have done with the last one, whose stage is the next to fill.
    ptx::copy_async_wait<kStages - 2>();
    ptx::sync_threads();
    const ptx::Shared stage = ring + at * kCut.stage_bytes();
    if (step + kStages - 1 < end) copies.copy_step(ring + (at == 0 ? kStages - 1 : at - 1) * kCut.stage_bytes());
    ptx::copy_async_commit();
    at = at + 1 == kStages ? 0 : at + 1;

    Vector codes[kPanels];
    ZeroPair zeros[kPanels];
    for (int p = 0; p < kPanels; ++p)
      codes[p] = ptx::load_shared<Vector>(stage + lane.codes + p * GemmSm80::kCodeBytes);
    int g = 0, left = groups.left;  // group of a quarter, in the step; quarters until it ends
    for (int j = 0; j < 4; ++j) {
      if (kSmallGroups || j == 0) {
        for (int p = 0; p < kPanels; ++p) {
          const std::uint32_t four = a.qzeros == nullptr
                                         ? kSymmetricZeros * 0x01010101u
                                         : ptx::load_shared<std::uint32_t>(
                                               stage + lane.zeros + (p * kCut.groups() + g) * GemmSm80::kZeroBytes);
          zeros[p] = zero_pair<kType>(four >> (lane.r % 4 * 8) & 0xffu);
        }
      }
      std::uint32_t x[kTokens / 16][4];
      for (int i = 0; i < kTokens / 16; ++i) ptx::load_matrices(x[i], ((stage + lane.x) ^ (j * 32)) + i * 2048);
      for (int p = 0; p < kPanels; ++p) {
        std::uint32_t w[4];
        dequantize_word<kType>(codes[p].word[j], zeros[p], w);
        for (int i = 0; i < kTokens / 8; ++i) {
          const std::uint32_t b[2] = {x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]};
          ptx::mma<kType>(products[p][i], w, b);
        }
      }
      // Scales come at the end of a group; or before, of a small group when the stage that has them ends, of a large
      // one when another block has the rest.
      --left;
      if (kSmallGroups ? left == 0 || j == 3 : j == 3 && (left <= 0 || step + 1 == end)) {
        for (int p = 0; p < kPanels; ++p) {
          const int scale = lane.scale[p] + g * GemmSm80::kPanelRows;
          const float low = load_shared_float(a.scale_type, stage + kCut.scales_at(), scale);
          const float high = load_shared_float(a.scale_type, stage + kCut.scales_at(), scale + 1);
          for (int i = 0; i < kTokens / 8; ++i)
            for (int e = 0; e < 4; ++e) {
              sums[p][i][e] = std::fma(products[p][i][e], e < 2 ? low : high, sums[p][i][e]);
              products[p][i][e] = 0.0f;
            }
        }
      }
      if (kSmallGroups && left == 0) ++g, left = groups.size;
    }
    groups.next(kCut.groups());
  }
  ptx::sync_threads();  // all have done with the last step
  gemm_sm80_store<kType, kCut>(a, partials, row, token, lane, ring, sums);
}

}  // namespace awq::cuda
