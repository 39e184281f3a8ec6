#include "compensate.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "quantize.h"

// Everything that runs per element is inlined into one function per instruction set (at the end of this file). Vectors
// go across rows of the weight, so no sum is reordered and every instruction set gives the same bytes.
#define AWQ_INLINE __attribute__((always_inline)) inline

namespace awq::core {

void compensation_order(const float* gram, std::int64_t k, bool act_order, std::int64_t* order) {
  for (std::int64_t i = 0; i < k; ++i) order[i] = k - 1 - i;
  if (act_order)
    std::stable_sort(order, order + k, [&](auto a, auto b) { return gram[a * (k + 1)] < gram[b * (k + 1)]; });
}

double damp_gram(const float* gram, const std::int64_t* order, std::int64_t k, double damping, double* a) {
  double trace = 0.0;
  for (std::int64_t i = 0; i < k; ++i) trace += gram[i * (k + 1)];
  const double mean = trace / static_cast<double>(std::max<std::int64_t>(1, k));
  const double lambda = mean > 0.0 ? damping * mean : 1.0;  // without any input every order of codes is as good
  for (std::int64_t t = 0; t < k; ++t) {
    for (std::int64_t u = t; u < k; ++u) a[t * k + u] = gram[order[t] * k + order[u]];
    a[t * (k + 1)] += lambda;
  }
  return lambda;
}

void factor_panel(double* a, std::int64_t k, std::int64_t p, double damping) noexcept {
  for (std::int64_t t = p; t < std::min(p + kFactorBlock, k); ++t) {
    double* row = a + t * k;
    for (std::int64_t s = p; s < t; ++s) {
      const double* above = a + s * k;
      const double factor = above[t];
      for (std::int64_t u = t; u < k; ++u) row[u] -= factor * above[u];
    }
    const double pivot = std::sqrt(std::max(row[t], damping)), inverse = 1.0 / pivot;
    row[t] = pivot;
    for (std::int64_t u = t + 1; u < k; ++u) row[u] *= inverse;
  }
}

void factor_rows(const double* a, std::int64_t k, float* factor) noexcept {
  for (std::int64_t t = 0; t < k; ++t) {
    const double inverse = 1.0 / a[t * (k + 1)];
    for (std::int64_t u = t + 1; u < k; ++u) factor[t * k + u] = static_cast<float>(a[t * k + u] * inverse);
  }
}

namespace {

constexpr std::int64_t kLanes = 16;  // rows in one vector
constexpr std::int64_t kTiles = kCompensateRows / kLanes;
static_assert(kTiles * kLanes == kCompensateRows);
constexpr std::int64_t kRounded = 32;  // columns whose sums are held while they are rounded

// Compilers split vectors that are longer than the instruction set's.
using Lanes = float __attribute__((vector_size(kLanes * 4), may_alias));
using Doubles = double __attribute__((vector_size(kLanes * 8)));

/// Sixteen rows. Arrays by column hold one vector per column of the weight.
struct Tile {
  Lanes* w;       // [k]
  Lanes* d;       // [k], dequantized - w
  Lanes* ranked;  // [k], d in the order of the factor
  Lanes* code;    // [k], code - zero: whole numbers
  Lanes* sum;     // [max(group, kRounded)]
  Lanes* scale;   // [groups]
  Lanes* zero;    // [groups]
  Lanes* first;   // [groups], the scales of rounding to nearest
  Doubles nearest;
};

/// sum[r] += row r of the matrix times d, for `count` rows that are `stride` apart and `length` long.
AWQ_INLINE void add_products(const float* matrix, std::int64_t stride, std::int64_t count, const Lanes* d,
                             std::int64_t length, Lanes* sum) {
  constexpr std::int64_t kTogether = 8;
  std::int64_t r = 0;
  for (; r + kTogether <= count; r += kTogether) {
    const float* m = matrix + r * stride;
    Lanes s0 = sum[r], s1 = sum[r + 1], s2 = sum[r + 2], s3 = sum[r + 3];
    Lanes s4 = sum[r + 4], s5 = sum[r + 5], s6 = sum[r + 6], s7 = sum[r + 7];
    for (std::int64_t u = 0; u < length; ++u, ++m) {
      const Lanes x = d[u];
      s0 += m[0] * x, s1 += m[stride] * x, s2 += m[2 * stride] * x, s3 += m[3 * stride] * x;
      s4 += m[4 * stride] * x, s5 += m[5 * stride] * x, s6 += m[6 * stride] * x, s7 += m[7 * stride] * x;
    }
    sum[r] = s0, sum[r + 1] = s1, sum[r + 2] = s2, sum[r + 3] = s3;
    sum[r + 4] = s4, sum[r + 5] = s5, sum[r + 6] = s6, sum[r + 7] = s7;
  }
  for (; r < count; ++r) {
    Lanes s = sum[r];
    for (std::int64_t u = 0; u < length; ++u) s += matrix[r * stride + u] * d[u];
    sum[r] = s;
  }
}

AWQ_INLINE void clear(Lanes* sum, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] = Lanes{};
}

/// round_code of quantize.h for a vector, less the zero. Takes and gives references: passing a vector by value would
/// depend on the instruction set.
AWQ_INLINE void round_lanes(const Lanes& target, const Lanes& scale, const Lanes& zero, float last_code, Lanes& code) {
  Lanes x = target / scale;
  const Lanes lo = Lanes{} - kBeyondCodes, hi = Lanes{} + kBeyondCodes, round = Lanes{} + 12582912.0f,
              last = Lanes{} + last_code;
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  x = (x + round) - round + zero;
  x = x < Lanes{} ? Lanes{} : x;
  x = x > last ? last : x;
  code = x - zero;
}

AWQ_INLINE bool any_nonzero(const Lanes& x) {
  std::int32_t bits[kLanes], all = 0;
  std::memcpy(bits, &x, sizeof bits);
  for (const std::int32_t b : bits) all |= b & 0x7fffffff;
  return all != 0;
}

/// d G d^T of each row: products in float32, their sum in float64.
AWQ_INLINE void row_losses(const CompensateArgs& a, const Tile& tile, Doubles& loss) {
  loss = Doubles{};
  for (std::int64_t t = 0; t < a.k; t += kRounded) {
    const std::int64_t count = std::min(kRounded, a.k - t);
    clear(tile.sum, count);
    add_products(a.gram + t * a.k, a.k, count, tile.d, a.k, tile.sum);
    for (std::int64_t i = 0; i < count; ++i)
      loss += __builtin_convertvector(tile.sum[i], Doubles) * __builtin_convertvector(tile.d[t + i], Doubles);
  }
}

AWQ_INLINE void round_to_nearest(const CompensateArgs& a, Tile& tile) {
  for (std::int64_t i = 0; i < a.k; ++i) {
    const std::int64_t g = i / a.group;
    round_lanes(tile.w[i], tile.scale[g], tile.zero[g], a.to.last, tile.code[i]);
    tile.d[i] = tile.code[i] * tile.scale[g] - tile.w[i];
  }
}

/// Rounds the columns of one block of the factor, [begin, end), last first.
AWQ_INLINE void compensate_block(const CompensateArgs& a, Tile& tile, std::int64_t begin, std::int64_t end) {
  const float* factor = a.factor + begin * a.k;
  clear(tile.sum, end - begin);
  add_products(factor + end, a.k, end - begin, tile.ranked + end, a.k - end, tile.sum);
  for (std::int64_t t = end - 1; t >= begin; --t) {
    const std::int64_t i = a.order[t], g = i / a.group;
    const Lanes target = tile.w[i] - tile.sum[t - begin];
    round_lanes(target, tile.scale[g], tile.zero[g], a.to.last, tile.code[i]);
    const Lanes d = tile.code[i] * tile.scale[g] - tile.w[i];
    tile.d[i] = tile.ranked[t] = d;
    for (std::int64_t r = 0; r < t - begin; ++r) tile.sum[r] += factor[r * a.k + t] * d;
  }
}

/// One group of one pass of coordinate descent. `sum` follows the gradient d G over the group's columns.
AWQ_INLINE void descend_group(const CompensateArgs& a, Tile& tile, std::int64_t g) {
  const std::int64_t begin = g * a.group;
  const float* gram = a.gram + begin * (a.k + 1);  // the group's block on the diagonal
  clear(tile.sum, a.group);
  add_products(a.gram + begin * a.k, a.k, a.group, tile.d, a.k, tile.sum);
  Lanes scale = tile.scale[g];
  for (std::int64_t t = 0; t < a.group; ++t) {
    const float curvature = gram[t * (a.k + 1)];
    if (!(curvature > 0.0f)) continue;
    Lanes& d = tile.d[begin + t];
    const Lanes target = tile.w[begin + t] + d - tile.sum[t] / curvature;
    round_lanes(target, scale, tile.zero[g], a.to.last, tile.code[begin + t]);
    const Lanes moved = tile.code[begin + t] * scale - tile.w[begin + t] - d;
    if (!any_nonzero(moved)) continue;
    d += moved;
    for (std::int64_t u = 0; u < a.group; ++u) tile.sum[u] += gram[t * a.k + u] * moved;
  }
  if (!a.refit_scales) return;
  // The loss is a parabola in the scale: slope 2 sum code * gradient, curvature code G code^T.
  Lanes slope{}, curvature{};
  for (std::int64_t t = 0; t < a.group; ++t) slope += tile.code[begin + t] * tile.sum[t];
  clear(tile.sum, a.group);
  add_products(gram, a.k, a.group, tile.code + begin, a.group, tile.sum);
  for (std::int64_t t = 0; t < a.group; ++t) curvature += tile.code[begin + t] * tile.sum[t];
  for (std::int64_t r = 0; r < kLanes; ++r) {
    const float best = scale[r] - slope[r] / curvature[r];
    if (!(best > 0.0f && best < 1e30f)) continue;
    const float stored = round_scale(best, a.to.scale_type), step = stored - scale[r];
    if (stored > 0.0f && std::isfinite(stored) && step * (2.0f * slope[r] + step * curvature[r]) < 0.0f)
      scale[r] = stored;
  }
  tile.scale[g] = scale;
  for (std::int64_t t = begin; t < begin + a.group; ++t) tile.d[t] = tile.code[t] * scale - tile.w[t];
}

/// Reads the rows and their groups' parameters. Rows beyond `end` are zero.
AWQ_INLINE std::int64_t read_tile(const CompensateArgs& a, Tile& tile, std::int64_t row, std::int64_t end) {
  const std::int64_t groups = a.k / a.group;
  auto* w = reinterpret_cast<float*>(tile.w);
  for (std::int64_t r = 0; r < kLanes; ++r) {
    if (row + r >= end) {
      for (std::int64_t i = 0; i < a.k; ++i) w[i * kLanes + r] = 0.0f;
      for (std::int64_t g = 0; g < groups; ++g) tile.scale[g][r] = 1.0f, tile.zero[g][r] = 0.0f;
      continue;
    }
    const float* source = a.w + (row + r) * a.k;
    for (std::int64_t i = 0; i < a.k; ++i) w[i * kLanes + r] = source[i];
    for (std::int64_t g = 0; g < groups; ++g) {
      float lo = 0.0f, hi = 0.0f;
      if (a.range != nullptr) {
        lo = a.range[((row + r) * groups + g) * 2], hi = a.range[((row + r) * groups + g) * 2 + 1];
      } else {
        for (std::int64_t i = g * a.group; i < (g + 1) * a.group; ++i)
          lo = source[i] < lo ? source[i] : lo, hi = source[i] > hi ? source[i] : hi;
      }
      const GroupParameters p = group_parameters(lo, hi, a.to);
      if (!std::isfinite(p.scale)) return row + r;
      tile.scale[g][r] = p.scale, tile.zero[g][r] = p.zero;
    }
  }
  for (std::int64_t g = 0; g < groups; ++g) tile.first[g] = tile.scale[g];
  return -1;
}

AWQ_INLINE void write_tile(const CompensateArgs& a, Tile& tile, std::int64_t row, std::int64_t end) {
  const std::int64_t groups = a.k / a.group;
  Doubles loss;
  row_losses(a, tile, loss);
  for (std::int64_t r = 0; r < std::min(kLanes, end - row); ++r) {
    const bool better = loss[r] < tile.nearest[r];
    for (std::int64_t g = 0; g < groups; ++g) {
      const GroupParameters p{better ? tile.scale[g][r] : tile.first[g][r], tile.zero[g][r], a.to.last};
      store_as(a.scales, a.to.scale_type, (row + r) * groups + g, p.scale);
      a.zeros[(row + r) * groups + g] = static_cast<std::uint8_t>(p.zero);
      for (std::int64_t i = g * a.group; i < (g + 1) * a.group; ++i)
        a.q[(row + r) * a.k + i] =
            static_cast<std::uint8_t>(better ? tile.code[i][r] + p.zero : round_code(tile.w[i][r], p));
    }
  }
}

AWQ_INLINE std::int64_t compensate(const CompensateArgs& a, std::int64_t begin, std::int64_t end, float* scratch) {
  const std::int64_t groups = a.k / a.group, tiles = (end - begin + kLanes - 1) / kLanes;
  Tile tile[kTiles];
  // Compilers use aligned instructions on vectors, whatever address their type is said to allow.
  const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(scratch) + sizeof(Lanes) - 1;
  auto* next = reinterpret_cast<Lanes*>(last / sizeof(Lanes) * sizeof(Lanes));
  for (std::int64_t i = 0; i < tiles; ++i) {
    Tile& t = tile[i];
    for (Lanes** part : {&t.w, &t.d, &t.ranked, &t.code}) *part = next, next += a.k;
    t.sum = next, next += std::max(a.group, kRounded);
    for (Lanes** part : {&t.scale, &t.zero, &t.first}) *part = next, next += groups;
    const std::int64_t bad = read_tile(a, t, begin + i * kLanes, end);
    if (bad >= 0) return bad;
    round_to_nearest(a, t);
    row_losses(a, t, t.nearest);
  }
  for (std::int64_t last = a.k; last > 0; last -= std::min(kRounded, last))
    for (std::int64_t i = 0; i < tiles; ++i) compensate_block(a, tile[i], last - std::min(kRounded, last), last);
  for (std::int64_t pass = 0; pass < a.passes; ++pass)
    for (std::int64_t g = 0; g < groups; ++g)
      for (std::int64_t i = 0; i < tiles; ++i) descend_group(a, tile[i], g);
  for (std::int64_t i = 0; i < tiles; ++i) write_tile(a, tile[i], begin + i * kLanes, end);
  return -1;
}

/// a[i, j] -= sum over the panel's rows s of a[s, i] a[s, j], for kFactorBlock rows i from `row` and all j >= row.
AWQ_INLINE void subtract_panel(double* a, std::int64_t k, std::int64_t p, std::int64_t row) {
  constexpr std::int64_t kColumns = 16;
  const std::int64_t rows = std::min(kFactorBlock, k - row);
  constexpr std::int64_t kTogether = 4;
  double left[kFactorBlock][kFactorBlock] = {};  // [i, s]
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t s = 0; s < kFactorBlock; ++s) left[i][s] = a[(p + s) * k + row + i];
  for (std::int64_t j = row; j < k; j += kColumns) {
    const std::int64_t count = std::min(kColumns, k - j);
    double right[kFactorBlock][kColumns] = {};
    for (std::int64_t s = 0; s < kFactorBlock; ++s)
      for (std::int64_t c = 0; c < count; ++c) right[s][c] = a[(p + s) * k + j + c];
    for (std::int64_t i = 0; i < rows; i += kTogether) {
      double sum[kTogether][kColumns] = {};
      for (std::int64_t s = 0; s < kFactorBlock; ++s)
        for (std::int64_t r = 0; r < kTogether; ++r)
          for (std::int64_t c = 0; c < kColumns; ++c) sum[r][c] += left[i + r][s] * right[s][c];
      for (std::int64_t r = 0; r < std::min(kTogether, rows - i); ++r)
        for (std::int64_t c = 0; c < count; ++c) a[(row + i + r) * k + j + c] -= sum[r][c];
    }
  }
}

