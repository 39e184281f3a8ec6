// Packing for one instruction-set level: included by kernels_impl.h, and compiled with that level's flags.
//
// Whatever the layouts, a tile of kBlock x kBlock codes is loaded in the order of its source, rearranged in place, and
// stored in the order of its target. Loading and storing move whole pieces of memory and know where a tile lies;
// rearranging works on 8 KiB in the first cache and knows nothing but the order of the codes.
//
// Rearranging is bookkeeping with index bits. Name the bits of a nibble's place in the tile after what they count, the
// rows, the words or the nibbles of this or that: an order is a permutation of the names, and a transposition or an
// exchange swaps some of them.
#pragma once
#include <algorithm>
#include <limits>

#include "layout.h"
#include "pack.h"
#include "simd.h"

namespace awq::core {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read and written as they lie in files");

inline constexpr int kTileWords = kBlock / kCodesPerWord;

/// Rearranged to rows, as every conversion has it midway: codes row by row along k, eight neighbours in a word (nibble
/// i holds the i-th). A row is a cache line. Codes outside the matrix are 0.
struct Tile {
  alignas(64) std::uint32_t row[kBlock][kTileWords];
};

/// Where a tile lies among the codes [n, k], and how much of it is inside.
struct Window {
  std::int64_t n, k, n0, k0;
  std::int64_t rows() const { return n - n0 < kBlock ? n - n0 : kBlock; }
  std::int64_t cols() const { return k - k0 < kBlock ? k - k0 : kBlock; }
  bool is_whole() const { return n - n0 >= kBlock && k - k0 >= kBlock; }
};

/// What a tile takes up in memory: rows of adjacent bytes.
template <class Byte>
struct Area {
  Byte* first;
  std::int64_t stride, rows, bytes;
};

// --- memory latency -------------------------------------------------------------------------------------------------

/// The cache lines of an area that have not been asked for yet.
struct Lines {
  const std::uint8_t* row = nullptr;
  std::int64_t stride = 0, rows = 0, bytes = 0, byte = 0;

  Lines() = default;
  template <class Byte>
  explicit Lines(const Area<Byte>& area)
      : row(area.first), stride(area.stride), rows(area.rows), bytes(area.bytes), byte(to_line(row)) {}

  /// From an address back to where its line begins.
  static std::int64_t to_line(const std::uint8_t* p) {
    return -static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % 64);
  }

  std::int64_t count() const { return rows * ceil_div(bytes, 64); }

  /// Into the second cache: rows of many matrices are a power of two apart and share few places in the first.
  void ask(std::int64_t lines) {
    Lines at = *this;
    for (; lines > 0 && at.rows > 0; --lines) {
      __builtin_prefetch(at.row + at.byte, 0, 1);
      at.byte += 64;
      if (at.byte >= at.bytes) --at.rows, at.row += at.stride, at.byte = to_line(at.row);
    }
    *this = at;
  }
};

/// Asks for memory while a tile is rearranged: a tile is some hundred lines far apart, which no hardware foresees, and
/// asked for all at once they would be waited for.
class Ahead {
 public:
  static constexpr int kSteps = 8;  // in a pass over the tile

  /// Spreads the lines of `read` and `write` over so many passes.
  Ahead(const Lines& read, const Lines& write, int passes) : read_(read), write_(write) {
    const std::int64_t steps = kSteps * (passes > 0 ? passes : 1);
    read_pace_ = ceil_div(read.count(), steps);
    write_pace_ = ceil_div(write.count(), steps);
  }

  void step() {
    read_.ask(read_pace_);
    write_.ask(write_pace_);
  }

  void finish() {
    read_.ask(kEverything);
    write_.ask(kEverything);
  }

 private:
  static constexpr std::int64_t kEverything = std::numeric_limits<std::int64_t>::max();
  Lines read_, write_;
  std::int64_t read_pace_, write_pace_;
};

// --- steps of rearranging -------------------------------------------------------------------------------------------

inline Words* vector_at(Tile& tile, int row, int word) { return reinterpret_cast<Words*>(&tile.row[row][word]); }

/// Exchanges the bits `mask << shift` of x with its own bits `mask`.
template <class Vector, class Mask>
inline Vector exchange_inside(Vector x, int shift, Mask mask) {
  const Vector t = ((x >> shift) ^ x) & mask;
  return x ^ t ^ (t << shift);
}

