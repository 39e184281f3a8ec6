#include <cstdint>
#include <vector>

#include "catch.hpp"
#include "core/layout.h"

using namespace awq::core;

namespace {

constexpr const Layout& gemm = *find_layout("gemm");
constexpr const Layout& gemv = *find_layout("gemv");
constexpr const Layout& gptq = *find_layout("gptq");

constexpr bool same(WordShape shape, std::int64_t rows, std::int64_t cols) {
  return shape.rows == rows && shape.cols == cols;
}

static_assert(find_layout("marlin") == nullptr && find_layout("") == nullptr && find_layout("GEMM") == nullptr);
static_assert(same(word_shape(gemm, 64, 24), 24, 8));  // [k, n/8]
static_assert(same(word_shape(gemv, 64, 24), 64, 3));  // [n, k/8]
static_assert(same(word_shape(gptq, 64, 24), 3, 64));  // [k/8, n]
static_assert(inverse(kNaturalOrder) == kNaturalOrder);
static_assert(inverse(kAwqOrder) == std::array<std::uint8_t, 8>{0, 4, 1, 5, 2, 6, 3, 7});
static_assert(locate(gemm, 16, 2, 9, 1).word == 3 && locate(gemm, 16, 2, 9, 1).nibble == 4);

/// The index of the word's code (out-feature, in-feature) that nibble i of word (r, c) holds, as each format's own
/// packing code puts it.
CodeShape code_in_word(std::string_view layout, std::int64_t r, std::int64_t c, int i) {
  constexpr int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  if (layout == "gemm") return {8 * c + awq_order[i], r};  // AutoAWQ gemm.py: rows are in_features
  if (layout == "gemv") return {r, 8 * c + i};             // AutoAWQ gemv.py: rows are out_features
  return {c, 8 * r + i};                                   // AutoGPTQ: columns are out_features
}

}  // namespace

TEST_CASE("locate agrees with every format's own formula, and code_shape with word_shape") {
  for (const Layout& layout : kLayouts)
    for (const auto& [n, k] :
         std::vector<std::pair<std::int64_t, std::int64_t>>{{8, 8}, {16, 40}, {72, 24}, {24, 64}}) {
      const WordShape shape = word_shape(layout, n, k);
      CAPTURE(std::string(layout.name), n, k);
      REQUIRE(shape.rows * shape.cols * 8 == n * k);
      const CodeShape codes = code_shape(layout, shape.rows, shape.cols);
      CHECK((codes.n == n && codes.k == k));
      std::vector<bool> seen(static_cast<std::size_t>(n * k));
      for (std::int64_t r = 0; r < shape.rows; ++r)
        for (std::int64_t c = 0; c < shape.cols; ++c)
          for (int i = 0; i < 8; ++i) {
            const CodeShape code = code_in_word(layout.name, r, c, i);
            const CodePlace place = locate(layout, n, k, code.n, code.k);
            REQUIRE((place.word == r * shape.cols + c && place.nibble == i));
            seen[static_cast<std::size_t>(code.n * k + code.k)] = true;
          }
      for (const bool code_seen : seen) REQUIRE(code_seen);
    }
}

TEST_CASE("the table is well formed") {
  for (const Layout& layout : kLayouts) {
    CHECK(find_layout(layout.name) == &layout);
    CHECK(!layout.source.empty());
    unsigned columns = 0;
    for (const auto column : layout.order) columns |= 1u << column;
    CHECK(columns == 0xffu);  // a permutation of 0..7
  }
}
