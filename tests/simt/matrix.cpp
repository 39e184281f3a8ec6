#include "matrix.h"

#include <cstring>
#include <utility>

#include "machine.h"

// Several versions of the inner loops, of which the loader takes the one for this CPU.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SIMT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SIMT_CLONES
#endif

namespace simt {
namespace {

/// core's half_to_float without branches: put where float has them, the bits are the value times 2^-112; only infinity
/// and NaN then lack the largest exponent.
inline float half_to_float(std::uint16_t half) {
  const std::uint32_t rest = half & 0x7fffu, sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f);
  return std::bit_cast<float>(bits | (rest >= 0x7c00u ? 0x7f800000u : 0u) | sign);
}

SIMT_CLONES void halves_to_floats(const std::uint16_t* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
}

void to_floats(DType type, const std::uint16_t* from, float* to, int count) {
  if (type == DType::f16) return halves_to_floats(from, to, count);
  for (int i = 0; i < count; ++i) to[i] = awq::core::bfloat_to_float(from[i]);
}

/// d [rows][columns] += a [rows][16] b [16][columns].
SIMT_CLONES void add_products(float* d, const float* a, const float* b, int rows, int columns) {
  for (int row = 0; row < rows; ++row)
    for (int first = 0; first < columns; first += 8) {  // eight sums stay in registers
      float sum[8];
      for (int i = 0; i < 8; ++i) sum[i] = d[row * columns + first + i];
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 8; ++i) sum[i] += a[row * 16 + k] * b[k * columns + first + i];
      for (int i = 0; i < 8; ++i) d[row * columns + first + i] = sum[i];
    }
}

struct Operands {
  float* d;
  const std::uint32_t *a, *b;
};

template <DType kType>
bool mma_warp(Warp& w) {
  std::uint16_t a[16][16], b[8][16];
  float d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int r = lane / 4, t = lane % 4;
    const auto& x = w.slot<Operands>(lane);
    for (int i = 0; i < 4; ++i) std::memcpy(&a[r + 8 * (i % 2)][2 * t + 8 * (i / 2)], &x.a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[r][2 * t + 8 * i], &x.b[i], 4);
    for (int i = 0; i < 4; ++i) d[r + 8 * (i / 2)][2 * t + i % 2] = x.d[i];
  }
  multiply(kType, 16, 8, &d[0][0], &a[0][0], &b[0][0]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int r = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) w.slot<Operands>(lane).d[i] = d[r + 8 * (i / 2)][2 * t + i % 2];
  }
  return true;
}

struct Rows {
  std::uint32_t* r;
  int count;
  std::uint32_t row;
};

}  // namespace

void multiply(DType type, int rows, int columns, float* d, const std::uint16_t* a, const std::uint16_t* b) {
  float all_a[64 * 16], columns_b[256 * 16], all_b[16 * 256];
  to_floats(type, a, all_a, rows * 16);
  to_floats(type, b, columns_b, columns * 16);
  for (int col = 0; col < columns; ++col)
    for (int k = 0; k < 16; ++k) all_b[k * columns + col] = columns_b[col * 16 + k];
  add_products(d, all_a, all_b, rows, columns);
}

void mma(DType type, float* d, const std::uint32_t* a, const std::uint32_t* b, Where where) {
  Operands mine{d, a, b};
  together({"mma", where}, &mine, type == DType::f16 ? mma_warp<DType::f16> : mma_warp<DType::bf16>);
}

void load_matrices(std::uint32_t* r, int count, std::uint32_t row, Where where) {
  SharedMemory& memory = current->block->shared;
  memory.check(row, 16, 16, "load_matrices", where);
  if (current->lane() < 8 * count) note_read(memory, row, 16, "load_matrices", where);
  Rows mine{r, count, row};
  together({"load_matrices", where}, &mine, [](Warp& w) {
    SharedMemory& from = w.block->shared;
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto& to = w.slot<Rows>(lane);
      for (int i = 0; i < to.count; ++i)
        std::memcpy(&to.r[i], from.data(w.slot<Rows>(8 * i + lane / 4).row + static_cast<std::uint32_t>(lane % 4 * 4)),
                    4);
    }
    return true;
  });
}

}  // namespace simt
