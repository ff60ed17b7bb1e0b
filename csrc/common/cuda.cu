// What the CUDA library offers beside its operations.
#include "cuda_kernel.cuh"

extern "C" LT_API const char *lt_cuda_error_string(int status) { return cudaGetErrorString((cudaError_t)status); }
