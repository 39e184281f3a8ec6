// Products of float32 matrices of which only the upper triangle counts: x^T x for calibration, d G d^T for the
// searches. Plain float32 multiplications and additions: tensor cores would round the factors to fewer bits, and losses
// that differ in the last digits decide.
//
// A block has a tile of kProductTile x kProductTile sums in its registers, 8 x 8 in each thread, and goes down the
// depth in steps: the next step's factors travel from global memory while those of this one are multiplied.
#pragma once
#include <cmath>

#include "../core/gram.h"
#include "device_code.h"
#include "ptx.cuh"
#include "search.h"

namespace awq::cuda {

/// Where the factors of one step lie in shared memory: depth by depth, each with the factors of a whole tile. Rows are
/// 16 bytes longer than the tile, so that writing down a column meets half as many banks twice as without.
inline constexpr int kProductStride = kProductTile + 4;
inline constexpr int kProductOperand = kProductDepth * kProductStride * 4;     // bytes
inline constexpr int kProductShared = 2 * 2 * kProductOperand;                 // two operands, two steps
inline constexpr int kProductShare = kProductDepth * kProductTile / kThreads;  // factors a thread moves
inline constexpr int kProductSide = 16;                                        // threads along each side
static_assert(kProductSide * kProductSide == kThreads && kProductSide * 8 == kProductTile);

/// The row (or column) of the tile that a thread's i-th is: two runs of four, half a tile apart, so that the 16-byte
/// loads of neighbouring threads are neighbours.
AWQ_DEVICE int product_index(int side, int i) { return i / 4 * (kProductTile / 2) + side * 4 + i % 4; }

/// Of the factors of a step, those that a thread moves. kAlongDepth: factors at neighbouring depths are neighbours in
/// memory, else factors at neighbouring indices of the tile.
template <bool kAlongDepth>
struct ProductShare {
  float value[kProductShare];

  /// factor(depth, index) is the factor there, 0 outside of the matrix.
  template <class Factor>
  AWQ_DEVICE void fetch(std::int64_t depth, const Factor& factor) {
    for (int u = 0; u < kProductShare; ++u) {
      const int element = ptx::thread() + u * kThreads;
      value[u] = factor(depth + depth_of(element), index_of(element));
    }
  }
  AWQ_DEVICE void put(ptx::Shared to) const {
    for (int u = 0; u < kProductShare; ++u) {
      const int element = ptx::thread() + u * kThreads;
      ptx::store_shared(to + 4u * static_cast<unsigned>(depth_of(element) * kProductStride + index_of(element)),
                        value[u]);
    }
  }

  AWQ_DEVICE static int depth_of(int element) { return kAlongDepth ? element % kProductDepth : element / kProductTile; }
  AWQ_DEVICE static int index_of(int element) { return kAlongDepth ? element / kProductDepth : element % kProductTile; }
};

/// A thread's eight factors of one depth.
AWQ_DEVICE void load_factors(ptx::Shared row, int side, float (&factor)[8]) {
  for (int half = 0; half < 2; ++half) {
    const auto four = ptx::load_shared<Vector>(row + 4u * static_cast<unsigned>(product_index(side, 4 * half)));
    for (int i = 0; i < 4; ++i) factor[4 * half + i] = std::bit_cast<float>(four.word[i]);
  }
}

/// sum[r][c] = sum over depth [begin, end) of left(depth, row) * right(depth, column), one after another, each addition
/// rounded once. All threads of the block take part; factors are 0 at end and beyond.
template <bool kLeftAlongDepth, class Left, class Right>
AWQ_DEVICE void multiply_tile(std::int64_t begin, std::int64_t end, const Left& left, const Right& right,
                              float (&sum)[8][8]) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) sum[r][c] = 0.0f;
  const int down = ptx::thread() / kProductSide, across = ptx::thread() % kProductSide;
  ProductShare<kLeftAlongDepth> rows;
  ProductShare<false> columns;
  rows.fetch(begin, left), columns.fetch(begin, right);
  ptx::sync_threads();  // nobody reads what an earlier product left in shared memory
  ptx::Shared here = ptx::dynamic_shared(), other = here + 2 * kProductOperand;
  for (std::int64_t depth = begin; depth < end; depth += kProductDepth) {
    rows.put(here), columns.put(here + kProductOperand);
    // One barrier a step suffices: whoever writes here again has passed the next one, which all reach after reading.
    ptx::sync_threads();
    if (depth + kProductDepth < end) {
      rows.fetch(depth + kProductDepth, left);
      columns.fetch(depth + kProductDepth, right);
    }
    for (int i = 0; i < kProductDepth; ++i) {
      const ptx::Shared row = here + 4u * static_cast<unsigned>(i * kProductStride);
      float a[8], b[8];
      load_factors(row, down, a);
      load_factors(row + kProductOperand, across, b);
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) sum[r][c] = std::fma(a[r], b[c], sum[r][c]);
    }
    const ptx::Shared swapped = here;
    here = other, other = swapped;
  }
}

