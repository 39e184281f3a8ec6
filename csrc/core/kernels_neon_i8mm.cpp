#include "kernels_impl.h"

namespace awq::core {

const Kernels& neon_i8mm_kernels() {
  static constexpr Kernels kernels = make_kernels("neon_i8mm");
  return kernels;
}

}  // namespace awq::core