/// Transposes the 16 x 16 words of the rows first, first + step, ...
inline void transpose_words(Tile& tile, int first, int step) {
  const auto load = [&](int row, int word, Words(&a)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) a[i] = *vector_at(tile, first + (row + i) * step, word);
    interleave(a);
  };
  const auto store = [&](const Words(&a)[kLanes], int row, int word) {
    for (int i = 0; i < kLanes; ++i) *vector_at(tile, first + (row + i) * step, word) = a[i];
  };
  for (int p = 0; p < kTileWords; p += kLanes) {
    Words a[kLanes], b[kLanes];
    load(p, p, a);
    store(a, p, p);
    for (int q = p + kLanes; q < kTileWords; q += kLanes) {
      load(p, q, a);
      load(q, p, b);
      store(a, q, p);
      store(b, p, q);
    }
  }
}

struct RowOrder {
  int row[8];
};
inline constexpr RowOrder kNaturalRows{{0, 1, 2, 3, 4, 5, 6, 7}};
inline constexpr RowOrder kAwqRows{
    {awq_order(0), awq_order(1), awq_order(2), awq_order(3), awq_order(4), awq_order(5), awq_order(6), awq_order(7)}};

/// In every eight rows: the 8 x 8 nibbles of each column of words are transposed, row from.row[i] counting as the i-th
/// before, and to.row[i] after. The off-diagonal quarters of every 2 x 2 nibbles change places, then of every 4 x 4,
/// then of all 8 x 8.
inline void transpose_nibbles(Tile& tile, const RowOrder& from, const RowOrder& to, Ahead& ahead) {
  for (int first = 0; first < kBlock; first += 8) {
    for (int word = 0; word < kTileWords; word += kLanes) {
      Words a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) a[i] = *vector_at(tile, first + from.row[i], word);
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) exchange<4>(a[i], a[i + 1]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) exchange<8>(a[i + i / 2 * 2], a[i + i / 2 * 2 + 2]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) exchange<16>(a[i], a[i + 4]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) *vector_at(tile, first + to.row[i], word) = a[i];
    }
    if (first % 16 == 0) ahead.step();
  }
}

/// Replaces each vector of the tile by f of it.
template <class F>
inline void for_vectors(Tile& tile, Ahead& ahead, F f) {
  for (int row = 0; row < kBlock; ++row) {
    for (int word = 0; word < kTileWords; word += kLanes) *vector_at(tile, row, word) = f(*vector_at(tile, row, word));
    if (row % 16 == 0) ahead.step();
  }
}

// --- rearranging to rows and back, per order ------------------------------------------------------------------------

/// Words that hold eight codes along n, as [k][n / 8]: after the nibbles are transposed, row 8 w + r holds for row r of
/// each eight the codes of word w, and it is left to transpose [w][n / 8].
inline void along_n_to_rows(Order order, Tile& tile, Ahead& ahead) {
  transpose_nibbles(tile, kNaturalRows, order == Order::awq ? kAwqRows : kNaturalRows, ahead);
  for (int r = 0; r < 8; ++r, ahead.step()) transpose_words(tile, r, 8);
}

inline void rows_to_along_n(Order order, Tile& tile, Ahead& ahead) {
  for (int r = 0; r < 8; ++r, ahead.step()) transpose_words(tile, r, 8);
  transpose_nibbles(tile, order == Order::awq ? kAwqRows : kNaturalRows, kNaturalRows, ahead);
}

/// Sixteen rows of words were placed one below the other, see Placing::columns; the same both ways.
inline void transpose_columns(Tile& tile, Ahead& ahead) {
  for (int first = 0; first < kBlock; first += kTileWords, ahead.step()) transpose_words(tile, first, 1);
}

/// A 64-bit word's nibbles as a 4 x 4 matrix, transposed: in every 2 x 2 nibbles 1-4, 3-6, 9-12 and 11-14 change
/// places, then the quarters 2-8, 3-9, 6-12 and 7-13.
inline Words transpose_4x4(Words words) {
  auto x = reinterpret_cast<Longs>(words);
  x = exchange_inside(x, 12, 0x0000f0f00000f0f0u);
  x = exchange_inside(x, 24, 0x00000000ff00ff00u);
  return reinterpret_cast<Words>(x);
}

