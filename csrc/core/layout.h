// The one table of 4-bit layouts. Everything that packs, unpacks, names, detects, checks or describes a layout reads it
// here; `docs/formats.md` is its page for people.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

#include "types.h"

namespace awq::core {

enum class Axis : std::uint8_t { n, k };  // n: out_features, k: in_features (for zeros: the groups along it)

struct CodeShape {
  std::int64_t n, k;
};

struct WordShape {
  std::int64_t rows, cols;
};

/// Order of the codes in a tile.
enum class Order : std::uint8_t { natural, awq, fast, marlin, strips, strip_zeros, fragments, fragment_zeros };

inline constexpr std::array<std::uint8_t, 8> kAwqOrder{0, 2, 4, 6, 1, 3, 5, 7};
inline constexpr int kCodesPerWord = 8;  // in 32 bits

constexpr std::array<std::uint8_t, 8> inverse(const std::array<std::uint8_t, 8>& order) {
  std::array<std::uint8_t, 8> nibble_of{};
  for (std::uint8_t i = 0; i < 8; ++i) nibble_of[order[i]] = i;
  return nibble_of;
}

/// How a matrix of codes [n, k], each 0..15, lies in words.
///
/// The matrix is cut into tiles of tile_n x tile_k codes. Each tile is a run of whole words, and its codes follow one
/// another from the lowest bits of its first word to the highest of its last, in `order`. The words form a matrix: a
/// row holds the tiles that are side by side along the axis that is not `outer`.
struct Codes {
  Order order;
  Axis outer;
  int tile_n, tile_k;
  int word_bits;  // 32 or 16, signed two's complement on disk
  bool padded;    // the last tile of either axis may stick out; the codes there are 0

  AWQ_HOST_DEVICE constexpr int tile_codes() const { return tile_n * tile_k; }
  AWQ_HOST_DEVICE constexpr int codes_per_word() const { return word_bits / 4; }
  AWQ_HOST_DEVICE constexpr int tile_words() const { return tile_codes() / codes_per_word(); }
};

/// kAwqOrder[i], for devices too, which cannot index a host's array.
AWQ_HOST_DEVICE constexpr int awq_order(int i) { return i < 4 ? 2 * i : 2 * i - 7; }

/// The code that comes at `place` (0 .. tile_codes - 1) in a tile.
AWQ_HOST_DEVICE constexpr CodeShape code_in_tile(const Codes& codes, int place) {
  switch (codes.order) {
    case Order::awq: return {awq_order(place), 0};
    case Order::fast: {
      // Four rows of 64. A 16-bit word holds the codes u, u + 8, u + 16, u + 24 of half a row; eight words are half a
      // row, two halves a row.
      const int word = place / 4, nibble = place % 4;
      return {word / 16, word % 16 / 8 * 32 + nibble * 8 + word % 8};
    }
    case Order::marlin: {
      // Four blocks of 16 n x 16 k. Thread i of a warp takes from each block the eight codes that it feeds to two
      // mma.m16n8k16: columns i / 4 and i / 4 + 8, rows 2 (i % 4) + {0, 1, 8, 9}; a word holds them in AWQ's order.
      const int thread = place / 32, block = place / 8 % 4, i = awq_order(place % 8);
      return {block * 16 + thread / 4 + i / 4 * 8, thread % 4 * 2 + i % 2 + i % 4 / 2 * 8};
    }
    // Vector instructions split bytes into lower and upper nibbles. A word is a column; its bytes' lower nibbles are
    // four neighbours along k, the upper ones the next four.
    case Order::strips: return {place / 8, place % 8 / 2 + place % 2 * 4};
    case Order::strip_zeros: return {place / 2 + place % 2 * 16, 0};
    // Four strips of 16 n, one to a warp. Lane i of the warp has four words of its strip, one to each 16 k, with all
    // that it feeds to mma.m16n8k16, or to a wgmma of 64 n x 16 k, as the first operand: rows i / 4 and i / 4 + 8,
    // columns 2 (i % 4) + {0, 1, 8, 9}. Register j of that operand is two neighbours along k, the nibbles j and j + 4.
    // Sources: PTX ISA, "Matrix Fragments for mma.m16n8k16", "Register Fragments" of wgmma.mma_async.m64nNk16.
    case Order::fragments: {
      const int lane = place / 32 % 32, nibble = place % 8;
      return {place / 1024 * 16 + lane / 4 + nibble % 2 * 8,
              place / 8 % 4 * 16 + lane % 4 * 2 + nibble % 4 / 2 * 8 + nibble / 4};
    }
    // A byte for the two rows of a lane.
    case Order::fragment_zeros: return {place / 16 * 16 + place % 16 / 2 + place % 2 * 8, 0};
    default: return {place / codes.tile_k, place % codes.tile_k};
  }
}

/// How the zero point of each group is stored.
enum class Zeros : std::uint8_t {
  none,            // not at all: each is 8
  words,           // codes [n, groups] in words
  words_less_one,  // codes in words, each one less than the zero; so a zero of 0 cannot be stored
  scaled,          // -(scale * zero), as a float beside the scale
};

/// What stands where in scales.
enum class ScaleOrder : std::uint8_t {
  natural,
  marlin,     // the columns are permuted, see marlin_scale
  strips,     // [groups, n] elements, but strip after strip, see strip_scale
  fragments,  // [groups, n] elements, but panel after panel, see fragment_scale
};

struct Layout {
  std::string_view name;
  Codes weight;
  Zeros zeros;
  Codes zero_words;     // if zeros are codes in words
  bool zeros_optional;  // without the tensor every zero is 8
  Axis scales_outer;    // k: scales are [groups, n]; n: they are [n, groups]
  bool groups_padded;   // the number of groups is padded, see padded_groups
  ScaleOrder scales_order;
  std::string_view weight_name, zeros_name, scales_name, extra_name;  // of the tensors, behind "<linear>."; or empty
  std::string_view source;

