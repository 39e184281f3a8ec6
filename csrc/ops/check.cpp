#include "check.h"

#include <torch/headeronly/macros/Macros.h>

namespace awq::ops {
namespace {

const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string shape_text(std::initializer_list<std::int64_t> sizes) {
  std::string text = "[";
  for (const std::int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

bool has_shape(const Tensor& t, std::initializer_list<std::int64_t> sizes) {
  if (t.dim() != static_cast<std::int64_t>(sizes.size())) return false;
  std::int64_t i = 0;
  for (const std::int64_t size : sizes)
    if (t.size(i++) != size) return false;
  return true;
}

void expect(const char* op, const char* name, const Tensor& t, std::initializer_list<std::int64_t> sizes,
            const char* meaning, ScalarType dtype) {
  STD_TORCH_CHECK(has_shape(t, sizes) && t.scalar_type() == dtype, "awq_ext::", op, ": ", name, " must be ", meaning,
                  " = ", shape_text(sizes), " ", dtype_name(dtype), ", got ", describe(t));
}

void expect_float(const char* op, const char* name, const Tensor& t, std::initializer_list<std::int64_t> sizes,
                  const char* meaning) {
  float_type(op, name, t);
  STD_TORCH_CHECK(has_shape(t, sizes), "awq_ext::", op, ": ", name, " must be ", meaning, " = ", shape_text(sizes),
                  ", got ", describe(t));
}

}  // namespace

std::string describe(const Tensor& t) {
  std::string text = "[";
  for (std::int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  text += std::string("] ") + dtype_name(t.scalar_type());
  if (t.is_cpu()) return text + " on cpu";
  if (t.is_cuda()) return text + " on cuda:" + std::to_string(t.get_device_index());
  return text;
}

void check_given(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.defined(), "awq_ext::", op, ": ", name, " must be a tensor, got None");
}

core::DType float_type(const char* op, const char* name, const Tensor& t, bool allow_f64) {
  check_given(op, name, t);
  switch (t.scalar_type()) {
    case ScalarType::Float: return core::DType::f32;
    case ScalarType::Half: return core::DType::f16;
    case ScalarType::BFloat16: return core::DType::bf16;
    case ScalarType::Double:
      if (allow_f64) return core::DType::f64;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, "awq_ext::", op, ": ", name, " must be float32, float16",
                      allow_f64 ? ", bfloat16 or float64" : " or bfloat16", ", got ", describe(t));
  }
}

core::DType scale_type(const char* op, std::optional<ScalarType> dtype) {
  switch (dtype.value_or(ScalarType::Half)) {
    case ScalarType::Half: return core::DType::f16;
    case ScalarType::BFloat16: return core::DType::bf16;
    case ScalarType::Float: return core::DType::f32;
    default:
      STD_TORCH_CHECK(false, "awq_ext::", op, ": dtype must be float16, bfloat16 or float32, got ", dtype_name(*dtype));
  }
}

ScalarType to_scalar_type(core::DType t) {
  switch (t) {
    case core::DType::f16: return ScalarType::Half;
    case core::DType::bf16: return ScalarType::BFloat16;
    case core::DType::f32: return ScalarType::Float;
    default: return ScalarType::Double;
  }
}

const core::Codes& codes_of(const char* op, const std::string& name) {
  const core::Codes* codes = core::find_codes(name);
  if (codes == nullptr) {
    std::string known;
    for (const core::Layout& l : core::kLayouts) known += (known.empty() ? "" : ", ") + std::string(l.name);
    STD_TORCH_CHECK(false, "awq_ext::", op, ": unknown layout '", name, "', expected one of ", known,
                    ", or '<layout>.zeros' where zeros are packed");
  }
  return *codes;
}

core::Rounding check_rounding(const char* op, std::int64_t w_bit, bool zero_point, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(w_bit >= 2 && w_bit <= 8, "awq_ext::", op, ": w_bit must be 2..8, got ", w_bit);
  return {zero_point, scale_type(op, dtype), core::last_code(w_bit)};
}

ScalarType word_type(const core::Codes& codes) { return codes.word_bits == 16 ? ScalarType::Short : ScalarType::Int; }

std::int64_t group_of(const char* op, std::int64_t group_size, std::int64_t k) {
  const std::int64_t group = group_size == -1 ? (k > 0 ? k : 1) : group_size;
  STD_TORCH_CHECK(group > 0, "awq_ext::", op,
                  ": group_size must be positive, or -1 for one group over in_features; got ", group_size);
  STD_TORCH_CHECK(k % group == 0, "awq_ext::", op, ": in_features must be a multiple of group_size, got in_features ",
                  k, " and group_size ", group_size);
  return group;
}

namespace {

/// Layouts strips and fragments. k is that of x, or -1: the words say it in whole tiles only, and group_size -1 not at
/// all.
WeightShape check_tiled(const char* op, const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros,
                        std::int64_t group_size, const std::string& layout, std::int64_t k) {
  const core::Layout& known = *core::find_layout(layout);
  const core::Codes& codes = known.weight;
  const bool strips = codes.order == core::Order::strips;
  STD_TORCH_CHECK(qweight.is_cpu() || !strips, "awq_ext::", op, ": layout 'strips' is for CPUs, got qweight ",
                  describe(qweight), "; repack qweight and qzeros to 'fragments' or 'gemm', and scales too ",
                  "(awq_ext.layouts.repack_scales)");
  const core::CodeShape most = check_words(op, qweight, layout);
  float_type(op, "scales", scales);
  STD_TORCH_CHECK(scales.dim() == 2, "awq_ext::", op, ": scales must be [in_features/group_size, out_features], got ",
                  describe(scales));
  const std::int64_t groups = scales.size(0), n = scales.size(1);
  const bool possible =
      core::ceil_div(k, codes.tile_k) * codes.tile_k == most.k && (group_size < 1 || k % group_size == 0);
  if (k < 0 || !possible) k = group_size > 0 ? groups * group_size : most.k;
  const std::int64_t group = group_of(op, group_size, k);
  STD_TORCH_CHECK(!strips || core::strips_can_have(k, group), "awq_ext::", op,
                  ": layout 'strips' needs a group_size that is a multiple of 8, or one group; got ", group_size,
                  "; keep layout 'gemm'");
  STD_TORCH_CHECK(strips || n % core::kCodesPerWord == 0, "awq_ext::", op,
                  ": layout 'fragments' needs out_features that are a multiple of ", core::kCodesPerWord,
                  ", got scales ", describe(scales));
  expect_float(op, "scales", scales, {k / group, n}, "[in_features/group_size, out_features]");
  check_same_device(op, qweight, "qweight", scales, "scales");
  const core::WordShape words = core::word_shape(codes, n, k);
  expect(op, "qweight", qweight, {words.rows, words.cols},
         strips ? "the words of [out_features, in_features] in layout 'strips'"
                : "the words of [out_features, in_features] in layout 'fragments'",
         ScalarType::Int);
  if (qzeros) {
    const core::WordShape zeros = core::word_shape(known.zero_words, n, groups);
    expect(op, "qzeros", *qzeros, {zeros.rows, zeros.cols},
           strips ? "the words of the zeros in layout 'strips.zeros'"
                  : "the words of the zeros in layout 'fragments.zeros'",
           ScalarType::Int);
    check_same_device(op, qweight, "qweight", *qzeros, "qzeros");
  }
  return {n, k, group, k / group};
}

}  // namespace

WeightShape check_weight(const char* op, const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros,
                         std::int64_t group_size, const std::string& layout, std::int64_t k_of_x) {
  codes_of(op, layout);  // an unknown name is told as such
  if (layout == "strips" || layout == "fragments")
    return check_tiled(op, qweight, scales, qzeros, group_size, layout, k_of_x);
  STD_TORCH_CHECK(layout == "gemm", "awq_ext::", op, ": layout '", layout,
                  "' is stored but not computed on; convert the words with awq_ext::repack(src='", layout,
                  "', dst='gemm') first");
  const core::CodeShape codes = check_words(op, qweight, layout);
  const std::int64_t n = codes.n, k = codes.k;
  const std::int64_t group = group_of(op, group_size, k);
  const std::int64_t groups = k / group;
  expect_float(op, "scales", scales, {groups, n}, "[in_features/group_size, out_features]");
  check_same_device(op, qweight, "qweight", scales, "scales");
  if (qzeros) {
    expect(op, "qzeros", *qzeros, {groups, n / core::kCodesPerWord}, "[in_features/group_size, out_features/8]",
           ScalarType::Int);
    check_same_device(op, qweight, "qweight", *qzeros, "qzeros");
  }
  return {n, k, group, groups};
}

LinearShape check_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& qzeros,
                         const OptionalTensor& bias, std::int64_t group_size, const std::string& layout,
                         const std::string& activation) {
  check_given("linear", "x", x);
  float_type("linear", "x", x, x.is_cpu());
  const std::int64_t k_of_x = x.dim() >= 1 ? x.size(x.dim() - 1) : -1;
  const WeightShape w = check_weight("linear", qweight, scales, qzeros, group_size, layout, k_of_x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == w.k, "awq_ext::linear: x must be [..., in_features] = [..., ",
                  w.k, "], got ", describe(x));
  check_same_device("linear", x, "x", qweight, "qweight");
  if (bias) {
    expect_float("linear", "bias", *bias, {w.n}, "[out_features]");
    check_same_device("linear", x, "x", *bias, "bias");
  }
  std::int64_t m = 1;
  for (std::int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  const std::optional<core::Activation> rounding = core::find_activation(activation);
  STD_TORCH_CHECK(rounding, "awq_ext::linear: activation must be 'exact', 'int16' or 'int8', got '", activation, "'");
  return {m, w, *rounding};
}

WeightShape check_float_weight(const char* op, const Tensor& w, std::int64_t group_size) {
  float_type(op, "w", w);
  STD_TORCH_CHECK(w.dim() == 2, "awq_ext::", op, ": w must be [out_features, in_features], got ", describe(w));
  const std::int64_t n = w.size(0), k = w.size(1);
  const std::int64_t group = group_of(op, group_size, k);
  return {n, k, group, k / group};
}

void check_range(const char* op, const OptionalTensor& range, const Tensor& w, const WeightShape& shape) {
  if (!range) return;
  expect(op, "range", *range, {shape.n, shape.groups, 2}, "[out_features, in_features/group_size, 2]",
         ScalarType::Float);
  check_same_device(op, w, "w", *range, "range");
}

bool check_gram(const char* op, const Tensor& gram, const Tensor& w, bool diagonal_allowed) {
  check_given(op, "gram", gram);
  const bool diagonal = diagonal_allowed && gram.dim() == 1;
  if (diagonal)
    expect(op, "gram", gram, {w.size(1)}, "[in_features], the diagonal", ScalarType::Float);
  else
    expect(op, "gram", gram, {w.size(1), w.size(1)}, "[in_features, in_features]", ScalarType::Float);
  check_same_device(op, w, "w", gram, "gram");
  return diagonal;
}

void check_row_weight(const char* op, const OptionalTensor& row_weight, const Tensor& w) {
  if (!row_weight) return;
  expect(op, "row_weight", *row_weight, {w.size(0)}, "[out_features]", ScalarType::Float);
  check_same_device(op, w, "w", *row_weight, "row_weight");
}

void check_candidates(const char* op, const Tensor& x_mean, const OptionalTensor& tie, std::int64_t grid,
                      const Tensor& w) {
  check_given(op, "x_mean", x_mean);
  expect(op, "x_mean", x_mean, {w.size(1)}, "[in_features]", ScalarType::Float);
  check_same_device(op, w, "w", x_mean, "x_mean");
  check_grid(op, grid);
  if (!tie) return;
  expect(op, "tie", *tie, {w.size(1)}, "[in_features]", ScalarType::Long);
  check_same_device(op, w, "w", *tie, "tie");
}

void check_scales(const char* op, const Tensor& candidates, const Tensor& w) {
  check_given(op, "candidates", candidates);
  const std::int64_t k = w.size(1);
  STD_TORCH_CHECK(candidates.dim() == 2 && candidates.size(1) == k && candidates.scalar_type() == ScalarType::Float,
                  "awq_ext::", op, ": candidates must be [candidates, in_features] = [.., ", k, "] float32, got ",
                  describe(candidates));
  check_same_device(op, w, "w", candidates, "candidates");
}

void check_grid(const char* op, std::int64_t grid) {
  STD_TORCH_CHECK(grid >= 1 && grid <= 1000, "awq_ext::", op, ": grid must be 1..1000, got ", grid);
}

void check_shrink(const char* op, double max_shrink) {
  STD_TORCH_CHECK(max_shrink >= 0 && max_shrink < 1, "awq_ext::", op, ": max_shrink must be in [0, 1), got ",
                  max_shrink);
}

void check_add_gram(const Tensor& sums, const Tensor& x) {
  check_given("add_gram", "sums", sums);
  check_given("add_gram", "x", x);
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == sums.size(1) && sums.scalar_type() == ScalarType::Float &&
                      sums.is_contiguous(),
                  "awq_ext::add_gram: sums must be a contiguous [in_features, in_features] float32, got ",
                  describe(sums), sums.is_contiguous() ? "" : ", not contiguous");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == sums.size(0) && x.scalar_type() == ScalarType::Float,
                  "awq_ext::add_gram: x must be [.., in_features] = [.., ", sums.size(0), "] float32, got ",
                  describe(x));
  check_same_device("add_gram", sums, "sums", x, "x");
}

