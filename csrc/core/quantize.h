// Group-wise rounding to 2..8 bits: W ~ (q - z) * s. Scalar rules here, shared with device code; rows in quantize.cpp.
//
// Formulas: AutoAWQ awq/quantize/quantizer.py pseudo_quantize_tensor, with a range that always includes zero and a
// scale that is rounded to its storage type before any code is chosen, so that a reader of the file gets exactly the
// values that were compared. Compile without fused multiply-add: every device must choose the same bits.
#pragma once
#include <cmath>
#include <cstdint>

#include "types.h"

namespace awq::core {

inline constexpr int kSymmetricZero = 8;  // of 4 bits, the only ones that are packed

/// What weights are rounded to. Whole numbers are floats here, so that one loop can be vectorised for any of them.
struct Rounding {
  bool zero_point;
  DType scale_type;
  float last = 15.0f;  // the largest code, 2^bits - 1

  /// The zero of symmetric codes, 2^(bits - 1): as many codes below it as from it on.
  AWQ_HOST_DEVICE constexpr float middle() const { return (last + 1.0f) * 0.5f; }
};

AWQ_HOST_DEVICE constexpr float last_code(std::int64_t bits) {
  return static_cast<float>((std::int64_t{1} << bits) - 1);
}

struct GroupParameters {
  float scale;
  float zero;  // a whole number, 0..last
  float last;  // the largest code
};

/// Nearest whole number, ties to even, for |x| < 2^22: 1.5 * 2^23 has a last bit worth one, so the addition rounds.
AWQ_HOST_DEVICE inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

AWQ_HOST_DEVICE inline float clamp(float x, float lo, float hi) { return x < lo ? lo : (x > hi ? hi : x); }

/// A positive scale as its storage type holds it. Nearest, but upwards below the type's normal range: there nearest
/// could lose a large part of the scale and with it the ends of the group's range.
AWQ_HOST_DEVICE inline float round_scale(float scale, DType type) {
  if (type == DType::f16) {
    const std::uint16_t bits = float_to_half(scale);
    const float rounded = half_to_float(bits);
    return rounded < scale && scale < 0x1p-14f ? half_to_float(static_cast<std::uint16_t>(bits + 1)) : rounded;
  }
  if (type == DType::bf16) {
    const std::uint16_t bits = float_to_bfloat(scale);
    const float rounded = bfloat_to_float(bits);
    return rounded < scale && scale < 0x1p-126f ? bfloat_to_float(static_cast<std::uint16_t>(bits + 1)) : rounded;
  }
  return scale;
}

/// Scale and zero for a group whose values span [lo, hi]. The range is widened to include zero; an empty range, or one
/// so small that its scale underflows, gives scale 1; a range that is not finite gives scale NaN, one that the storage
/// type cannot hold gives infinity.
AWQ_HOST_DEVICE inline GroupParameters group_parameters(float lo, float hi, Rounding to) {
  if (!(lo - lo == 0.0f) || !(hi - hi == 0.0f))
    return {lo - lo + (hi - hi), to.zero_point ? 0.0f : to.middle(), to.last};
  lo = lo < 0.0f ? lo : 0.0f;
  hi = hi > 0.0f ? hi : 0.0f;
  if (!to.zero_point) {
    const float bound = -lo > hi ? -lo : hi;
    const float scale = round_scale(bound / (to.middle() - 1.0f), to.scale_type);
    return {scale == 0.0f ? 1.0f : scale, to.middle(), to.last};
  }
  // Divided before the subtraction: hi - lo may overflow where the difference of the quotients does not.
  const float scale = round_scale(hi / to.last - lo / to.last, to.scale_type);
  if (scale == 0.0f) return {1.0f, 0.0f, to.last};
  return {scale, round_even(clamp(-lo / scale, 0.0f, to.last)), to.last};
}

inline constexpr float kBeyondCodes = 512.0f;  // steps from any zero to where every code saturates

/// The code of w, as a whole number 0..last. (The first clamp keeps round_even in its domain.)
AWQ_HOST_DEVICE inline float round_code(float w, GroupParameters p) {
  return clamp(round_even(clamp(w / p.scale, -kBeyondCodes, kBeyondCodes)) + p.zero, 0.0f, p.last);
}

AWQ_HOST_DEVICE inline float dequantize_code(float code, GroupParameters p) { return (code - p.zero) * p.scale; }

struct QuantizeArgs {
  const void* w;        // [n, k], rows `w_stride` elements apart
  const float* range;   // [n, groups, 2] or nullptr
  std::uint8_t* q;      // [n, k]
  void* scales;         // [n, groups] of to.scale_type
  std::uint8_t* zeros;  // [n, groups]
  std::int64_t n, k, group, w_stride;
  DType w_type;
  Rounding to;
};

/// Quantizes rows [begin, end). Returns -1, or the first row with a scale that is not finite (its weights or range
/// are not, or the storage type cannot hold the scale); later rows are then left unwritten.
std::int64_t quantize_rows(const QuantizeArgs& args, std::int64_t begin, std::int64_t end) noexcept;

}  // namespace awq::core
