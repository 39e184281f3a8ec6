// The interpreter itself: what is right runs, under every order of threads; what is wrong is named.
#include <cstring>
#include <string>
#include <vector>

#include "cpp/catch.hpp"
#include "cpp/data.h"
#include "cuda/ptx.cuh"
#include "simt/planted.h"
#include "simt/simt.h"

using namespace awq::cuda;
using namespace simt::test;

namespace {

constexpr simt::Launch kOneWarp{.threads = 32, .shared_bytes = 1024};
constexpr simt::Launch kBlock{.threads = 128, .shared_bytes = 4096};

}  // namespace

TEST_CASE("simt: threads hand values on through shared memory and a barrier") {
  simt::Buffer<std::uint32_t> y(3 * 128);
  y.global().uninitialised();
  run_seeds({.grid_x = 3, .threads = 128, .shared_bytes = 512}, [&] {
    const auto i = static_cast<std::uint32_t>(ptx::thread());
    const ptx::Shared s = ptx::dynamic_shared();
    ptx::store_shared(s + 4 * i, 7 * i);
    ptx::sync_threads();
    const auto other = ptx::load_shared<std::uint32_t>(s + 4 * (127 - i));
    ptx::store(y.data() + 128 * ptx::block_x() + i, other);
  });
  REQUIRE(y.global().all_written());
  for (std::uint32_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == 7 * (127 - i % 128));
}

TEST_CASE("simt: a missing barrier is a race") {
  const auto text = error_of(kBlock, [&] {
    const auto i = static_cast<std::uint32_t>(ptx::thread());
    const ptx::Shared s = ptx::dynamic_shared();
    ptx::store_shared(s + 4 * i, i);
    if (i >= 64) ptx::store_shared(s + 4 * (i - 64), i);
  });
  REQUIRE(contains(text, "race with a write by thread"));
}

TEST_CASE("simt: what a warp exchanges orders no memory; sync_warp does") {
  const auto body = [](bool sync) {
    const auto i = static_cast<std::uint32_t>(ptx::thread());
    const ptx::Shared s = ptx::dynamic_shared();
    ptx::store_shared(s + 4 * i, i);
    if (sync)
      ptx::sync_warp();
    else
      ptx::ballot(true);
    expect(ptx::load_shared<std::uint32_t>(s + 4 * (i ^ 1)) == (i ^ 1));
  };
  run_seeds(kOneWarp, [&] { body(true); });
  REQUIRE(contains(error_of(kOneWarp, [&] { body(false); }), "race"));
}

TEST_CASE("simt: reads must be over before the next write") {
  const auto body = [](bool sync) {
    const auto i = static_cast<std::uint32_t>(ptx::thread());
    const ptx::Shared s = ptx::dynamic_shared();
    for (std::uint32_t step = 0; step < 3; ++step) {
      ptx::store_shared(s + 4 * i, i + step);
      ptx::sync_threads();
      expect(ptx::load_shared<std::uint32_t>(s + 4 * (i ^ 64)) == (i ^ 64) + step);
      if (sync) ptx::sync_threads();
    }
  };
  run_seeds(kBlock, [&] { body(true); });
  REQUIRE(contains(error_of(kBlock, [&] { body(false); }), "race with a"));
}

TEST_CASE("simt: uninitialised shared memory") {
  const auto text = error_of(kOneWarp, [] {
    const ptx::Shared s = ptx::dynamic_shared();
    if (ptx::thread() < 31) ptx::store_shared(s + 4 * static_cast<std::uint32_t>(ptx::thread()), 1.0f);
    ptx::sync_threads();
    ptx::load_shared<Vector>(s + 112);
  });
  REQUIRE(contains(text, "uninitialised"));
}