using CompensateRows = std::int64_t (*)(const CompensateArgs&, std::int64_t, std::int64_t, float*);
using SubtractPanel = void (*)(double*, std::int64_t, std::int64_t, std::int64_t);

#define AWQ_LEVEL(name, flags)                                                                        \
  flags std::int64_t compensate_##name(const CompensateArgs& a, std::int64_t begin, std::int64_t end, \
                                       float* scratch) {                                              \
    return compensate(a, begin, end, scratch);                                                        \
  }                                                                                                   \
  flags void subtract_##name(double* a, std::int64_t k, std::int64_t p, std::int64_t row) {           \
    subtract_panel(a, k, p, row);                                                                     \
  }
AWQ_LEVEL(portable, )
#if defined(__x86_64__)
AWQ_LEVEL(avx2, __attribute__((target("avx2"))))
AWQ_LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#undef AWQ_LEVEL

CompensateRows rows_of([[maybe_unused]] const Kernels& level) {
#if defined(__x86_64__)
  if (std::strncmp(level.name, "avx512", 6) == 0) return compensate_avx512;
  if (std::strncmp(level.name, "avx", 3) == 0) return compensate_avx2;
#endif
  return compensate_portable;
}

SubtractPanel panel_of([[maybe_unused]] const Kernels& level) {
#if defined(__x86_64__)
  if (std::strncmp(level.name, "avx512", 6) == 0) return subtract_avx512;
  if (std::strncmp(level.name, "avx", 3) == 0) return subtract_avx2;
#endif
  return subtract_portable;
}

}  // namespace

void factor_trailing(const Kernels& level, double* a, std::int64_t k, std::int64_t p, std::int64_t row) noexcept {
  panel_of(level)(a, k, p, row);
}

std::int64_t compensate_scratch_size(const CompensateArgs& a) {
  const std::int64_t groups = a.k / a.group;
  return kTiles * kLanes * (4 * a.k + std::max(a.group, kRounded) + 3 * groups) + kLanes;  // to align it
}

std::int64_t compensate_rows(const Kernels& level, const CompensateArgs& a, std::int64_t begin, std::int64_t end,
                             float* scratch) noexcept {
  return rows_of(level)(a, begin, end, scratch);
}

}  // namespace awq::core
