// What every csrc/<op>/cuda.cu includes: storage types, reductions over a block, and launch errors that are returned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "leantune_kernels.h"

namespace lt_cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float *out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16 *out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half *out) { *out = __float2half_rn(x); }

// Sum over the block in a fixed order (a tree within each warp, then over the warps); every thread gets the result.
template <int THREADS> __device__ inline float block_sum(float x) {
    __shared__ float warps[THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    __syncthreads(); // the last call's readers are done
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < THREADS / 32; ++w)
        total += warps[w];
    return total;
}

// 0, or the code of the CUDA error of the launch just made (cudaGetErrorString names it).
inline int launched() { return (int)cudaGetLastError(); }

template <class F> int with_dtype(int dtype, F f) {
    switch (dtype) {
    case LT_F32:
        return f(float{});
    case LT_BF16:
        return f(__nv_bfloat16{});
    case LT_F16:
        return f(__half{});
    default:
        return (int)cudaErrorInvalidValue;
    }
}

} // namespace lt_cuda
