#include "kernels_impl.h"

namespace awq::core {

static_assert(kMatrixRows > 0, "the compiler does not say that it may use AMX");

const Kernels& amx_int8_kernels() {
  static constexpr Kernels kernels = make_kernels("amx_int8");
  return kernels;
}

}  // namespace awq::core
