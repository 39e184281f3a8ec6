// Everything this room takes from torch: the stable ABI and nothing else.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace awq::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const std::uint32_t* words_of(const Tensor& t) { return static_cast<const std::uint32_t*>(t.const_data_ptr()); }
inline std::uint32_t* words_of(Tensor& t) { return static_cast<std::uint32_t*>(t.mutable_data_ptr()); }

/// torch's own asks the dispatcher, which takes longer than to look.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline OptionalTensor contiguous_or_none(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}

}  // namespace awq::ops
