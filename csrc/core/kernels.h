// What one instruction-set level offers. Each level is one translation unit (kernels_<level>.cpp) that compiles
// kernels_impl.h with its own flags; nothing else may be compiled with those flags, since an inline function from a
// shared header could then be linked in its AVX form into code that runs anywhere.
#pragma once
#include <cstdint>

#include "gram.h"
#include "layout.h"
#include "linear.h"
#include "pack.h"
#include "quantize.h"
#include "strips.h"
#include "types.h"

namespace awq::core {

/// A linear call, prepared: x as contiguous float32 with its sums per group.
struct LinearWork {
  const LinearArgs* args;
  const float* x;      // [m, k]
  const float* x_sum;  // [m, groups], the sum of x over each group
  float* acc;          // [strips, m, strip] scratch; used by decode only
};

struct Kernels {
  const char*
      name;  // "portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon_dotprod", ...
  std::int64_t strip;  // output columns that a linear kernel handles together, a multiple of eight
  std::int64_t panel;  // columns of a packed triangle that gram_loss handles together

  /// Output strips [begin, end). decode unpacks the words once for every few rows and suits small m; gemm unpacks a
  /// block to float32 once for 64 rows. Both read only args, x and x_sum and write only their strips of y and acc.
  void (*linear_decode)(const LinearWork& work, std::int64_t begin, std::int64_t end) noexcept;
  void (*linear_gemm)(const LinearWork& work, std::int64_t begin, std::int64_t end) noexcept;

  /// Row `row` of x as float32 with the sums of its groups.
  void (*prepare_row)(const LinearArgs& args, std::int64_t row, float* x, float* x_sum) noexcept;

  /// d = dequantize(quantize(w * scale)) / scale - w for one row of k weights; inv_scale = 1 / scale.
  /// Returns false if a group's scale is not finite.
  bool (*quantization_error)(const float* w, const float* scale, const float* inv_scale, float* d, std::int64_t k,
                             std::int64_t group, Rounding to) noexcept;

  /// d = dequantize(code of w) - w for `count` weights of one group.
  void (*rounding_error)(const float* w, GroupParameters p, std::int64_t count, float* d) noexcept;

  /// loss[r] = d_r G d_r^T for `rows` rows of d, [rows, padded(k)] with zeros beyond k, from the packed triangle.
  void (*gram_loss)(const float* d, std::int64_t rows, const float* triangle, std::int64_t k, double* loss) noexcept;

  /// The same of a G that is zero off its diagonal [k].
  void (*diagonal_loss)(const float* d, std::int64_t rows, const float* diagonal, std::int64_t k,
                        double* loss) noexcept;

  /// sums[i, j] += sum over rows t of x[t, i] x[t, j] for j >= i, in two steps: gram_pack for blocks [begin, end) of
  /// gram_block columns each, which writes only their part of packed; then, when all are packed, gram_add for every two
  /// blocks i <= j, which writes only their part of sums. Nothing else of sums is touched. The order in which an
  /// element is summed depends on t alone. gram_size: the words of packed.
  std::int64_t gram_block;
  std::int64_t (*gram_size)(const GramArgs& args) noexcept;
  void (*gram_pack)(const GramArgs& args, std::int64_t begin, std::int64_t end) noexcept;
  void (*gram_add)(const GramArgs& args, std::int64_t i, std::int64_t j) noexcept;

  /// What pack.h promises under these names.
  bool (*pack_blocks)(const Codes& to, const std::uint8_t* q, void* words, std::int64_t n, std::int64_t k,
                      std::int64_t begin, std::int64_t end) noexcept;
  void (*unpack_blocks)(const Codes& from, const void* words, std::uint8_t* q, std::int64_t n, std::int64_t k,
                        std::int64_t begin, std::int64_t end) noexcept;
  void (*repack_blocks)(const Codes& from, const Codes& to, const void* source, void* target, std::int64_t n,
                        std::int64_t k, std::int64_t begin, std::int64_t end) noexcept;
  /// Of layout gemm, and of strips and fragments, where begin is a multiple of kBlock.
  void (*dequantize_rows)(const DequantizeArgs& args, std::int64_t begin, std::int64_t end) noexcept;
  void (*dequantize_tiles)(const DequantizeArgs& args, std::int64_t begin, std::int64_t end) noexcept;

  /// Layout strips, see strips.h: prepare tiles [begin, end) of x, then, when all are prepared, multiply output strips
  /// [begin, end). A row of y is the same whatever rows are beside it.
  int strips_rows[kMostDigits];  // most rows of a tile, by digits - 1
  int matrix_rows;               // most rows of a tile with StripsWork::matrix; 0 where the level has no matrix unit
  void (*strips_prepare)(const StripsWork& work, std::int64_t begin, std::int64_t end) noexcept;
  void (*strips_multiply)(const StripsWork& work, std::int64_t begin, std::int64_t end) noexcept;
};

/// k rounded up to whole panels: the row length of d.
AWQ_HOST_DEVICE constexpr std::int64_t padded(std::int64_t k, std::int64_t panel) {
  return (k + panel - 1) / panel * panel;
}

/// Floats in the packed triangle of a k x k matrix.
constexpr std::int64_t triangle_size(std::int64_t k, std::int64_t panel) { return k * padded(k, panel); }

/// Packs the upper triangle of the symmetric matrix `gram` (rows `stride` apart), entries off the diagonal doubled, so
/// that d G d^T = sum over i <= j of d_i t_ij d_j: half the work of the full product. Panel p holds, for i = 0 .. k-1,
/// the `panel` entries t[i, p * panel ...]; entries below the diagonal and beyond k are zero.
void pack_triangle(const float* gram, std::int64_t stride, std::int64_t k, std::int64_t panel, float* triangle);

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_int8_kernels();
#elif defined(__aarch64__)
const Kernels& neon_dotprod_kernels();
const Kernels& neon_i8mm_kernels();
#endif

}  // namespace awq::core
