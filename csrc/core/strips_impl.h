// The kernels on layout strips of one level: included by kernels_impl.h, and compiled with that level's flags. strips.h
// says what they compute.
//
// An octet is the words of a strip for eight values of x: 32 columns of four bytes. `and` and a shift make of them two
// vectors of codes, one a byte, that four digits of x each are multiplied with; a lane of the sums is a column.
#pragma once
#include <limits>

#include "layout.h"
#include "pack_impl.h"
#include "simd.h"
#include "strips.h"
#include "strips_matrix.h"

namespace awq::core {
namespace {

inline constexpr int kVectors = 2;                        // vectors of columns whose sums are kept at a time
inline constexpr std::int64_t kPart = kVectors * kLanes;  // columns: a strip is 1, 2 or 4 parts
static_assert(kStripColumns % kPart == 0);

// How many rows a tile has at most, by digits, and how many sums of a part fit into the registers beside codes.
inline constexpr int kRowsOfDigits[kMostDigits] = {kRegisters / 4, kRegisters / 4, kRegisters / 8};
inline constexpr int kSumsAtOnce = kRegisters == 32 ? 12 : 4;

// Rows of x whose octets stand side by side, as Arm's products read them.
#if defined(__ARM_FEATURE_DOTPROD)
inline constexpr int kTogether = 2;
#else
inline constexpr int kTogether = 1;
#endif

/// Rows that sums are declared of: the last one may lack its partner.
template <int kRows>
inline constexpr int kSumRows = (kRows + kTogether - 1) / kTogether * kTogether;

/// Whether an instruction multiplies two rows of x by two columns. Of a single row that would waste half.
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int kRows>
inline constexpr bool kByPairs = kRows > 1;
#else
template <int kRows>
inline constexpr bool kByPairs = false;
#endif

// --- x -> digits ----------------------------------------------------------------------------------------------------

struct Rounded {
  float step, sum;
};

inline constexpr std::int64_t kDigitValues = 4 * kLanes;     // values: of as many, a digit fills a vector
inline constexpr std::int64_t kSegmentWords = kSegment / 4;  // of a digit
static_assert(kSegment % kDigitValues == 0);

/// Whole numbers nearest to v, ties to even: |v| + 2^23, or v + 1.5 * 2^23, is worth one in its last bit, so that the
/// addition rounds. The latter needs |v| <= 2^22.
template <bool kSmall>
inline Ints nearest(Floats v) {
  if constexpr (kSmall) return reinterpret_cast<Ints>(v + 0x1.8p23f) - 0x4b400000;
  const auto bits = reinterpret_cast<Words>(v);
  const Ints magnitude = reinterpret_cast<Ints>(reinterpret_cast<Floats>(bits & 0x7fffffffu) + 0x1p23f) - 0x4b000000;
  const Ints sign = reinterpret_cast<Ints>(bits) >> 31;
  return (magnitude ^ sign) - sign;
}

/// The bits of the largest |x|, which order numbers as their values do, then infinity, then NaN.
inline std::int32_t largest_bits(const float* x, std::int64_t count) {
  Ints largest{};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const auto bits = reinterpret_cast<Ints>(reinterpret_cast<Words>(load(x + i)) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return largest_of(largest);
}

/// x[0 .. count), count a multiple of kDigitValues, as digits. The same at every level: nothing is added but integers.
template <int kDigits>
inline Rounded round_segment(const float* x, std::int64_t count, std::int32_t largest,
                             std::uint32_t (&digits)[kDigits][kSegmentWords]) {
  if (largest >= 0x7f800000) {  // a step of NaN makes the whole row of y NaN
    std::memset(digits, 0, sizeof digits);
    return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  }
  // The largest number that digits can hold; of three only what leaves room for the roundings of 1 / step and of v.
  constexpr float kLimit = kDigits == 1 ? 127.0f : kDigits == 2 ? 127.0f * 257.0f : 127.0f * 65536.0f;
  float step = std::bit_cast<float>(largest) / kLimit;
  if (step < 0x1p-126f) step = 0x1p-126f;  // so that 1 / step is finite
  const Floats inverse = broadcast(1.0f / step);
  constexpr bool kSmall = kDigits < 3;
  Ints sum{};
  for (std::int64_t i = 0; i < count; i += kDigitValues) {
    Ints rest[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum += rest[v] = nearest<kSmall>(load(x + i + v * kLanes) * inverse);
#pragma GCC unroll 3
    for (int d = kDigits - 1; d >= 0; --d) {
      const Words words = lowest_bytes(rest);  // rest mod 256, as -128 .. 127
      std::memcpy(digits[d] + i / 4, &words, sizeof words);
#pragma GCC unroll 4
      for (Ints& v : rest) v = (v + 128) >> 8;
    }
  }
  return {step, static_cast<float>(sum_of(sum))};
}

/// The first `count` words of some vectors. (Of a memcpy or a loop g++ makes an instruction that takes long to start.)
template <int kCount>
inline __attribute__((always_inline)) void store_words(const Words (&a)[kCount], std::int64_t count,
                                                       std::uint32_t* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i, count -= kLanes) {
    if (count >= kLanes)
      *reinterpret_cast<WordsAnywhere*>(to + i * kLanes) = a[i];
    else if (count > 0)
      std::memcpy(to + i * kLanes, &a[i], static_cast<std::size_t>(count) * sizeof *to);
  }
}

/// Words [kRows][kStride], the first `words` of each row, as [words][kRows] at out.
template <int kRows, std::int64_t kStride>
inline void interleave_vectors(const std::uint32_t* from, std::int64_t words, std::uint32_t* out) {
  for (std::int64_t word = 0; word < words; word += kLanes, out += kRows * kLanes) {
    Words a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = load_words(from + r * kStride + word, kLanes);
    interleave(a);
    store_words(a, (words - word) * kRows, out);
  }
}

/// The same for any number of rows, kTogether words of each at a time.
template <std::int64_t kStride>
inline void interleave_rows(const std::uint32_t* from, std::int64_t rows, std::int64_t words, std::uint32_t* out) {
  if (rows == 1) return interleave_vectors<1, kStride>(from, words, out);
  if constexpr (kTogether == 1) {
    if (rows == 2) return interleave_vectors<2, kStride>(from, words, out);
    if (rows == 4) return interleave_vectors<4, kStride>(from, words, out);
    if (rows == 8) return interleave_vectors<8, kStride>(from, words, out);
  }
  for (std::int64_t word = 0; word < words; word += kTogether)
    for (std::int64_t r = 0; r < rows; ++r, out += kTogether)
      std::memcpy(out, from + r * kStride + word, kTogether * sizeof *out);
}

/// The same words as [rows][words].
template <std::int64_t kStride>
inline void join_rows(const std::uint32_t* from, std::int64_t rows, std::int64_t words, std::uint32_t* out) {
  constexpr std::int64_t kWords = 8;  // 32 values, of which matrix_can_have wants whole ones
  for (std::int64_t r = 0; r < rows; ++r, out += words)
    for (std::int64_t word = 0; word < words; word += kWords)
      std::memcpy(out + word, from + r * kStride + word, kWords * sizeof *out);
}

template <int kDigits>
inline void prepare_tile(const StripsWork& work, std::int64_t tile) {
  constexpr int kMostRows = kMatrixRows > 0 ? kMatrixRows : kRowsOfDigits[kDigits - 1];
  const LinearArgs& a = *work.args;
  const Segments segments(a.k, a.group);
  const std::int64_t rows = work.tile_rows, first = tile * rows;
  const std::int64_t filled = work.rows - first < rows ? work.rows - first : rows;
  std::uint32_t* out = work.x + tile * work.words(a.k);
  float* parameters = work.parameters + tile * work.floats(segments.count);
  alignas(64) float x[kMostRows][kSegment];
  alignas(64) std::uint32_t digits[kMostRows][kDigits][kSegmentWords];
  std::int32_t largest[kMostRows] = {};
  for (std::int64_t r = filled; r < rows; ++r) std::memset(x[r], 0, sizeof x[r]);
  std::int64_t begin = 0;
  for (std::int64_t i = 0, rest = segments.size_from(0); i < segments.count; ++i) {
    const std::int64_t size = rest < kSegment ? rest : kSegment, whole = ceil_div(size, kDigitValues) * kDigitValues;
    rest = rest > kSegment ? rest - kSegment : segments.group;
    for (std::int64_t r = 0; r < filled; ++r) {
      convert_to_float(a.x, a.x_type, (work.row + first + r) * a.x_stride + begin, size, x[r]);
      for (std::int64_t j = size; j < whole; ++j) x[r][j] = 0.0f;
      largest[r] = largest_bits(x[r], whole);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const Rounded rounded = round_segment(x[r], whole, largest[r], digits[r]);
      parameters[r] = rounded.step, parameters[rows + r] = rounded.sum;
    }
    const std::int64_t words = ceil_div(size, kOctet) * 2;
    for (int d = 0; d < kDigits; ++d, out += words * rows) {
      if (work.matrix)
        join_rows<kDigits * kSegmentWords>(digits[0][d], rows, words, out);
      else
        interleave_rows<kDigits * kSegmentWords>(digits[0][d], rows, words, out);
    }
    parameters += 2 * rows;
    begin += size;
  }
}

void strips_prepare(const StripsWork& work, std::int64_t begin, std::int64_t end) noexcept {
  for (std::int64_t tile = begin; tile < end; ++tile) switch (work.digits) {
      case 1: prepare_tile<1>(work, tile); break;
      case 2: prepare_tile<2>(work, tile); break;
      default: prepare_tile<3>(work, tile); break;
    }
}

// --- products -------------------------------------------------------------------------------------------------------

/// Bytes of the weight between what is read and what is asked for: of 2.5 to 16 KiB the best on Zen 4, by 3 to 7 % for
/// up to 8 rows, where digits of x want a part of the first cache, too; a row as int8 takes up to 2 % longer than with
/// 8 KiB. On Zen 5, 4 to 16 KiB were equal.
inline constexpr std::int64_t kAhead = 3584;

/// In how many parts each sum is kept: a product waits for the one before it in its part, and one row has few sums.
template <int kRows>
inline constexpr int kChains = kRows == 1 ? 2 : 1;

/// To each lane of sum[0], the four codes of `low` times the digits x0; to the last sum those of `high` times x1.
template <int kSums>
inline __attribute__((always_inline)) void dot(Ints (&sum)[kSums], Words low, Words x0, Words high, Words x1) {
#if defined(__AVX512VNNI__) && defined(__clang__)
  sum[0] = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum[0]), reinterpret_cast<__m512i>(low),
                                                      reinterpret_cast<__m512i>(x0)));
  Ints& last = sum[kSums - 1];
  last = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(last), reinterpret_cast<__m512i>(high),
                                                    reinterpret_cast<__m512i>(x1)));
