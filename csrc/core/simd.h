// The few vector operations the kernels need, for the level that this translation unit is compiled for. Arithmetic
// uses the compilers' vector types; only what those cannot say is an intrinsic.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>  // of which every AArch64 CPU has what this file takes: "portable" is NEON there
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

// Vectors that the CPU has names for: how many sums a kernel keeps at a time follows from it.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::uint64_t Longs __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::uint16_t Shorts __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::uint16_t HalfWords __attribute__((vector_size(2 * kLanes), may_alias));
typedef std::uint8_t HalfBytes __attribute__((vector_size(2 * kLanes), may_alias));
typedef std::int8_t SmallBytes __attribute__((vector_size(kLanes), may_alias));

// The same at any address. Only for access: as types of variables they lead clang to use aligned instructions on them.
typedef float FloatsAnywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::uint32_t WordsAnywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const FloatsAnywhere*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<FloatsAnywhere*>(p) = v; }
inline Floats broadcast(float x) { return Floats{} + x; }

/// The first `count` words at p, zero beyond.
inline Words load_words(const std::uint32_t* p, std::int64_t count) {
  if (count >= kLanes) return *reinterpret_cast<const WordsAnywhere*>(p);
  Words v{};
  std::memcpy(&v, p, static_cast<std::size_t>(count) * 4);
  return v;
}

#if defined(__aarch64__)
/// The first two words at p, zero beyond, by one instruction.
inline Words load_two_words(const std::uint32_t* p) {
  return reinterpret_cast<Words>(vcombine_u32(vld1_u32(p), vdup_n_u32(0)));
}
#endif

/// a * b + c, rounded once where the level has the instruction.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return static_cast<Floats>(_mm512_fmadd_ps(a, b, c));
#elif defined(__FMA__)
  return static_cast<Floats>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
  return static_cast<Floats>(vfmaq_f32(c, a, b));
#else
  return a * b + c;
#endif
}

inline std::int32_t largest_of(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v));
#elif defined(__aarch64__)
  return vmaxvq_s32(reinterpret_cast<int32x4_t>(v));
#else
  std::int32_t largest = v[0];
  for (int c = 1; c < kLanes; ++c) largest = v[c] > largest ? v[c] : largest;
  return largest;
#endif
}

inline std::int32_t sum_of(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
#elif defined(__aarch64__)
  return vaddvq_s32(reinterpret_cast<int32x4_t>(v));
#else
  std::int32_t sum = 0;
  for (int c = 0; c < kLanes; ++c) sum += v[c];
  return sum;
#endif
}

/// The lowest bytes of all lanes of four vectors, in order.
inline Words lowest_bytes(const Ints (&v)[4]) {
#if defined(__AVX2__)
  // Of each sixteen bytes of the four, packing makes one sixteen: as words, a matrix to transpose.
  const auto of = [&](int i) { return v[i] & 255; };
#if defined(__AVX512F__)
  const auto pack = [](Ints a, Ints b) {
    return _mm512_packus_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  };
  const __m512i bytes = _mm512_packus_epi16(pack(of(0), of(1)), pack(of(2), of(3)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Words>(_mm512_permutexvar_epi32(order, bytes));
#else
  const auto pack = [](Ints a, Ints b) {
    return _mm256_packus_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  };
  const __m256i bytes = _mm256_packus_epi16(pack(of(0), of(1)), pack(of(2), of(3)));
  return reinterpret_cast<Words>(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#endif
#elif defined(__aarch64__)  // compilers have no vectors of four bytes there and go lane by lane
  const auto even = [](Ints a, Ints b) {
    return vuzp1q_s8(reinterpret_cast<int8x16_t>(a), reinterpret_cast<int8x16_t>(b));
  };
  return reinterpret_cast<Words>(vuzp1q_s8(even(v[0], v[1]), even(v[2], v[3])));
#else
  SmallBytes bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = __builtin_convertvector(v[i], SmallBytes);
  Words words;
  static_assert(sizeof bytes == sizeof words);
  std::memcpy(&words, bytes, sizeof words);
  return words;
#endif
}

/// The bits of floats, rounded to bfloat16: float_to_bfloat of each in the upper half.
inline Words round_to_bfloat(Words bits) {
  const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
  return (reinterpret_cast<Ints>(bits & 0x7fffffffu) > 0x7f800000 ? quiet : nearest) & 0xffff0000u;
}

/// Elements i .. i + kLanes of an array of type t, as `store_as` of types.h writes one.
inline void store_as(void* data, DType t, std::int64_t i, Floats v) {
  if (t == DType::f32) {
    store(static_cast<float*>(data) + i, v);
    return;
  }
  if (t == DType::bf16) {
    const auto halves = __builtin_convertvector(round_to_bfloat(reinterpret_cast<Words>(v)) >> 16, HalfWords);
    std::memcpy(static_cast<std::uint16_t*>(data) + i, &halves, sizeof halves);
    return;
  }
#if defined(__AVX512F__)
  if (t == DType::f16 && _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) == 0) {  // NaNs would keep more of their bits
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(static_cast<std::uint16_t*>(data) + i, &halves, sizeof halves);
    return;
  }
#elif defined(__aarch64__)
  if (t == DType::f16 && vminvq_u32(vceqq_f32(v, v)) != 0) {  // no NaN
    const float16x4_t halves = vcvt_f16_f32(v);
    std::memcpy(static_cast<std::uint16_t*>(data) + i, &halves, sizeof halves);
    return;
  }
#endif
  for (int lane = 0; lane < kLanes; ++lane) awq::core::store_as(data, t, i + lane, static_cast<float>(v[lane]));
}

/// The upper nibble of every byte.
inline Words upper_nibbles(Words v) {
#if defined(__aarch64__)
  return reinterpret_cast<Words>(vshrq_n_u8(reinterpret_cast<uint8x16_t>(v), 4));
#else
  return (v >> 4) & 0x0f0f0f0fu;
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
#elif defined(__aarch64__)
    for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
#endif
    for (; i < count; ++i) out[i] = half_to_float(in[i]);
  } else {
    for (; i < count; ++i) out[i] = bfloat_to_float(in[i]);
  }
}

/// kLanes bytes as numbers. (g++ 12 takes a vector of bytes apart to convert it.)
inline Ints load_bytes(const std::uint8_t* bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#elif defined(__aarch64__)
  std::uint32_t four;
  std::memcpy(&four, bytes, sizeof four);
  return reinterpret_cast<Ints>(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
#else
  typedef std::uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));
  Bytes b;
  std::memcpy(&b, bytes, sizeof b);
  return __builtin_convertvector(b, Ints);
#endif
}

