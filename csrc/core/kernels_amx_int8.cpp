#include "kernels_impl.h"

namespace awq::core {

const Kernels& amx_int8_kernels() {
  static constexpr Kernels kernels = make_kernels("amx_int8");
  return kernels;
}

}  // namespace awq::core
