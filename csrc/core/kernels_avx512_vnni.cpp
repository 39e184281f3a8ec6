#include "kernels_impl.h"

namespace awq::core {

const Kernels& avx512_vnni_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512_vnni");
  return kernels;
}

}  // namespace awq::core