/// Half a row of 64 is 16 bytes. Its 16-bit word u holds the codes u, u + 8, u + 16 and u + 24: words 0..3 are the
/// columns of a 4 x 4 matrix of codes whose rows are the low halves of the tile's words; words 4..7 make the high ones.
inline void fast_to_rows(Tile& tile, Ahead& ahead) {
  for_vectors(tile, ahead, [](Words v) { return interleave_halves(transpose_4x4(v)); });
}

inline void rows_to_fast(Tile& tile, Ahead& ahead) {
  for_vectors(tile, ahead, [](Words v) { return transpose_4x4(separate_halves(v)); });
}

/// Index bits of a word of the tile and of a byte in it, from the highest; c is k / 16, and t is k / 2 % 4 (see
/// code_in_tile). A word's nibble (odd k, upper 8 of n: h, upper 8 of k: g) has its highest and lowest bit swapped, so
/// that a byte holds two neighbours along k:
///   as placed          row n/64 c c c s s s   word t t b b   byte g h   (n % 64 is b b h s s s)
/// Only the rows of one n / 64 and lower s s are concerned with one another; of those, sixteen four apart:
///   as placed               c c c s           word t t b b   byte g h
///   words transposed        t t b b           word c c c s   byte g h
///   rows' t t with g h      g h b b           word c c c s   byte t t
///   rows' g with words' s   s h b b           word c c c g   byte t t
///   rows reordered          b b h s           word c c c g   byte t t
/// and c c c g t t is k / 2.
inline constexpr int marlin_row(int shbb) { return shbb % 4 * 4 + shbb / 4 % 2 * 2 + shbb / 8; }

inline void swap_outer_bits_of_nibbles(Words (&a)[16]) {
#pragma GCC unroll 16
  for (Words& words : a) words = exchange_inside(words, 12, 0x0000f0f0u);
}

inline void swap_rows_and_bytes(Words (&a)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i % 8 < 4) exchange<8>(a[i], a[i + 4]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) exchange<16>(a[i], a[i + 8]);
}

inline void swap_rows_and_words(Words (&a)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) exchange<32>(a[i], a[i + 8]);
}

inline void marlin_to_rows(Tile& tile, Ahead& ahead) {
  for (int i = 0; i < 8; ++i, ahead.step()) {
    const int first = i / 4 * 64 + i % 4;
    transpose_words(tile, first, 4);
    ahead.step();
    for (int word = 0; word < kTileWords; word += kLanes) {
      Words a[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) a[r] = *vector_at(tile, first + 4 * r, word);
      swap_outer_bits_of_nibbles(a);
      swap_rows_and_bytes(a);
      swap_rows_and_words(a);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) *vector_at(tile, first + 4 * marlin_row(r), word) = a[r];
    }
  }
}

inline void rows_to_marlin(Tile& tile, Ahead& ahead) {
  for (int i = 0; i < 8; ++i, ahead.step()) {
    const int first = i / 4 * 64 + i % 4;
    for (int word = 0; word < kTileWords; word += kLanes) {
      Words a[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) a[r] = *vector_at(tile, first + 4 * marlin_row(r), word);
      swap_rows_and_words(a);
      swap_rows_and_bytes(a);
      swap_outer_bits_of_nibbles(a);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) *vector_at(tile, first + 4 * r, word) = a[r];
    }
    ahead.step();
    transpose_words(tile, first, 4);
  }
}

/// A word's nibbles, counted by three bits j j h, hold the codes h j j: the lower two bits change places, then the
/// upper.
inline void strips_to_rows(Tile& tile, Ahead& ahead) {
  for_vectors(tile, ahead, [](Words v) { return exchange_inside(exchange_inside(v, 4, 0x00f000f0u), 8, 0x0000ff00u); });
}

inline void rows_to_strips(Tile& tile, Ahead& ahead) {
  for_vectors(tile, ahead, [](Words v) { return exchange_inside(exchange_inside(v, 8, 0x0000ff00u), 4, 0x00f000f0u); });
}

