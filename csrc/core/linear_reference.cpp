#include <array>

#include "layout.h"
#include "linear.h"

namespace awq::core {
namespace {

template <class T>
void reference(const LinearArgs& a, std::int64_t begin, std::int64_t end) {
  constexpr auto nibble_of = inverse(kAwqOrder);
  const std::int64_t word_cols = a.n / kCodesPerWord;
  for (std::int64_t row = 0; row < a.m; ++row)
    for (std::int64_t col = begin; col < end; ++col) {
      const std::int64_t word_col = col / kCodesPerWord;
      const int shift = 4 * nibble_of[static_cast<std::size_t>(col % kCodesPerWord)];
      T sum = 0;
      for (std::int64_t i = 0; i < a.k; ++i) {
        const std::int64_t g = i / a.group;
        const auto code = static_cast<int>((a.qweight[i * word_cols + word_col] >> shift) & 15u);
        const int zero =
            a.qzeros == nullptr ? 8 : static_cast<int>((a.qzeros[g * word_cols + word_col] >> shift) & 15u);
        const T weight = static_cast<T>(code - zero) * load_as<T>(a.scales, a.scale_type, g * a.n + col);
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
