#include "pack.h"

#include <algorithm>
#include <array>

namespace awq::core {
namespace {

constexpr std::int64_t kTileRows = 64;  // word rows and columns moved at a time: 64 x 16 words are 4 KiB, and each
constexpr std::int64_t kTileCols = 16;  // row of the tile is one cache line

/// Distance in q between codes that are neighbours along the packed axis, and along the other axis.
struct Strides {
  std::int64_t packed, other;
};

Strides code_strides(const Layout& layout, std::int64_t k) {
  return layout.packed == Axis::n ? Strides{k, 1} : Strides{1, k};
}

/// First code of the word at (row, col) of the word matrix.
std::int64_t first_code(const Layout& layout, Strides s, std::int64_t row, std::int64_t col) {
  return layout.words_by_row ? row * kCodesPerWord * s.packed + col * s.other
                             : col * kCodesPerWord * s.packed + row * s.other;
}

/// Calls visit(word index, index of the word's first code) tile by tile, so that both sides stay in cache.
template <class Visit>
void for_words(const Layout& layout, WordShape shape, Strides s, std::int64_t begin, std::int64_t end, Visit visit) {
  for (std::int64_t r0 = begin; r0 < end; r0 += kTileRows)
    for (std::int64_t c0 = 0; c0 < shape.cols; c0 += kTileCols)
      for (std::int64_t r = r0; r < std::min(r0 + kTileRows, end); ++r)
        for (std::int64_t c = c0; c < std::min(c0 + kTileCols, shape.cols); ++c)
          visit(r * shape.cols + c, first_code(layout, s, r, c));
}

}  // namespace

bool pack_rows(const Layout& layout, const std::uint8_t* q, std::int64_t n, std::int64_t k, std::uint32_t* words,
               std::int64_t begin, std::int64_t end) noexcept {
  const Strides s = code_strides(layout, k);
  std::uint8_t seen = 0;
  for_words(layout, word_shape(layout, n, k), s, begin, end, [&](std::int64_t word, std::int64_t code) {
    std::uint32_t bits = 0;
    for (int i = 0; i < kCodesPerWord; ++i) {
      const std::uint8_t value = q[code + layout.order[static_cast<std::size_t>(i)] * s.packed];
      seen |= value;
      bits |= static_cast<std::uint32_t>(value & 15u) << (4 * i);
    }
    words[word] = bits;
  });
  return seen <= 15;
}

void unpack_rows(const Layout& layout, const std::uint32_t* words, std::int64_t n, std::int64_t k, std::uint8_t* q,
                 std::int64_t begin, std::int64_t end) noexcept {
  const Strides s = code_strides(layout, k);
  for_words(layout, word_shape(layout, n, k), s, begin, end, [&](std::int64_t word, std::int64_t code) {
    for (int i = 0; i < kCodesPerWord; ++i)
      q[code + layout.order[static_cast<std::size_t>(i)] * s.packed] =
          static_cast<std::uint8_t>((words[word] >> (4 * i)) & 15u);
  });
}

void dequantize_rows(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  constexpr const Layout& gemm = *find_layout("gemm");
  constexpr auto nibble_of = inverse(gemm.order);
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
