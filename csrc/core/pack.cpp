#include "pack.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace awq::core {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read and written as they lie in files");

constexpr int kTileWords = kBlock / kCodesPerWord;

/// What every conversion goes through: kBlock x kBlock codes, row by row, eight neighbours along k in a word (nibble i
/// holds the i-th). 8 KiB, so that it stays in the first cache, and 64 bytes a row, so that whole cache lines are moved
/// on either side. Codes outside the matrix are 0.
struct Tile {
  alignas(64) std::uint32_t row[kBlock][kTileWords];
};

/// Where a tile lies, and how much of it is inside the matrix.
struct Window {
  std::int64_t n, k;    // the matrix
  std::int64_t n0, k0;  // the tile's first code
  std::int64_t rows() const { return std::min(kBlock, n - n0); }
  std::int64_t cols() const { return std::min(kBlock, k - k0); }
  std::int64_t row_words() const { return ceil_div(cols(), kCodesPerWord); }
};

std::uint32_t load_word(const std::uint8_t* words, std::int64_t i) {
  std::uint32_t word;
  std::memcpy(&word, words + 4 * i, 4);
  return word;
}

void store_word(std::uint8_t* words, std::int64_t i, std::uint32_t word) { std::memcpy(words + 4 * i, &word, 4); }

// --- eight codes a word along n: 8 x 8 codes are transposed in registers ---------------------------------------------

using Vector [[gnu::vector_size(64)]] = std::uint32_t;
constexpr int kLanes = 16;
static_assert(kLanes == kTileWords);

/// Transposes sixteen 8 x 8 matrices of nibbles at once: lane c of a[r] holds row r of matrix c. Swaps the off-diagonal
/// quarters of every 2 x 2, then 4 x 4, then of the whole matrix.
inline void transpose(Vector (&a)[8]) {
  const auto swap = [&a](int distance, std::uint32_t mask) {
    for (int i = 0; i < 8; ++i)
      if ((i & distance) == 0) {
        const Vector t = ((a[i] >> (4 * distance)) ^ a[i + distance]) & mask;
        a[i + distance] ^= t;
        a[i] ^= t << (4 * distance);
      }
  };
  swap(1, 0x0f0f0f0fu);
  swap(2, 0x00ff00ffu);
  swap(4, 0x0000ffffu);
}

/// Calls visit(word of the tile's rows, r, c, index in the word matrix) for the words that hold eight rows of code
/// column 8 * word + r, c from 0.
template <class Visit>
void for_lanes(const Codes& codes, const Window& w, std::int64_t word, Visit visit) {
  const WordShape shape = word_shape(codes, w.n, w.k);
  const std::int64_t lanes = ceil_div(w.rows(), kCodesPerWord);
  const std::int64_t columns = std::min<std::int64_t>(kCodesPerWord, w.cols() - word * kCodesPerWord);
  for (std::int64_t r = 0; r < columns; ++r) {
    const std::int64_t k = w.k0 + word * kCodesPerWord + r, first = w.n0 / kCodesPerWord;
    for (std::int64_t c = 0; c < lanes; ++c)
      visit(r, c, codes.outer == Axis::k ? k * shape.cols + first + c : (first + c) * shape.cols + k);
  }
}

bool is_whole_line(const Codes& codes, const Window& w, std::int64_t word) {
  return codes.outer == Axis::k && w.rows() == kBlock && w.cols() - word * kCodesPerWord >= kCodesPerWord;
}

void read_along_n(const Codes& codes, const Window& w, const std::uint8_t* words, Tile& tile) {
  const std::int64_t cols = word_shape(codes, w.n, w.k).cols;
  for (std::int64_t word = 0; word < w.row_words(); ++word) {
    alignas(64) std::uint32_t lane[8][kLanes] = {};
    Vector a[8];
    if (is_whole_line(codes, w, word)) {
      for (int r = 0; r < 8; ++r)
        std::memcpy(&a[r], words + 4 * ((w.k0 + word * 8 + r) * cols + w.n0 / 8), sizeof(Vector));
    } else {
      for_lanes(codes, w, word,
                [&](std::int64_t r, std::int64_t c, std::int64_t i) { lane[r][c] = load_word(words, i); });
      std::memcpy(a, lane, sizeof lane);
    }
    transpose(a);
    std::memcpy(lane, a, sizeof lane);
    for (int i = 0; i < 8; ++i) {
      const std::int64_t row = code_in_tile(codes, i).n;
      for (int c = 0; c < kLanes; ++c) tile.row[8 * c + row][word] = lane[i][c];
    }
  }
}

