#include "kernels_impl.h"

namespace awq::core {

const Kernels& portable_kernels() {
  static constexpr Kernels kernels = make_kernels("portable");
  return kernels;
}

}  // namespace awq::core
