#include "kernels_impl.h"

namespace awq::core {

const Kernels& neon_dotprod_kernels() {
  static constexpr Kernels kernels = make_kernels("neon_dotprod");
  return kernels;
}

}  // namespace awq::core