#elif defined(__AVX512VNNI__)
  // g++ 12 surrounds the intrinsics with copies of the sums.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum[0]) : "v"(low), "v"(x0));
  asm("vpdpbusd %2, %1, %0" : "+v"(sum[kSums - 1]) : "v"(high), "v"(x1));
#elif defined(__AVXVNNI__) && defined(__clang__)
  sum[0] = reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum[0]), reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(x0)));
  Ints& last = sum[kSums - 1];
  last = reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(last), reinterpret_cast<__m256i>(high), reinterpret_cast<__m256i>(x1)));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[0]) : "x"(low), "x"(x0));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[kSums - 1]) : "x"(high), "x"(x1));
#elif defined(__AVX512F__)
  // Four products are at most 4 * 15 * 128 < 2^15.
  const __m512i pairs =
      _mm512_add_epi16(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(x0)),
                       _mm512_maddubs_epi16(reinterpret_cast<__m512i>(high), reinterpret_cast<__m512i>(x1)));
  sum[0] += reinterpret_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(x0)),
                       _mm256_maddubs_epi16(reinterpret_cast<__m256i>(high), reinterpret_cast<__m256i>(x1)));
  sum[0] += reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__aarch64__)
  const auto a = reinterpret_cast<int8x16_t>(low), b = reinterpret_cast<int8x16_t>(x0);
  const auto c = reinterpret_cast<int8x16_t>(high), d = reinterpret_cast<int8x16_t>(x1);
  const int16x8_t first = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vget_low_s8(c), vget_low_s8(d));
  const int16x8_t second = vmlal_high_s8(vmull_high_s8(a, b), c, d);
  sum[0] = reinterpret_cast<Ints>(vpadalq_s16(reinterpret_cast<int32x4_t>(sum[0]), vpaddq_s16(first, second)));