void write_along_n(const Codes& codes, const Window& w, const Tile& tile, std::uint8_t* words) {
  const std::int64_t cols = word_shape(codes, w.n, w.k).cols;
  for (std::int64_t word = 0; word < w.row_words(); ++word) {
    alignas(64) std::uint32_t lane[8][kLanes];
    for (int i = 0; i < 8; ++i) {
      const std::int64_t row = code_in_tile(codes, i).n;
      for (int c = 0; c < kLanes; ++c) lane[i][c] = tile.row[8 * c + row][word];
    }
    Vector a[8];
    std::memcpy(a, lane, sizeof lane);
    transpose(a);
    if (is_whole_line(codes, w, word)) {
      for (int r = 0; r < 8; ++r)
        std::memcpy(words + 4 * ((w.k0 + word * 8 + r) * cols + w.n0 / 8), &a[r], sizeof(Vector));
    } else {
      std::memcpy(lane, a, sizeof lane);
      for_lanes(codes, w, word,
                [&](std::int64_t r, std::int64_t c, std::int64_t i) { store_word(words, i, lane[r][c]); });
    }
  }
}

// --- eight codes a word along k: the tile's own words ----------------------------------------------------------------

void read_along_k(const Codes& codes, const Window& w, const std::uint8_t* words, Tile& tile) {
  const std::int64_t cols = word_shape(codes, w.n, w.k).cols, first = w.k0 / kCodesPerWord, count = w.row_words();
  if (codes.outer == Axis::n) {
    for (std::int64_t r = 0; r < w.rows(); ++r)
      std::memcpy(tile.row[r], words + 4 * ((w.n0 + r) * cols + first), static_cast<std::size_t>(4 * count));
  } else {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t r = 0; r < w.rows(); ++r) tile.row[r][i] = load_word(words, (first + i) * cols + w.n0 + r);
  }
}

void write_along_k(const Codes& codes, const Window& w, const Tile& tile, std::uint8_t* words) {
  const std::int64_t cols = word_shape(codes, w.n, w.k).cols, first = w.k0 / kCodesPerWord, count = w.row_words();
  if (codes.outer == Axis::n) {
    for (std::int64_t r = 0; r < w.rows(); ++r)
      std::memcpy(words + 4 * ((w.n0 + r) * cols + first), tile.row[r], static_cast<std::size_t>(4 * count));
  } else {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t r = 0; r < w.rows(); ++r) store_word(words, (first + i) * cols + w.n0 + r, tile.row[r][i]);
  }
}

// --- Order::fast -----------------------------------------------------------------------------------------------------

/// The nibbles of x as a 4 x 4 matrix, transposed: swaps nibbles 1-4, 3-6, 9-12, 11-14, then 2-8, 3-9, 6-12, 7-13.
std::uint64_t transpose4(std::uint64_t x) {
  std::uint64_t t = (x ^ (x >> 12)) & 0x0000f0f00000f0f0u;
  x ^= t ^ (t << 12);
  t = (x ^ (x >> 24)) & 0x00000000ff00ff00u;
  return x ^ t ^ (t << 24);
}

/// Calls visit(row of the tile, first word of half a row in the tile, address of its eight 16-bit words).
template <class Words, class Visit>
void for_halves(const Codes& codes, const Window& w, Words* words, Visit visit) {
  for (std::int64_t r = 0; r < w.rows(); r += codes.tile_n)
    for (std::int64_t c = 0; c < w.cols(); c += codes.tile_k) {
      Words* run = words + 2 * tile_word(codes, w.n, w.k, w.n0 + r, w.k0 + c);
      for (int half = 0; half < 8; ++half, run += 16) visit(r + half / 2, (c + half % 2 * 32) / kCodesPerWord, run);
    }
}

