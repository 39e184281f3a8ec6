// Intel's AMX on layout strips: included by strips_impl.h for the level that has it.
//
// A register of AMX, a tile, is up to 16 rows of 64 bytes. A product adds to sums [rows of x][16 columns] the digits of
// up to 64 values [rows of x][64] times their codes [64 / 4][16 columns][4] (Intel SDM volume 2, TDPBSUD): a row of
// codes is what `and` and a shift make of a vector of words. Digits are prepared as they are read. Codes come from
// memory alone, so those of a block are unpacked to there, once for all rows.
#pragma once
#include "simd.h"
#include "strips.h"

#if defined(__AMX_INT8__) || defined(__AMXINT8__)  // the latter by clang before 16
#define AWQ_AMX
#endif

namespace awq::core {
namespace {

#if defined(AWQ_AMX)

inline constexpr int kMatrixRows = 16;
static_assert(kStripColumns == 2 * kLanes);

// Tile 2 d + h has the sums of digit d and half h of the columns. Then follow those of x, one a digit, and of codes,
// one a half; with three digits there is room for one of each.
constexpr int tile_of_x(int digits) { return digits == 3 ? 6 : 4; }
constexpr int tile_of_codes(int digits) { return digits == 3 ? 7 : 6; }

// A thread's registers have shapes, from here on until they are released (SDM volume 1, the chapter on AMX).
struct TileShapes {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::int64_t count, std::int64_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(count), row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

inline void shape_tiles(int digits, std::int64_t rows, std::int64_t step) {
  TileShapes shapes;
  for (int tile = 0; tile < 2 * digits; ++tile) shapes.set(tile, rows, 64);
  for (int tile = tile_of_x(digits); tile < tile_of_codes(digits); ++tile) shapes.set(tile, rows, step);
  for (int tile = tile_of_codes(digits); tile < 8; ++tile) shapes.set(tile, step / 4, 64);
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}

inline void release_tiles() { asm volatile("tilerelease"); }

// The compilers' own names for these take no template arguments, and g++ 12's loads may be moved in front of stores.
template <int kTile>
inline __attribute__((always_inline)) void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline __attribute__((always_inline)) void load_tile(const void* rows, std::int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(pitch), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void store_tile(void* rows, std::int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(pitch), "i"(kTile) : "memory");
}
template <int kSums, int kX, int kCodes>
inline __attribute__((always_inline)) void add_product() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kX), "i"(kCodes));
}

/// What a product multiplies: codes of a block, one a byte, [values / 4][half of the columns][16 columns][4].
struct MatrixCodes {
  static constexpr std::int64_t kValues = 512;  // of x: with two digits of 16 rows 32 KiB, which the first cache has
  static constexpr std::int64_t kPitch = 2 * 64;
  alignas(64) std::uint8_t bytes[kValues * kStripColumns];

  void unpack(const std::uint8_t* w, std::int64_t octets) {
    auto* out = reinterpret_cast<Words*>(bytes);
    for (std::int64_t o = 0; o < octets; ++o, w += kOctetBytes, out += 4)
      for (int half = 0; half < 2; ++half) {
        const Words codes = load_words(reinterpret_cast<const std::uint32_t*>(w) + half * kLanes, kLanes);
        out[half] = codes & 0x0f0f0f0fu;
        out[2 + half] = upper_nibbles(codes);
      }
  }
};

/// All sums of a segment of `size` values: x [digit][rows][size] times codes [size / 4][2][16][4].
template <int kDigits>
inline void multiply_tiles_of(const std::uint8_t* x, std::int64_t rows, const std::uint8_t* codes, std::int64_t size,
                              std::int64_t step, Ints (&sums)[kDigits][kMatrixRows][2]) {
  constexpr int kX = tile_of_x(kDigits), kCodes = tile_of_codes(kDigits);
  const std::int64_t digit = rows * size;  // bytes of x
  clear_tile<0>(), clear_tile<1>();
  if constexpr (kDigits > 1) clear_tile<2>(), clear_tile<3>();
  if constexpr (kDigits > 2) clear_tile<4>(), clear_tile<5>();
  for (std::int64_t i = 0; i < size; i += step, x += step, codes += step / 4 * MatrixCodes::kPitch) {
    load_tile<kCodes>(codes, MatrixCodes::kPitch);
    load_tile<kX>(x, size);
    add_product<0, kX, kCodes>();
    if constexpr (kDigits == 3) {
      load_tile<kX>(x + digit, size);
      add_product<2, kX, kCodes>();
      load_tile<kX>(x + 2 * digit, size);
      add_product<4, kX, kCodes>();
      load_tile<kCodes>(codes + 64, MatrixCodes::kPitch);
      add_product<5, kX, kCodes>();
      load_tile<kX>(x + digit, size);
      add_product<3, kX, kCodes>();
      load_tile<kX>(x, size);
      add_product<1, kX, kCodes>();
    } else {
      load_tile<kCodes + 1>(codes + 64, MatrixCodes::kPitch);
      add_product<1, kX, kCodes + 1>();
    }
    if constexpr (kDigits == 2) {
      load_tile<kX + 1>(x + digit, size);
      add_product<2, kX + 1, kCodes>();
      add_product<3, kX + 1, kCodes + 1>();
    }
  }
  constexpr std::int64_t kPitch = sizeof sums[0][0];
  store_tile<0>(sums[0][0], kPitch), store_tile<1>(sums[0][0] + 1, kPitch);
  if constexpr (kDigits > 1) store_tile<2>(sums[1][0], kPitch), store_tile<3>(sums[1][0] + 1, kPitch);
  if constexpr (kDigits > 2) store_tile<4>(sums[2][0], kPitch), store_tile<5>(sums[2][0] + 1, kPitch);
}

#else

inline constexpr int kMatrixRows = 0;

#endif

}  // namespace
}  // namespace awq::core
