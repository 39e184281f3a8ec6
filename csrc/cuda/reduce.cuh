// The end of every linear kernel: sums become outputs. Where blocks share the sums of a tile between them, each a part
// of k, they leave theirs in a workspace [splits][m][n] of floats, and a kernel of its own adds them in that order: the
// same bytes every time, and nothing to be zeroed or locked.
#pragma once
#include "../core/linear.h"
#include "ptx.cuh"

namespace awq::cuda {

/// Element i of an array that no kernel in flight writes.
AWQ_DEVICE float constant_as_float(const void* data, core::DType type, std::int64_t i) {
  using core::DType;
  if (type == DType::f32) return ptx::load_constant(static_cast<const float*>(data) + i);
  const std::uint16_t bits = ptx::load_constant(static_cast<const std::uint16_t*>(data) + i);
  return type == DType::f16 ? ptx::to_float<DType::f16>(bits) : ptx::to_float<DType::bf16>(bits);
}

/// y[row, column .. column + 4) = sum + bias, each rounded once. column is a multiple of four; y is 8-byte aligned.
template <core::DType kType>
AWQ_DEVICE void store_four(const core::LinearArgs& a, std::int64_t row, std::int64_t column, const float (&sum)[4]) {
  float v[4];
  for (int i = 0; i < 4; ++i)
    v[i] = a.bias == nullptr ? sum[i] : sum[i] + constant_as_float(a.bias, a.bias_type, column + i);
  const std::uint64_t low = ptx::round_pair<kType>(v[0], v[1]), high = ptx::round_pair<kType>(v[2], v[3]);
  ptx::store(static_cast<std::uint64_t*>(a.y) + (row * a.n + column) / 4, low | high << 32);
}

inline constexpr int kReduceThreads = 128, kReduceColumns = 4 * kReduceThreads;  // of a block

/// A thread for each four neighbours of y; blocks: along x columns, along y rows, which spares a division of 64 bits.
/// The kernel that wrote `partials` has ended.
template <core::DType kType>
AWQ_DEVICE void reduce_body(const core::LinearArgs& a, const float* partials, int splits) {
  const std::int64_t row = ptx::block_y(), column = ptx::block_x() * kReduceColumns + ptx::thread() * 4;
  if (column >= a.n) return;
  float sum[4] = {};
  for (int s = 0; s < splits; ++s) {
    const auto part = ptx::load(reinterpret_cast<const Vector*>(partials + ((s * a.m + row) * a.n + column)));
    for (int i = 0; i < 4; ++i) sum[i] += std::bit_cast<float>(part.word[i]);
  }
  store_four<kType>(a, row, column, sum);
}

}  // namespace awq::cuda
