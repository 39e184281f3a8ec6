// Argument checks, the same for every device. Each message names op and tensor, what was expected, what was got.
#pragma once
#include "../core/layout.h"
#include "../core/plan.h"
#include "../core/quantize.h"
#include "../core/types.h"
#include "stable.h"

namespace awq::ops {

/// "[2, 3] int32 on cpu" for messages.
std::string describe(const Tensor& t);

/// Refuses None, which the dispatcher lets through for any tensor of a schema.
void check_given(const char* op, const char* name, const Tensor& t);

/// dtype as the kernels know it; refuses what is not a floating point type they compute with.
core::DType float_type(const char* op, const char* name, const Tensor& t, bool allow_f64 = false);

/// The storage dtype of scales: `dtype` or float16.
core::DType scale_type(const char* op, std::optional<ScalarType> dtype);
ScalarType to_scalar_type(core::DType t);

/// What weights are rounded to; refuses w_bit other than 2..8 and scales of a dtype that is none.
core::Rounding check_rounding(const char* op, std::int64_t w_bit, bool zero_point, std::optional<ScalarType> dtype);

/// The codes of that name, see core::find_codes.
const core::Codes& codes_of(const char* op, const std::string& name);

/// group_size as the user gives it (-1: the whole of k) -> g; refuses what does not divide k.
std::int64_t group_of(const char* op, std::int64_t group_size, std::int64_t k);

/// A packed weight in a layout that is computed on: gemm, fragments, and on a CPU strips.
struct WeightShape {
  std::int64_t n, k, group, groups;
};
WeightShape check_weight(const char* op, const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros,
                         std::int64_t group_size, const std::string& layout, std::int64_t k_of_x = -1);

struct LinearShape {
  std::int64_t m;
  WeightShape w;
  core::Activation activation;
};
LinearShape check_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros,
                         const OptionalTensor& bias, std::int64_t group_size, const std::string& layout,
                         const std::string& activation);

/// [n, k] float weight for quantize and the searches.
WeightShape check_float_weight(const char* op, const Tensor& w, std::int64_t group_size);
void check_range(const char* op, const OptionalTensor& range, const Tensor& w, const WeightShape& shape);

/// What the searches take besides w: shapes, dtypes and devices. The values are for the device to look at.
/// Whether it is the diagonal alone, which has to be allowed.
bool check_gram(const char* op, const Tensor& gram, const Tensor& w, bool diagonal_allowed = false);
void check_row_weight(const char* op, const OptionalTensor& row_weight, const Tensor& w);
void check_candidates(const char* op, const Tensor& x_mean, const OptionalTensor& tie, std::int64_t grid,
                      const Tensor& w);
void check_scales(const char* op, const Tensor& candidates, const Tensor& w);
void check_grid(const char* op, std::int64_t grid);
void check_shrink(const char* op, double max_shrink);
void check_add_gram(const Tensor& sums, const Tensor& x);

/// q uint8 [n, k] that `layout` can pack; returns how.
const core::Codes& check_codes(const char* op, const Tensor& q, const std::string& layout);
/// Words of `layout`; returns the n and k of their codes.
core::CodeShape check_words(const char* op, const Tensor& words, const std::string& layout);
/// Refuses codes of shape [n, k] that `layout` cannot hold; returns how it holds them.
const core::Codes& check_packable(const char* op, std::int64_t n, std::int64_t k, const std::string& layout);
/// The dtype of a layout's words.
ScalarType word_type(const core::Codes& codes);

void check_same_device(const char* op, const Tensor& first, const char* first_name, const Tensor& other,
                       const char* other_name);

/// x as rows of adjacent elements at one stride: itself when its leading dimensions already are, else a copy.
Tensor as_rows(const Tensor& x, std::int64_t& stride);

/// x.sizes() with the last one replaced by n.
std::vector<std::int64_t> output_sizes(const Tensor& x, std::int64_t n);

}  // namespace awq::ops
