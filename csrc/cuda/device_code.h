// What one thread of each kernel does. There is no launch syntax and no shuffle in here, so that a test without a GPU
// can play every thread of a launch on the host and compare the result with core's, bit for bit.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../core/layout.h"
#include "../core/pack.h"
#include "../core/quantize.h"
#include "vector.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace awq::cuda {

using core::CodeShape;
using core::DType;
using core::kCodesPerWord;

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // of every block

/// The codes [n, k] cut into tiles of kRows x kCols codes, numbered along k first. The last ones may stick out.
template <int kRows, int kCols>
struct Tiles {
  CodeShape shape;

  AWQ_HOST_DEVICE constexpr std::int64_t across() const { return (shape.k + kCols - 1) / kCols; }
  AWQ_HOST_DEVICE constexpr std::int64_t count() const { return (shape.n + kRows - 1) / kRows * across(); }
  AWQ_HOST_DEVICE constexpr CodeShape origin(std::int64_t tile) const {
    return {tile / across() * kRows, tile % across() * kCols};
  }
};

/// Element i of an array of kType as float, exactly: core::load_as, in one instruction where the device has it.
template <DType kType>
AWQ_HOST_DEVICE inline float load_float(const void* data, std::int64_t i) {
#ifdef __CUDA_ARCH__
  if constexpr (kType == DType::f16) return __half2float(static_cast<const __half*>(data)[i]);
#endif
  return core::load_as<float>(data, kType, i);
}

// --- pack, unpack, repack: codes or words -> a square tile of codes in shared memory -> words or codes --------------
// Both sides read and write neighbouring addresses; only the shared tile is walked across its grain. Every layout's
// own tiles fit into the square one a whole number of times.

inline constexpr int kTile = 64;
inline constexpr int kTileStride = kTile + 4;  // 17 words, an odd number: a column of codes lies in distinct banks
using SquareTiles = Tiles<kTile, kTile>;

/// The code of a square tile that `nibble` of the tile's word (row, col) holds: the inverse of core::locate.
AWQ_HOST_DEVICE inline CodeShape code_of_word(const core::Codes& codes, int row, int col, int nibble) {
  const int inner = col / codes.tile_words();
  const CodeShape code = core::code_in_tile(codes, col % codes.tile_words() * codes.codes_per_word() + nibble);
  const bool by_n = codes.outer == core::Axis::n;
  return {(by_n ? row : inner) * codes.tile_n + code.n, (by_n ? inner : row) * codes.tile_k + code.k};
}

/// Calls visit(index in the tile, index in q) for this thread's share of the codes of a tile.
template <class Visit>
AWQ_HOST_DEVICE inline void for_codes(SquareTiles tiles, std::int64_t tile, int thread, Visit visit) {
  const CodeShape origin = tiles.origin(tile);
  for (int i = thread; i < kTile * kTile; i += kThreads) {
    const std::int64_t row = origin.n + i / kTile, col = origin.k + i % kTile;
    if (row < tiles.shape.n && col < tiles.shape.k)
      visit(i / kTile * kTileStride + i % kTile, row * tiles.shape.k + col);
  }
}

/// Calls visit(row and column of the word in the tile, index in the word matrix) for this thread's share of the words.
template <class Visit>
AWQ_HOST_DEVICE inline void for_words(const core::Codes& codes, SquareTiles tiles, std::int64_t tile, int thread,
                                      Visit visit) {
  const core::WordShape whole = core::word_shape(codes, tiles.shape.n, tiles.shape.k);
  const core::WordShape part = core::word_shape(codes, kTile, kTile);
  const CodeShape first = tiles.origin(tile);
  const core::WordShape origin = core::word_shape(codes, first.n, first.k);
  for (int i = thread; i < kTile * kTile / codes.codes_per_word(); i += kThreads) {
    const int row = i / static_cast<int>(part.cols), col = i % static_cast<int>(part.cols);
    if (origin.rows + row < whole.rows && origin.cols + col < whole.cols)
      visit(row, col, (origin.rows + row) * whole.cols + origin.cols + col);
  }
}

struct ReadCodes {
  const std::uint8_t* q;

  AWQ_HOST_DEVICE void operator()(std::uint8_t* shared, SquareTiles tiles, std::int64_t tile, int thread) const {
    for_codes(tiles, tile, thread, [&](int local, std::int64_t global) { shared[local] = q[global]; });
  }
};

struct WriteCodes {
  std::uint8_t* q;

  AWQ_HOST_DEVICE void operator()(const std::uint8_t* shared, SquareTiles tiles, std::int64_t tile, int thread) const {
    for_codes(tiles, tile, thread, [&](int local, std::int64_t global) { q[global] = shared[local]; });
  }
};

struct ReadWords {
  core::Codes codes;
  const void* words;

