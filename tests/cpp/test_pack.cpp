#include <algorithm>
#include <vector>

#include "catch.hpp"
#include "core/pack.h"
#include "data.h"

using namespace awq;
using namespace awq::core;
using test::Array;
using test::Random;

namespace {

struct Shape {
  std::int64_t n, k;
};

// Around the tile of 64 x 16 words that packing moves at a time, and far from it; k = 1 and 3 are what zeros have.
const std::vector<Shape> kShapes = {{8, 8},    {16, 8},    {8, 136}, {136, 8}, {64, 64}, {128, 520}, {520, 128},
                                    {136, 72}, {200, 264}, {64, 1},  {576, 3}, {1, 64},  {5, 576}};

bool fits(const Layout& layout, Shape shape) { return (layout.packed == Axis::n ? shape.n : shape.k) % 8 == 0; }

std::uint32_t nibble_at(const std::vector<std::uint32_t>& words, CodePlace place) {
  return (words[static_cast<std::size_t>(place.word)] >> (4 * place.nibble)) & 15u;
}

}  // namespace

TEST_CASE("every value at every place lands in the nibble that locate names, and nowhere else") {
  constexpr std::int64_t n = 16, k = 24;
  for (const Layout& layout : kLayouts) {
    int wrong = 0;
    for (std::int64_t row = 0; row < n; ++row)
      for (std::int64_t col = 0; col < k; ++col)
        for (std::uint8_t value = 0; value < 16; ++value) {
          std::vector<std::uint8_t> q(n * k);
          q[static_cast<std::size_t>(row * k + col)] = value;
          std::vector<std::uint32_t> expected(n * k / 8);
          const CodePlace place = locate(layout, n, k, row, col);
          expected[static_cast<std::size_t>(place.word)] = std::uint32_t{value} << (4 * place.nibble);
          wrong += test::pack(layout, q, n, k) != expected;
          std::vector<std::uint8_t> back(n * k, 255);
          unpack_rows(layout, expected.data(), n, k, back.data(), 0, word_shape(layout, n, k).rows);
          wrong += back != q;
        }
    CAPTURE(std::string(layout.name));
    CHECK(wrong == 0);
  }
}

TEST_CASE("pack follows locate for every shape, and unpack is its inverse") {
  Random random(2);
  for (const Layout& layout : kLayouts)
    for (const Shape shape : kShapes) {
      if (!fits(layout, shape)) continue;
      const auto [n, k] = shape;
      CAPTURE(std::string(layout.name), n, k);
      const auto q = random.codes(n * k);
      const auto words = test::pack(layout, q, n, k);
      int wrong = 0;
      for (std::int64_t row = 0; row < n; ++row)
        for (std::int64_t col = 0; col < k; ++col)
          wrong += nibble_at(words, locate(layout, n, k, row, col)) != q[static_cast<std::size_t>(row * k + col)];
      CHECK(wrong == 0);
      std::vector<std::uint8_t> back(q.size(), 255);
      unpack_rows(layout, words.data(), n, k, back.data(), 0, word_shape(layout, n, k).rows);
      CHECK(back == q);
    }
}

TEST_CASE("any split of the word rows gives the same words and codes") {
  Random random(3);
  for (const Layout& layout : kLayouts)
    for (const Shape shape : kShapes) {
      if (!fits(layout, shape)) continue;
      const auto [n, k] = shape;
      CAPTURE(std::string(layout.name), n, k);
      const auto q = random.codes(n * k);
      const auto whole = test::pack(layout, q, n, k);
      const std::int64_t rows = word_shape(layout, n, k).rows;
      for (const std::int64_t piece : {std::int64_t{1}, std::int64_t{7}, (rows + 1) / 2}) {
        std::vector<std::uint32_t> words(whole.size(), 0xdeadbeefu);
        std::vector<std::uint8_t> back(q.size(), 255);
        for (std::int64_t begin = 0; begin < rows; begin += piece)
          CHECK(pack_rows(layout, q.data(), n, k, words.data(), begin, std::min(begin + piece, rows)));
        for (std::int64_t begin = 0; begin < rows; begin += piece)
          unpack_rows(layout, words.data(), n, k, back.data(), begin, std::min(begin + piece, rows));
        CHECK(words == whole);
        CHECK(back == q);
      }
    }
}

TEST_CASE("a code above 15 is reported by the rows that hold it, and spoils no neighbour") {
  constexpr std::int64_t n = 16, k = 16;
  for (const Layout& layout : kLayouts) {
    const WordShape shape = word_shape(layout, n, k);
    for (std::int64_t place = 0; place < n * k; ++place) {
      std::vector<std::uint8_t> q(n * k, 3);
      q[static_cast<std::size_t>(place)] = static_cast<std::uint8_t>(5 | 16 << place % 4);
      const std::int64_t bad_row = locate(layout, n, k, place / k, place % k).word / shape.cols;
      std::vector<std::uint32_t> words(n * k / 8);
      for (std::int64_t row = 0; row < shape.rows; ++row)
        REQUIRE(pack_rows(layout, q.data(), n, k, words.data(), row, row + 1) == (row != bad_row));
      q[static_cast<std::size_t>(place)] = 5;
      REQUIRE(words == test::pack(layout, q, n, k));
    }
  }
}

TEST_CASE("dequantize is (q - z) * s, in float32, rounded once") {
  struct Case {
    std::int64_t n, k, group;
  };
  Random random(4);
  for (const Case& c : {Case{8, 4, 4}, Case{24, 96, 32}, Case{72, 128, 64}, Case{8, 130, 130}, Case{136, 65, 13}})
    for (const DType scale_type : test::kFloatTypes)
      for (const DType w_type : test::kFloatTypes)
        for (const bool with_zeros : {true, false}) {
          CAPTURE(c.n, c.k, c.group, int(scale_type), int(w_type), with_zeros);
          const std::int64_t groups = c.k / c.group;
          const auto q = random.codes(c.n * c.k), z = random.codes(c.n * groups);
          const auto qweight = test::pack(test::gemm_layout(), q, c.n, c.k);
          const auto qzeros = test::pack(test::gemm_layout(), z, c.n, groups);
          const Array scales(scale_type, groups * c.n, random, 0.001, 0.1);
          Array w(w_type, c.n * c.k), expected(w_type, c.n * c.k);
          const DequantizeArgs args{qweight.data(),
                                    with_zeros ? qzeros.data() : nullptr,
                                    scales.data(),
                                    w.data(),
                                    c.n,
                                    c.k,
                                    c.group,
                                    scale_type,
                                    w_type};
          for (std::int64_t row = 0; row < c.n; row += 8) dequantize_rows(args, row, row + 8);
          for (std::int64_t row = 0; row < c.n; ++row)
            for (std::int64_t col = 0; col < c.k; ++col) {
              const std::int64_t g = col / c.group;
              const int zero = with_zeros ? z[static_cast<std::size_t>(row * groups + g)] : 8;
              const auto scale = static_cast<float>(scales[g * c.n + row]);
              expected.set(row * c.k + col,
                           static_cast<float>(q[static_cast<std::size_t>(row * c.k + col)] - zero) * scale);
            }
          CHECK(w == expected);
          Array whole(w_type, c.n * c.k);
          DequantizeArgs all = args;
          all.w = whole.data();
          dequantize_rows(all, 0, c.n);
          CHECK(whole == expected);
        }
}
