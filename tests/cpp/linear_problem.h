// A linear call on random data, with what is needed to judge its result.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/linear.h"
#include "data.h"

namespace awq::test {

struct Shape {
  std::int64_t m, n, k, group;
};

struct Types {
  DType x = DType::f32, scale = DType::f16, bias = DType::f16;
  bool zeros = true, with_bias = true;
};

struct LinearProblem {
  /// `layout` is one that kernels compute on: "gemm" or "strips". Rows of x are `pad` elements apart.
  LinearProblem(const char* layout, Shape shape_, Types types_, Random& random, std::int64_t pad)
      : weight_codes(core::find_codes(layout)),
        zero_codes(core::find_codes(std::string(layout) + ".zeros")),
        strips(std::string(layout) == "strips"),
        shape(shape_),
        types(types_),
        groups(shape.k / shape.group),
        stride(shape.k + pad),
        x(types.x, shape.m == 0 ? 0 : (shape.m - 1) * stride + shape.k, random, -1.0, 1.0),
        scales(types.scale, groups * shape.n, random, 0.001, 0.05),
        ordered(scales),
        bias(types.bias, shape.n, random, -1.0, 1.0),
        q(random.codes(shape.n * shape.k)),
        z(random.codes(shape.n * groups)) {
    if (!types.zeros) std::fill(z.begin(), z.end(), std::uint8_t{8});
    pack();
    for (std::int64_t g = 0; g < groups && strips; ++g)
      for (std::int64_t col = 0; col < shape.n; ++col)
        ordered.set(core::strip_scale(shape.n, groups, g, col), scales[g * shape.n + col]);
  }

  /// q and z into words.
  void pack() {
    words = test::pack(*weight_codes, q, shape.n, shape.k);
    zeros = test::pack(*zero_codes, z, shape.n, groups);
  }

  core::LinearArgs args(Array& y) const {
    return {x.data(),
            words.data(),
            strips ? ordered.data() : scales.data(),
            types.zeros ? zeros.data() : nullptr,
            types.with_bias ? bias.data() : nullptr,
            y.data(),
            shape.m,
            shape.n,
            shape.k,
            shape.group,
            stride,
            types.x,
            types.scale,
            types.bias,
            strips};
  }

  int code(std::int64_t col, std::int64_t i) const { return q[static_cast<std::size_t>(col * shape.k + i)]; }
  int zero(std::int64_t col, std::int64_t i) const {
    return z[static_cast<std::size_t>(col * groups + i / shape.group)];
  }
  double scale(std::int64_t col, std::int64_t i) const { return scales[i / shape.group * shape.n + col]; }

  const core::Codes *weight_codes, *zero_codes;
  bool strips;
  Shape shape;
  Types types;
  std::int64_t groups, stride;
  Array x, scales, ordered, bias;  // scales [groups, n], ordered as layout strips has them
  std::vector<std::uint8_t> q, z;
  std::vector<std::uint32_t> words, zeros;
};

}  // namespace awq::test