  AWQ_HOST_DEVICE void operator()(std::uint8_t* shared, SquareTiles tiles, std::int64_t tile, int thread) const {
    for_words(codes, tiles, tile, thread, [&](int row, int col, std::int64_t global) {
      const std::uint32_t word = codes.word_bits == 16 ? static_cast<const std::uint16_t*>(words)[global]
                                                       : static_cast<const std::uint32_t*>(words)[global];
      for (int i = 0; i < codes.codes_per_word(); ++i) {
        const CodeShape code = code_of_word(codes, row, col, i);
        shared[code.n * kTileStride + code.k] = static_cast<std::uint8_t>((word >> (4 * i)) & 15u);
      }
    });
  }
};

/// Codes outside the matrix, where a layout pads, are 0.
struct WriteWords {
  core::Codes codes;
  void* words;

  AWQ_HOST_DEVICE void operator()(const std::uint8_t* shared, SquareTiles tiles, std::int64_t tile, int thread) const {
    const CodeShape origin = tiles.origin(tile);
    for_words(codes, tiles, tile, thread, [&](int row, int col, std::int64_t global) {
      std::uint32_t word = 0;
      for (int i = 0; i < codes.codes_per_word(); ++i) {
        const CodeShape code = code_of_word(codes, row, col, i);
        if (origin.n + code.n < tiles.shape.n && origin.k + code.k < tiles.shape.k)
          word |= (shared[code.n * kTileStride + code.k] & std::uint32_t{15}) << (4 * i);
      }
      if (codes.word_bits == 16)
        static_cast<std::uint16_t*>(words)[global] = static_cast<std::uint16_t>(word);
      else
        static_cast<std::uint32_t*>(words)[global] = word;
    });
  }
};

// --- quantize: one warp a group -------------------------------------------------------------------------------------

/// What a group's parameters are computed from. Minimum and maximum do not depend on the order of the values, nor does
/// whether poison is NaN, so lanes may see them in any.
struct GroupRange {
  float lo = std::numeric_limits<float>::infinity(), hi = -std::numeric_limits<float>::infinity();
  float poison = 0.0f;  // 0 while every value is finite, NaN after one that is not

  AWQ_HOST_DEVICE void add(float w) { merge({w, w, w * 0.0f}); }

  AWQ_HOST_DEVICE void merge(const GroupRange& other) {
    lo = other.lo < lo ? other.lo : lo;
    hi = other.hi > hi ? other.hi : hi;
    poison += other.poison;
  }
};

/// Groups are numbered row by row: `group` is the index in scales and zeros.
template <DType kType>
AWQ_HOST_DEVICE inline GroupRange lane_range(const core::QuantizeArgs& a, std::int64_t group, int lane) {
  const std::int64_t groups = a.k / a.group;
  const std::int64_t first = group / groups * a.w_stride + group % groups * a.group;
  GroupRange range;
  for (std::int64_t i = lane; i < a.group; i += kWarp) range.add(load_float<kType>(a.w, first + i));
  return range;
}

AWQ_HOST_DEVICE inline core::GroupParameters parameters(const core::QuantizeArgs& a, std::int64_t group,
                                                        const GroupRange& range) {
  const float lo = a.range == nullptr ? range.lo : a.range[2 * group];
  const float hi = a.range == nullptr ? range.hi : a.range[2 * group + 1];
  const core::GroupParameters p = core::group_parameters(lo + range.poison, hi + range.poison, a.to);
  if (p.scale - p.scale == 0.0f) return p;
  return {std::numeric_limits<float>::quiet_NaN(), a.to.zero_point ? 0.0f : a.to.middle(), a.to.last};
}

template <DType kType>
AWQ_HOST_DEVICE inline void write_group(const core::QuantizeArgs& a, std::int64_t group, core::GroupParameters p,
                                        int lane) {
  const std::int64_t groups = a.k / a.group;
  const std::int64_t row = group / groups, col = group % groups * a.group;
  const bool finite = p.scale == p.scale;
  for (std::int64_t i = lane; i < a.group; i += kWarp) {
    const float w = load_float<kType>(a.w, row * a.w_stride + col + i);
    a.q[row * a.k + col + i] = static_cast<std::uint8_t>(finite ? core::round_code(w, p) : p.zero);
  }
  if (lane != 0) return;
  core::store_as(a.scales, a.to.scale_type, group, p.scale);
  a.zeros[group] = static_cast<std::uint8_t>(p.zero);
}

// --- dequantize: gemm layout -> W [n, k] ----------------------------------------------------------------------------
// A thread turns one word of eight rows k0 .. k0+7 into an 8 x 8 block of W: the transposition happens in registers. Of
// a warp's lanes eight lie along the words and four along k, so that each load touches whole 32-byte sectors and each
// store 16-byte pieces that are adjacent across lanes, whole sectors again. Four warps along the words then use whole
// 128-byte lines of the source, two along k (for two-byte types) whole lines of the target.

