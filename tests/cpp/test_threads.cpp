// Kernels called by several threads at once, each for its own part of the work: the bytes are those of one thread.
// Under ThreadSanitizer (AWQ_SANITIZE=thread) this is where a write outside one's part shows.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/kernels.h"
#include "core/plan.h"
#include "core/shares.h"
#include "data.h"
#include "levels.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::for_levels;
using test::Random;

namespace {

constexpr std::int64_t kThreads = 4;

/// f(begin, end) for `threads` parts of [0, count), each in a thread of its own.
template <class F>
void in_threads(std::int64_t threads, std::int64_t count, F f) {
  std::vector<std::thread> running;
  for (std::int64_t t = 0; t < threads; ++t)
    if (const std::int64_t begin = count * t / threads, end = count * (t + 1) / threads; begin < end)
      running.emplace_back([=] { f(begin, end); });
  for (std::thread& thread : running) thread.join();
}

constexpr std::int64_t kColumns = 296, kDepth = 256, kGroup = 128, kGroups = kDepth / kGroup, kStride = kDepth + 3;

/// A linear call on random data; scales stand in the order of either layout, since they are random.
struct Problem {
  Problem(const char* layout, std::int64_t rows, DType type, Random& random)
      : m(rows),
        x(type, rows * kStride, random, -1.0, 1.0),
        scales(DType::f16, kColumns * kGroups, random, 0.001, 0.05),
        bias(type, kColumns, random, -1.0, 1.0),
        words(test::pack(*find_codes(layout), random.codes(kColumns * kDepth), kColumns, kDepth)),
        zeros(test::pack(*find_codes(std::string(layout) + ".zeros"), random.codes(kColumns * kGroups), kColumns,
                         kGroups)),
        strips(std::string(layout) == "strips") {}

  LinearArgs args(Array& y) const {
    return {x.data(), words.data(), scales.data(), zeros.data(), bias.data(), y.data(),    m,     kColumns,
            kDepth,   kGroup,       kStride,       x.type(),     DType::f16,  bias.type(), strips};
  }

  std::int64_t m;
  Array x, scales, bias;
  std::vector<std::uint32_t> words, zeros;
  bool strips;
};

Array run_strips(const Problem& p, const Kernels& kernels, int digits, std::int64_t threads) {
  Array y(p.x.type(), p.m * kColumns);
  const LinearArgs args = p.args(y);
  StripsWork work{};
  work.args = &args, work.digits = digits, work.rows = p.m;
  work.tile_rows = even_rows(p.m, kernels.strips_rows[digits - 1]);
  std::vector<std::uint32_t> x(static_cast<std::size_t>(work.tiles() * work.words(kDepth)));
  std::vector<float> parameters(static_cast<std::size_t>(work.tiles() * work.floats(Segments(kDepth, kGroup).count)));
  work.x = x.data(), work.parameters = parameters.data();
  in_threads(threads, work.tiles(), [&](auto begin, auto end) { kernels.strips_prepare(work, begin, end); });
  Shares shares(ceil_div(kColumns, kStripColumns), threads);
  in_threads(threads, threads, [&](auto thread, auto) {
    shares.work(thread, [&](auto begin, auto end) { kernels.strips_multiply(work, begin, end); });
  });
  return y;
}

Array run_linear(const Problem& p, const Kernels& kernels, bool decode, std::int64_t threads) {
  Array y(p.x.type(), p.m * kColumns);
  const LinearArgs args = p.args(y);
  const std::int64_t strips = ceil_div(kColumns, kernels.strip);
  std::vector<float> x(static_cast<std::size_t>(p.m * kDepth)), sums(static_cast<std::size_t>(p.m * kGroups)),
      acc(static_cast<std::size_t>(strips * p.m * kernels.strip), std::numeric_limits<float>::quiet_NaN());
  in_threads(threads, p.m, [&](auto begin, auto end) {
    for (std::int64_t row = begin; row < end; ++row)
      kernels.prepare_row(args, row, x.data() + row * kDepth, sums.data() + row * kGroups);
  });
  const LinearWork work{&args, x.data(), sums.data(), acc.data()};
  in_threads(threads, strips,
             [&](auto begin, auto end) { (decode ? kernels.linear_decode : kernels.linear_gemm)(work, begin, end); });
  return y;
}

}  // namespace

