// The kernels of one level, written once for every level. Included by kernels_<level>.cpp only, and compiled without
// implicit contraction: multiplications and additions are fused where `fma` says so and nowhere else, so that
// quantization chooses the same codes at every level.
//
// Inside a strip, columns are kept in the order of the words' nibbles: vector i, lane c is column 8c + kAwqOrder[i].
#include "kernels.h"
#include "layout.h"
#include "pack_impl.h"
#include "quantize.h"
#include "simd.h"
#include "strips_impl.h"

namespace awq::core {
namespace {

inline constexpr std::int64_t kStrip = std::int64_t{kCodesPerWord} * kLanes;
inline constexpr std::int64_t kChunk = 128;    // rows of W that gemm unpacks at a time: 64 KiB of floats at 16 lanes
inline constexpr std::int64_t kRowBlock = 64;  // rows of x that share one unpacked chunk

// The table's order as a plain array: std::array's operator[] is a function, which must not be emitted here.
struct NibbleOrder {
  int column[kCodesPerWord];
};
constexpr NibbleOrder kOrder = [] {
  NibbleOrder order{};
  for (std::size_t i = 0; i < kCodesPerWord; ++i) order.column[i] = kAwqOrder[i];
  return order;
}();

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

/// acc[r][v] += sum over i of a[r * lda + i] * b[i * ldb + v * kLanes ...]: the inner loop of all matrix products here.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_add(const float* a, std::int64_t lda, const float* b,
                                                        std::int64_t ldb, std::int64_t count,
                                                        Floats (&acc)[kRows][kVectors]) {
  for (std::int64_t i = 0; i < count; ++i) {
    Floats row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + i * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = broadcast(a[r * lda + i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(factor, row[v], acc[r][v]);
    }
  }
}

inline constexpr int kTileRows = 6, kTileVectors = kRegisters / 8;  // 24 accumulators of 32 registers, 12 of 16
inline constexpr std::int64_t kPanel = std::int64_t{kTileVectors} * kLanes;

/// Calls f.template operator()<rows>(first) for tiles of kTileRows rows and one tile for the rest.
template <class F>
inline void for_row_tiles(std::int64_t rows, F f) {
  std::int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) f.template operator()<kTileRows>(r);
  switch (rows - r) {
    case 1: f.template operator()<1>(r); break;
    case 2: f.template operator()<2>(r); break;
    case 3: f.template operator()<3>(r); break;
    case 4: f.template operator()<4>(r); break;
    case 5: f.template operator()<5>(r); break;
    default: break;
  }
}

// --- linear ---------------------------------------------------------------------------------------------------------

/// The scales of one group and strip, in strip order; zero beyond the last column.
inline void load_scales(const LinearArgs& a, std::int64_t g, std::int64_t column, float* scales) {
  float natural[kStrip];
  const std::int64_t count = smaller(kStrip, a.n - column);
  for (std::int64_t c = count; c < kStrip; ++c) natural[c] = 0.0f;
  convert_to_float(a.scales, a.scale_type, g * a.n + column, count, natural);
  for (int i = 0; i < kCodesPerWord; ++i)
    for (int c = 0; c < kLanes; ++c) scales[i * kLanes + c] = natural[8 * c + kOrder.column[i]];
}

/// The words of the zeros of one group and strip.
inline Words load_zeros(const LinearArgs& a, std::int64_t g, std::int64_t word, std::int64_t count) {
  if (a.qzeros == nullptr) return Words{} + 0x88888888u;
  return load_words(a.qzeros + g * (a.n / kCodesPerWord) + word, count);
}

/// y[row, strip] = acc + bias, in natural column order and y's type.
inline void store_outputs(const LinearArgs& a, std::int64_t row, std::int64_t column, const float* acc) {
  const std::int64_t count = smaller(kStrip, a.n - column);
  float natural[kStrip];
  for (int i = 0; i < kCodesPerWord; ++i)
    for (int c = 0; c < kLanes; ++c) natural[8 * c + kOrder.column[i]] = acc[i * kLanes + c];
  if (a.bias != nullptr) {
    float bias[kStrip];
    convert_to_float(a.bias, a.bias_type, column, count, bias);
    for (std::int64_t c = 0; c < count; ++c) natural[c] += bias[c];
  }
  for (std::int64_t c = 0; c < count; ++c) store_as(a.y, a.x_type, row * a.n + column + c, natural[c]);
}

/// acc (one strip of kRows rows, rows acc_stride apart) += the part of one group:
/// sum (q - z) s x = s (sum q x - z sum x).
template <int kRows>
inline void decode_group(const LinearWork& work, std::int64_t row, std::int64_t g, std::int64_t word,
                         std::int64_t words, const float* scales, float* acc) {
  const LinearArgs& a = *work.args;
  const std::int64_t stride = a.n / kCodesPerWord;
  const std::uint32_t* w = a.qweight + g * a.group * stride + word;
  const float* x = work.x + row * a.k + g * a.group;
  Floats sum[kRows][kCodesPerWord] = {};
  for (std::int64_t i = 0; i < a.group; ++i) {
    const Words line = load_words(w + i * stride, words);
    __builtin_prefetch(w + i * stride + 2 * kLanes);  // two strips on in the same row, so DRAM pages stay open
#pragma GCC unroll 8
    for (int v = 0; v < kCodesPerWord; ++v) {
      const Floats codes = nibble(line, v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][v] = fma(broadcast(x[r * a.k + i]), codes, sum[r][v]);
    }
  }
  const Words zeros = load_zeros(a, g, word, words);
  const std::int64_t groups = a.k / a.group;
  for (int r = 0; r < kRows; ++r) {
    const Floats total = broadcast(work.x_sum[(row + r) * groups + g]);
    float* out = acc + r * kStrip;
#pragma GCC unroll 8
    for (int v = 0; v < kCodesPerWord; ++v) {
      const Floats centred = sum[r][v] - nibble(zeros, v) * total;
      store(out + v * kLanes, fma(load(scales + v * kLanes), centred, load(out + v * kLanes)));
    }
  }
}

void linear_decode(const LinearWork& work, std::int64_t begin, std::int64_t end) noexcept {
  const LinearArgs& a = *work.args;
  const std::int64_t all_words = a.n / kCodesPerWord;
  for (std::int64_t i = begin * a.m * kStrip; i < end * a.m * kStrip; ++i) work.acc[i] = 0.0f;
  float scales[kStrip];
  for (std::int64_t g = 0; g < a.k / a.group; ++g)
    for (std::int64_t strip = begin; strip < end; ++strip) {
      const std::int64_t word = strip * kLanes, words = smaller(kLanes, all_words - word);
      load_scales(a, g, strip * kStrip, scales);
      std::int64_t row = 0;
      if constexpr (kRegisters == 32)  // two rows need 16 accumulators
        for (; row + 2 <= a.m; row += 2)
          decode_group<2>(work, row, g, word, words, scales, work.acc + (strip * a.m + row) * kStrip);
      for (; row < a.m; ++row)
        decode_group<1>(work, row, g, word, words, scales, work.acc + (strip * a.m + row) * kStrip);
    }
  for (std::int64_t strip = begin; strip < end; ++strip)
    for (std::int64_t row = 0; row < a.m; ++row)
      store_outputs(a, row, strip * kStrip, work.acc + (strip * a.m + row) * kStrip);
}

void linear_gemm(const LinearWork& work, std::int64_t begin, std::int64_t end) noexcept {
  const LinearArgs& a = *work.args;
  const std::int64_t all_words = a.n / kCodesPerWord;
  alignas(64) float block[kStrip / kPanel][kChunk][kPanel];  // unpacked weights, panel by panel
  alignas(64) float acc[kRowBlock][kStrip];
  float scales[kStrip];
  for (std::int64_t strip = begin; strip < end; ++strip) {
    const std::int64_t word = strip * kLanes, words = smaller(kLanes, all_words - word);
    for (std::int64_t row0 = 0; row0 < a.m; row0 += kRowBlock) {
      const std::int64_t rows = smaller(kRowBlock, a.m - row0);
      std::memset(acc, 0, sizeof(float) * static_cast<std::size_t>(rows * kStrip));
      for (std::int64_t g = 0; g < a.k / a.group; ++g) {
        load_scales(a, g, strip * kStrip, scales);
        const Words zeros = load_zeros(a, g, word, words);
        for (std::int64_t k0 = g * a.group; k0 < (g + 1) * a.group; k0 += kChunk) {
          const std::int64_t depth = smaller(kChunk, (g + 1) * a.group - k0);
          for (int v = 0; v < kCodesPerWord; ++v) {
            const Floats zero = nibble(zeros, v), scale = load(scales + v * kLanes);
            const std::uint32_t* w = a.qweight + k0 * all_words + word;
            for (std::int64_t i = 0; i < depth; ++i)
              store(&block[v / kTileVectors][i][v % kTileVectors * kLanes],
                    (nibble(load_words(w + i * all_words, words), v) - zero) * scale);
          }
          for (std::int64_t p = 0; p < kStrip / kPanel; ++p)
            for_row_tiles(rows, [&]<int kRows>(std::int64_t r) {
              Floats sum[kRows][kTileVectors];
              for (int t = 0; t < kRows; ++t)
                for (int v = 0; v < kTileVectors; ++v) sum[t][v] = load(&acc[r + t][p * kPanel + v * kLanes]);
              multiply_add(work.x + (row0 + r) * a.k + k0, a.k, block[p][0], kPanel, depth, sum);
              for (int t = 0; t < kRows; ++t)
                for (int v = 0; v < kTileVectors; ++v) store(&acc[r + t][p * kPanel + v * kLanes], sum[t][v]);
            });
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) store_outputs(a, row0 + r, strip * kStrip, acc[r]);
    }
  }
}

void prepare_row(const LinearArgs& a, std::int64_t row, float* x, float* x_sum) noexcept {
  convert_to_float(a.x, a.x_type, row * a.x_stride, a.k, x);
  for (std::int64_t g = 0; g < a.k / a.group; ++g) {
    float lanes[kLanes] = {};  // a fixed number of partial sums, so that the loop vectorises in one order
    std::int64_t i = g * a.group;
    for (; i + kLanes <= (g + 1) * a.group; i += kLanes)
      for (int c = 0; c < kLanes; ++c) lanes[c] += x[i + c];
    float sum = 0.0f;
    for (; i < (g + 1) * a.group; ++i) sum += x[i];
    for (int c = 0; c < kLanes; ++c) sum += lanes[c];
    x_sum[g] = sum;
  }
}

// --- search ---------------------------------------------------------------------------------------------------------

bool quantization_error(const float* w, const float* scale, const float* inv_scale, float* d, std::int64_t k,
                        std::int64_t group, Rounding to) noexcept {
  for (std::int64_t g = 0; g < k; g += group) {
    // Ends do not depend on the order of the values, nor does whether poison is NaN: each lane may have its own.
    Floats lows{}, highs{}, poisons{};
    std::int64_t i = g;
    for (; i + kLanes <= g + group; i += kLanes) {
      const Floats v = load(w + i) * load(scale + i);
      store(d + i, v);
      lows = v < lows ? v : lows;
      highs = v > highs ? v : highs;
      poisons += v * 0.0f;
    }
    float lo = 0.0f, hi = 0.0f, poison = 0.0f;
    for (int c = 0; c < kLanes; ++c) {
      lo = lows[c] < lo ? lows[c] : lo;
      hi = highs[c] > hi ? highs[c] : hi;
      poison += poisons[c];
    }
    for (; i < g + group; ++i) {
      const float v = w[i] * scale[i];
      d[i] = v;
      lo = v < lo ? v : lo;
      hi = v > hi ? v : hi;
      poison += v * 0.0f;
    }
    const GroupParameters p = group_parameters(lo + poison, hi + poison, to);
    if (!(p.scale - p.scale == 0.0f)) return false;
    for (i = g; i < g + group; ++i) d[i] = dequantize_code(round_code(d[i], p), p) * inv_scale[i] - w[i];
  }
  return true;
}

void rounding_error(const float* w, GroupParameters p, std::int64_t count, float* d) noexcept {
  for (std::int64_t i = 0; i < count; ++i) d[i] = dequantize_code(round_code(w[i], p), p) - w[i];
}

void gram_loss(const float* d, std::int64_t rows, const float* triangle, std::int64_t k, double* loss) noexcept {
  const std::int64_t ld = padded(k, kPanel);
  for (std::int64_t r = 0; r < rows; ++r) loss[r] = 0.0;
  for (std::int64_t j = 0; j < ld; j += kPanel) {
    const float* panel = triangle + j * k;
    const std::int64_t depth = smaller(k, j + kPanel);  // below that the triangle is zero
    for_row_tiles(rows, [&]<int kRows>(std::int64_t r) {
      Floats sum[kRows][kTileVectors] = {};
      multiply_add(d + r * ld, ld, panel, kPanel, depth, sum);
      for (int t = 0; t < kRows; ++t) {
        Floats products = {};
        for (int v = 0; v < kTileVectors; ++v)
          products = fma(sum[t][v], load(d + (r + t) * ld + j + v * kLanes), products);
        double total = 0.0;
        for (int c = 0; c < kLanes; ++c) total += static_cast<double>(products[c]);
        loss[r + t] += total;
      }
    });
  }
}

void diagonal_loss(const float* d, std::int64_t rows, const float* diagonal, std::int64_t k, double* loss) noexcept {
  constexpr std::int64_t kColumns = 8 * kLanes;  // summed before they are added to the loss
  for (std::int64_t r = 0; r < rows; ++r, d += padded(k, kPanel)) {
    loss[r] = 0.0;
    for (std::int64_t first = 0; first < k; first += kColumns) {
      const std::int64_t end = smaller(k, first + kColumns);
      Floats sum{};
      std::int64_t i = first;
      for (; i + kLanes <= end; i += kLanes) sum = fma(load(d + i) * load(diagonal + i), load(d + i), sum);
      double total = 0.0;
      for (int c = 0; c < kLanes; ++c) total += static_cast<double>(sum[c]);
      for (; i < end; ++i) total += static_cast<double>(d[i] * diagonal[i]) * static_cast<double>(d[i]);
      loss[r] += total;
    }
  }
}

// --- gram -----------------------------------------------------------------------------------------------------------

// x is packed into panels of columns; the word of a column is its float, or where the level multiplies bfloat16
// numbers, those of two rows, the first in the lower half. Panels are whole and an odd last row has a partner: what is
// missing is zero, which adds nothing.
#if defined(__AVX512F__)
inline constexpr int kGramRows = 8;  // by three vectors: 24 accumulators of 32 registers
#elif defined(__aarch64__)
inline constexpr int kGramRows = 6;  // 18: a panel is whole tiles of rows
#else
inline constexpr int kGramRows = 4;  // 12 of 16
#endif
inline constexpr int kGramVectors = 3;
inline constexpr std::int64_t kGramPanel = std::int64_t{kGramVectors} * kLanes;
inline constexpr std::int64_t kGramPanels = 2;   // in one block
inline constexpr std::int64_t kGramDepth = 128;  // words summed before they are added to sums: a panel is then 24 KiB
static_assert(kGramPanel % kGramRows == 0);

inline bool gram_pairs([[maybe_unused]] const GramArgs& a) {
#if defined(__AVX512BF16__)
  return a.bfloat16;
#else
  return false;
#endif
}

/// Words of one packed column.
inline std::int64_t gram_depth(const GramArgs& a) { return gram_pairs(a) ? (a.t + 1) / 2 : a.t; }

std::int64_t gram_size(const GramArgs& a) noexcept { return gram_depth(a) * padded(a.k, kGramPanels * kGramPanel); }

/// Bits of x from [row, column] on; zero beyond its last row and column.
inline Words gram_line(const GramArgs& a, std::int64_t row, std::int64_t column) {
  if (row >= a.t || column >= a.k) return Words{};
  const float* x = a.x + row * a.x_stride + column;
  const Words bits = load_words(reinterpret_cast<const std::uint32_t*>(x), a.k - column);
  return a.bfloat16 ? round_to_bfloat(bits) : bits;
}

void gram_pack(const GramArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t depth = gram_depth(a);
  const bool pairs = gram_pairs(a);
  for (std::int64_t panel = begin * kGramPanels; panel < end * kGramPanels; ++panel)
    for (std::int64_t i = 0; i < depth; ++i)
      for (int v = 0; v < kGramVectors; ++v) {
        const std::int64_t column = panel * kGramPanel + v * kLanes;
        const Words line =
            pairs ? (gram_line(a, 2 * i, column) >> 16) | gram_line(a, 2 * i + 1, column) : gram_line(a, i, column);
        std::memcpy(a.packed + (panel * depth + i) * kGramPanel + v * kLanes, &line, sizeof line);
      }
}

/// sum += the product of two words of each lane, or with kPairs of their two bfloat16 numbers.
template <bool kPairs>
inline Floats multiply_words(Words a, Words b, Floats sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs)
    return static_cast<Floats>(_mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#endif
  return fma(reinterpret_cast<Floats>(a), reinterpret_cast<Floats>(b), sum);
}

/// sums[row .., column ..] += the products of kGramRows columns, packed at `left`, and one panel, `right`.
template <bool kPairs>
inline void gram_tile(const GramArgs& a, const std::uint32_t* left, const std::uint32_t* right, std::int64_t count,
                      std::int64_t row, std::int64_t column) {
  Floats sum[kGramRows][kGramVectors] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    Words line[kGramVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kGramVectors; ++v) line[v] = load_words(right + i * kGramPanel + v * kLanes, kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kGramRows; ++r) {
      const Words factor = Words{} + left[i * kGramPanel + r];
#pragma GCC unroll 3
      for (int v = 0; v < kGramVectors; ++v) sum[r][v] = multiply_words<kPairs>(factor, line[v], sum[r][v]);
    }
  }
  if (row + kGramRows <= column + 1 && column + kGramPanel <= a.k) {  // all of it is on or above the diagonal
#pragma GCC unroll 8
    for (int r = 0; r < kGramRows; ++r) {
      float* out = a.sums + (row + r) * a.k + column;
#pragma GCC unroll 3
      for (int v = 0; v < kGramVectors; ++v) store(out + v * kLanes, load(out + v * kLanes) + sum[r][v]);
    }
    return;
  }
  float tile[kGramRows][kGramPanel];
  for (int r = 0; r < kGramRows; ++r)
    for (int v = 0; v < kGramVectors; ++v) store(&tile[r][v * kLanes], sum[r][v]);
  for (std::int64_t i = row; i < smaller(row + kGramRows, a.k); ++i)
    for (std::int64_t j = i < column ? column : i; j < smaller(column + kGramPanel, a.k); ++j)
      a.sums[i * a.k + j] += tile[i - row][j - column];
}

template <bool kPairs>
inline void gram_add_panels(const GramArgs& a, std::int64_t i_block, std::int64_t j_block) {
  const std::int64_t depth = gram_depth(a);
  for (std::int64_t first = 0; first < depth; first += kGramDepth)  // the panels of both blocks stay in the cache
    for (std::int64_t j = j_block * kGramPanels; j < (j_block + 1) * kGramPanels; ++j)
      for (std::int64_t i = i_block * kGramPanels; i < smaller((i_block + 1) * kGramPanels, j + 1); ++i)
        for (std::int64_t r = 0; r < kGramPanel; r += kGramRows)
          gram_tile<kPairs>(a, a.packed + (i * depth + first) * kGramPanel + r,
                            a.packed + (j * depth + first) * kGramPanel, smaller(kGramDepth, depth - first),
                            i * kGramPanel + r, j * kGramPanel);
}

void gram_add(const GramArgs& a, std::int64_t i, std::int64_t j) noexcept {
  if (gram_pairs(a)) return gram_add_panels<true>(a, i, j);
  gram_add_panels<false>(a, i, j);
}

// --- dequantize -----------------------------------------------------------------------------------------------------

/// Columns i0 .. i1 of the row of the result whose codes are nibbles v of `words`, which are of one column of qweight.
inline void dequantize_row(const DequantizeArgs& a, const std::uint32_t* words, int v, std::int64_t column,
                           std::int64_t i0, std::int64_t i1) {
  const std::int64_t row = column * kCodesPerWord + kOrder.column[v], word_cols = a.n / kCodesPerWord;
  for (std::int64_t i = i0; i < i1;) {
    const std::int64_t g = i / a.group, stop = smaller((g + 1) * a.group, i1);
    const float scale = load_as<float>(a.scales, a.scale_type, g * a.n + row);
    const std::uint32_t zero = a.qzeros == nullptr ? 8u : (a.qzeros[g * word_cols + column] >> (4 * v)) & 15u;
    const Floats factor = broadcast(scale), shift = broadcast(static_cast<float>(zero));
    for (; i + kLanes <= stop; i += kLanes)
      store_as(a.w, a.w_type, row * a.k + i, (nibble(load_words(words + (i - i0), kLanes), v) - shift) * factor);
    for (; i < stop; ++i) {
      const float code = static_cast<float>((words[i - i0] >> (4 * v)) & 15u) - static_cast<float>(zero);
      store_as(a.w, a.w_type, row * a.k + i, code * scale);
    }
  }
}

void dequantize_rows(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  constexpr std::int64_t kInputs = 512;  // handled at a time: long enough stretches of each row of the result
  constexpr std::int64_t kLine = 16;     // words in a cache line, whose rows may lie a power of two apart
  const std::int64_t word_cols = a.n / kCodesPerWord, last = end / kCodesPerWord;
  std::uint32_t lines[kInputs][kLine], words[kInputs];
  for (std::int64_t first = begin / kCodesPerWord; first < last; first += kLine) {
    const std::int64_t count = smaller(kLine, last - first);
    for (std::int64_t i0 = 0; i0 < a.k; i0 += kInputs) {
      const std::int64_t inputs = smaller(kInputs, a.k - i0);
      for (std::int64_t i = 0; i < inputs; ++i)
        std::memcpy(lines[i], a.qweight + (i0 + i) * word_cols + first, static_cast<std::size_t>(count) * 4);
      for (std::int64_t c = 0; c < count; ++c) {
        for (std::int64_t i = 0; i < inputs; ++i) words[i] = lines[i][c];
        for (int v = 0; v < kCodesPerWord; ++v) dequantize_row(a, words, v, first + c, i0, i0 + inputs);
      }
    }
  }
}

constexpr Codes kStripCodes = kStrips, kFragmentCodes = kFragments;  // of this level alone: their addresses are taken

/// Scale and zero of the row and group, in layout strips or fragments.
inline GroupParameters parameters_of(const DequantizeArgs& a, std::int64_t row, std::int64_t g) {
  const std::int64_t groups = a.k / a.group;
  const bool strips = a.order == Order::strips;
  const std::int64_t place = strips ? strip_scale(a.n, groups, g, row) : fragment_scale(a.n, groups, g, row);
  const float scale = load_as<float>(a.scales, a.scale_type, place);
  if (a.qzeros == nullptr) return {scale, kSymmetricZero, last_code(4)};
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(a.qzeros);
  const std::int64_t byte =
      strips ? (row / kStripColumns * groups + g) * (kStripColumns / 2) + row % 16
             : (row / kPanelColumns * groups + g) * (kPanelColumns / 2) + row % 64 / 16 * 8 + row % 8;
  const std::int64_t upper = strips ? row % kStripColumns / 16 : row % kFragmentRows / 8;
  return {scale, static_cast<float>(bytes[byte] >> (4 * upper) & 15), last_code(4)};
}

/// Codes [begin, begin + count) of a row of the tile, one a byte there, from which on the row of the result is `row`.
inline void dequantize_codes(const DequantizeArgs& a, const std::uint8_t* codes, std::int64_t row, std::int64_t begin,
                             std::int64_t count) {
  for (std::int64_t i = begin; i < begin + count;) {
    const std::int64_t g = i / a.group, stop = smaller((g + 1) * a.group, begin + count);
    const GroupParameters p = parameters_of(a, row, g);
    for (; i + kLanes <= stop; i += kLanes) {
      const Floats code = __builtin_convertvector(load_bytes(codes + (i - begin)), Floats);
      store_as(a.w, a.w_type, row * a.k + i, (code - broadcast(p.zero)) * broadcast(p.scale));
    }
    for (; i < stop; ++i)
      store_as(a.w, a.w_type, row * a.k + i, (static_cast<float>(codes[i - begin]) - p.zero) * p.scale);
  }
}

void dequantize_tiles(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const Codes& layout = a.order == Order::strips ? kStripCodes : kFragmentCodes;
  const Packed<const std::uint8_t> words{layout, reinterpret_cast<const std::uint8_t*>(a.qweight)};
  Tile tile;
  alignas(64) std::uint8_t codes[kBlock];
  for (std::int64_t n0 = begin; n0 < end; n0 += kBlock)
    for (std::int64_t k0 = 0; k0 < a.k; k0 += kBlock) {
      const Window w{a.n, a.k, n0, k0};
      const Lines next = k0 + kBlock < a.k ? Lines(words.area({a.n, a.k, n0, k0 + kBlock})) : Lines();
      Ahead ahead(next, Lines(), words.passes());
      words.load(w, tile, ahead);
      for (std::int64_t r = 0; r < w.rows(); ++r) {
        for (std::int64_t i = 0; i < kBlock; i += std::int64_t{sizeof(Words)}) {
          HalfBytes pairs;
          std::memcpy(&pairs, &tile.row[r][i / kCodesPerWord], sizeof pairs);
          const Words split = split_codes(pairs);
          std::memcpy(codes + i, &split, sizeof split);
        }
        dequantize_codes(a, codes, n0 + r, k0, w.cols());
      }
    }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          kStrip,
          kPanel,
          linear_decode,
          linear_gemm,
          prepare_row,
          quantization_error,
          rounding_error,
          gram_loss,
          diagonal_loss,
          kGramPanels * kGramPanel,
          gram_size,
          gram_pack,
          gram_add,
          pack_tiles,
          unpack_tiles,
          repack_tiles,
          dequantize_rows,
          dequantize_tiles,
          {kRowsOfDigits[0], kRowsOfDigits[1], kRowsOfDigits[2]},
          kMatrixRows,
          strips_prepare,
          strips_multiply};
}

}  // namespace
}  // namespace awq::core
