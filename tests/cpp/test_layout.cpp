#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "catch.hpp"
#include "core/layout.h"
#include "data.h"

using namespace awq::core;
using awq::test::every_codes;

namespace {

const Codes& codes_of(std::string_view name) { return *find_codes(name); }

bool same(WordShape shape, std::int64_t rows, std::int64_t cols) { return shape.rows == rows && shape.cols == cols; }

bool lies(std::string_view name, std::int64_t n, std::int64_t k, std::int64_t row, std::int64_t col, std::int64_t word,
          int nibble) {
  const CodePlace place = locate(codes_of(name), n, k, row, col);
  return place.word == word && place.nibble == nibble;
}

}  // namespace

TEST_CASE("shapes and single places are those of each format's own packing code") {
  CHECK((find_layout("") == nullptr && find_layout("GEMM") == nullptr && find_layout("gemm.zeros") == nullptr));
  CHECK((find_codes("marlin.zeros") == nullptr && find_codes("gemv_fast.zeros") == nullptr));
  CHECK((find_codes(".zeros") == nullptr && find_codes("gemm.zeros.zeros") == nullptr));
  CHECK((same(word_shape(codes_of("gemm"), 64, 24), 24, 8)));                   // [k, n/8]
  CHECK((same(word_shape(codes_of("gemv"), 64, 24), 64, 3)));                   // [n, k/8]
  CHECK((same(word_shape(codes_of("gptq"), 64, 24), 3, 64)));                   // [k/8, n]
  CHECK((same(word_shape(codes_of("gemv_fast"), 64, 128), 16, 128)));           // [n/4, k]
  CHECK((same(word_shape(codes_of("marlin"), 128, 48), 3, 256)));               // [k/16, 2n]
  CHECK((same(word_shape(codes_of("compressed-tensors"), 5, 9), 5, 2)));        // [n, ceil(k/8)]
  CHECK((same(word_shape(codes_of("compressed-tensors.zeros"), 9, 5), 2, 5)));  // [ceil(n/8), groups]
  CHECK((same(word_shape(codes_of("gptq.zeros"), 64, 3), 3, 8)));               // [groups, n/8]
  CHECK((inverse(kAwqOrder) == std::array<std::uint8_t, 8>{0, 4, 1, 5, 2, 6, 3, 7}));
  CHECK((!can_hold(codes_of("gemm"), 12, 8) && can_hold(codes_of("gemm"), 8, 3)));
  CHECK((!can_hold(codes_of("gemv_fast"), 4, 32) && can_hold(codes_of("compressed-tensors"), 3, 3)));

  // Single codes, by each format's own packing code.
  CHECK((lies("gemm", 16, 2, 9, 1, 3, 4)));       // AutoAWQ gemm.py: word [k, n/8], order 0 2 4 6 1 3 5 7
  CHECK((lies("gemv", 16, 16, 9, 10, 19, 2)));    // AutoAWQ gemv.py: word [n, k/8]
  CHECK((lies("gptq", 16, 16, 9, 10, 25, 2)));    // AutoGPTQ: word [k/8, n]
  CHECK((lies("gemv_fast", 4, 64, 0, 8, 0, 1)));  // llm-awq qmodule.py: a word is k, k + 8, k + 16, k + 24
  CHECK((lies("gemv_fast", 8, 128, 6, 64 + 32 + 3, 128 + 64 + 2 * 16 + 8 + 3, 0)));
  CHECK((lies("marlin", 64, 16, 0, 8, 0, 1) && lies("marlin", 64, 16, 8, 0, 0, 2)));  // mma fragments
  CHECK((lies("marlin", 64, 16, 0, 1, 0, 4) && lies("marlin", 64, 16, 1, 2, 17 * 1 + 3, 0)));

  CHECK((same(word_shape(codes_of("strips"), 40, 20), 2, 3 * 32)));      // [ceil(n/32), ceil(k/8) 32]
  CHECK((same(word_shape(codes_of("strips.zeros"), 40, 5), 2, 5 * 4)));  // [ceil(n/32), 4 groups]
  CHECK((lies("strips", 64, 16, 0, 1, 0, 2) && lies("strips", 64, 16, 0, 4, 0, 1)));
  CHECK((lies("strips", 64, 16, 33, 8 + 6, 96 + 1, 5) && lies("strips", 64, 16, 31, 7, 31, 7)));
  CHECK((lies("strips.zeros", 64, 3, 32 + 17, 2, 12 + 8, 3) && lies("strips.zeros", 64, 3, 15, 1, 4 + 3, 6)));

  CHECK((same(word_shape(codes_of("fragments"), 72, 80), 2, 2 * 512)));     // [ceil(n/64), 512 ceil(k/64)]
  CHECK((same(word_shape(codes_of("fragments.zeros"), 72, 5), 2, 5 * 8)));  // [ceil(n/64), 8 groups]
  // Strip 1, lane 4 * 3 + 2, k 16..31: by the PTX ISA, register a1 of the lane is row 8 + 3, columns 2 * 2 and one
  // more.
  CHECK((lies("fragments", 128, 128, 16 + 11, 16 + 4, 128 + 14 * 4 + 1, 1)));
  CHECK((lies("fragments", 128, 128, 16 + 11, 16 + 5, 128 + 14 * 4 + 1, 5)));
  CHECK((lies("fragments", 128, 128, 64 + 48, 64 + 8, 3 * 512 + 3 * 128, 2)));  // a2: columns 8 on
  CHECK((lies("fragments", 128, 128, 64 + 56, 63, 2 * 512 + 3 * 128 + 3 * 4 + 3, 7)));
  CHECK((lies("fragments.zeros", 128, 3, 64 + 16 + 3, 2, 24 + 16 + 2, 6)));
  CHECK((lies("fragments.zeros", 128, 3, 64 + 16 + 11, 2, 24 + 16 + 2, 7)));

  CHECK((padded_groups(32, 128) == 32 && padded_groups(64, 64) == 64 && padded_groups(1, 128) == 8));
  CHECK((padded_groups(9, 64) == 16 && padded_groups(9, 32) == 32 && padded_groups(8, 16) == 0));
  CHECK((marlin_scale(1, false) == 8 && marlin_scale(64 + 8, false) == 64 + 1));
  CHECK((marlin_scale(2, true) == 8 && marlin_scale(32 + 9, true) == 32 + 3));
}