TEST_CASE("simt: bounds and alignment") {
  simt::Buffer<std::uint16_t> x(100, "x");
  const auto one = [&](auto access) {
    return error_of(kOneWarp, [&] {
      if (ptx::thread() == 0) access();
    });
  };
  REQUIRE(contains(one([&] { ptx::load(x.data() + 100); }), "200 bytes from the start of x, which has 200"));
  REQUIRE(contains(one([&] { ptx::load_once(reinterpret_cast<const Vector*>(x.data() + 96)); }), "out of bounds"));
  REQUIRE(contains(one([&] { ptx::load(x.data() - 1); }), "2 bytes before x"));
  REQUIRE(contains(one([&] { ptx::load_once(reinterpret_cast<const Vector*>(x.data() + 4)); }), "16-byte aligned"));
  const ptx::Shared s = ptx::dynamic_shared();
  REQUIRE(contains(one([&] { ptx::store_shared(s + 1024, 1.0f); }), "out of bounds"));
  REQUIRE(contains(one([&] { ptx::store_shared(s - 4, 1.0f); }), "out of bounds"));
  REQUIRE(contains(one([&] { ptx::store_shared(s + 8, Vector{}); }), "16-byte aligned"));
  const std::vector<float> constants(4);
  const simt::Global registered(constants.data(), 16, false, "constants");
  REQUIRE(contains(one([&] { ptx::store(const_cast<float*>(constants.data()), 1.0f); }), "only to be read"));
}

TEST_CASE("simt: global memory that nobody or somebody else has written") {
  simt::Buffer<float> y(64, "y");
  y.global().uninitialised();
  REQUIRE(contains(error_of(kOneWarp, [&] { ptx::load(y.data()); }), "uninitialised"));
  REQUIRE(contains(error_of(kOneWarp, [&] { ptx::store(y.data() + ptx::thread() / 2, 1.0f); }), "race with a write"));
  REQUIRE(contains(error_of({.grid_x = 2}, [&] { ptx::store(y.data() + ptx::thread(), 1.0f); }), "race with a write"));
  REQUIRE_FALSE(y.global().all_written());
}

TEST_CASE("simt: shuffles") {
  run_seeds(kOneWarp, [] {
    const int i = ptx::thread();
    expect(ptx::shuffle(10 * i, 5) == 50);
    expect(ptx::shuffle_xor(i * 1.0, 4) == (i ^ 4));
    expect(ptx::ballot(i % 3 == 0) == 0x49249249u);
  });
  const auto text = error_of(kOneWarp, [] {
    if (ptx::thread() < 16)
      ptx::shuffle(1, 0);
    else
      ptx::shuffle_xor(1, 1);
  });
  REQUIRE(contains(text, "divergent"));
  REQUIRE(contains(error_of(kOneWarp,
                            [] {
                              if (ptx::thread() != 7) ptx::ballot(true);
                            }),
                   "divergent"));
}

TEST_CASE("simt: a barrier that not all reach") {
  const auto text = error_of(kBlock, [] {
    if (ptx::thread() >= 32) ptx::sync_some(1, 128);
    ptx::sync_some(2, 128);
  });
  REQUIRE(contains(text, "deadlock"));
  REQUIRE(contains(text, "threads 32..127: at sync_some"));
  REQUIRE(contains(error_of(kBlock,
                            [] {
                              if (ptx::thread() >= 32) ptx::sync_threads();
                            }),
                   "ended"));
}

TEST_CASE("simt: named barriers order those who meet there") {
  const auto body = [](bool arrive) {
    const auto i = static_cast<std::uint32_t>(ptx::thread());
    const ptx::Shared s = ptx::dynamic_shared();
    if (i < 64) {
      ptx::store_shared(s + 4 * i, i);
      if (arrive)
        ptx::arrive_some(1, 128);
      else
        ptx::arrive_some(2, 128);
      return;
    }
    ptx::sync_some(arrive ? 1 : 3, arrive ? 128 : 64);
    expect(ptx::load_shared<std::uint32_t>(s + 4 * (i - 64)) == i - 64);
  };
  run_seeds(kBlock, [&] { body(true); });
  bool caught = false;
  try {
    simt::run(kBlock, {}, [&] { body(false); });
  } catch (const simt::Error& error) {
    caught = contains(error.what(), "race");
  }
  REQUIRE(caught);
}