  constexpr bool in_files() const { return !weight_name.empty(); }  // else in memory only
};

inline constexpr Codes kAlongN{Order::awq, Axis::k, 8, 1, 32, false};
inline constexpr Codes kAlongNNatural{Order::natural, Axis::k, 8, 1, 32, false};
inline constexpr Codes kAlongK{Order::natural, Axis::n, 1, 8, 32, false};
inline constexpr Codes kAlongKPadded{Order::natural, Axis::n, 1, 8, 32, true};
inline constexpr Codes kGptq{Order::natural, Axis::k, 1, 8, 32, false};
inline constexpr Codes kFast{Order::fast, Axis::n, 4, 64, 16, false};
inline constexpr Codes kMarlin{Order::marlin, Axis::k, 64, 16, 32, false};
inline constexpr Codes kDownN{Order::natural, Axis::n, 8, 1, 32, true};
inline constexpr Codes kStrips{Order::strips, Axis::n, 32, 8, 32, true};
inline constexpr Codes kStripZeros{Order::strip_zeros, Axis::n, 32, 1, 32, true};
inline constexpr Codes kFragments{Order::fragments, Axis::n, 64, 64, 32, true};
inline constexpr Codes kFragmentZeros{Order::fragment_zeros, Axis::n, 64, 1, 32, true};
inline constexpr Codes kNoWords{Order::natural, Axis::n, 1, 8, 32, false};

inline constexpr std::array<Layout, 10> kLayouts{{
    // name, weight, zeros, zero_words, optional, scales_outer, padded, scales_order,
    // names of weight, zeros, scales, extra
    {"gemm", kAlongN, Zeros::words, kAlongN, false, Axis::k, false, ScaleOrder::natural, "qweight", "qzeros", "scales",
     "", "AutoAWQ awq/modules/linear/gemm.py"},
    {"gemv", kAlongK, Zeros::words, kAlongKPadded, false, Axis::n, true, ScaleOrder::natural, "qweight", "qzeros",
     "scales", "", "AutoAWQ awq/modules/linear/gemv.py, llm-awq v1"},
    {"gemv_fast", kFast, Zeros::scaled, kNoWords, false, Axis::k, true, ScaleOrder::natural, "qweight", "qzeros",
     "scales", "", "AutoAWQ awq/modules/linear/gemv_fast.py"},
    {"llm-awq", kFast, Zeros::scaled, kNoWords, false, Axis::k, true, ScaleOrder::natural, "qweight", "scaled_zeros",
     "scales", "", "llm-awq awq/quantize/qmodule.py (v2)"},
    {"marlin", kMarlin, Zeros::none, kNoWords, false, Axis::k, false, ScaleOrder::marlin, "qweight", "", "scales", "",
     "AutoAWQ awq/modules/linear/marlin.py"},
    {"gptq", kGptq, Zeros::words_less_one, kAlongNNatural, false, Axis::k, false, ScaleOrder::natural, "qweight",
     "qzeros", "scales", "g_idx", "AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda.py"},
    {"gptq_v2", kGptq, Zeros::words, kAlongNNatural, false, Axis::k, false, ScaleOrder::natural, "qweight", "qzeros",
     "scales", "g_idx", "GPTQModel gptqmodel/utils/model.py"},
    {"compressed-tensors", kAlongKPadded, Zeros::words, kDownN, true, Axis::n, false, ScaleOrder::natural,
     "weight_packed", "weight_zero_point", "weight_scale", "weight_shape",
     "compressed-tensors compressors/pack_quantized (pack-quantized)"},
    {"strips", kStrips, Zeros::words, kStripZeros, true, Axis::k, false, ScaleOrder::strips, "", "", "", "",
     "csrc/core/strips.h, for this library's CPU kernels"},
    {"fragments", kFragments, Zeros::words, kFragmentZeros, true, Axis::k, false, ScaleOrder::fragments, "", "", "", "",
     "the first operand of mma and wgmma, for this library's CUDA kernels"},
}};

/// Layout of that name, or nullptr.
constexpr const Layout* find_layout(std::string_view name) {
  for (const Layout& layout : kLayouts)
    if (layout.name == name) return &layout;
  return nullptr;
}

/// The codes that operators know under a name: "<layout>" is its weight, "<layout>.zeros" its zeros if they are words.
constexpr const Codes* find_codes(std::string_view name) {
  constexpr std::string_view suffix = ".zeros";
  if (!name.ends_with(suffix)) {
    const Layout* layout = find_layout(name);
    return layout == nullptr ? nullptr : &layout->weight;
  }
  const Layout* layout = find_layout(name.substr(0, name.size() - suffix.size()));
  const bool words = layout != nullptr && (layout->zeros == Zeros::words || layout->zeros == Zeros::words_less_one);
  return words ? &layout->zero_words : nullptr;
}

AWQ_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

/// Whether codes [n, k] can be stored so; if not, n must be a multiple of tile_n and k of tile_k.
constexpr bool can_hold(const Codes& codes, std::int64_t n, std::int64_t k) {
  return codes.padded || (n % codes.tile_n == 0 && k % codes.tile_k == 0);
}

/// Shape of the word matrix of codes [n, k].
AWQ_HOST_DEVICE constexpr WordShape word_shape(const Codes& codes, std::int64_t n, std::int64_t k) {
  const std::int64_t down = ceil_div(n, codes.tile_n), across = ceil_div(k, codes.tile_k);
  return codes.outer == Axis::n ? WordShape{down, across * codes.tile_words()}
                                : WordShape{across, down * codes.tile_words()};
}

/// The largest codes [n, k] that have this word matrix; {-1, -1} if none have.
constexpr CodeShape code_shape(const Codes& codes, std::int64_t rows, std::int64_t cols) {
  if (cols % codes.tile_words() != 0) return {-1, -1};
  const std::int64_t tiles = cols / codes.tile_words();
  return codes.outer == Axis::n ? CodeShape{rows * codes.tile_n, tiles * codes.tile_k}
                                : CodeShape{tiles * codes.tile_n, rows * codes.tile_k};
}

/// Index of a tile's first word in the row-major word matrix of codes [n, k]; the tile's first code is (row, col).
AWQ_HOST_DEVICE constexpr std::int64_t tile_word(const Codes& codes, std::int64_t n, std::int64_t k, std::int64_t row,
                                                 std::int64_t col) {
  const std::int64_t down = row / codes.tile_n, across = col / codes.tile_k;
  const std::int64_t tile =
      codes.outer == Axis::n ? down * ceil_div(k, codes.tile_k) + across : across * ceil_div(n, codes.tile_n) + down;
  return tile * codes.tile_words();
}

struct CodePlace {
  std::int64_t word;  // index into the row-major word matrix
  int nibble;         // bits 4*nibble .. 4*nibble+3 of that word
};

/// Where the code (row, col) of [n, k] lies: the definition that every packing routine is tested against.
constexpr CodePlace locate(const Codes& codes, std::int64_t n, std::int64_t k, std::int64_t row, std::int64_t col) {
  for (int place = 0;; ++place) {
    const CodeShape code = code_in_tile(codes, place);
    if (code.n == row % codes.tile_n && code.k == col % codes.tile_k)
      return {tile_word(codes, n, k, row, col) + place / codes.codes_per_word(), place % codes.codes_per_word()};
  }
}

/// The groups that scales and zeros have room for, where a layout pads them: 8 ZW with ZW = ceil(groups / 8) rounded up
/// to 1, 2 or 4 words for a group size of at least 128, 64 or 32. Nobody writes smaller groups so: 0.
/// Source: AutoAWQ awq/modules/linear/gemv.py calculate_zeros_width.
constexpr std::int64_t padded_groups(std::int64_t groups, std::int64_t group) {
  const std::int64_t words = group >= 128 ? 1 : group >= 64 ? 2 : group >= 32 ? 4 : 0;
  return words == 0 ? 0 : ceil_div(ceil_div(groups, 8), words) * words * 8;
}

/// The output channel whose scale stands in column `column`, where a layout permutes them: each thread of marlin's
/// kernel finds its scales side by side. One group over all of k is permuted in blocks of 32, else in blocks of 64.
constexpr std::int64_t marlin_scale(std::int64_t column, bool one_group) {
  const std::int64_t size = one_group ? 32 : 64, place = column % size, i = place / 8, j = place % 8;
  return column - place + (one_group ? 2 * i + j / 2 * 8 + j % 2 : i + 8 * j);
}

inline constexpr std::int64_t kStripColumns = kStrips.tile_n;

/// Where the scale of group `g` and output channel `column` stands in scales of order strips: strips of kStripColumns
/// channels (the last may have fewer) one after another, in each group after group, in each group its channels.
AWQ_HOST_DEVICE constexpr std::int64_t strip_scale(std::int64_t n, std::int64_t groups, std::int64_t g,
                                                   std::int64_t column) {
  const std::int64_t first = column / kStripColumns * kStripColumns, rest = n - first;
  return first * groups + g * (rest < kStripColumns ? rest : kStripColumns) + column - first;
}

inline constexpr std::int64_t kPanelColumns = kFragments.tile_n;
inline constexpr std::int64_t kFragmentRows = 16;

/// The same in scales of order fragments: panels of kPanelColumns channels (the last may have fewer) one after another,
/// in each group after group, in each its channels. In 16 channels those that a lane has, r and r + 8, are neighbours;
/// a panel may end with 8, which are as they are.
AWQ_HOST_DEVICE constexpr std::int64_t fragment_scale(std::int64_t n, std::int64_t groups, std::int64_t g,
                                                      std::int64_t column) {
  const std::int64_t first = column / kPanelColumns * kPanelColumns, rest = n - first;
  const std::int64_t columns = rest < kPanelColumns ? rest : kPanelColumns;
  const std::int64_t strip = (column - first) / kFragmentRows * kFragmentRows, r = column % kFragmentRows;
  const std::int64_t place = columns - strip < kFragmentRows ? r : r % 8 * 2 + r / 8;
  return first * groups + g * columns + strip + place;
}

}  // namespace awq::core