#else
  typedef std::int16_t Halves __attribute__((vector_size(4 * kLanes), may_alias));
  const auto even = [](Words bytes) { return reinterpret_cast<Halves>(bytes) << 8 >> 8; };
  const auto odd = [](Words bytes) { return reinterpret_cast<Halves>(bytes) >> 8; };
  const auto pairs =
      reinterpret_cast<Ints>(even(low) * even(x0) + odd(low) * odd(x0) + even(high) * even(x1) + odd(high) * odd(x1));
  sum[0] += (pairs << 16 >> 16) + (pairs >> 16);
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
/// The same for an octet of each of two rows. By pairs, low and high are octets of two columns each, and the sums those
/// of both rows with the first two columns, and with the last two.
template <int kRows, int kSums>
inline __attribute__((always_inline)) void dot_rows(Ints (&first)[kSums], Ints (&second)[kSums], Words low, Words high,
                                                    Words rows) {
  const auto a = reinterpret_cast<int8x16_t>(low), b = reinterpret_cast<int8x16_t>(high);
  const auto x = reinterpret_cast<int8x16_t>(rows);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (kByPairs<kRows>) {
    first[0] = reinterpret_cast<Ints>(vmmlaq_s32(reinterpret_cast<int32x4_t>(first[0]), x, a));
    second[0] = reinterpret_cast<Ints>(vmmlaq_s32(reinterpret_cast<int32x4_t>(second[0]), x, b));
    return;
  }
#endif
  Ints &first_high = first[kSums - 1], &second_high = second[kSums - 1];
  first[0] = reinterpret_cast<Ints>(vdotq_laneq_s32(reinterpret_cast<int32x4_t>(first[0]), a, x, 0));
  first_high = reinterpret_cast<Ints>(vdotq_laneq_s32(reinterpret_cast<int32x4_t>(first_high), b, x, 1));
  second[0] = reinterpret_cast<Ints>(vdotq_laneq_s32(reinterpret_cast<int32x4_t>(second[0]), a, x, 2));
  second_high = reinterpret_cast<Ints>(vdotq_laneq_s32(reinterpret_cast<int32x4_t>(second_high), b, x, 3));
}
#endif

