// What the CUDA sources use of CUDA C++, on the host: qualifiers, vector types, intrinsics, a little of the runtime.
#pragma once

#include <cmath>

#include "cuda_host.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::lt_host::thread_index)
#define blockIdx (::lt_host::block_index)
#define blockDim (::lt_host::block_size)
#define gridDim (::lt_host::grid_size)
constexpr int warpSize = 32;

// ---- vector types ---------------------------------------------------------------------------------------------------

#define LT_VECTOR_TYPES(T, name)                               \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
    struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LT_VECTOR_TYPES(float, float)
LT_VECTOR_TYPES(int, int)
LT_VECTOR_TYPES(unsigned, uint)
LT_VECTOR_TYPES(unsigned char, uchar)
LT_VECTOR_TYPES(signed char, char)
LT_VECTOR_TYPES(unsigned short, ushort)
#undef LT_VECTOR_TYPES

// ---- waiting for other threads. `place` is where the kernel calls; nobody passes it. --------------------------------

inline void __syncthreads(lt_host::Place place = lt_host::Place::here()) { lt_host::barrier(place); }

inline void __syncwarp(unsigned mask = 0xffffffffu, lt_host::Place place = lt_host::Place::here()) {
    lt_host::collective("__syncwarp", mask, place, nullptr, nullptr);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, lt_host::Place place = lt_host::Place::here()) {
    const int segment = lt_host::lane() & ~(width - 1);
    return lt_host::shuffled("__shfl_sync", mask, value, segment | (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, lt_host::Place place = lt_host::Place::here()) {
    const int lane = lt_host::lane(), source = lane ^ bits;
    const int beyond = (lane & ~(width - 1)) + width;
    return lt_host::shuffled("__shfl_xor_sync", mask, value, source < beyond ? source : lane, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, lt_host::Place place = lt_host::Place::here()) {
    const int lane = lt_host::lane(), source = lane + (int)by;
    const int beyond = (lane & ~(width - 1)) + width;
    return lt_host::shuffled("__shfl_down_sync", mask, value, source < beyond ? source : lane, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, lt_host::Place place = lt_host::Place::here()) {
    const int lane = lt_host::lane(), source = lane - (int)by;
    const int first = lane & ~(width - 1);
    return lt_host::shuffled("__shfl_up_sync", mask, value, source >= first ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, lt_host::Place place = lt_host::Place::here()) {
    return lt_host::vote("__ballot_sync", mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate, lt_host::Place place = lt_host::Place::here()) {
    return lt_host::vote("__any_sync", mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, lt_host::Place place = lt_host::Place::here()) {
    return lt_host::vote("__all_sync", mask, predicate != 0, place) == mask;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }

// Products and sums that are never contracted into one fused operation.
inline float __fmul_rn(float x, float y) {
    volatile float product = x * y;
    return product;
}
inline float __fadd_rn(float x, float y) {
    volatile float sum = x + y;
    return sum;
}
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }

inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class To, class From> To lt_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return lt_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return lt_bits<float>(x); }
inline int __float_as_int(float x) { return lt_bits<int>(x); }
inline float __int_as_float(int x) { return lt_bits<float>(x); }

#define LT_MIN_MAX(T)                                \
    inline T min(T a, T b) { return b < a ? b : a; } \
    inline T max(T a, T b) { return a < b ? b : a; }
LT_MIN_MAX(int)
LT_MIN_MAX(unsigned)
LT_MIN_MAX(long)
LT_MIN_MAX(unsigned long)
LT_MIN_MAX(long long)
LT_MIN_MAX(unsigned long long)
#undef LT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

template <class T> T __ldg(const T *p) { return lt_host::load(p); }

// ---- the runtime ----------------------------------------------------------------------------------------------------

typedef struct CUstream_st *cudaStream_t;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };

const char *cudaGetErrorString(cudaError_t error); // of a launch failure: what the emulator found

inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
