// What every csrc/<op>/cuda.cu includes: launches, shared memory, vector accesses, storage types and reductions.
//
// The sources are compiled by nvcc for the device and, unmodified, by the C++ compiler for the emulator in
// tests/cuda_host, which defines LT_CUDA_HOST. What differs between the two is in this file and in cuda_mma.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "leantune_kernels.h"

#if !defined(LT_CUDA_HOST)
namespace lt_cuda {
template <class T> using shared_type = T;
}
// A shared variable of the block: LT_SHARED(float[64][33], tile); and the memory that the launch asked for:
// LT_DYNAMIC_SHARED(bytes); gives unsigned char *bytes, aligned to 16. Neither is initialised.
#define LT_SHARED(type, name) __shared__ __align__(16) lt_cuda::shared_type<type> name
#define LT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace lt_cuda {

// ---- launches -------------------------------------------------------------------------------------------------------

// Launches kernel(args...) and returns 0 or the cudaError_t. `stream` is a cudaStream_t.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, void *stream, A... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) // nothing to do, which CUDA calls an error
        return 0;
#if defined(LT_CUDA_HOST)
    (void)stream;
    return lt_host::launch((const void *)kernel, grid, block, dynamic_shared_bytes, [&] { kernel(P(args)...); });
#else
    constexpr size_t kWithoutAsking = 48 << 10;
    cudaError_t status = cudaSuccess;
    if (dynamic_shared_bytes > kWithoutAsking)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)dynamic_shared_bytes);
    if (status == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = dynamic_shared_bytes;
        config.stream = (cudaStream_t)stream;
        status = cudaLaunchKernelEx(&config, kernel, P(args)...);
    }
    if (status != cudaSuccess)
        (void)cudaGetLastError(); // the caller has it now; nobody else shall find it
    return (int)status;
#endif
}

// Shared memory that a block of the current device may ask for, or 48 KiB where the device cannot say.
inline int64_t max_shared_bytes() {
#if defined(LT_CUDA_HOST)
    return 163 << 10;
#else
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return 48 << 10;
    }
    return bytes;
#endif
}

template <class A, class B> __host__ __device__ constexpr A ceil_div(A a, B b) { return (a + b - 1) / b; }

// f(T{}) for the storage type T that `dtype` names, or cudaErrorInvalidValue.
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

// The same on the device, for a storage type that varies within a kernel. `dtype` has been checked by the host.
template <class F> __device__ inline void with_dtype_on_device(int dtype, F f) {
    if (dtype == LT_F32)
        f(float{});
    else if (dtype == LT_BF16)
        f(__nv_bfloat16{});
    else
        f(__half{});
}

// Whether every row, `stride_bytes` after the one before, starts at a multiple of 16 bytes. A null pointer does.
inline bool aligned16(const void *pointer, int64_t stride_bytes) {
    return (uintptr_t)pointer % 16 == 0 && stride_bytes % 16 == 0;
}

// ---- storage types --------------------------------------------------------------------------------------------------

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float *out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16 *out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half *out) { *out = __float2half_rn(x); }

// ---- vector accesses ------------------------------------------------------------------------------------------------

template <int BYTES> struct Word;
template <> struct Word<1> {
    typedef uint8_t type;
};
template <> struct Word<2> {
    typedef uint16_t type;
};
template <> struct Word<4> {
    typedef uint32_t type;
};
template <> struct Word<8> {
    typedef uint2 type;
};
template <> struct Word<16> {
    typedef uint4 type;
};

// N elements that travel together: in one access up to 16 bytes, in several of 16 beyond.
template <class T, int N> struct Vec {
    static constexpr int kBytes = N * (int)sizeof(T);
    typedef typename Word<(kBytes < 16 ? kBytes : 16)>::type word;
    static constexpr int kWords = kBytes / (int)sizeof(word);
    static_assert(kWords * sizeof(word) == kBytes, "a power of two up to 16 bytes, or a multiple of 16");

    alignas(word) T values[N];

    __device__ T &operator[](int i) { return values[i]; }
    __device__ const T &operator[](int i) const { return values[i]; }
};

// Elements of T in 16 bytes.
template <class T> constexpr int kVector = 16 / (int)sizeof(T);

template <int N, class T> __device__ inline Vec<T, N> load_vec(const T *p) {
    typedef typename Vec<T, N>::word word;
    Vec<T, N> result;
    for (int i = 0; i < Vec<T, N>::kWords; ++i) {
#if defined(LT_CUDA_HOST)
        const word w = lt_host::load((const word *)p + i);
#else
        const word w = ((const word *)p)[i];
#endif
        memcpy((char *)&result + i * sizeof w, &w, sizeof w);
    }
    return result;
}

template <class T, int N> __device__ inline void store_vec(T *p, const Vec<T, N> &value) {
    typedef typename Vec<T, N>::word word;
    for (int i = 0; i < Vec<T, N>::kWords; ++i) {
        word w;
        memcpy(&w, (const char *)&value + i * sizeof w, sizeof w);
#if defined(LT_CUDA_HOST)
        lt_host::store((word *)p + i, w);
#else
        ((word *)p)[i] = w;
#endif
    }
}

// store_vec to global memory by name: where values come out of several branches, nvcc splits a 16-byte store otherwise.
template <int N, class T> __device__ inline void store_global(T *p, const Vec<T, N> &value) {
#if !defined(LT_CUDA_HOST)
    if constexpr (sizeof(typename Vec<T, N>::word) == 16) {
#pragma unroll
        for (int i = 0; i < Vec<T, N>::kWords; ++i) {
            uint4 w;
            memcpy(&w, (const char *)&value + 16 * i, 16);
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global((char *)p + 16 * i)),
                         "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
                         : "memory");
        }
        return;
    }
#endif
    store_vec(p, value);
}

// ---- reductions -----------------------------------------------------------------------------------------------------

// In a fixed order (a tree within each warp, then one over the warps); every thread gets the result. A warp's functions
// are called by all its lanes; a block's by all threads of a one-dimensional block of whole warps, THREADS at most.
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float warp_sum(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2)
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
}

// Each warp leaves `x` of its first lane; lane w of every warp gets warp w's, or `otherwise` where there is none.
template <int THREADS> __device__ inline float across_warps(float x, float otherwise) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
    LT_SHARED(float[THREADS / 32], of_warp);
    const int lane = threadIdx.x % 32;
    __syncthreads(); // the readers of the last call are done
    if (lane == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return lane < (int)blockDim.x / 32 ? of_warp[lane] : otherwise;
}

template <int THREADS> __device__ inline float block_sum(float x) {
    return warp_sum(across_warps<THREADS>(warp_sum(x), 0.0f));
}

template <int THREADS> __device__ inline float block_max(float x) {
    return warp_max(across_warps<THREADS>(warp_max(x), -INFINITY));
}

} // namespace lt_cuda
