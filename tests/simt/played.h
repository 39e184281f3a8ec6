// What operators owe those who launch kernels for them, where these are played.
#pragma once
#include <cuda_runtime_api.h>

/// Throws an Error unless the tensors' device is the current one and `stream` is torch's current stream there.
void require_enqueued(cudaStream_t stream);
