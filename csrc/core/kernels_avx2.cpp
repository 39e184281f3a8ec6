#include "kernels_impl.h"

namespace awq::core {

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  return kernels;
}

}  // namespace awq::core
