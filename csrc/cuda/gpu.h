// What plans need to know of the devices of this machine.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace awq::cuda {

/// The device of that number. Asked once, and then remembered.
cudaError_t gpu_of(int device, Gpu& gpu);

}  // namespace awq::cuda
