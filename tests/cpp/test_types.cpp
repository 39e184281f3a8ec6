#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "catch.hpp"
#include "core/cpu.h"
#include "core/types.h"
#include "data.h"

using namespace awq;
using core::bfloat_to_float;
using core::float_to_bfloat;
using core::float_to_half;
using core::half_to_float;

static_assert(half_to_float(0x3c00) == 1.0f && half_to_float(0xc000) == -2.0f);
static_assert(half_to_float(0x0001) == 0x1p-24f && half_to_float(0x03ff) == 0x1p-14f - 0x1p-24f);
static_assert(float_to_half(65504.0f) == 0x7bff && float_to_half(1.0f) == 0x3c00);
static_assert(bfloat_to_float(0x3f80) == 1.0f && float_to_bfloat(1.0f) == 0x3f80);
static_assert(core::size_of(core::DType::f16) == 2 && core::size_of(core::DType::f64) == 8);

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

/// binary16 by its definition: sign, five exponent bits with bias 15, ten fraction bits.
double half_by_definition(std::uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                           : exponent == 31 ? (fraction ? std::nan("") : HUGE_VAL)
                                            : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

/// Checks nearest-ties-to-even between every two neighbours 0 <= a, a + 1 <= last of a 16-bit format: the middle goes
/// to the even one, one float below it to a, one float above it to a + 1. Rounding is monotonic in between.
template <class ToFloat, class FromFloat>
int count_wrong_roundings(std::uint16_t last, ToFloat to_float, FromFloat from_float) {
  int wrong = 0;
  for (std::uint16_t a = 0; a < last; ++a)
    for (const std::uint16_t sign : {0, 0x8000}) {
      const auto b = static_cast<std::uint16_t>(a + 1);
      const float middle = to_float(a) + (to_float(b) - to_float(a)) / 2;
      const auto round = [&](float x) { return from_float(sign ? -x : x); };
      wrong += round(middle) != (sign | (a % 2 ? b : a));
      wrong += round(std::nextafter(middle, 0.0f)) != (sign | a);
      wrong += round(std::nextafter(middle, kInfinity)) != (sign | b);
    }
  return wrong;
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) std::uint16_t hardware_half(float x) {
  return static_cast<std::uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
}
__attribute__((target("f16c"))) float hardware_float(std::uint16_t h) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}
#endif

}  // namespace

TEST_CASE("every half converts to float as binary16 defines, and back to itself") {
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const auto h = static_cast<std::uint16_t>(i);
    const double expected = half_by_definition(h);
    const float value = half_to_float(h);
    if (std::isnan(expected))
      wrong += !std::isnan(value) || !std::isnan(half_to_float(float_to_half(value)));
    else
      wrong += value != expected || std::signbit(value) != std::signbit(expected) || float_to_half(value) != h;
  }
  CHECK(wrong == 0);
}

TEST_CASE("every bfloat16 converts to float as its upper half, and back to itself") {
  int wrong = 0;
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const float value = bfloat_to_float(static_cast<std::uint16_t>(i));
    wrong += bits_of(value) != i << 16;
    wrong += std::isnan(value) ? !std::isnan(bfloat_to_float(float_to_bfloat(value))) : float_to_bfloat(value) != i;
  }
  CHECK(wrong == 0);
}

TEST_CASE("float to half and bfloat16 rounds to nearest, ties to even, between all neighbours") {
  CHECK(count_wrong_roundings(0x7bff, half_to_float, float_to_half) == 0);
  CHECK(count_wrong_roundings(0x7f7f, bfloat_to_float, float_to_bfloat) == 0);
}

TEST_CASE("float to half at the ends of its range") {
  CHECK(float_to_half(65519.0f) == 0x7bff);
  CHECK(float_to_half(std::nextafter(65520.0f, 0.0f)) == 0x7bff);
  CHECK(float_to_half(65520.0f) == 0x7c00);
  CHECK(float_to_half(-65520.0f) == 0xfc00);
  CHECK(float_to_half(std::numeric_limits<float>::max()) == 0x7c00);
  CHECK(float_to_half(kInfinity) == 0x7c00);
  CHECK(float_to_half(-kInfinity) == 0xfc00);
  CHECK(float_to_half(0x1p-25f) == 0x0000);  // the middle between zero and the smallest subnormal
  CHECK(float_to_half(std::nextafter(0x1p-25f, 1.0f)) == 0x0001);
  CHECK(float_to_half(0x1p-149f) == 0x0000);
  CHECK(float_to_half(-0.0f) == 0x8000);
  for (const std::uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu, 0x7f802000u}) {
    CHECK(std::isnan(half_to_float(float_to_half(std::bit_cast<float>(nan)))));
    CHECK(std::signbit(half_to_float(float_to_half(std::bit_cast<float>(nan)))) == (nan >> 31 != 0));
  }
}

TEST_CASE("float to bfloat16 at the ends of its range") {
  CHECK(float_to_bfloat(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(float_to_bfloat(std::bit_cast<float>(0x7f7f7fffu)) == 0x7f7f);
  CHECK(float_to_bfloat(-kInfinity) == 0xff80);
  CHECK(float_to_bfloat(0x1p-149f) == 0x0000);
  CHECK(float_to_bfloat(-0.0f) == 0x8000);
  for (const std::uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu})
    CHECK(std::isnan(bfloat_to_float(float_to_bfloat(std::bit_cast<float>(nan)))));
}

#if defined(__x86_64__)
TEST_CASE("half conversions equal the CPU's own (F16C)") {
  if (!core::cpu_features().avx2) return;  // which F16C is counted with
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const auto h = static_cast<std::uint16_t>(i);
    const float mine = half_to_float(h), theirs = hardware_float(h);
    wrong += std::isnan(theirs) ? !std::isnan(mine) : bits_of(mine) != bits_of(theirs);
  }
  test::Random random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    std::uint32_t bits = random.bits();
    // Half of the samples within binary16's exponents (and two beyond at each end), where all the cases are.
    if (i % 2) bits = (bits & 0x807fffffu) | (100 + (bits >> 9) % 46) << 23;
    const float x = std::bit_cast<float>(bits);
    const std::uint16_t mine = float_to_half(x), theirs = hardware_half(x);
    wrong += std::isnan(x) ? !std::isnan(half_to_float(mine)) : mine != theirs;
  }
  CHECK(wrong == 0);
}
#endif

TEST_CASE("load_as and store_as follow the element type") {
  for (const core::DType type : {core::DType::f64, core::DType::f32, core::DType::f16, core::DType::bf16}) {
    test::Array array(type, 3);
    array.set(0, 1.0);
    array.set(1, -0.15625);
    array.set(2, 1.0 / 3.0);
    CHECK(array[0] == 1.0);
    CHECK(array[1] == -0.15625);
    CHECK(std::fabs(array[2] - 1.0 / 3.0) <= test::unit_roundoff(type) / 3.0);
    CHECK(core::load_as<float>(array.data(), type, 2) == static_cast<float>(array[2]));
  }
}
