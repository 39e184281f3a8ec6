// Loops that no compiler leaves as loops.
#pragma once
#include <type_traits>
#include <utility>

#include "ptx.cuh"

namespace awq::cuda {

/// f(0), ..., f(kCount - 1) with constants, so that arrays indexed by them stay in registers.
template <int kCount, class F>
AWQ_DEVICE void unrolled(F f) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) {
    (f(std::integral_constant<int, kI>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace awq::cuda