/// As placed, by index bits from the highest: n is n/64 s s h r r r, k is k/64 j j g t u o (see code_in_tile: a lane is
/// r r r t u, its four words are j j). A piece is the words u j j.
///                          row n/64 s s t r r r   word k/64 u j j   nibble o g h
///   rows' t with h         row n/64 s s h r r r   word k/64 u j j   nibble o g t
///   nibble's o with t                             word k/64 u j j   nibble t g o
///   fours interleaved                             word k/64 j j u   nibble t g o
///   words' u with g                               word k/64 j j g   nibble t u o
inline void swap_rows_and_nibbles(Tile& tile, Ahead& ahead) {
  for (int first = 0; first < kBlock; first += 16, ahead.step())
    for (int row = first; row < first + 8; ++row)
      for (int word = 0; word < kTileWords; word += kLanes)
        exchange<4>(*vector_at(tile, row, word), *vector_at(tile, row + 8, word));
}

inline Words swap_words_and_bytes(Words v) {
  return reinterpret_cast<Words>(exchange_inside(reinterpret_cast<Longs>(v), 24, std::uint64_t{0xff00ff00}));
}

/// Replaces each row's vectors by f of them.
template <class F>
inline void for_rows(Tile& tile, F f) {
  for (auto& row : tile.row) {
    Words v[kTileWords / kLanes];
    std::memcpy(v, row, sizeof v);
    f(v);
    std::memcpy(row, v, sizeof v);
  }
}

inline void fragments_to_rows(Tile& tile, Ahead& ahead) {
  swap_rows_and_nibbles(tile, ahead);
  for_rows(tile, [](Words(&v)[kTileWords / kLanes]) {
    for (Words& words : v) words = exchange_inside(words, 12, 0x0000f0f0u);
    interleave_fours(v);
    for (Words& words : v) words = swap_words_and_bytes(words);
  });
}

inline void rows_to_fragments(Tile& tile, Ahead& ahead) {
  for_rows(tile, [](Words(&v)[kTileWords / kLanes]) {
    for (Words& words : v) words = swap_words_and_bytes(words);
    separate_fours(v);
    for (Words& words : v) words = exchange_inside(words, 12, 0x0000f0f0u);
  });
  swap_rows_and_nibbles(tile, ahead);
}

// --- words in memory ------------------------------------------------------------------------------------------------

/// Where the pieces of an area go in a tile, such that it can be rearranged in place.
enum class Placing {
  rows,       // a row of 64 bytes to a row
  columns,    // sixteen rows of 512 bytes: each 64 columns of bytes to sixteen rows
  fast,       // a row of 256 bytes holds two times four rows of 64 codes: each four to half of the same four rows
  marlin,     // eight rows of 1024 bytes, each n / 64 s s s of 64: to row n / 64 c c c s s s, see marlin_row
  strips,     // four rows of 2048 bytes, by turns 64 of the strip's lower and its upper columns: each to sixteen rows
  fragments,  // two rows of 4096 bytes, k / 64 s s r r r t: to row n / 64 s s t r r r, see fragments_to_rows
  one,        // nibble by nibble, for zeros in an order of their own: they are few
};

inline Placing placing_of(const Codes& codes) {
  if (codes.order == Order::fast) return Placing::fast;
  if (codes.order == Order::marlin) return Placing::marlin;
  if (codes.order == Order::strips) return Placing::strips;
  if (codes.order == Order::fragments) return Placing::fragments;
  if (codes.order == Order::strip_zeros || codes.order == Order::fragment_zeros) return Placing::one;
  return (codes.tile_k == 1) == (codes.outer == Axis::n) ? Placing::columns : Placing::rows;
}

inline constexpr std::int64_t kPiece = 32;  // bytes

/// Calls move(address, place in the tile, bytes) for the pieces of an area, which are kPiece bytes but for the last of
/// a row where that is not whole.
template <Placing kPlacing, class Byte, class Move>
inline void for_pieces(const Area<Byte>& area, bool whole, Tile& tile, Move move) {
  const auto place = [&tile](std::int64_t row, std::int64_t piece) __attribute__((always_inline)) {
    const std::int64_t line = piece / 2, half = piece % 2 * (kTileWords / 2);
    switch (kPlacing) {
      case Placing::columns: return &tile.row[16 * line + row][half];
      case Placing::fast: return &tile.row[4 * row + piece % 4][piece / 4 * (kTileWords / 2)];
      case Placing::marlin: return &tile.row[line / 8 * 64 + row * 8 + line % 8][half];
      case Placing::strips: return &tile.row[32 * row + line % 2 * 16 + line / 2][half];
      case Placing::fragments:
        return &tile.row[64 * row + line % 32 / 8 * 16 + piece % 2 * 8 + line % 8][line / 32 * (kTileWords / 2)];
      default: return &tile.row[row][half];
    }
  };
  const auto visit = [&](std::int64_t rows, std::int64_t bytes) __attribute__((always_inline)) {
    for (std::int64_t row = 0; row < rows; ++row) {
      Byte* const first = area.first + row * area.stride;
      for (std::int64_t piece = 0; piece < bytes / kPiece; ++piece)
        move(first + piece * kPiece, place(row, piece), kPiece);
      if (const std::int64_t rest = bytes % kPiece; rest != 0)
        move(first + bytes - rest, place(row, bytes / kPiece), rest);
    }
  };
  constexpr std::int64_t kRows = kPlacing == Placing::columns     ? 16
                                 : kPlacing == Placing::fast      ? 32
                                 : kPlacing == Placing::marlin    ? 8
                                 : kPlacing == Placing::strips    ? 4
                                 : kPlacing == Placing::fragments ? 2
                                                                  : kBlock;
  whole ? visit(kRows, std::int64_t{sizeof tile} / kRows) : visit(area.rows, area.bytes);
}