/// sums[d][r][v] += the kDigits digits that begin at x times the codes of a part, for the octets of a segment.
template <int kRows, int kDigits, int kSums>
inline __attribute__((always_inline)) void add_products(const std::uint8_t* w, std::int64_t octets,
                                                        const std::uint32_t* x,
                                                        Ints (&sums)[kDigits][kSumRows<kRows>][kVectors][kSums]) {
  const std::int64_t digit = octets * 2 * kRows;  // words of x between one and the next
  for (std::int64_t o = 0; o < octets; ++o, w += kOctetBytes, x += 2 * kRows) {
    for (std::int64_t line = 0; line < kPart * 4; line += 64) __builtin_prefetch(w + kAhead + line);
    Words low[kVectors], high[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Words codes = load_words(reinterpret_cast<const std::uint32_t*>(w) + v * kLanes, kLanes);
#if defined(__AVX512F__) && !defined(__clang__)
      asm("" : "+v"(codes));  // else g++ loads it twice, which takes as long as a product
#endif
      low[v] = codes & 0x0f0f0f0fu;
      high[v] = upper_nibbles(codes);
    }
#if defined(__ARM_FEATURE_DOTPROD)
    if constexpr (kByPairs<kRows>)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) riffle(low[v], high[v], low[v], high[v]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) {
        const std::uint32_t* const octet = x + d * digit + 2 * r;
        const Words rows = r + 1 < kRows ? load_words(octet, kLanes) : load_two_words(octet);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dot_rows<kRows>(sums[d][r][v], sums[d][r + 1][v], low[v], high[v], rows);
      }
#else
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) {
        const Words x0 = Words{} + x[d * digit + r], x1 = Words{} + x[d * digit + kRows + r];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dot(sums[d][r][v], low[v], x0, high[v], x1);
      }
