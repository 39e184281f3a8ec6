#include <algorithm>
#include <vector>

#include "catch.hpp"
#include "core/cpu.h"
#include "core/pack.h"
#include "data.h"
#include "levels.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::for_levels;
using test::Random;

namespace {

struct Shape {
  std::int64_t n, k;
};

// Around the tile of 128 x 128 codes that conversions go through, and far from it; k = 1 and 3 are what zeros have.
const std::vector<Shape> kShapes = {{8, 8},     {16, 8},    {8, 136},   {136, 8}, {64, 64},   {128, 520},
                                    {520, 128}, {136, 72},  {200, 264}, {64, 1},  {576, 3},   {1, 64},
                                    {5, 576},   {131, 257}, {192, 192}, {4, 64},  {576, 192}, {192, 576}};

/// All of q in words; what they held before is not 0.
std::vector<std::uint8_t> pack(const Kernels& level, const Codes& codes, const std::vector<std::uint8_t>& q,
                               std::int64_t n, std::int64_t k) {
  const WordShape shape = word_shape(codes, n, k);
  std::vector<std::uint8_t> words(static_cast<std::size_t>(shape.rows * shape.cols * codes.word_bits / 8), 0xa5);
  level.pack_blocks(codes, q.data(), words.data(), n, k, 0, block_count(codes.outer, n, k));
  return words;
}

std::uint32_t nibble_at(const Codes& codes, const std::vector<std::uint8_t>& words, CodePlace place) {
  const std::int64_t nibble = place.word * codes.codes_per_word() + place.nibble;
  return (words[static_cast<std::size_t>(nibble / 2)] >> (nibble % 2 * 4)) & 15u;
}

std::vector<std::uint8_t> unpack(const Kernels& level, const Codes& codes, const std::vector<std::uint8_t>& words,
                                 std::int64_t n, std::int64_t k) {
  std::vector<std::uint8_t> q(static_cast<std::size_t>(n * k), 255);
  level.unpack_blocks(codes, words.data(), q.data(), n, k, 0, block_count(Axis::n, n, k));
  return q;
}

}  // namespace

