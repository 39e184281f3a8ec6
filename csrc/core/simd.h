// The few vector operations the kernels need, for the level that this translation unit is compiled for. Arithmetic
// uses the compilers' vector types; only what those cannot say is an intrinsic.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

namespace awq::core {
namespace {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats broadcast(float x) { return Floats{} + x; }

/// The first `count` words at p, zero beyond.
inline Words load_words(const std::uint32_t* p, std::int64_t count) {
  if (count >= kLanes) return *reinterpret_cast<const Words*>(p);
  Words v{};
  std::memcpy(&v, p, static_cast<std::size_t>(count) * 4);
  return v;
}

/// a * b + c, rounded once where the level has the instruction.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return static_cast<Floats>(_mm512_fmadd_ps(a, b, c));
#elif defined(__FMA__)
  return static_cast<Floats>(_mm256_fmadd_ps(a, b, c));
#else
  return a * b + c;
#endif
}

/// Nibble i of every word, as float.
inline Floats nibble(Words words, int i) {
#if defined(__AVX512F__)
  // The permutation reads only the lowest four bits of each index, so no mask is needed.
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return static_cast<Floats>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(words >> (4 * i)), table));
#else
  return __builtin_convertvector(reinterpret_cast<Ints>((words >> (4 * i)) & 15u), Floats);
#endif
}

/// count elements of type t, from element `offset` on, to float.
inline void convert_to_float(const void* data, DType t, std::int64_t offset, std::int64_t count, float* out) {
  std::int64_t i = 0;
  if (t == DType::f32) {
    std::memcpy(out, static_cast<const float*>(data) + offset, static_cast<std::size_t>(count) * 4);
    return;
  }
  const std::uint16_t* in = static_cast<const std::uint16_t*>(data) + offset;
  if (t == DType::f16) {
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < count; ++i) out[i] = half_to_float(in[i]);
  } else {
    for (; i < count; ++i) out[i] = bfloat_to_float(in[i]);
  }
}

}  // namespace
}  // namespace awq::core