const core::Codes& check_packable(const char* op, std::int64_t n, std::int64_t k, const std::string& layout) {
  const core::Codes& codes = codes_of(op, layout);
  STD_TORCH_CHECK(core::can_hold(codes, n, k), "awq_ext::", op, ": layout '", layout,
                  "' needs out_features that are a multiple of ", codes.tile_n,
                  " and in_features that are a multiple of ", codes.tile_k, ", got ", n, " and ", k);
  return codes;
}

const core::Codes& check_codes(const char* op, const Tensor& q, const std::string& layout) {
  check_given(op, "q", q);
  STD_TORCH_CHECK(q.dim() == 2 && q.scalar_type() == ScalarType::Byte, "awq_ext::", op,
                  ": q must be [out_features, in_features] uint8, got ", describe(q));
  return check_packable(op, q.size(0), q.size(1), layout);
}

core::CodeShape check_words(const char* op, const Tensor& words, const std::string& layout) {
  const core::Codes& codes = codes_of(op, layout);
  check_given(op, "qweight", words);
  STD_TORCH_CHECK(words.dim() == 2 && words.scalar_type() == word_type(codes), "awq_ext::", op,
                  ": qweight must be a matrix of ", dtype_name(word_type(codes)), " words in layout '", layout,
                  "', got ", describe(words));
  const core::CodeShape shape = core::code_shape(codes, words.size(0), words.size(1));
  STD_TORCH_CHECK(shape.n >= 0, "awq_ext::", op, ": qweight must have columns in runs of ", codes.tile_words(),
                  " words in layout '", layout, "', got ", describe(words));
  return shape;
}