/// Word j of half a row holds the codes j, j + 8, j + 16, j + 24 of it: words 0..3 are columns 0..3 of a matrix whose
/// rows are the low halves of the tile's words, and words 4..7 are those of the high halves.
void read_fast(const Codes& codes, const Window& w, const std::uint8_t* words, Tile& tile) {
  for_halves(codes, w, words, [&](std::int64_t r, std::int64_t word, const std::uint8_t* run) {
    std::uint64_t low, high;
    std::memcpy(&low, run, 8);
    std::memcpy(&high, run + 8, 8);
    low = transpose4(low), high = transpose4(high);
    for (int i = 0; i < 4; ++i)
      tile.row[r][word + i] = static_cast<std::uint32_t>(low >> (16 * i) & 0xffffu) |
                              static_cast<std::uint32_t>(high >> (16 * i) & 0xffffu) << 16;
  });
}

void write_fast(const Codes& codes, const Window& w, const Tile& tile, std::uint8_t* words) {
  for_halves(codes, w, words, [&](std::int64_t r, std::int64_t word, std::uint8_t* run) {
    std::uint64_t low = 0, high = 0;
    for (int i = 0; i < 4; ++i) {
      low |= std::uint64_t{tile.row[r][word + i] & 0xffffu} << (16 * i);
      high |= std::uint64_t{tile.row[r][word + i] >> 16} << (16 * i);
    }
    low = transpose4(low), high = transpose4(high);
    std::memcpy(run, &low, 8);
    std::memcpy(run + 8, &high, 8);
  });
}

// --- Order::marlin ---------------------------------------------------------------------------------------------------

/// Calls visit(row, word, byte of that word, index in the word matrix): that marlin word holds codes of tile rows `row`
/// and row + 8, of each two in byte `byte` of word `word` and two in the same byte of the next.
template <class Visit>
void for_marlin(const Codes& codes, const Window& w, Visit visit) {
  for (std::int64_t r = 0; r < w.rows(); r += codes.tile_n)
    for (std::int64_t c = 0; c < w.cols(); c += codes.tile_k) {
      std::int64_t i = tile_word(codes, w.n, w.k, w.n0 + r, w.k0 + c);
      for (int thread = 0; thread < 32; ++thread)
        for (int block = 0; block < 4; ++block, ++i)
          visit(r + 16 * block + thread / 4, c / kCodesPerWord, thread % 4, i);
    }
}

/// Byte 0 of a word holds row 0, codes k and k + 8; byte 1 the same of row 8; bytes 2 and 3 hold k + 1 and k + 9.
void read_marlin(const Codes& codes, const Window& w, const std::uint8_t* words, Tile& tile) {
  for_marlin(codes, w, [&](std::int64_t row, std::int64_t word, int byte, std::int64_t i) {
    const std::uint32_t bits = load_word(words, i);
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t even = bits >> (4 * j) & 15u, odd = bits >> (4 * j + 16) & 15u;
      std::uint32_t& target = tile.row[row + j / 2 * 8][word + j % 2];
      target = (target & ~(0xffu << (8 * byte))) | (even | odd << 4) << (8 * byte);
    }
  });
}

void write_marlin(const Codes& codes, const Window& w, const Tile& tile, std::uint8_t* words) {
  for_marlin(codes, w, [&](std::int64_t row, std::int64_t word, int byte, std::int64_t i) {
    std::uint32_t bits = 0;
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t pair = tile.row[row + j / 2 * 8][word + j % 2] >> (8 * byte) & 0xffu;
      bits |= (pair & 15u) << (4 * j) | (pair >> 4) << (4 * j + 16);
    }
    store_word(words, i, bits);
  });
}

// --- tiles to and from words and codes -------------------------------------------------------------------------------

/// Sets what a word may hold beside the matrix to 0.
void clear_outside(const Window& w, Tile& tile) {
  const std::int64_t rows = w.rows(), cols = w.cols();
  if (cols % kCodesPerWord != 0)
    for (std::int64_t r = 0; r < rows; ++r)
      tile.row[r][cols / kCodesPerWord] &= (1u << (4 * (cols % kCodesPerWord))) - 1;
  if (rows % kCodesPerWord != 0)
    std::memset(tile.row[rows], 0, static_cast<std::size_t>(kCodesPerWord - rows % kCodesPerWord) * sizeof tile.row[0]);
}