#endif
  }
}

/// sum q v of its sums by digit.
template <int kDigits>
inline __attribute__((always_inline)) Floats join_digits(const Ints (&sums)[kDigits]) {
  Ints upper = sums[0];
  if constexpr (kDigits > 1) upper = (upper << 8) + sums[1];
  const Floats value = __builtin_convertvector(upper, Floats);
  if constexpr (kDigits < 3) return value;
  return fma(value, broadcast(256.0f), __builtin_convertvector(sums[kDigits - 1], Floats));
}

/// acc[column] += s step (sum q v - z sum v) of one row, for the columns of a part.
inline __attribute__((always_inline)) void add_values(const Floats (&values)[kVectors], float step, float sum,
                                                      const float* scales, const float* zeros, float* acc) {
  const Floats steps = broadcast(step), minus_sum = broadcast(-sum);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    float* const out = acc + v * kLanes;
    const Floats centred = fma(load(zeros + v * kLanes), minus_sum, values[v]);
    store(out, fma(load(scales + v * kLanes) * steps, centred, load(out)));
  }
}

/// acc[r][column] += the segment's part of y, for the columns of a part.
template <int kRows, int kDigits>
inline __attribute__((always_inline)) void multiply_segment(const std::uint8_t* w, std::int64_t octets,
                                                            const std::uint32_t* x, const float* parameters,
                                                            const float* scales, const float* zeros, float* acc) {
  constexpr int kHeld = kSumRows<kRows>;
  Floats values[kHeld][kVectors];  // sum q v
  if constexpr (kRows * kDigits <= kSumsAtOnce) {
    constexpr int kSums = kChains<kRows>;
    Ints sums[kDigits][kHeld][kVectors][kSums] = {};
    add_products<kRows>(w, octets, x, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kHeld; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kSums == 2)
#pragma GCC unroll 3
          for (int d = 0; d < kDigits; ++d) sums[d][r][v][0] += sums[d][r][v][1];
        Ints of[kDigits];
#pragma GCC unroll 3
        for (int d = 0; d < kDigits; ++d) of[d] = sums[d][r][v][0];
        values[r][v] = join_digits(of);
      }
  } else {  // digit after digit: the codes are in the cache
    const std::int64_t digit = octets * 2 * kRows;
    Ints sums[1][kHeld][kVectors][1] = {};
    add_products<kRows>(w, octets, x, sums);
    if constexpr (kDigits > 1) {
#pragma GCC unroll 8
      for (int r = 0; r < kHeld; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[0][r][v][0] <<= 8;
      add_products<kRows>(w, octets, x + digit, sums);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kHeld; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) values[r][v] = __builtin_convertvector(sums[0][r][v][0], Floats);
    if constexpr (kDigits > 2) {
      Ints lowest[1][kHeld][kVectors][1] = {};
      add_products<kRows>(w, octets, x + 2 * digit, lowest);
#pragma GCC unroll 8
      for (int r = 0; r < kHeld; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          values[r][v] = fma(values[r][v], broadcast(256.0f), __builtin_convertvector(lowest[0][r][v][0], Floats));
    }
  }
  if constexpr (kByPairs<kRows>)  // to a row each
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        auto first = reinterpret_cast<Words>(values[r][v]), second = reinterpret_cast<Words>(values[r + 1][v]);
        exchange<64>(first, second);
        values[r][v] = reinterpret_cast<Floats>(first), values[r + 1][v] = reinterpret_cast<Floats>(second);
      }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    add_values(values[r], parameters[r], parameters[kRows + r], scales, zeros, acc + r * kStripColumns);
}

