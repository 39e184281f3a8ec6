#include "pack.h"

#include <algorithm>
#include <array>

#include "cpu.h"

namespace awq::core {

bool pack_blocks(const Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 std::int64_t begin, std::int64_t end) noexcept {
  return best_kernels().pack_blocks(to, q, words, n, k, begin, end);
}

void unpack_blocks(const Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept {
  best_kernels().unpack_blocks(from, words, q, n, k, begin, end);
}

void repack_blocks(const Codes& from, const Codes& to, const void* source, void* target, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept {
  best_kernels().repack_blocks(from, to, source, target, n, k, begin, end);
}

void dequantize_rows(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  constexpr auto nibble_of = inverse(kAwqOrder);
  constexpr std::int64_t kColumns = 64;  // in_features handled at a time: one output cache line or more per row
  const std::int64_t word_cols = a.n / kCodesPerWord;
  for (std::int64_t n0 = begin; n0 < end; n0 += kCodesPerWord) {
    const std::int64_t column = n0 / kCodesPerWord;
    for (std::int64_t k0 = 0; k0 < a.k; k0 += kColumns) {
      const std::int64_t k1 = std::min(k0 + kColumns, a.k);
      std::array<std::uint32_t, kColumns> words;
      for (std::int64_t i = k0; i < k1; ++i)
        words[static_cast<std::size_t>(i - k0)] = a.qweight[i * word_cols + column];
      for (std::int64_t r = 0; r < kCodesPerWord; ++r) {
        const int shift = 4 * nibble_of[static_cast<std::size_t>(r)];
        for (std::int64_t i = k0; i < k1;) {
          const std::int64_t g = i / a.group, stop = std::min((g + 1) * a.group, k1);
          const float scale = load_as<float>(a.scales, a.scale_type, g * a.n + n0 + r);
          const std::uint32_t zero = a.qzeros == nullptr ? 8u : (a.qzeros[g * word_cols + column] >> shift) & 15u;
          for (; i < stop; ++i) {
            const auto code = static_cast<std::int32_t>((words[static_cast<std::size_t>(i - k0)] >> shift) & 15u);
            const float value = static_cast<float>(code - static_cast<std::int32_t>(zero)) * scale;
            store_as(a.w, a.w_type, (n0 + r) * a.k + i, value);
          }
        }
      }
    }
  }
}

}  // namespace awq::core