TEST_CASE("simt: named barriers count what they are told to, by whole warps") {
  REQUIRE(contains(error_of(kBlock, [] { ptx::sync_some(1, ptx::thread() < 32 ? 64 : 96); }), "counts"));
  REQUIRE(contains(error_of(kBlock, [] { ptx::sync_some(1, 160); }), "must be warps"));
  REQUIRE(contains(error_of(kBlock, [] { ptx::sync_some(16, 64); }), "there are 0 .. 15"));
  REQUIRE(contains(error_of(kBlock, [] { ptx::sync_some(1, ptx::thread() % 32 < 16 ? 64 : 96); }), "divergent"));
}

TEST_CASE("simt: a source that changes, memory that is not constant") {
  simt::Buffer<std::uint32_t> x(4, "x"), y(4, "y");
  REQUIRE(contains(error_of(kOneWarp,
                            [&] {
                              if (ptx::thread() != 0) return;
                              ptx::copy_async(ptx::dynamic_shared(), x.data(), 16);
                              ptx::copy_async_commit();
                              ptx::store(x.data() + 2, x[2] + 1);
                              ptx::copy_async_wait<0>();
                            }),
                   "was changed while the copy was under way"));
  REQUIRE(contains(error_of(kOneWarp,
                            [&] {
                              if (ptx::thread() != 0) return;
                              ptx::store(y.data(), 1u);
                              ptx::load_constant(y.data());
                            }),
                   "no kernel in flight writes"));
  REQUIRE(contains(error_of(kOneWarp, [&] { ptx::copy_async(ptx::dynamic_shared() + 8, x.data(), 16); }), "aligned"));
  REQUIRE(contains(error_of(kOneWarp, [&] { ptx::copy_async(ptx::dynamic_shared(), x.data() + 1, 0); }), "aligned"));
  REQUIRE(contains(error_of(kOneWarp,
                            [&] {
                              if (ptx::thread() == 0) ptx::copy_async(ptx::dynamic_shared(), x.data(), 16);
                            }),
                   "ends before it has waited"));
  REQUIRE_THROWS_AS(simt::Global(x.data() + 1, 4, true), simt::Error);
}

TEST_CASE("simt: asynchronous copies") {
  simt::Buffer<std::uint32_t> x(4 * 32 + 3, "x");
  for (std::uint32_t i = 0; i < x.size(); ++i) x[i] = i + 1;
  const auto body = [&](bool wait, bool sync, int bytes) {
    const auto i = static_cast<std::uint32_t>(ptx::thread());
    const ptx::Shared s = ptx::dynamic_shared();
    ptx::copy_async(s + 16 * i, x.data() + 4 * i, bytes);
    ptx::copy_async_commit();
    ptx::copy_async(s + 512 + 16 * i, x.data(), 0);
    ptx::copy_async_commit();
    if (wait) ptx::copy_async_wait<1>();
    if (sync) ptx::sync_threads();
    const auto got = ptx::load_shared<Vector>(s + 16 * (i ^ 1));
    for (std::uint32_t j = 0; j < 4; ++j)
      expect(got.word[j] == (static_cast<int>(j) * 4 < bytes ? 4 * (i ^ 1) + j + 1 : 0));
    ptx::copy_async_wait<0>();
  };
  run_seeds(kOneWarp, [&] { body(true, true, 16); });
  run_seeds(kOneWarp, [&] { body(true, true, 8); });
  REQUIRE(contains(error_of(kOneWarp, [&] { body(false, true, 16); }), "has not been waited for"));
  REQUIRE(contains(error_of(kOneWarp, [&] { body(true, false, 16); }), "shared byte"));
  REQUIRE(contains(error_of({.threads = 64, .shared_bytes = 2048}, [&] { body(true, true, 16); }), "out of bounds"));
}