/// Where the scales and zeros of a strip are.
struct StripGroups {
  static constexpr std::int64_t kAheadGroups = 8;  // these streams are too thin for hardware to notice
  static constexpr std::int64_t kHalf = kStripColumns / 2;
  const LinearArgs& a;
  std::int64_t first, width;  // of scales: index of the first, and how many a group has
  const std::uint8_t* zeros;  // bytes, kHalf a group

  StripGroups(const LinearArgs& args, std::int64_t strip) : a(args), zeros(nullptr) {
    const std::int64_t column = strip * kStripColumns, groups = a.k / a.group;
    width = a.n - column < kStripColumns ? a.n - column : kStripColumns;
    first = strip_scale(a.n, groups, 0, column);
    if (a.qzeros != nullptr) zeros = reinterpret_cast<const std::uint8_t*>(a.qzeros) + strip * groups * kHalf;
  }

  /// Those of group g, as floats [kStripColumns].
  inline __attribute__((always_inline)) void load(std::int64_t g, float* scale, float* zero) const {
    const std::int64_t at = first + g * width;
    __builtin_prefetch(static_cast<const char*>(a.scales) + (at + kAheadGroups * width) * size_of(a.scale_type));
    for (std::int64_t c = width; c < kStripColumns; ++c) scale[c] = 0.0f;
    convert_to_float(a.scales, a.scale_type, at, width, scale);
    if (zeros == nullptr) {
      for (std::int64_t c = 0; c < kStripColumns; c += kLanes) store(zero + c, broadcast(8.0f));
      return;
    }
    const std::uint8_t* const bytes = zeros + g * kHalf;
    __builtin_prefetch(bytes + kAheadGroups * kHalf);
    for (std::int64_t c = 0; c < kHalf; c += kLanes) {
      const Ints pairs = load_bytes(bytes + c);
      store(zero + c, __builtin_convertvector(pairs & 15, Floats));
      store(zero + kHalf + c, __builtin_convertvector(pairs >> 4, Floats));
    }
  }
};

/// Segments [first, last) of one strip, with their scales and zeros as floats. A single tile reads those once and best
/// among its products: multiply_tile does; more tiles share them.
struct StripBlock {
  static constexpr std::int64_t kValues = 2048;  // of x: a tile's digits of so many stay in the first cache
  static constexpr std::int64_t kMost = 64;      // segments
  std::int64_t first, last;
  const std::uint8_t* w;
  const StripGroups* unread;  // of a single tile, else nullptr
  alignas(64) float scales[kMost][kStripColumns];
  alignas(64) float zeros[kMost][kStripColumns];
};

