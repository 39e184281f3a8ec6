// The little of the CUDA runtime that operators speak of, for operators whose kernels are played.
#pragma once
enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
