// Every operator of the library, one paragraph each. n = out_features, k = in_features, g = group_size (-1 means k),
// G = k / g. A weight is W[n, k] = (q[n, k] - z[n, k/g]) * s[n, k/g] with codes q and zeros z in 0..15; where there is
// a w_bit of 2..8, in 0 .. 2^w_bit - 1, and only those of 4 bits can be packed.
#include "stable.h"

STABLE_TORCH_LIBRARY(awq_ext, m) {
  // y = x W^T + bias.
  //   x [..., k] float32|float16|bfloat16|float64 (float64 on a CPU only), any strides; y has x's dtype, [..., n]
  //   layout "gemm": qweight int32 [k, n/8], scales float [G, n], qzeros int32 [G, n/8] (None: every zero is 8)
  //   layout "strips" (CPU only; g a multiple of 8, or k): qweight int32 [ceil(n/32), 32 ceil(k/8)], scales float
  //   [G, n] in their order there (strip_scale of csrc/core/layout.h), qzeros int32 [ceil(n/32), 4 G]
  //   layout "fragments" (CUDA only; n a multiple of 8): qweight int32 [ceil(n/64), 512 ceil(k/64)], scales float [G,
  //   n] in their order there (fragment_scale), qzeros int32 [ceil(n/64), 8 G] bias float [n]; activation: how little x
  //   may be rounded to, "exact" (its own dtype), "int16" or "int8"
  m.def(
      "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? qzeros=None, Tensor? bias=None, *, "
      "int group_size, str layout=\"gemm\", str activation=\"exact\") -> Tensor");

  // W [n, k] in `dtype` (None: the dtype of scales), from the tensors that `linear` takes, and from layout fragments
  // on a CPU too. Of one group of -1, k is known in whole eights only in layout strips, and in 64s in fragments.
  m.def(
      "dequantize(Tensor qweight, Tensor scales, Tensor? qzeros=None, *, "
      "int group_size, str layout=\"gemm\", ScalarType? dtype=None) -> Tensor");

  // Rounds w float [n, k] to nearest, per group: q uint8 [n, k], scales `dtype` (None: float16) [n, G],
  // zeros uint8 [n, G]. range float32 [n, G, 2] = lowest and highest value of each group to represent
  // (None: the group's own minimum and maximum); weights outside saturate. zero_point=False: symmetric, every z is
  // 2^(w_bit - 1).
  m.def(
      "quantize(Tensor w, *, int group_size, int w_bit=4, bool zero_point=True, Tensor? range=None, "
      "ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)");

  // Codes q uint8 [n, k] -> the words of a layout of csrc/core/layout.h. The name of a layout means its weight (gemm:
  // int32 [k, n/8], gemv: int32 [n, k/8], gptq: int32 [k/8, n], gemv_fast: int16 [n/4, k] ...), "<layout>.zeros" its
  // packed zeros, for q = zeros [n, G]. Layouts that pad fill up with 0.
  m.def("pack(Tensor q, *, str layout=\"gemm\") -> Tensor");

  // Words of the layout -> codes q uint8 [n, k], with the padding if there is any.
  m.def("unpack(Tensor qweight, *, str layout=\"gemm\") -> Tensor");

  // Words of layout src -> words of layout dst, for the same codes.
  m.def("repack(Tensor qweight, *, str src, str dst) -> Tensor");

  // AWQ's search for the scale of each input channel that loses least: argmin over candidates c of
  // sum_rows row_weight d gram d^T, d = dequantize(quantize(w * c)) / c - w, that is the (weighted) squared error of
  // w x, its mean over all the tokens that gram was taken from. Candidates: the identity, x_mean^r, and with
  // duo_scaling x_mean^r / w_mean^(1-r), r = 1/grid .. 1.
  //   w float [n, k], x_mean float32 [k] = mean |x|, gram float32 [k, k] = mean x^T x (or [k], its diagonal: the rest
  //   is zero), tie int64 [k]: channels with the same number share one scale (None: none do) row_weight float32 [n]:
  //   how much each row's error counts (None: all the same)
  //   -> scale float32 [k], losses float64 [candidates] (losses[0] is the identity's, i.e. round-to-nearest)
  // Rounding errors are the same on every device; the order of their sums is not. On CUDA, here and below, NaN comes
  // out where a CPU raises for values.
  m.def(
      "search_scale(Tensor w, Tensor x_mean, Tensor gram, *, int group_size, int w_bit=4, int grid=20, "
      "bool duo_scaling=True, bool zero_point=True, Tensor? tie=None, Tensor? row_weight=None, "
      "ScalarType? dtype=None) -> (Tensor, Tensor)");

  // The candidates of search_scale, in its order, the identity first: float32 [candidates, k].
  m.def(
      "scale_candidates(Tensor w, Tensor x_mean, *, int group_size, int grid=20, bool duo_scaling=True, "
      "Tensor? tie=None) -> Tensor");

  // The losses by which search_scale compares, of given ones, on any gram.
  //   candidates float32 [c, k] -> losses float64 [c]
  m.def(
      "scale_losses(Tensor w, Tensor candidates, Tensor gram, *, int group_size, int w_bit=4, bool zero_point=True, "
      "Tensor? row_weight=None, ScalarType? dtype=None) -> Tensor");

  // The range [n, G, 2] float32 of each group that loses least, for `quantize`: shrinks the group's own range
  // in `grid` steps down to 1 - max_shrink, at both ends together and at each end alone; the loss of one group is
  // d gram_gg d^T with gram_gg the g x g block of gram on the diagonal. The whole range is always a candidate.
  //   w float [n, k], gram float32 [k, k] or [k] -> range float32 [n, G, 2]
  m.def(
      "search_clip(Tensor w, Tensor gram, *, int group_size, int w_bit=4, int grid=20, float max_shrink=0.5, "
      "bool zero_point=True, ScalarType? dtype=None) -> Tensor");

  // On a CPU only. Rounds w like `quantize`, but to what loses least in the output: loss of a row d gram d^T,
  // d = dequantized - w. Columns one after another, each making up for the errors before it (GPTQ; act_order: those
  // with the largest diagonal of gram first, else from left to right), then `passes` of coordinate descent over codes
  // and, with refit_scales, group scales. No row loses more than with `quantize`. Groups and zeros are those of
  // `quantize`.
  //   w float [n, k], gram float32 [k, k], range float32 [n, G, 2]; damping times the mean of gram's diagonal is
  //   added to it in the first step -> q uint8 [n, k], scales `dtype` (None: float16) [n, G], zeros uint8 [n, G]
  m.def(
      "quantize_compensated(Tensor w, Tensor gram, *, int group_size, int w_bit=4, bool zero_point=True, "
      "Tensor? range=None, float damping=0.01, bool act_order=True, int passes=4, bool refit_scales=True, ScalarType? "
      "dtype=None) "
      "-> (Tensor, Tensor, Tensor)");

  // sums[i, j] += sum over t of x[t, i] x[t, j] for j >= i; what is left of the diagonal stays as it is.
  //   sums float32 [k, k] contiguous, x float32 [t, k], rounded to bfloat16 first if `bfloat16`; sums are float32
  m.def("add_gram(Tensor(a!) sums, Tensor x, *, bool bfloat16=False) -> ()");
}
