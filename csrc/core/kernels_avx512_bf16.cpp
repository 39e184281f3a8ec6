#include "kernels_impl.h"

namespace awq::core {

const Kernels& avx512_bf16_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512_bf16");
  return kernels;
}

}  // namespace awq::core