/// Of every two neighbouring elements of kBits bits, exchanges the upper in a with the lower in b. 64 only on AArch64.
template <int kBits>
inline void exchange(Words& a, Words& b) {
#if defined(__AVX512F__)
  if constexpr (kBits >= 8) {  // whole bytes: byte i comes from byte i ^ kBits / 8 of the other
    constexpr int kFlip = kBits / 8 * 0x01010101;
    constexpr std::uint64_t kLower = kBits == 8    ? 0x5555555555555555
                                     : kBits == 16 ? 0x3333333333333333
                                                   : 0x0f0f0f0f0f0f0f0f;
    const __m512i table =
        _mm512_setr4_epi32(0x03020100 ^ kFlip, 0x07060504 ^ kFlip, 0x0b0a0908 ^ kFlip, 0x0f0e0d0c ^ kFlip);
    const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
    a = reinterpret_cast<Words>(_mm512_mask_shuffle_epi8(x, ~kLower, y, table));
    b = reinterpret_cast<Words>(_mm512_mask_shuffle_epi8(y, kLower, x, table));
    return;
  }
#elif defined(__aarch64__)
  if constexpr (kBits <= 8) {
    const auto x = reinterpret_cast<uint8x16_t>(a), y = reinterpret_cast<uint8x16_t>(b);
    a = reinterpret_cast<Words>(kBits == 4 ? vsliq_n_u8(x, y, 4) : vtrn1q_u8(x, y));
    b = reinterpret_cast<Words>(kBits == 4 ? vsriq_n_u8(y, x, 4) : vtrn2q_u8(x, y));
    return;
  } else if constexpr (kBits == 16) {
    const auto x = reinterpret_cast<uint16x8_t>(a), y = reinterpret_cast<uint16x8_t>(b);
    a = reinterpret_cast<Words>(vtrn1q_u16(x, y));
    b = reinterpret_cast<Words>(vtrn2q_u16(x, y));
    return;
  } else if constexpr (kBits == 64) {
    const auto x = reinterpret_cast<uint64x2_t>(a), y = reinterpret_cast<uint64x2_t>(b);
    a = reinterpret_cast<Words>(vtrn1q_u64(x, y));
    b = reinterpret_cast<Words>(vtrn2q_u64(x, y));
    return;
  }
#endif
  constexpr std::uint64_t kLower = kBits == 4    ? 0x0f0f0f0f0f0f0f0f
                                   : kBits == 8  ? 0x00ff00ff00ff00ff
                                   : kBits == 16 ? 0x0000ffff0000ffff
                                                 : 0x00000000ffffffff;
  const auto x = reinterpret_cast<Longs>(a), y = reinterpret_cast<Longs>(b);
  const Longs t = ((x >> kBits) ^ y) & kLower;
  a = reinterpret_cast<Words>(x ^ (t << kBits));
  b = reinterpret_cast<Words>(y ^ t);
}