TEST_CASE("simt: matrices of halves, and their product") {
  awq::test::Random random(5);
  for (const bool half : {true, false}) {
    const auto type = half ? awq::core::DType::f16 : awq::core::DType::bf16;
    const awq::test::Array a(type, 16 * 16, random, -2.0, 2.0), b(type, 8 * 16, random, -2.0, 2.0);
    simt::Buffer<std::uint32_t> words_a(128), words_b(64);
    std::memcpy(words_a.data(), a.data(), 512);
    std::memcpy(words_b.data(), b.data(), 256);
    simt::Buffer<float> y(16 * 8);
    run_seeds(kOneWarp, [&] {
      const int lane = ptx::thread(), r = lane / 4, t = lane % 4;
      const ptx::Shared s = ptx::dynamic_shared();
      for (int i = lane; i < 128; i += 32)
        ptx::store_shared(s + 4 * static_cast<std::uint32_t>(i), ptx::load(words_a.data() + i));
      for (int i = lane; i < 64; i += 32)
        ptx::store_shared(s + 512 + 4 * static_cast<std::uint32_t>(i), ptx::load(words_b.data() + i));
      ptx::sync_warp();
      std::uint32_t fragment_a[4], fragment_b[2];
      ptx::load_matrices(fragment_a, s + static_cast<std::uint32_t>(lane % 16 * 32 + lane / 16 * 16));
      ptx::load_matrices(fragment_b, s + 512 + static_cast<std::uint32_t>(lane % 8 * 32 + lane / 8 % 2 * 16));
      float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (half)
        ptx::mma<awq::core::DType::f16>(d, fragment_a, fragment_b);
      else
        ptx::mma<awq::core::DType::bf16>(d, fragment_a, fragment_b);
      for (int i = 0; i < 4; ++i) ptx::store(y.data() + (r + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
    });
    for (int row = 0; row < 16; ++row)
      for (int col = 0; col < 8; ++col) {
        float sum = 1.0f;
        for (int k = 0; k < 16; ++k) sum += static_cast<float>(a[row * 16 + k]) * static_cast<float>(b[col * 16 + k]);
        REQUIRE(y[static_cast<std::size_t>(row * 8 + col)] == sum);
      }
  }
}

TEST_CASE("simt: the matrix units take every 16-bit float as it is") {
  for (const auto type : {awq::core::DType::f16, awq::core::DType::bf16})
    for (std::uint32_t bits = 0; bits < 0x10000; bits += 16) {
      std::uint16_t a[16][16] = {}, b[8][16] = {};
      for (int i = 0; i < 16; ++i) a[i][0] = static_cast<std::uint16_t>(bits + static_cast<std::uint32_t>(i));
      for (auto& column : b) column[0] = type == awq::core::DType::f16 ? 0x3c00 : 0x3f80;
      float d[16][8] = {};
      simt::multiply(type, 16, 8, &d[0][0], &a[0][0], &b[0][0]);
      for (int i = 0; i < 16; ++i) {
        const float expected = awq::core::load_as<float>(&a[i][0], type, 0);
        if (expected == expected) REQUIRE((d[i][3] == expected || expected - expected != 0.0f));
        if (!(expected - expected == 0.0f)) REQUIRE_FALSE(d[i][3] - d[i][3] == 0.0f);
      }
    }
}

TEST_CASE("simt: pairs are rounded once") {
  using awq::core::DType;
  for (std::uint32_t a = 0; a < 0x10000; a += 7)
    for (std::uint32_t b : {0x0001u, 0x3c01u, 0x6400u, 0x641fu, 0xfbffu, 0x8000u, 0x7bffu, 0x83ffu}) {
      const double x = awq::core::half_to_float(static_cast<std::uint16_t>(a));
      const double y = awq::core::half_to_float(static_cast<std::uint16_t>(b));
      if (x - x != 0.0) continue;
      const auto product = static_cast<std::uint16_t>(ptx::mul_pair<DType::f16>(a | b << 16, b | a << 16));
      REQUIRE(product == awq::core::float_to_half(static_cast<float>(x * y)));  // a float holds the product exactly
      // a - b is exact in float unless the exponents are far apart, and then rounding to odd decides
      const auto difference = static_cast<std::uint16_t>(ptx::sub_pair<DType::f16>(a, b));
      REQUIRE(difference == awq::core::float_to_half(static_cast<float>(x - y)));
    }
  REQUIRE(ptx::sub_pair<DType::bf16>(0x43084300, 0x43004308) == 0x4100c100);  // 136 - 128 = 8, 128 - 136 = -8
  REQUIRE(ptx::round_pair<DType::f16>(1.0f, 2.0f) == 0x40003c00);
}
