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

/// Where the factors of one step lie in shared memory: depth by depth, each with the factors of a whole tile. Four
/// words more than that, so that a warp that brings eight depths of four rows writes to 32 distinct banks.
inline constexpr int kProductStride = kProductTile + 4;
inline constexpr int kProductOperand = kProductDepth * kProductStride * 4;     // bytes
inline constexpr int kProductShared = 2 * 2 * kProductOperand;                 // two operands, two steps
inline constexpr int kProductShare = kProductDepth * kProductTile / kThreads;  // factors a thread moves
inline constexpr int kProductSide = 16;                                        // threads along each side
static_assert(kProductSide * kProductSide == kThreads && kProductSide * 8 == kProductTile);

/// The row (or column) of the tile that a thread's i-th is: two runs of four, half a tile apart, so that the 16-byte
/// loads of neighbouring threads are neighbours.
AWQ_DEVICE int product_index(int side, int i) { return i / 4 * (kProductTile / 2) + side * 4 + i % 4; }

AWQ_DEVICE int part_of_tile(std::int64_t left) { return static_cast<int>(smaller(left, kProductTile)); }

/// A matrix of factors, from the first of a tile on: the one at depth i, index j of the tile is
/// data[i * depth_stride + j * index_stride]. Where i >= depths or j >= indices there is none.
struct Factors {
  const float* data;
  int depths, indices;  // a k x k matrix fits no memory where k does not fit an int
  std::int64_t depth_stride, index_stride;
};

/// Of the factors of a step, those that a thread moves. kAlongDepth: factors at neighbouring depths are neighbours in
/// memory (depth_stride 1), else factors at neighbouring indices (index_stride 1).
template <bool kAlongDepth>
class ProductShare {
 public:
  AWQ_DEVICE explicit ProductShare(const Factors& from)
      : from_(from), next_(from.data + depth_of(0) * from.depth_stride + index_of(0) * from.index_stride) {}

  /// Takes the factors of depths depth .. depth + kProductDepth - 1, 0 where there are none; steps come in their order.
  /// use(x, depth, index) is what counts of a factor x.
  template <class Use>
  AWQ_DEVICE void fetch(int depth, const Use& use) {
    for (int u = 0; u < kProductShare; ++u) {
      const bool inside = depth + depth_of(u) < from_.depths && index_of(u) < from_.indices;
      const std::int64_t further = kAlongDepth ? kIndices * u * from_.index_stride : kDepths * u * from_.depth_stride;
      value_[u] = inside ? use(ptx::load(next_ + further), depth + depth_of(u), index_of(u)) : 0.0f;
    }
    next_ += kProductDepth * from_.depth_stride;
  }
  AWQ_DEVICE void put(ptx::Shared to) const {
    for (int u = 0; u < kProductShare; ++u)
      ptx::store_shared(to + 4u * static_cast<unsigned>(depth_of(u) * kProductStride + index_of(u)), value_[u]);
  }

 private:
  // The threads take a run of whole depths or of whole indices together, and then the next.
  static constexpr int kIndices = kThreads / kProductDepth, kDepths = kThreads / kProductTile;
  AWQ_DEVICE static int depth_of(int u) {
    return kAlongDepth ? ptx::thread() % kProductDepth : ptx::thread() / kProductTile + kDepths * u;
  }
  AWQ_DEVICE static int index_of(int u) {
    return kAlongDepth ? ptx::thread() / kProductDepth + kIndices * u : ptx::thread() % kProductTile;
  }

  const Factors& from_;
  const float* next_;
  float value_[kProductShare];
};

/// A thread's eight factors of one depth.
AWQ_DEVICE void load_factors(ptx::Shared row, int side, float (&factor)[8]) {
  for (int half = 0; half < 2; ++half) {
    const auto four = ptx::load_shared<Vector>(row + 4u * static_cast<unsigned>(product_index(side, 4 * half)));
    for (int i = 0; i < 4; ++i) factor[4 * half + i] = std::bit_cast<float>(four.word[i]);
  }
}