/// acc [tile_rows][kStripColumns] += the block's part of y for one tile.
template <int kRows, int kDigits>
void multiply_tile(const StripsWork& work, const Segments& segments, StripBlock& block, std::int64_t tile, float* acc) {
  const std::uint32_t* x = work.x + tile * work.words(work.args->k) + work.words(segments.begin(block.first));
  const float* parameters = work.parameters + tile * work.floats(segments.count) + work.floats(block.first);
  const std::uint8_t* w = block.w;
  std::int64_t rest = segments.size_from(block.first), group = block.first / segments.in_group, slot = 0;
  for (std::int64_t i = block.first; i < block.last; ++i) {
    const std::int64_t octets = ceil_div(rest < kSegment ? rest : kSegment, kOctet);
    if (block.unread != nullptr)
      block.unread->load(group, block.scales[0], block.zeros[0]);
    else
      slot = i - block.first;
    for (std::int64_t part = 0; part < kStripColumns; part += kPart)
      multiply_segment<kRows, kDigits>(w + part * 4, octets, x, parameters, block.scales[slot] + part,
                                       block.zeros[slot] + part, acc + part);
    const bool ends = rest <= kSegment;
    rest = ends ? segments.group : rest - kSegment;
    group += ends;
    w += octets * kOctetBytes;
    x += octets * 2 * kDigits * kRows;
    parameters += 2 * kRows;
  }
}

#if defined(AWQ_AMX)
/// The same of tiles that a matrix unit multiplies, whose codes are unpacked.
template <int kDigits>
inline void multiply_matrix(const StripsWork& work, const Segments& segments, const StripBlock& block,
                            const MatrixCodes& unpacked, float* acc) {
  const std::int64_t rows = work.tile_rows, step = matrix_step(segments.group);
  alignas(64) Ints sums[kDigits][kMatrixRows][kVectors];
  for (std::int64_t tile = 0; tile < work.tiles(); ++tile, acc += rows * kStripColumns) {
    const std::uint32_t* x = work.x + tile * work.words(work.args->k) + work.words(segments.begin(block.first));
    const float* parameters = work.parameters + tile * work.floats(segments.count) + work.floats(block.first);
    const std::uint8_t* codes = unpacked.bytes;
    for (std::int64_t i = block.first; i < block.last; ++i) {
      const std::int64_t size = segments.size(i);
      multiply_tiles_of(reinterpret_cast<const std::uint8_t*>(x), rows, codes, size, step, sums);
      for (std::int64_t r = 0; r < rows; ++r) {
        Floats values[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          Ints of[kDigits];
          for (int d = 0; d < kDigits; ++d) of[d] = sums[d][r][v];
          values[v] = join_digits(of);
        }
        add_values(values, parameters[r], parameters[rows + r], block.scales[i - block.first],
                   block.zeros[i - block.first], acc + r * kStripColumns);
      }
      codes += size * kStripColumns;
      x += size / 4 * kDigits * rows;
      parameters += 2 * rows;
    }
  }
}
#endif

template <int kDigits>
inline void multiply_tiles(const StripsWork& work, const Segments& segments, StripBlock& block, float* acc) {
  for (std::int64_t tile = 0; tile < work.tiles(); ++tile) {
    float* const out = acc + tile * work.tile_rows * kStripColumns;
    switch (work.tile_rows) {
      case 1: multiply_tile<1, kDigits>(work, segments, block, tile, out); break;
      case 2: multiply_tile<2, kDigits>(work, segments, block, tile, out); break;
      default:
        if constexpr (kRowsOfDigits[kDigits - 1] > 2) {
          if (work.tile_rows == 3) multiply_tile<3, kDigits>(work, segments, block, tile, out);
          if (work.tile_rows == 4) multiply_tile<4, kDigits>(work, segments, block, tile, out);
        }
        if constexpr (kRowsOfDigits[kDigits - 1] > 4) {
          if (work.tile_rows == 5) multiply_tile<5, kDigits>(work, segments, block, tile, out);
          if (work.tile_rows == 6) multiply_tile<6, kDigits>(work, segments, block, tile, out);
          if (work.tile_rows == 7) multiply_tile<7, kDigits>(work, segments, block, tile, out);
          if (work.tile_rows == 8) multiply_tile<8, kDigits>(work, segments, block, tile, out);
        }
    }
  }
}