void check_same_device(const char* op, const Tensor& first, const char* first_name, const Tensor& other,
                       const char* other_name) {
  const bool same = first.is_cpu() == other.is_cpu() && first.is_cuda() == other.is_cuda() &&
                    (first.is_cpu() || first.get_device_index() == other.get_device_index());
  STD_TORCH_CHECK(same, "awq_ext::", op, ": ", other_name, " must be on the device of ", first_name, ", got ",
                  first_name, " ", describe(first), " and ", other_name, " ", describe(other));
}

/// x as rows of adjacent elements at one stride: itself when its leading dimensions already are, else a copy.
Tensor as_rows(const Tensor& x, std::int64_t& stride) {
  const std::int64_t dims = x.dim();
  stride = dims >= 2 ? x.stride(dims - 2) : x.size(dims - 1);
  bool rows = x.stride(dims - 1) == 1 || x.size(dims - 1) <= 1;
  for (std::int64_t i = dims - 3; i >= 0; --i) rows &= x.stride(i) == x.stride(i + 1) * x.size(i + 1);
  if (rows) return x;
  stride = x.size(dims - 1);
  return as_contiguous(x);
}

std::vector<std::int64_t> output_sizes(const Tensor& x, std::int64_t n) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(n);
  return sizes;
}

}  // namespace awq::ops