/// sum[r][c] = sum over the depths of left (row) times right (column), one after another, each addition rounded once.
/// All threads of the block take part.
template <bool kLeftAlongDepth, class LeftUse, class RightUse>
AWQ_DEVICE void multiply_tile(const Factors& left, const LeftUse& left_use, const Factors& right,
                              const RightUse& right_use, float (&sum)[8][8]) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) sum[r][c] = 0.0f;
  const int down = ptx::thread() / kProductSide, across = ptx::thread() % kProductSide;
  ProductShare<kLeftAlongDepth> rows(left);
  ProductShare<false> columns(right);
  rows.fetch(0, left_use), columns.fetch(0, right_use);
  ptx::sync_threads();  // nobody reads what an earlier product left in shared memory
  ptx::Shared here = ptx::dynamic_shared(), other = here + 2 * kProductOperand;
  for (int depth = 0; depth < left.depths; depth += kProductDepth) {
    rows.put(here), columns.put(here + kProductOperand);
    // One barrier a step suffices: whoever writes here again has passed the next one, which all reach after reading.
    ptx::sync_threads();
    if (depth + kProductDepth < left.depths) {
      rows.fetch(depth + kProductDepth, left_use);
      columns.fetch(depth + kProductDepth, right_use);
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

/// core's gram_pack and gram_add in one, for at most kGramRows rows: sums[i, j] += sum over rows t of x[t, i] x[t, j]
/// for j >= i.
AWQ_DEVICE void gram_body(const core::GramArgs& a) {
  const std::int64_t side = product_tiles(a.k);
  for (std::int64_t tile = ptx::block_x(); tile < side * side; tile += ptx::grid_x()) {
    const std::int64_t first_row = tile / side * kProductTile, first_column = tile % side * kProductTile;
    if (first_row > first_column) continue;
    const Factors rows{a.x + first_row, static_cast<int>(a.t), part_of_tile(a.k - first_row), a.x_stride, 1};
    const Factors columns{a.x + first_column, static_cast<int>(a.t), part_of_tile(a.k - first_column), a.x_stride, 1};
    const auto rounded = [&](float x, int, int) {
      return a.bfloat16 ? core::bfloat_to_float(core::float_to_bfloat(x)) : x;
    };
    float sum[8][8];
    multiply_tile<false>(rows, rounded, columns, rounded, sum);
    for (int r = 0; r < 8; ++r) {
      const std::int64_t i = first_row + product_index(ptx::thread() / kProductSide, r);
      for (int c = 0; c < 8; ++c) {
        const std::int64_t j = first_column + product_index(ptx::thread() % kProductSide, c);
        if (i > j || j >= a.k) continue;
        float* place = a.sums + i * a.k + j;
        ptx::store(place, ptx::load(place) + sum[r][c]);
      }
    }
  }
}

/// partial[batch, column tile, row] = the part of d G d^T that the tile's columns j make: over all i <= j of
/// d_i t_ij d_j, t_ij = G_ij, doubled off the diagonal (core's packed triangle). Sums over i, and over the columns of a
/// thread, are float32, the others float64, as on a CPU.
AWQ_DEVICE void loss_body(const LossArgs& a) {
  const std::int64_t down = product_tiles(a.rows), across = product_tiles(a.k);
  for (std::int64_t tile = ptx::block_x(); tile < a.batches * down * across; tile += ptx::grid_x()) {
    // The last columns go deepest and come first.
    const std::int64_t column_tile = across - 1 - tile % across;
    const std::int64_t batch = tile / across / down;
    const std::int64_t first_row = tile / across % down * kProductTile, first_column = column_tile * kProductTile;
    const float* d = a.d + batch * a.rows * a.k;
    const float* gram = a.gram + batch * a.k * (a.gram_stride + 1);
    const auto depths = static_cast<int>(smaller(a.k, first_column + kProductTile));
    const Factors errors{d + first_row * a.k, depths, part_of_tile(a.rows - first_row), 1, a.k};
    const Factors entries{gram + first_column, depths, part_of_tile(a.k - first_column), a.gram_stride, 1};
    const auto doubled = [column = static_cast<int>(first_column)](float g, int i, int index) {
      return i < column + index ? 2.0f * g : (i == column + index ? g : 0.0f);
    };
    float sum[8][8];
    multiply_tile<true>(errors, [](float x, int, int) { return x; }, entries, doubled, sum);
    for (int r = 0; r < 8; ++r) {
      const int row = product_index(ptx::thread() / kProductSide, r);
      float products = 0.0f;
      for (int c = 0; c < 8; ++c) {
        const std::int64_t column = first_column + product_index(ptx::thread() % kProductSide, c);
        if (column < a.k && row < errors.indices)
          products = std::fma(sum[r][c], ptx::load(errors.data + row * a.k + column), products);
      }
      double total = products;
      for (int distance = kProductSide / 2; distance > 0; distance /= 2) total += ptx::shuffle_xor(total, distance);
      if (ptx::thread() % kProductSide == 0 && row < errors.indices)
        ptx::store(a.partial + (batch * across + column_tile) * a.rows + first_row + row, total);
    }
  }
}

}  // namespace awq::cuda
