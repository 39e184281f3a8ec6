#include "kernels_impl.h"

namespace awq::core {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return kernels;
}

}  // namespace awq::core
