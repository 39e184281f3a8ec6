// y = x W^T + bias for a weight in layout strips: what kernels get and promise.
//
// A row of x is cut into segments, each within one group. In a segment x = step v with whole numbers v, rounded to
// nearest, and v = sum over i of digit[i] 256^(digits - 1 - i) with digits of -128 .. 127, so that CPUs can multiply
// them with codes four at a time. The segment adds
//     s step (sum q v - z sum v)
// to y, where one and two digits make both sums exact: 15 * 32639 * 128 < 2^31. Nothing is rounded but x, once, to
// step / 2, and the sums of segments in float32.
#pragma once
#include <cstdint>

#include "layout.h"
#include "linear.h"

namespace awq::core {

/// How x may be rounded before it is multiplied.
enum class Activation : std::uint8_t {
  exact,  // less than by its own type
  int16,  // two digits: to 1 / 65278 of the segment's largest value
  int8,   // one digit: to 1 / 254
};

inline constexpr int kMostDigits = 3;
inline constexpr std::int64_t kSegment = 128;                   // values, at most
inline constexpr std::int64_t kOctet = 8;                       // values that a word of the weight holds
inline constexpr std::int64_t kOctetBytes = kStripColumns * 4;  // of a strip's words for an octet

AWQ_HOST_DEVICE constexpr int digits_of(Activation activation, DType x_type) {
  if (activation == Activation::exact) return x_type == DType::f32 ? 3 : 2;
  return activation == Activation::int16 ? 2 : 1;
}

/// Whether the kernels can have such groups: no word of the weight may belong to two.
AWQ_HOST_DEVICE constexpr bool strips_can_have(std::int64_t k, std::int64_t group) {
  return group == k || group % kOctet == 0;
}

/// Whether a matrix unit can have such groups: it is fed matrix_step values at a time, of one group each.
AWQ_HOST_DEVICE constexpr bool matrix_can_have(std::int64_t group) { return group % 32 == 0; }
AWQ_HOST_DEVICE constexpr std::int64_t matrix_step(std::int64_t group) { return group % 64 == 0 ? 64 : 32; }

/// The segments of a row: kSegment values each, but the last of a group has what is left.
struct Segments {
  std::int64_t group, in_group, count;

  AWQ_HOST_DEVICE constexpr Segments(std::int64_t k, std::int64_t group_)
      : group(group_), in_group(ceil_div(group_, kSegment)), count(k / group_ * in_group) {}

  AWQ_HOST_DEVICE constexpr std::int64_t begin(std::int64_t i) const {
    return i / in_group * group + i % in_group * kSegment;
  }
  AWQ_HOST_DEVICE constexpr std::int64_t size(std::int64_t i) const {
    const std::int64_t rest = size_from(i);
    return rest < kSegment ? rest : kSegment;
  }
  /// Values from segment i on to the end of its group.
  AWQ_HOST_DEVICE constexpr std::int64_t size_from(std::int64_t i) const { return group - i % in_group * kSegment; }
};

/// Some rows of a call, prepared: tiles of tile_rows rows each, the last filled up with zeros.
struct StripsWork {
  const LinearArgs* args;
  std::int64_t row, rows;  // of x
  std::int64_t tile_rows;  // 1 .. Kernels::strips_rows[digits - 1]; with matrix 1 .. Kernels::matrix_rows
  int digits;
  bool matrix;        // by the level's matrix unit, where matrix_can_have the groups
  std::uint32_t* x;   // [tiles][segments][digit][size / 4][tile_rows] words of four neighbours' digits;
                      // at the end [size / 8][tile_rows][2] for Arm's dot products, [tile_rows][size / 4] with matrix
  float* parameters;  // [tiles][segments][2][tile_rows]: step, and sum of v

  AWQ_HOST_DEVICE constexpr std::int64_t tiles() const { return ceil_div(rows, tile_rows); }
  /// Words and parameters of a tile before the value `first`, or the segment `first`; with all of them: of a tile.
  AWQ_HOST_DEVICE constexpr std::int64_t words(std::int64_t first) const {
    return ceil_div(first, kOctet) * 2 * digits * tile_rows;
  }
  AWQ_HOST_DEVICE constexpr std::int64_t floats(std::int64_t first) const { return first * 2 * tile_rows; }
};

inline constexpr std::int64_t kStripsRows = 512;  // most rows of a StripsWork

}  // namespace awq::core
