#include "kernels_impl.h"

namespace awq::core {

const Kernels& avx_vnni_kernels() {
  static constexpr Kernels kernels = make_kernels("avx_vnni");
  return kernels;
}

}  // namespace awq::core
