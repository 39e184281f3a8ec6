#include "quantize.h"

#include <limits>

namespace awq::core {
namespace {

constexpr std::int64_t kChunk = 256;  // weights converted to float at a time

/// Calls visit(begin, count, floats) for consecutive chunks of w[offset .. offset + length).
template <class Visit>
void for_chunks(const void* w, DType type, std::int64_t offset, std::int64_t length, Visit visit) {
  float buffer[kChunk];
  for (std::int64_t i = 0; i < length; i += kChunk) {
    const std::int64_t count = length - i < kChunk ? length - i : kChunk;
    if (type == DType::f32) {
      visit(i, count, static_cast<const float*>(w) + offset + i);
      continue;
    }
    for (std::int64_t j = 0; j < count; ++j) buffer[j] = load_as<float>(w, type, offset + i + j);
    visit(i, count, static_cast<const float*>(buffer));
  }
}

struct Range {
  float lo = std::numeric_limits<float>::infinity(), hi = -std::numeric_limits<float>::infinity();
  float poison = 0.0f;  // 0 while every value is finite, NaN after one that is not

  void add(const float* w, std::int64_t count) {
    float l = lo, h = hi, p = poison;
    for (std::int64_t j = 0; j < count; ++j) {
      l = w[j] < l ? w[j] : l;
      h = w[j] > h ? w[j] : h;
      p += w[j] * 0.0f;
    }
    lo = l, hi = h, poison = p;
  }
};

}  // namespace

std::int64_t quantize_rows(const QuantizeArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t groups = a.k / a.group;
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t offset = row * a.w_stride + g * a.group;
      Range range;
      for_chunks(a.w, a.w_type, offset, a.group,
                 [&](std::int64_t, std::int64_t count, const float* w) { range.add(w, count); });
      if (a.range != nullptr) {
        const float* given = a.range + (row * groups + g) * 2;
        range.lo = given[0], range.hi = given[1];
      }
      const GroupParameters p = group_parameters(range.lo + range.poison, range.hi + range.poison, a.to);
      if (!std::isfinite(p.scale)) return row;
      store_as(a.scales, a.to.scale_type, row * groups + g, p.scale);
      a.zeros[row * groups + g] = static_cast<std::uint8_t>(p.zero);
      std::uint8_t* q = a.q + row * a.k + g * a.group;
      for_chunks(a.w, a.w_type, offset, a.group, [&](std::int64_t i, std::int64_t count, const float* w) {
        for (std::int64_t j = 0; j < count; ++j) q[i + j] = static_cast<std::uint8_t>(round_code(w[j], p));
      });
    }
  }
  return -1;
}

}  // namespace awq::core