struct Words {
  const Codes& codes;
  const std::uint8_t* words;

  void operator()(const Window& w, Tile& tile) const {
    switch (codes.order) {
      case Order::fast: return read_fast(codes, w, words, tile);
      case Order::marlin: return read_marlin(codes, w, words, tile);
      default: break;
    }
    codes.tile_k == 1 ? read_along_n(codes, w, words, tile) : read_along_k(codes, w, words, tile);
    clear_outside(w, tile);
  }
};

struct ToWords {
  const Codes& codes;
  std::uint8_t* words;

  void operator()(const Window& w, const Tile& tile) {
    switch (codes.order) {
      case Order::fast: return write_fast(codes, w, tile, words);
      case Order::marlin: return write_marlin(codes, w, tile, words);
      default: codes.tile_k == 1 ? write_along_n(codes, w, tile, words) : write_along_k(codes, w, tile, words);
    }
  }
};

struct Bytes {
  const std::uint8_t* q;
  std::uint64_t& seen;  // all the codes, or-ed

  void operator()(const Window& w, Tile& tile) {
    for (std::int64_t r = 0; r < w.rows(); ++r) {
      const std::uint8_t* from = q + (w.n0 + r) * w.k + w.k0;
      for (std::int64_t i = 0; i < w.row_words(); ++i) {
        std::uint64_t x = 0;
        std::memcpy(&x, from + 8 * i, static_cast<std::size_t>(std::min<std::int64_t>(8, w.cols() - 8 * i)));
        seen |= x;
        // Each step halves the distance between the codes: 8 bits apart, then pairs 16 and fours 32 bits apart.
        x &= 0x0f0f0f0f0f0f0f0fu;
        x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
        x = (x | x >> 8) & 0x0000ffff0000ffffu;
        tile.row[r][i] = static_cast<std::uint32_t>(x | x >> 16);
      }
    }
  }
};

struct ToBytes {
  std::uint8_t* q;

  void operator()(const Window& w, const Tile& tile) {
    for (std::int64_t r = 0; r < w.rows(); ++r) {
      std::uint8_t* to = q + (w.n0 + r) * w.k + w.k0;
      for (std::int64_t i = 0; i < w.row_words(); ++i) {
        std::uint64_t x = tile.row[r][i];
        x = (x | x << 16) & 0x0000ffff0000ffffu;
        x = (x | x << 8) & 0x00ff00ff00ff00ffu;
        x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
        std::memcpy(to + 8 * i, &x, static_cast<std::size_t>(std::min<std::int64_t>(8, w.cols() - 8 * i)));
      }
    }
  }
};

/// Moves tile after tile of the blocks [begin, end) along `axis`.
template <class Read, class Write>
void convert(Read read, Write write, Axis axis, std::int64_t n, std::int64_t k, std::int64_t begin, std::int64_t end) {
  Tile tile;
  for (std::int64_t block = begin; block < end; ++block)
    for (std::int64_t other = 0; other < (axis == Axis::n ? k : n); other += kBlock) {
      const Window window = axis == Axis::n ? Window{n, k, block * kBlock, other} : Window{n, k, other, block * kBlock};
      if (window.rows() < kBlock || window.cols() < kBlock) std::memset(&tile, 0, sizeof tile);
      read(window, tile);
      write(window, tile);
    }
}

}  // namespace

bool pack_blocks(const Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                 std::int64_t begin, std::int64_t end) noexcept {
  std::uint64_t seen = 0;
  convert(Bytes{q, seen}, ToWords{to, static_cast<std::uint8_t*>(words)}, to.outer, n, k, begin, end);
  return (seen & 0xf0f0f0f0f0f0f0f0u) == 0;
}

void unpack_blocks(const Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept {
  convert(Words{from, static_cast<const std::uint8_t*>(words)}, ToBytes{q}, Axis::n, n, k, begin, end);
}

void repack_blocks(const Codes& from, const Codes& to, const void* source, void* target, std::int64_t n, std::int64_t k,
                   std::int64_t begin, std::int64_t end) noexcept {
  convert(Words{from, static_cast<const std::uint8_t*>(source)}, ToWords{to, static_cast<std::uint8_t*>(target)},
          to.outer, n, k, begin, end);
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