TEST_CASE("every code has a place of its own, and code_shape is the inverse of word_shape") {
  for (const auto& [name, codes] : every_codes())
    for (const auto& [n, k] :
         std::vector<std::pair<std::int64_t, std::int64_t>>{{8, 8}, {16, 40}, {72, 24}, {24, 64}, {128, 128}, {5, 9}}) {
      if (!can_hold(codes, n, k)) continue;
      const WordShape shape = word_shape(codes, n, k);
      CAPTURE(name, n, k);
      const CodeShape most = code_shape(codes, shape.rows, shape.cols);
      CHECK((most.n == ceil_div(n, codes.tile_n) * codes.tile_n && most.k == ceil_div(k, codes.tile_k) * codes.tile_k));
      std::set<std::int64_t> seen;
      for (std::int64_t row = 0; row < n; ++row)
        for (std::int64_t col = 0; col < k; ++col) {
          const CodePlace place = locate(codes, n, k, row, col);
          REQUIRE((place.word >= 0 && place.word < shape.rows * shape.cols));
          REQUIRE((place.nibble >= 0 && place.nibble < codes.codes_per_word()));
          REQUIRE(seen.insert(place.word * codes.codes_per_word() + place.nibble).second);
        }
      if (codes.tile_words() > 1) {
        const CodeShape none = code_shape(codes, shape.rows, shape.cols + 1);
        CHECK((none.n == -1 && none.k == -1));
      }
    }
}