template <class Byte, class Move>
inline void for_pieces(Placing placing, const Area<Byte>& area, bool whole, Tile& tile, Move move) {
  switch (placing) {
    case Placing::rows: return for_pieces<Placing::rows>(area, whole, tile, move);
    case Placing::columns: return for_pieces<Placing::columns>(area, whole, tile, move);
    case Placing::fast: return for_pieces<Placing::fast>(area, whole, tile, move);
    case Placing::marlin: return for_pieces<Placing::marlin>(area, whole, tile, move);
    case Placing::strips: return for_pieces<Placing::strips>(area, whole, tile, move);
    case Placing::fragments: return for_pieces<Placing::fragments>(area, whole, tile, move);
    case Placing::one: return;
  }
}

/// Sets what words and padded tiles may hold beside the matrix to 0.
inline void clear_outside(const Window& w, Tile& tile) {
  const std::int64_t rows = w.rows(), cols = w.cols();
  constexpr std::int64_t kTallest = kFragments.tile_n, kWidest = kFragments.tile_k;  // of the tiles that pad
  static_assert(kTallest % kCodesPerWord == 0 && kBlock % kTallest == 0 && kBlock % kWidest == 0);
  if (cols % kWidest != 0) {
    const std::int64_t word = cols / kCodesPerWord, last = (cols / kWidest + 1) * (kWidest / kCodesPerWord);
    for (std::int64_t r = 0; r < rows; ++r) {
      tile.row[r][word] &= (1u << (4 * (cols % kCodesPerWord))) - 1;
      std::fill(tile.row[r] + word + 1, tile.row[r] + last, 0u);
    }
  }
  if (rows % kTallest != 0)
    std::memset(tile.row[rows], 0, static_cast<std::size_t>(kTallest - rows % kTallest) * sizeof tile.row[0]);
}

/// Codes in words, as source or target of a conversion.
template <class Byte>
struct Packed {
  const Codes& codes;
  Byte* words;

  Area<Byte> area(const Window& w) const {
    const std::int64_t stride = word_shape(codes, w.n, w.k).cols * (codes.word_bits / 8);
    const std::int64_t tile = codes.tile_codes() / 2;
    const std::int64_t down = ceil_div(w.rows(), codes.tile_n), across = ceil_div(w.cols(), codes.tile_k);
    if (codes.outer == Axis::n)
      return {words + w.n0 / codes.tile_n * stride + w.k0 / codes.tile_k * tile, stride, down, across * tile};
    return {words + w.k0 / codes.tile_k * stride + w.n0 / codes.tile_n * tile, stride, across, down * tile};
  }

  /// Passes over the tile, Ahead::kSteps steps each, between rows and the order in memory.
  int passes() const {
    const Placing placing = placing_of(codes);
    if (placing == Placing::one) return 0;
    const bool two = placing == Placing::marlin || placing == Placing::strips;
    return (two ? 2 : placing == Placing::rows ? 0 : 1) + (codes.tile_k == 1 ? 2 : 0);
  }