TEST_CASE("every value at every place lands in the nibble that locate names, and nowhere else") {
  for_levels([&](const Kernels& level) {
    for (const auto& [name, codes] : test::every_codes()) {
      const std::int64_t n = std::max(8, codes.tile_n), k = std::max(16, codes.tile_k);
      int wrong = 0;
      for (std::int64_t row = 0; row < n; ++row)
        for (std::int64_t col = 0; col < k; ++col) {
          const std::uint8_t value = static_cast<std::uint8_t>(1 + (row + 5 * col) % 15);
          std::vector<std::uint8_t> q(static_cast<std::size_t>(n * k));
          q[static_cast<std::size_t>(row * k + col)] = value;
          std::vector<std::uint8_t> expected(static_cast<std::size_t>(n * k / 2));
          const CodePlace place = locate(codes, n, k, row, col);
          const std::int64_t nibble = place.word * codes.codes_per_word() + place.nibble;
          expected[static_cast<std::size_t>(nibble / 2)] = static_cast<std::uint8_t>(value << (nibble % 2 * 4));
          wrong += pack(level, codes, q, n, k) != expected;
          wrong += unpack(level, codes, expected, n, k) != q;
        }
      CAPTURE(name);
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("pack follows locate for every shape, unpack is its inverse, and padding is 0") {
  Random random(2);
  for (const auto& entry : test::every_codes())
    for (const auto& size : kShapes) {
      const Codes& codes = entry.second;
      const std::int64_t n = size.n, k = size.k;
      if (!can_hold(codes, n, k)) continue;
      CAPTURE(entry.first, n, k);
      const auto q = random.codes(n * k);
      const WordShape shape = word_shape(codes, n, k);
      const CodeShape most = code_shape(codes, shape.rows, shape.cols);
      std::vector<CodePlace> places;
      for (std::int64_t row = 0; row < most.n; ++row)
        for (std::int64_t col = 0; col < most.k; ++col) places.push_back(locate(codes, most.n, most.k, row, col));
      for_levels([&](const Kernels& level) {
        const auto words = pack(level, codes, q, n, k);
        int wrong = 0;
        for (std::int64_t row = 0; row < most.n; ++row)
          for (std::int64_t col = 0; col < most.k; ++col)
            wrong += nibble_at(codes, words, places[static_cast<std::size_t>(row * most.k + col)]) !=
                     (row < n && col < k ? q[static_cast<std::size_t>(row * k + col)] : 0u);
        CHECK(wrong == 0);
        CHECK(unpack(level, codes, words, n, k) == q);
      });
    }
}

TEST_CASE("repack is unpack and pack, whatever stands in the padding") {
  for_levels([&](const Kernels& level) {
    Random random(6);
    for (const auto& [from_name, from] : test::every_codes())
      for (const auto [n, k] : kShapes) {
        if (!can_hold(from, n, k)) continue;
        const auto q = random.codes(n * k);
        auto words = pack(level, from, q, n, k);
        const WordShape shape = word_shape(from, n, k);
        const CodeShape most = code_shape(from, shape.rows, shape.cols);
        for (std::int64_t row = 0; row < most.n; ++row)
          for (std::int64_t col = row < n ? k : 0; col < most.k; ++col) {
            const CodePlace place = locate(from, most.n, most.k, row, col);
            const std::int64_t nibble = place.word * from.codes_per_word() + place.nibble;
            words[static_cast<std::size_t>(nibble / 2)] |= static_cast<std::uint8_t>(15 << (nibble % 2 * 4));
          }
        for (const auto& [to_name, to] : test::every_codes()) {
          if (!can_hold(to, n, k)) continue;
          CAPTURE(from_name, to_name, n, k);
          const auto expected = pack(level, to, q, n, k);
          std::vector<std::uint8_t> target(expected.size(), 0xa5);
          level.repack_blocks(from, to, words.data(), target.data(), n, k, 0, block_count(to.outer, n, k));
          CHECK(target == expected);
        }
      }
  });
}

TEST_CASE("any split of the blocks gives the same words and codes, and each writes its own rows of words") {
  for_levels([&](const Kernels& level) {
    Random random(3);
    for (const auto& [name, codes] : test::every_codes())
      for (const auto [n, k] : {Shape{320, 128}, Shape{128, 320}, Shape{320, 320}}) {
        CAPTURE(name, n, k);
        const auto q = random.codes(n * k);
        const auto whole = pack(level, codes, q, n, k);
        const std::int64_t blocks = block_count(codes.outer, n, k);
        std::vector<std::uint8_t> words(whole.size(), 0xa5), moved = words, back(q.size(), 255);
        for (std::int64_t block = blocks; block-- > 0;) {
          const std::vector<std::uint8_t> before = words;
          CHECK(level.pack_blocks(codes, q.data(), words.data(), n, k, block, block + 1));
          level.repack_blocks(codes, codes, whole.data(), moved.data(), n, k, block, block + 1);
          const std::int64_t row_bytes = word_shape(codes, n, k).cols * codes.word_bits / 8;
          const int tile = codes.outer == Axis::n ? codes.tile_n : codes.tile_k;
          for (std::size_t i = 0; i < words.size(); ++i)
            if (const std::int64_t code = static_cast<std::int64_t>(i) / row_bytes * tile; code / kBlock != block)
              REQUIRE(words[i] == before[i]);
        }
        for (std::int64_t block = 0; block < block_count(Axis::n, n, k); ++block)
          level.unpack_blocks(codes, whole.data(), back.data(), n, k, block, block + 1);
        CHECK(words == whole);
        CHECK(moved == whole);
        CHECK(back == q);
      }
  });
}

TEST_CASE("a code above 15 is reported by the block that holds it, and spoils no neighbour") {
  for_levels([&](const Kernels& level) {
    constexpr std::int64_t n = 256, k = 256;
    for (const auto& [name, codes] : test::every_codes()) {
      CAPTURE(name);
      for (std::int64_t place = 0; place < n * k; place += 251) {
        std::vector<std::uint8_t> q(n * k, 3);
        q[static_cast<std::size_t>(place)] = static_cast<std::uint8_t>(5 | 16 << place % 4);
        const std::int64_t bad = (codes.outer == Axis::n ? place / k : place % k) / kBlock;
        auto words = pack(level, codes, q, n, k);
        for (std::int64_t block = 0; block < 2; ++block)
          REQUIRE(level.pack_blocks(codes, q.data(), words.data(), n, k, block, block + 1) == (block != bad));
        q[static_cast<std::size_t>(place)] = 5;
        REQUIRE(words == pack(level, codes, q, n, k));
      }
    }
  });
}

TEST_CASE("words and codes may stand at any address") {
  Random random(7);
  for_levels([&](const Kernels& level) {
    for (const auto& [name, codes] : test::every_codes())
      for (const auto [n, k] : {Shape{256, 128}, Shape{192, 192}})
        for (const std::size_t offset : {1u, 16u, 40u}) {
          CAPTURE(name, n, k, offset);
          const auto q = random.codes(n * k);
          const auto expected = pack(level, codes, q, n, k);
          std::vector<std::uint8_t> from(q.size() + offset), words(expected.size() + offset), moved = words;
          std::copy(q.begin(), q.end(), from.begin() + static_cast<std::ptrdiff_t>(offset));
          const std::int64_t blocks = block_count(codes.outer, n, k);
          CHECK(level.pack_blocks(codes, from.data() + offset, words.data() + offset, n, k, 0, blocks));
          CHECK(std::equal(expected.begin(), expected.end(), words.begin() + static_cast<std::ptrdiff_t>(offset)));
          level.repack_blocks(codes, codes, words.data() + offset, moved.data() + offset, n, k, 0, blocks);
          CHECK(moved == words);
          std::vector<std::uint8_t> back(from.size());
          level.unpack_blocks(codes, words.data() + offset, back.data() + offset, n, k, 0, block_count(Axis::n, n, k));
          CHECK(back == from);
        }
  });
}

namespace {

/// Scales [groups, n] in the order of a layout.
Array arranged(const Array& scales, Order order, std::int64_t n, std::int64_t groups) {
  Array result(scales.type(), scales.size());
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t row = 0; row < n; ++row)
      result.set(order == Order::strips      ? strip_scale(n, groups, g, row)
                 : order == Order::fragments ? fragment_scale(n, groups, g, row)
                                             : g * n + row,
                 scales[g * n + row]);
  return result;
}

}  // namespace

TEST_CASE("dequantize is (q - z) * s, in float32, rounded once") {
  struct Case {
    std::int64_t n, k, group;
  };
  Random random(4);
  for (const Case& c : {Case{8, 4, 4}, Case{24, 96, 32}, Case{72, 128, 64}, Case{8, 130, 130}, Case{136, 65, 13},
                        Case{200, 264, 24}, Case{64, 576, 16}})
    for (const DType scale_type : test::kFloatTypes)
      for (const DType w_type : test::kFloatTypes)
        for (const bool with_zeros : {true, false}) {
          const std::int64_t groups = c.k / c.group;
          const auto q = random.codes(c.n * c.k), z = random.codes(c.n * groups);
          const Array scales(scale_type, groups * c.n, random, 0.001, 0.1);
          Array expected(w_type, c.n * c.k);
          for (std::int64_t row = 0; row < c.n; ++row)
            for (std::int64_t col = 0; col < c.k; ++col) {
              const std::int64_t g = col / c.group;
              const int zero = with_zeros ? z[static_cast<std::size_t>(row * groups + g)] : 8;
              const auto scale = static_cast<float>(scales[g * c.n + row]);
              expected.set(row * c.k + col,
                           static_cast<float>(q[static_cast<std::size_t>(row * c.k + col)] - zero) * scale);
            }
          for (const std::string name : {"gemm", "strips", "fragments"}) {
            CAPTURE(c.n, c.k, c.group, int(scale_type), int(w_type), with_zeros, name);
            const Codes& codes = *find_codes(name);
            const auto qweight = test::pack(codes, q, c.n, c.k);
            const auto qzeros = test::pack(*find_codes(name + ".zeros"), z, c.n, groups);
            const Array ordered = arranged(scales, codes.order, c.n, groups);
            for_levels([&](const Kernels& level) {
              Array w(w_type, c.n * c.k), whole(w_type, c.n * c.k);
              DequantizeArgs args{qweight.data(),
                                  with_zeros ? qzeros.data() : nullptr,
                                  ordered.data(),
                                  w.data(),
                                  c.n,
                                  c.k,
                                  c.group,
                                  scale_type,
                                  w_type,
                                  codes.order};
              const auto dequantize = name == "gemm" ? level.dequantize_rows : level.dequantize_tiles;
              for (std::int64_t row = 0; row < c.n; row += args.row_block())
                dequantize(args, row, std::min(row + args.row_block(), c.n));
              CHECK(w == expected);
              args.w = whole.data();
              dequantize(args, 0, c.n);
              CHECK(whole == expected);
            });
            Array best(w_type, c.n * c.k);
            dequantize_rows({qweight.data(), with_zeros ? qzeros.data() : nullptr, ordered.data(), best.data(), c.n,
                             c.k, c.group, scale_type, w_type, codes.order},
                            0, c.n);
            CHECK(best == expected);
          }
        }
}
