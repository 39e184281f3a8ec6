// The one table of 4-bit layouts. Everything that packs, unpacks, names or describes a layout reads it here.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

namespace awq::core {

enum class Axis : std::uint8_t { n, k };  // n: out_features, k: in_features

/// How the codes q[n, k] (0..15) of one linear lie in 32-bit words, eight codes a word.
///
/// A word holds eight neighbours along `packed`; nibble i (bits 4i..4i+3) holds the neighbour order[i]. The words
/// form a matrix whose rows run along the packed axis (in steps of eight) if `words_by_row`, else along the other.
struct Layout {
  std::string_view name;
  Axis packed;
  bool words_by_row;
  std::array<std::uint8_t, 8> order;
  std::string_view source;
};

inline constexpr int kCodesPerWord = 8;
inline constexpr std::array<std::uint8_t, 8> kNaturalOrder{0, 1, 2, 3, 4, 5, 6, 7};
inline constexpr std::array<std::uint8_t, 8> kAwqOrder{0, 2, 4, 6, 1, 3, 5, 7};

inline constexpr std::array<Layout, 3> kLayouts{{
    {"gemm", Axis::n, false, kAwqOrder, "AutoAWQ awq/modules/linear/gemm.py: int32 [k, n/8]"},
    {"gemv", Axis::k, false, kNaturalOrder, "AutoAWQ awq/modules/linear/gemv.py: int32 [n, k/8]"},
    {"gptq", Axis::k, true, kNaturalOrder, "AutoGPTQ auto_gptq/nn_modules/qlinear: int32 [k/8, n]"},
}};

/// Layout of that name, or nullptr.
constexpr const Layout* find_layout(std::string_view name) {
  for (const Layout& layout : kLayouts)
    if (layout.name == name) return &layout;
  return nullptr;
}

struct WordShape {
  std::int64_t rows, cols;
};

/// Shape of the word matrix of an [n, k] linear; the packed axis must be a multiple of eight.
constexpr WordShape word_shape(const Layout& layout, std::int64_t n, std::int64_t k) {
  const std::int64_t along = (layout.packed == Axis::n ? n : k) / kCodesPerWord;
  const std::int64_t other = layout.packed == Axis::n ? k : n;
  return layout.words_by_row ? WordShape{along, other} : WordShape{other, along};
}

struct CodeShape {
  std::int64_t n, k;
};

/// The inverse of word_shape.
constexpr CodeShape code_shape(const Layout& layout, std::int64_t rows, std::int64_t cols) {
  const std::int64_t along = (layout.words_by_row ? rows : cols) * kCodesPerWord;
  const std::int64_t other = layout.words_by_row ? cols : rows;
  return layout.packed == Axis::n ? CodeShape{along, other} : CodeShape{other, along};
}

constexpr std::array<std::uint8_t, 8> inverse(const std::array<std::uint8_t, 8>& order) {
  std::array<std::uint8_t, 8> nibble_of{};
  for (std::uint8_t i = 0; i < 8; ++i) nibble_of[order[i]] = i;
  return nibble_of;
}

struct CodePlace {
  std::int64_t word;  // index into the row-major word matrix
  int nibble;         // bits 4*nibble .. 4*nibble+3 of that word
};

/// Where q[row, col] of an [n, k] linear lies: the definition every packing routine is tested against.
constexpr CodePlace locate(const Layout& layout, std::int64_t n, std::int64_t k, std::int64_t row, std::int64_t col) {
  const std::int64_t p = layout.packed == Axis::n ? row : col;
  const std::int64_t other = layout.packed == Axis::n ? col : row;
  const WordShape shape = word_shape(layout, n, k);
  const std::int64_t word =
      layout.words_by_row ? p / kCodesPerWord * shape.cols + other : other * shape.cols + p / kCodesPerWord;
  return {word, inverse(layout.order)[static_cast<std::size_t>(p % kCodesPerWord)]};
}

}  // namespace awq::core