  /// Calls visit(word, its shift, row of the tile, column) for every code of the window, in memory's order, padding
  /// included.
  template <class Visit>
  void for_nibbles(const Window& w, Visit visit) const {
    for (std::int64_t row = 0; row < w.rows(); row += codes.tile_n)
      for (std::int64_t col = 0; col < w.cols(); col += codes.tile_k) {
        Byte* const first = words + tile_word(codes, w.n, w.k, w.n0 + row, w.k0 + col) * (codes.word_bits / 8);
        for (int place = 0; place < codes.tile_codes(); ++place) {
          const CodeShape code = code_in_tile(codes, place);
          visit(first + place / 2, place % 2 * 4, row + code.n, col + code.k);
        }
      }
  }

  void load(const Window& w, Tile& tile, Ahead& ahead) const {
    const Placing placing = placing_of(codes);
    if (!w.is_whole() || placing == Placing::one) std::memset(&tile, 0, sizeof tile);
    if (placing == Placing::one)
      for_nibbles(w, [&](const std::uint8_t* byte, int shift, std::int64_t row, std::int64_t col) {
        tile.row[row][col / 8] |= static_cast<std::uint32_t>(*byte >> shift & 15) << (4 * (col % 8));
      });
    for_pieces(placing, area(w), w.is_whole(), tile,
               [](const std::uint8_t* from, std::uint32_t* to, std::int64_t bytes) {
                 std::memcpy(to, from, static_cast<std::size_t>(bytes));
               });
    if (placing == Placing::columns || placing == Placing::strips) transpose_columns(tile, ahead);
    if (placing == Placing::fast) fast_to_rows(tile, ahead);
    if (placing == Placing::marlin) marlin_to_rows(tile, ahead);
    if (placing == Placing::strips) strips_to_rows(tile, ahead);
    if (placing == Placing::fragments) fragments_to_rows(tile, ahead);
    if (codes.tile_k == 1 && placing != Placing::one) along_n_to_rows(codes.order, tile, ahead);
    clear_outside(w, tile);
  }

  void store(const Window& w, Tile& tile, Ahead& ahead) const {
    const Placing placing = placing_of(codes);
    if (codes.tile_k == 1 && placing != Placing::one) rows_to_along_n(codes.order, tile, ahead);
    if (placing == Placing::strips) rows_to_strips(tile, ahead);
    if (placing == Placing::columns || placing == Placing::strips) transpose_columns(tile, ahead);
    if (placing == Placing::fast) rows_to_fast(tile, ahead);
    if (placing == Placing::marlin) rows_to_marlin(tile, ahead);
    if (placing == Placing::fragments) rows_to_fragments(tile, ahead);
    ahead.finish();
    if (placing == Placing::one)
      for_nibbles(w, [&](std::uint8_t* byte, int shift, std::int64_t row, std::int64_t col) {
        const std::uint32_t code = tile.row[row][col / 8] >> (4 * (col % 8)) & 15u;
        *byte = static_cast<std::uint8_t>((shift == 0 ? 0 : *byte) | code << shift);
      });
    for_pieces(placing, area(w), w.is_whole(), tile,
               [](std::uint8_t* to, const std::uint32_t* from, std::int64_t bytes) {
                 std::memcpy(to, from, static_cast<std::size_t>(bytes));
               });
  }
};

// --- one code a byte ------------------------------------------------------------------------------------------------

/// Sixteen bits hold two codes, 8 bits apart: the codes in the lower 8 bits.
inline HalfBytes join_codes(Words codes) {
  const auto x = reinterpret_cast<Shorts>(codes) & 0x0f0fu;
  return __builtin_convertvector((x | x >> 4) & 0x00ffu, HalfBytes);
}

inline Words split_codes(HalfBytes pairs) {
  const Shorts x = __builtin_convertvector(pairs, Shorts);
  return reinterpret_cast<Words>(Shorts((x | x << 4) & 0x0f0fu));
}

/// Where the codes of a tile lie, one a byte.
template <class Byte>
inline Area<Byte> area_of_bytes(Byte* q, const Window& w) {
  return {q + w.n0 * w.k + w.k0, w.k, w.rows(), w.cols()};
}

struct ByteSource {
  const std::uint8_t* q;
  Words& seen;  // all the codes, or-ed

  Area<const std::uint8_t> area(const Window& w) const { return area_of_bytes(q, w); }
  int passes() const { return 1; }

