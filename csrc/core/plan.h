// Which kernel a linear call gets, and why. A pure function, apart from running anything.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels.h"
#include "types.h"

namespace awq::core {

enum class LinearKernel : std::uint8_t { reference, decode, gemm, strips };

struct LinearPlan {
  LinearKernel kernel;
  const char* name;  // "reference", "decode", "gemm", "strips", "strips_matrix"
  const char* why;
  std::int64_t tiles;  // pieces of work; each is `tile` output columns, the last may be shorter
  std::int64_t tile;
  std::int64_t grain;      // fewest tiles worth a thread of their own
  int digits;              // strips: of x
  std::int64_t rows;       // strips: of x in one StripsWork, the last of a call may have fewer
  std::int64_t tile_rows;  // strips: of x in one tile
};

/// "exact", "int16" or "int8"; nothing for another name.
std::optional<Activation> find_activation(std::string_view name);

/// m rows of x, an [n, k] weight in layout gemm, x of type x_type, at the given instruction-set level.
LinearPlan plan_linear(std::int64_t m, std::int64_t n, std::int64_t k, DType x_type, const Kernels& kernels);

/// The same for layout strips.
LinearPlan plan_strips(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, DType x_type,
                       Activation activation, const Kernels& kernels);

/// What `rows` rows of x, all of a call or the turn of some, are cut into: tiles for the matrix unit or not, and their
/// most rows.
struct StripsTiles {
  bool matrix;
  int most_rows;
};
StripsTiles strips_tiles(std::int64_t rows, std::int64_t group, int digits, const Kernels& kernels);

/// Whether each of `threads` threads prepares all of x for itself, rather than its part for all of them. What another
/// core has written comes from its cache, line by line, and two loops in parallel are started instead of one.
bool prepare_apart(const LinearPlan& plan, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t threads);

/// Rows of a tile, when `rows` are cut into equal tiles of at most `most`.
constexpr std::int64_t even_rows(std::int64_t rows, std::int64_t most) {
  return ceil_div(rows, rows <= most ? 1 : ceil_div(rows, most));
}

}  // namespace awq::core