/// low, high = a0 b0 a1 b1 ..., first of the lower halves of a and b and then of the upper.
inline void riffle(Words a, Words b, Words& low, Words& high) {
#if defined(__AVX512F__)
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i upper = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  low = reinterpret_cast<Words>(_mm512_permutex2var_epi32(x, lower, y));
  high = reinterpret_cast<Words>(_mm512_permutex2var_epi32(x, upper, y));
#elif defined(__AVX2__)
  const auto x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
  const __m256i even = _mm256_unpacklo_epi32(x, y), odd = _mm256_unpackhi_epi32(x, y);
  low = reinterpret_cast<Words>(_mm256_permute2x128_si256(even, odd, 0x20));
  high = reinterpret_cast<Words>(_mm256_permute2x128_si256(even, odd, 0x31));
#elif defined(__aarch64__)
  const auto x = reinterpret_cast<uint32x4_t>(a), y = reinterpret_cast<uint32x4_t>(b);
  low = reinterpret_cast<Words>(vzip1q_u32(x, y));
  high = reinterpret_cast<Words>(vzip2q_u32(x, y));
#else
  low = Words{a[0], b[0], a[1], b[1]};
  high = Words{a[2], b[2], a[3], b[3]};
#endif
}

/// Of vectors that are rows of words, the words column by column. kRows is a power of two; kLanes rows are transposed.
/// Let the bits of a row's number and then of a lane's be one number: a round of riffles moves each word to where that
/// number is rotated by one bit, so after log2(kRows) rounds the row's bits are the lowest.
template <int kRows>
inline void interleave(Words (&a)[kRows]) {
#pragma GCC unroll 4
  for (int round = 1; round < kRows; round *= 2) {
    Words b[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) riffle(a[i], a[i + kRows / 2], b[2 * i], b[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) a[i] = b[i];
  }
}

#if defined(__AVX2__)
/// Byte i of every sixteen is byte table[i] of them.
inline Words shuffle_bytes(Words v, __m128i table) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(v), _mm512_broadcast_i32x4(table)));
#else
  return reinterpret_cast<Words>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(v), _mm256_broadcastsi128_si256(table)));
#endif
}
#elif !defined(__aarch64__)
/// Of four 32-bit elements, and of every four 16-bit ones, the two in the middle change places. Compilers know these
/// forms as one instruction each.
inline Words swap_middle_words(Words v) { return Words{v[0], v[2], v[1], v[3]}; }
inline Words swap_middle_shorts(Words v) {
  auto x = reinterpret_cast<Shorts>(v);
  x = Shorts{x[0], x[2], x[1], x[3], x[4], x[5], x[6], x[7]};
  x = Shorts{x[0], x[1], x[2], x[3], x[4], x[6], x[5], x[7]};
  return reinterpret_cast<Words>(x);
}
#endif

/// Of every eight of these words, the first four interleaved with the last four: 0 4 1 5 2 6 3 7.
inline void interleave_fours(Words (&v)[16 / kLanes]) {
#if defined(__AVX512F__)
  const __m512i from = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  v[0] = reinterpret_cast<Words>(_mm512_permutexvar_epi32(from, reinterpret_cast<__m512i>(v[0])));
#elif defined(__AVX2__)
  const __m256i from = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (Words& a : v) a = reinterpret_cast<Words>(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(a), from));
#else
  for (int i = 0; i < 16 / kLanes; i += 2) riffle(v[i], v[i + 1], v[i], v[i + 1]);
#endif
}

/// The inverse: the even ones before the odd ones.
inline void separate_fours(Words (&v)[16 / kLanes]) {
#if defined(__AVX512F__)
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  v[0] = reinterpret_cast<Words>(_mm512_permutexvar_epi32(from, reinterpret_cast<__m512i>(v[0])));
#elif defined(__AVX2__)
  const __m256i from = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (Words& a : v) a = reinterpret_cast<Words>(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(a), from));
#else
  for (int i = 0; i < 16 / kLanes; i += 2) {
    const Words a = v[i], b = v[i + 1];
    v[i] = Words{a[0], a[2], b[0], b[2]};
    v[i + 1] = Words{a[1], a[3], b[1], b[3]};
  }
#endif
}

/// Of every eight 16-bit elements, the first four interleaved with the last four: 0 4 1 5 2 6 3 7.
inline Words interleave_halves(Words v) {
#if defined(__AVX2__)
  return shuffle_bytes(v, _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
#elif defined(__aarch64__)
  const auto x = reinterpret_cast<uint16x8_t>(v);
  return reinterpret_cast<Words>(vzip1q_u16(x, vextq_u16(x, x, 4)));
#else
  return swap_middle_shorts(swap_middle_words(v));
#endif
}

/// The inverse: 0 2 4 6 1 3 5 7.
inline Words separate_halves(Words v) {
#if defined(__AVX2__)
  return shuffle_bytes(v, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
#elif defined(__aarch64__)
  const auto x = reinterpret_cast<uint16x8_t>(v);
  return reinterpret_cast<Words>(vcombine_u16(vget_low_u16(vuzp1q_u16(x, x)), vget_low_u16(vuzp2q_u16(x, x))));
#else
  return swap_middle_words(swap_middle_shorts(v));
#endif
}

}  // namespace
}  // namespace awq::core