  void load(const Window& w, Tile& tile, Ahead& ahead) const {
    const Area<const std::uint8_t> from = area(w);
    if (!w.is_whole()) std::memset(&tile, 0, sizeof tile);
    Words all = seen;
    for (std::int64_t r = 0; r < from.rows; ++r) {
      alignas(64) std::uint8_t padded_row[kBlock];
      const std::uint8_t* row = from.first + r * from.stride;
      if (from.bytes < kBlock) {
        std::memset(padded_row, 0, sizeof padded_row);
        std::memcpy(padded_row, row, static_cast<std::size_t>(from.bytes));
        row = padded_row;
      }
      for (int i = 0; i < kBlock; i += int{sizeof(Words)}) {
        Words codes;
        std::memcpy(&codes, row + i, sizeof codes);
        all |= codes;
        const HalfBytes pairs = join_codes(codes);
        std::memcpy(&tile.row[r][i / kCodesPerWord], &pairs, sizeof pairs);
      }
      if (r % 16 == 0) ahead.step();
    }
    seen = all;
  }
};

struct ByteTarget {
  std::uint8_t* q;

  Area<std::uint8_t> area(const Window& w) const { return area_of_bytes(q, w); }
  int passes() const { return 0; }

  void store(const Window& w, Tile& tile, Ahead& ahead) const {
    ahead.finish();
    const Area<std::uint8_t> to = area(w);
    for (std::int64_t r = 0; r < to.rows; ++r) {
      alignas(64) std::uint8_t padded_row[kBlock];
      std::uint8_t* const row = to.first + r * to.stride;
      std::uint8_t* const target = to.bytes < kBlock ? padded_row : row;
      for (int i = 0; i < kBlock; i += int{sizeof(Words)}) {
        HalfBytes pairs;
        std::memcpy(&pairs, &tile.row[r][i / kCodesPerWord], sizeof pairs);
        const Words codes = split_codes(pairs);
        std::memcpy(target + i, &codes, sizeof codes);
      }
      if (target == padded_row) std::memcpy(row, padded_row, static_cast<std::size_t>(to.bytes));
    }
  }
};

// --- tile after tile ------------------------------------------------------------------------------------------------

/// Moves the tiles of the blocks [begin, end) along `axis`. Four blocks go together, tile by tile of each in turn:
/// tiles side by side across the blocks lie in the same pages of memory, which a CPU remembers only so many of.
template <class Source, class Target>
inline void convert(const Source& source, const Target& target, Axis axis, std::int64_t n, std::int64_t k,
                    std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kGroup = 4;
  const std::int64_t tiles = ceil_div(axis == Axis::n ? k : n, kBlock);  // in a block
  const auto window = [&](std::int64_t i) {
    const std::int64_t first = begin + i / (kGroup * tiles) * kGroup, place = i % (kGroup * tiles);
    const std::int64_t blocks = end - first < kGroup ? end - first : kGroup;
    const std::int64_t along = (first + place % blocks) * kBlock, across = place / blocks * kBlock;
    return axis == Axis::n ? Window{n, k, along, across} : Window{n, k, across, along};
  };
  Tile tile;
  const std::int64_t count = (end - begin) * tiles;
  for (std::int64_t i = 0; i < count; ++i) {
    const Window w = window(i);
    const Lines next = i + 1 < count ? Lines(source.area(window(i + 1))) : Lines();
    Ahead ahead(next, Lines(target.area(w)), source.passes() + target.passes());
    source.load(w, tile, ahead);
    target.store(w, tile, ahead);
  }
}

bool pack_tiles(const Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k, std::int64_t begin,
                std::int64_t end) noexcept {
  Words seen{};
  convert(ByteSource{q, seen}, Packed<std::uint8_t>{to, static_cast<std::uint8_t*>(words)}, to.outer, n, k, begin, end);
  std::uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= seen[i];
  return (all & 0xf0f0f0f0u) == 0;
}

void unpack_tiles(const Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                  std::int64_t begin, std::int64_t end) noexcept {
  convert(Packed<const std::uint8_t>{from, static_cast<const std::uint8_t*>(words)}, ByteTarget{q}, Axis::n, n, k,
          begin, end);
}

void repack_tiles(const Codes& from, const Codes& to, const void* source, void* target, std::int64_t n, std::int64_t k,
                  std::int64_t begin, std::int64_t end) noexcept {
  convert(Packed<const std::uint8_t>{from, static_cast<const std::uint8_t*>(source)},
          Packed<std::uint8_t>{to, static_cast<std::uint8_t*>(target)}, to.outer, n, k, begin, end);
}

}  // namespace
}  // namespace awq::core