TEST_CASE("threads: shares give out every item once, by however many threads") {
  for (const std::int64_t count : {0, 1, 2, 17, 64, 1000})
    for (const std::int64_t threads : {1, 2, 3, 8, 63, 64, 65, 200}) {
      CAPTURE(count, threads);
      std::vector<int> taken(static_cast<std::size_t>(count));
      std::atomic<bool> within{true};  // Catch2's own assertions are for one thread
      const auto take = [&](std::int64_t begin, std::int64_t end) {
        if (begin < 0 || begin >= end || end > count) within = false;
        for (std::int64_t i = begin; i < end && within; ++i) ++taken[static_cast<std::size_t>(i)];
      };
      Shares together(count, threads), alone(count, threads);
      in_threads(threads, threads, [&](auto thread, auto) { together.work(thread, take); });
      CHECK(std::count(taken.begin(), taken.end(), 1) == count);
      for (std::int64_t thread = threads; thread-- > 0;) alone.work(thread, take);
      CHECK(std::count(taken.begin(), taken.end(), 2) == count);
      CHECK(within);
    }
}

TEST_CASE("threads: who is held up is helped") {
  constexpr std::int64_t kCount = 100;
  std::atomic<std::int64_t> left{kCount}, left_before{0};
  Shares shares(kCount, 2);
  in_threads(2, 2, [&](auto thread, auto) {
    shares.work(thread, [&](std::int64_t begin, std::int64_t end) {
      const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      // The first thread's first piece lasts until the second has done all the rest.
      while (begin == 0 && left > end - begin && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
      if (begin == 0) left_before = left - (end - begin);
      left -= end - begin;
    });
  });
  CHECK(left_before == 0);
  CHECK(left == 0);
}

TEST_CASE("threads: layout strips") {
  Random random(60);
  for (const std::int64_t m : {1, 3, 37})
    for (const DType type : test::kFloatTypes) {
      const Problem p("strips", m, type, random);
      CAPTURE(m, int(type));
      for (const int digits : {1, 2, 3})
        for_levels([&](const Kernels& kernels) {
          CHECK(run_strips(p, kernels, digits, kThreads) == run_strips(p, kernels, digits, 1));
        });
    }
}

TEST_CASE("threads: decode and gemm") {
  Random random(61);
  for (const std::int64_t m : {1, 3, 37})
    for (const DType type : test::kFloatTypes) {
      const Problem p("gemm", m, type, random);
      CAPTURE(m, int(type));
      for (const bool decode : {true, false})
        for_levels([&](const Kernels& kernels) {
          CHECK(run_linear(p, kernels, decode, kThreads) == run_linear(p, kernels, decode, 1));
        });
    }
}

TEST_CASE("threads: dequantize, and words of one layout into those of another") {
  Random random(62);
  const Problem gemm("gemm", 1, DType::f32, random), strips("strips", 1, DType::f32, random);
  const auto dequantized = [&](const Problem& p, const Kernels& kernels, std::int64_t threads) {
    Array w(DType::f16, kColumns * kDepth);
    const DequantizeArgs args{
        p.words.data(), p.zeros.data(), p.scales.data(), w.data(),   kColumns,
        kDepth,         kGroup,         DType::f16,      DType::f16, p.strips ? Order::strips : Order::awq};
    const std::int64_t block = args.row_block();
    in_threads(threads, ceil_div(kColumns, block), [&](auto begin, auto end) {
      (p.strips ? kernels.dequantize_tiles : kernels.dequantize_rows)(args, begin * block,
                                                                      std::min(end * block, kColumns));
    });
    return w;
  };
  const auto repacked = [&](const Codes& from, const Codes& to, const std::vector<std::uint32_t>& words,
                            const Kernels& kernels, std::int64_t threads) {
    const WordShape shape = word_shape(to, kColumns, kDepth);
    std::vector<std::uint32_t> result(static_cast<std::size_t>(shape.rows * shape.cols));
    in_threads(threads, block_count(to.outer, kColumns, kDepth), [&](auto begin, auto end) {
      kernels.repack_blocks(from, to, words.data(), result.data(), kColumns, kDepth, begin, end);
    });
    return result;
  };
  const Codes &a = *find_codes("gemm"), &b = *find_codes("strips");
  for_levels([&](const Kernels& kernels) {
    for (const Problem* p : {&gemm, &strips}) CHECK(dequantized(*p, kernels, kThreads) == dequantized(*p, kernels, 1));
    CHECK(repacked(a, b, gemm.words, kernels, kThreads) == repacked(a, b, gemm.words, kernels, 1));
    CHECK(repacked(b, a, strips.words, kernels, kThreads) == repacked(b, a, strips.words, kernels, 1));
  });
}
