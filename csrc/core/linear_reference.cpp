#include <array>

#include "layout.h"
#include "linear.h"

namespace awq::core {
namespace {

std::uint32_t nibble_of_word(std::uint32_t word, std::int64_t i) { return (word >> (4 * i)) & 15u; }

/// The code of W[col, i], and the zero of its group.
struct Weight {
  std::uint32_t code, zero;
};

Weight weight_of_strips(const LinearArgs& a, std::int64_t col, std::int64_t i) {
  const std::int64_t strip = col / kStripColumns, column = col % kStripColumns, groups = a.k / a.group;
  const std::uint32_t* word = a.qweight + (strip * ceil_div(a.k, 8) + i / 8) * kStripColumns + column;
  if (a.qzeros == nullptr) return {nibble_of_word(*word, i % 4 * 2 + i % 8 / 4), 8};
  const std::uint32_t* zero = a.qzeros + (strip * groups + i / a.group) * 4 + column % 16 / 4;
  return {nibble_of_word(*word, i % 4 * 2 + i % 8 / 4), nibble_of_word(*zero, column % 4 * 2 + column / 16)};
}

Weight weight_of_gemm(const LinearArgs& a, std::int64_t col, std::int64_t i) {
  constexpr auto nibble_of = inverse(kAwqOrder);
  const std::int64_t words = a.n / kCodesPerWord, word = col / kCodesPerWord, g = i / a.group;
  const int nibble = nibble_of[static_cast<std::size_t>(col % kCodesPerWord)];
  return {nibble_of_word(a.qweight[i * words + word], nibble),
          a.qzeros == nullptr ? 8 : nibble_of_word(a.qzeros[g * words + word], nibble)};
}

template <class T>
void reference(const LinearArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = 0; row < a.m; ++row)
    for (std::int64_t col = begin; col < end; ++col) {
      T sum = 0;
      for (std::int64_t i = 0; i < a.k; ++i) {
        const std::int64_t g = i / a.group;
        const Weight w = a.strips ? weight_of_strips(a, col, i) : weight_of_gemm(a, col, i);
        const std::int64_t scale = a.strips ? strip_scale(a.n, a.k / a.group, g, col) : g * a.n + col;
        const T weight = (static_cast<T>(w.code) - static_cast<T>(w.zero)) * load_as<T>(a.scales, a.scale_type, scale);
        sum += load_as<T>(a.x, a.x_type, row * a.x_stride + i) * weight;
      }
      if (a.bias != nullptr) sum += load_as<T>(a.bias, a.bias_type, col);
      store_as(a.y, a.x_type, row * a.n + col, sum);
    }
}

}  // namespace

void linear_reference(const LinearArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  if (a.x_type == DType::f64) return reference<double>(a, begin, end);
  reference<float>(a, begin, end);
}

}  // namespace awq::core