/// y[row, strip] = acc + bias, in y's type.
inline void store_strip(const StripsWork& work, std::int64_t strip, float* acc) {
  const LinearArgs& a = *work.args;
  const std::int64_t column = strip * kStripColumns;
  const std::int64_t width = a.n - column < kStripColumns ? a.n - column : kStripColumns;
  alignas(64) float bias[kStripColumns] = {};
  if (a.bias != nullptr) convert_to_float(a.bias, a.bias_type, column, width, bias);
  for (std::int64_t r = 0; r < work.rows; ++r, acc += kStripColumns) {
    const std::int64_t at = (work.row + r) * a.n + column;
    if (a.bias != nullptr)
      for (std::int64_t c = 0; c < kStripColumns; c += kLanes) store(acc + c, load(acc + c) + load(bias + c));
    if (width == kStripColumns)
      for (std::int64_t c = 0; c < kStripColumns; c += kLanes) store_as(a.y, a.x_type, at + c, load(acc + c));
    else
      for (std::int64_t c = 0; c < width; ++c) store_as(a.y, a.x_type, at + c, acc[c]);
  }
}

void strips_multiply(const StripsWork& work, std::int64_t begin, std::int64_t end) noexcept {
  const LinearArgs& a = *work.args;
  const Segments segments(a.k, a.group);
  const std::int64_t strip_bytes = ceil_div(a.k, kOctet) * kOctetBytes;
  const bool single = work.tiles() == 1 && !work.matrix;
  std::int64_t most = single ? segments.count : StripBlock::kValues / segments.size(0);
#if defined(AWQ_AMX)
  MatrixCodes unpacked;
  if (work.matrix) {
    most = MatrixCodes::kValues / segments.size(0);
    shape_tiles(work.digits, work.tile_rows, matrix_step(a.group));
  }
#endif
  if (!single) most = most < 1 ? 1 : most > StripBlock::kMost ? StripBlock::kMost : most;
  alignas(64) float acc[(kStripsRows + kOctet) * kStripColumns];
  StripBlock block;
  for (std::int64_t strip = begin; strip < end; ++strip) {
    const StripGroups groups(a, strip);
    std::memset(acc, 0, static_cast<std::size_t>(work.tiles() * work.tile_rows * kStripColumns) * sizeof *acc);
    for (block.first = 0; block.first < segments.count; block.first = block.last) {
      block.last = block.first + most < segments.count ? block.first + most : segments.count;
      block.w = reinterpret_cast<const std::uint8_t*>(a.qweight) + strip * strip_bytes +
                segments.begin(block.first) / kOctet * kOctetBytes;
      block.unread = single ? &groups : nullptr;
      for (std::int64_t i = block.first; i < block.last && !single; ++i)
        groups.load(i / segments.in_group, block.scales[i - block.first], block.zeros[i - block.first]);
#if defined(AWQ_AMX)
      if (work.matrix) {
        unpacked.unpack(block.w, (segments.begin(block.last) - segments.begin(block.first)) / kOctet);
        switch (work.digits) {
          case 1: multiply_matrix<1>(work, segments, block, unpacked, acc); break;
          case 2: multiply_matrix<2>(work, segments, block, unpacked, acc); break;
          default: multiply_matrix<3>(work, segments, block, unpacked, acc); break;
        }
        continue;
      }
#endif
      switch (work.digits) {
        case 1: multiply_tiles<1>(work, segments, block, acc); break;
        case 2: multiply_tiles<2>(work, segments, block, acc); break;
        default: multiply_tiles<3>(work, segments, block, acc); break;
      }
    }
    store_strip(work, strip, acc);
  }
#if defined(AWQ_AMX)
  if (work.matrix) release_tiles();
#endif
}

}  // namespace
}  // namespace awq::core