inline constexpr int kLanesAlongN = 8, kLanesAlongK = 4, kWarpsAlongN = 4, kWarpsAlongK = 2;
static_assert(kLanesAlongN * kLanesAlongK == kWarp && kWarp * kWarpsAlongN * kWarpsAlongK == kThreads);
using BlockTiles = Tiles<kLanesAlongN * kWarpsAlongN * kCodesPerWord, kLanesAlongK * kWarpsAlongK * kCodesPerWord>;

/// First code of the 8 x 8 block that a thread of a tile works on.
AWQ_HOST_DEVICE inline CodeShape thread_block(BlockTiles tiles, std::int64_t tile, int thread) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  const CodeShape origin = tiles.origin(tile);
  return {origin.n + (warp % kWarpsAlongN * kLanesAlongN + lane % kLanesAlongN) * kCodesPerWord,
          origin.k + (warp / kWarpsAlongN * kLanesAlongK + lane / kLanesAlongN) * kCodesPerWord};
}

/// 2^23 + code, exactly: the last bit of a float in [2^23, 2^24) is worth one. The difference of two such numbers is
/// the exact difference of their codes, for two integer instructions a code and no conversion.
AWQ_HOST_DEVICE inline float offset_code(std::uint32_t word, int nibble) {
  return std::bit_cast<float>(0x4b000000u | ((word >> (4 * nibble)) & 15u));
}

/// Two floats, each rounded to kType (nearest, ties to even), as neighbours in memory.
template <DType kType>
AWQ_HOST_DEVICE inline std::uint32_t round_pair(float first, float second) {
  static_assert(kType == DType::f16 || kType == DType::bf16);
#ifdef __CUDA_ARCH__
  if constexpr (kType == DType::f16)
    return std::bit_cast<std::uint32_t>(__half2_raw(__floats2half2_rn(first, second)));
  else
    return std::bit_cast<std::uint32_t>(__nv_bfloat162_raw(__floats2bfloat162_rn(first, second)));
#else
  if constexpr (kType == DType::f16)
    return core::float_to_half(first) | static_cast<std::uint32_t>(core::float_to_half(second)) << 16;
  else
    return core::float_to_bfloat(first) | static_cast<std::uint32_t>(core::float_to_bfloat(second)) << 16;
#endif
}

/// Eight floats -> w[i .. i + 8) of kType, 16-byte aligned there.
template <DType kType>
AWQ_HOST_DEVICE inline void store_eight(void* w, std::int64_t i, const float (&v)[kCodesPerWord]) {
  auto* out = reinterpret_cast<Vector*>(static_cast<char*>(w) + i * core::size_of(kType));
  if constexpr (kType == DType::f32) {
    for (int half = 0; half < 2; ++half) {
      Vector bits;
      for (int j = 0; j < 4; ++j) bits.word[j] = std::bit_cast<std::uint32_t>(v[4 * half + j]);
      out[half] = bits;
    }
  } else {
    Vector bits;
    for (int j = 0; j < 4; ++j) bits.word[j] = round_pair<kType>(v[2 * j], v[2 * j + 1]);
    out[0] = bits;
  }
}

/// Whether every 8 x 8 block lies within one group and can be stored in 16-byte pieces.
inline bool has_whole_blocks(const core::DequantizeArgs& a) {
  return a.k % kCodesPerWord == 0 && a.group % kCodesPerWord == 0 && reinterpret_cast<std::uintptr_t>(a.w) % 16 == 0;
}