TEST_CASE("the table is well formed") {
  for (const Layout& layout : kLayouts) {
    CAPTURE(std::string(layout.name));
    CHECK(find_layout(layout.name) == &layout);
    CHECK(!layout.source.empty());
    CHECK((layout.in_files() || layout.name == "strips" || layout.name == "fragments"));
    CHECK(layout.scales_name.empty() == !layout.in_files());
    CHECK(layout.zeros_name.empty() == (layout.zeros == Zeros::none || !layout.in_files()));
  }
  for (const auto& [name, codes] : every_codes()) {
    CAPTURE(name);
    CHECK(codes.tile_codes() % codes.codes_per_word() == 0);
    CHECK((64 % codes.tile_n == 0 && 64 % codes.tile_k == 0));  // CUDA's conversions work on squares of 64
  }
}

TEST_CASE("marlin's scales are a permutation of the channels") {
  for (const bool one_group : {false, true}) {
    std::set<std::int64_t> seen;
    for (std::int64_t column = 0; column < 192; ++column) seen.insert(marlin_scale(column, one_group));
    CHECK((seen.size() == 192 && *seen.begin() == 0 && *seen.rbegin() == 191));
  }
}

TEST_CASE("scales of strips have a place of their own each, and those of a strip lie together") {
  for (const std::int64_t n : {8, 32, 40, 72, 96})
    for (const std::int64_t groups : {1, 3}) {
      std::set<std::int64_t> seen;
      for (std::int64_t column = 0; column < n; ++column)
        for (std::int64_t g = 0; g < groups; ++g) {
          const std::int64_t first = column / 32 * 32, place = strip_scale(n, groups, g, column);
          CHECK((place >= first * groups && place < std::min(first + 32, n) * groups));
          CHECK((column == first || place == strip_scale(n, groups, g, column - 1) + 1));
          seen.insert(place);
        }
      CHECK((seen.size() == static_cast<std::size_t>(n * groups) && *seen.rbegin() == n * groups - 1));
    }
}

TEST_CASE("the nibbles of a word of fragments are the registers of a lane: q_i = word >> 4 i & 0x000f000f") {
  const Codes& codes = codes_of("fragments");
  for (int word = 0; word < 512; ++word)
    for (int i = 0; i < 4; ++i)
      for (int high = 0; high < 2; ++high) {
        // PTX ISA, mma.m16n8k16: row lane / 4 for a0 and a2, + 8 for a1 and a3; column 2 (lane % 4) + the half, + 8 for
        // a2 and a3.
        const int lane = word / 4 % 32;
        const CodeShape code = code_in_tile(codes, 8 * word + i + 4 * high);
        CHECK(code.n == word / 128 * 16 + lane / 4 + (i == 1 || i == 3 ? 8 : 0));
        CHECK(code.k == word % 4 * 16 + lane % 4 * 2 + high + (i >= 2 ? 8 : 0));
      }
}

TEST_CASE(
    "scales of fragments have a place of their own each, those of a lane are neighbours, those of a panel together") {
  for (const std::int64_t n : {8, 16, 24, 64, 72, 120, 136})
    for (const std::int64_t groups : {1, 3}) {
      std::set<std::int64_t> seen;
      for (std::int64_t column = 0; column < n; ++column)
        for (std::int64_t g = 0; g < groups; ++g) {
          const std::int64_t first = column / 64 * 64, columns = std::min<std::int64_t>(64, n - first);
          const std::int64_t place = fragment_scale(n, groups, g, column);
          CHECK((place >= first * groups + g * columns && place < first * groups + (g + 1) * columns));
          if (column % 16 < 8 && column + 8 < n) {
            CHECK(place % 2 == 0);
            CHECK(fragment_scale(n, groups, g, column + 8) == place + 1);
          } else if (column % 16 < 8 && column % 8 != 0) {
            CHECK(place == fragment_scale(n, groups, g, column - 1) + 1);
          }
          seen.insert(place);
        }
      CHECK((seen.size() == static_cast<std::size_t>(n * groups) && *seen.rbegin() == n * groups - 1));
    }
}