/// core's gram_pack and gram_add in one: sums[i, j] += sum over rows t of x[t, i] x[t, j] for j >= i. Some hundred rows
/// are summed on their own before they are added to sums, as on a CPU: a sum of millions of rows would lose digits.
AWQ_DEVICE void gram_body(const core::GramArgs& a) {
  const std::int64_t side = product_tiles(a.k);
  for (std::int64_t tile = ptx::block_x(); tile < side * side; tile += ptx::grid_x()) {
    const std::int64_t first_row = tile / side * kProductTile, first_column = tile % side * kProductTile;
    if (first_row > first_column) continue;
    for (std::int64_t begin = 0; begin < a.t; begin += kGramRows) {
      const std::int64_t end = smaller(begin + kGramRows, a.t);
      const auto factor = [&](std::int64_t first) {
        return [&a, first, end](std::int64_t t, int index) {
          const std::int64_t column = first + index;
          if (t >= end || column >= a.k) return 0.0f;
          const float x = ptx::load(a.x + t * a.x_stride + column);
          return a.bfloat16 ? core::bfloat_to_float(core::float_to_bfloat(x)) : x;
        };
      };
      float sum[8][8];
      multiply_tile<false>(begin, end, factor(first_row), factor(first_column), sum);
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) {
          const std::int64_t i = first_row + product_index(ptx::thread() / kProductSide, r);
          const std::int64_t j = first_column + product_index(ptx::thread() % kProductSide, c);
          if (i > j || j >= a.k) continue;
          float* place = a.sums + i * a.k + j;
          ptx::store(place, ptx::load(place) + sum[r][c]);
        }
    }
  }
}

/// partial[batch, column tile, row] = the part of d G d^T that the tile's columns j make: over all i <= j of
/// d_i t_ij d_j, t_ij = G_ij, doubled off the diagonal (core's packed triangle). Sums over i are float32, the others
/// float64.
AWQ_DEVICE void loss_body(const LossArgs& a) {
  const std::int64_t down = product_tiles(a.rows), across = product_tiles(a.k);
  for (std::int64_t tile = ptx::block_x(); tile < a.batches * down * across; tile += ptx::grid_x()) {
    // The last columns go deepest and come first.
    const std::int64_t column_tile = across - 1 - tile % across;
    const std::int64_t batch = tile / across / down;
    const std::int64_t first_row = tile / across % down * kProductTile, first_column = column_tile * kProductTile;
    const float* d = a.d + batch * a.rows * a.k;
    const float* gram = a.gram + batch * a.k * (a.gram_stride + 1);
    const auto error = [&](std::int64_t depth, int index) {
      const std::int64_t row = first_row + index;
      return depth < a.k && row < a.rows ? ptx::load(d + row * a.k + depth) : 0.0f;
    };
    const auto entry = [&](std::int64_t i, int index) {
      const std::int64_t j = first_column + index;
      if (i > j || j >= a.k) return 0.0f;
      const float g = ptx::load(gram + i * a.gram_stride + j);
      return i == j ? g : 2.0f * g;
    };
    float sum[8][8];
    multiply_tile<true>(0, smaller(a.k, first_column + kProductTile), error, entry, sum);
    for (int r = 0; r < 8; ++r) {
      const int row = product_index(ptx::thread() / kProductSide, r);
      double total = 0.0;
      for (int c = 0; c < 8; ++c) {
        const int column = product_index(ptx::thread() % kProductSide, c);
        total += static_cast<double>(sum[r][c]) * static_cast<double>(error(first_column + column, row));
      }
      for (int distance = kProductSide / 2; distance > 0; distance /= 2) total += ptx::shuffle_xor(total, distance);
      if (ptx::thread() % kProductSide == 0 && first_row + row < a.rows)
        ptx::store(a.partial + (batch * across + column_tile) * a.rows + first_row + row, total);
    }
  }
}

}  // namespace awq::cuda