/// One thread's share of a tile. kWhole is has_whole_blocks(a).
template <DType kScale, DType kOut, bool kWhole>
AWQ_HOST_DEVICE inline void dequantize_block(const core::DequantizeArgs& a, std::int64_t tile, int thread) {
  constexpr auto nibble_of = core::inverse(core::kAwqOrder);
  const CodeShape first = thread_block({{a.n, a.k}}, tile, thread);
  if (first.n >= a.n || first.k >= a.k) return;
  const std::int64_t words = a.n / kCodesPerWord, column = first.n / kCodesPerWord;
  if constexpr (kWhole) {
    std::uint32_t codes[kCodesPerWord];
    for (int i = 0; i < kCodesPerWord; ++i) codes[i] = a.qweight[(first.k + i) * words + column];
    const std::int64_t g = first.k / a.group;
    const std::uint32_t zeros = a.qzeros == nullptr ? core::kSymmetricZero * 0x11111111u : a.qzeros[g * words + column];
    float scales[kCodesPerWord];
    for (int r = 0; r < kCodesPerWord; ++r) scales[r] = load_float<kScale>(a.scales, g * a.n + first.n + r);
    for (int r = 0; r < kCodesPerWord; ++r) {
      const int nibble = nibble_of[static_cast<std::size_t>(r)];
      const float zero = offset_code(zeros, nibble);
      float values[kCodesPerWord];
      for (int i = 0; i < kCodesPerWord; ++i) values[i] = (offset_code(codes[i], nibble) - zero) * scales[r];
      store_eight<kOut>(a.w, (first.n + r) * a.k + first.k, values);
    }
  } else {
    for (std::int64_t i = first.k; i < a.k && i < first.k + kCodesPerWord; ++i) {
      const std::int64_t g = i / a.group;
      const std::uint32_t codes = a.qweight[i * words + column];
      const std::uint32_t zeros =
          a.qzeros == nullptr ? core::kSymmetricZero * 0x11111111u : a.qzeros[g * words + column];
      for (int r = 0; r < kCodesPerWord; ++r) {
        const int nibble = nibble_of[static_cast<std::size_t>(r)];
        const float scale = load_float<kScale>(a.scales, g * a.n + first.n + r);
        const float value = (offset_code(codes, nibble) - offset_code(zeros, nibble)) * scale;
        core::store_as(a.w, kOut, (first.n + r) * a.k + i, value);
      }
    }
  }
}

// Layout fragments: the words j of four neighbouring lanes hold 16 neighbours along k of rows r and r + 8. A thread
// takes half of those 16 from each, so that four threads' stores are 64 bytes (of two-byte types) of one row.

using FragmentTiles = Tiles<64, 128>;  // a warp has 16 x 64 of them

/// One thread's share of a tile. kWhole is has_whole_blocks(a).
template <DType kScale, DType kOut, bool kWhole>
AWQ_HOST_DEVICE inline void dequantize_fragments(const core::DequantizeArgs& a, std::int64_t tile, int thread) {
  constexpr core::Codes codes_at = core::kFragments, zeros_at = core::kFragmentZeros;
  const int lane = thread % kWarp, warp = thread / kWarp;
  const CodeShape origin = FragmentTiles{{a.n, a.k}}.origin(tile);
  const std::int64_t groups = a.k / a.group, k0 = origin.k + warp / 4 * 64;
  const int strip = warp % 4, r = lane / 4, half = lane % 2;
  if (k0 >= a.k) return;
  // The groups of these 64 along k: the first one, what is left of it, and the size of the next, neither above 64. So
  // only one division is of 64 bits.
  const std::int64_t first_group = k0 / a.group, rest = (first_group + 1) * a.group - k0;
  const auto left = static_cast<unsigned>(rest < 64 ? rest : 64);
  const auto size = static_cast<unsigned>(a.group < 64 ? a.group : 64);
  const auto group_of = [&](unsigned place) { return first_group + (place + size - left) / size; };
  const std::uint32_t* const words =
      a.qweight + core::tile_word(codes_at, a.n, a.k, origin.n, k0) + strip * 128 + r * 16;
  for (int step = 0; step < 2; ++step) {
    const int j = 2 * step + lane % 4 / 2;
    const unsigned place = 16 * static_cast<unsigned>(j) + 8 * static_cast<unsigned>(half);
    const std::int64_t first = k0 + place;
    if (first >= a.k) return;
    std::uint32_t codes[4];
    for (int t = 0; t < 4; ++t) codes[t] = words[4 * t + j];
    for (int upper = 0; upper < 2; ++upper) {
      const std::int64_t row = origin.n + 16 * strip + r + 8 * upper;
      if (row >= a.n) break;
      float scale = 0.0f, zero = 0.0f, values[8];
      const auto enter = [&](std::int64_t g) {
        scale = load_float<kScale>(a.scales, core::fragment_scale(a.n, groups, g, row));
        const std::uint32_t zeros =
            a.qzeros == nullptr
                ? core::kSymmetricZero * 0x11u
                : a.qzeros[core::tile_word(zeros_at, a.n, groups, row, g) + 2 * strip + r / 4] >> r % 4 * 8;
        zero = offset_code(zeros, upper);
      };
      if (kWhole) enter(group_of(place));
      std::int64_t of = -1;  // group that scale and zero are of
      for (int i = 0; i < 8; ++i) {
        if (!kWhole) {
          if (first + i >= a.k) break;
          const std::int64_t g = group_of(place + static_cast<unsigned>(i));
          if (g != of) enter(of = g);
        }
        values[i] = (offset_code(codes[i / 2], 2 * half + upper + i % 2 * 4) - zero) * scale;
        if (!kWhole) core::store_as(a.w, kOut, row * a.k + first + i, values[i]);
      }
      if (kWhole) store_eight<kOut>(a.w, row * a.k + first, values);
    }
  }
}

}  // namespace awq::cuda
