// NF4 weights on CUDA: eight lanes quantise a block of 64; a thread dequantises four bytes to 16 (or 32) at a time; few
// rows are multiplied with the codes themselves.
#include "../common/cuda_quantised.cuh"
#include "../common/dynamic_map.h"
#include "code_book.h"

namespace lt_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlock = 64, kGroup = 256;
constexpr int kPerThread = 8;                // weights, four bytes of codes
constexpr int kHeld = 4;                     // times kPerThread weights on their way at once
constexpr float kSmallest = 1.17549435e-38f; // 2^-126: below it 1 / absmax overflows

__constant__ const float kCodeBook[16] = {LT_NF4_CODE_BOOK};
__device__ const float kDynamicMap[256] = {LT_DYNAMIC_MAP};

struct Absmax { // as lt_nf4_dequantise takes them
    const float *values;
    const uint8_t *codes;
    const float *scales, *offset;
};

// The product of two floats is exact in double, so that the sum is rounded alike with and without a fused instruction.
__device__ float absmax_at(const Absmax &a, int64_t block) {
    if (a.values)
        return a.values[block];
    return (float)((double)kDynamicMap[a.codes[block]] * (double)a.scales[block / kGroup] + (double)*a.offset);
}

// |x|, infinite for what is not finite, so that a maximum keeps it.
__device__ float magnitude(float x) { return fabsf(x) <= 3.402823466e38f ? fabsf(x) : INFINITY; }

// What is stored of a block whose largest magnitude is `largest`, and what its elements are multiplied by.
__device__ float stored(float largest) { return largest == INFINITY ? NAN : largest < kSmallest ? 0.0f : largest; }
__device__ float inverse_of(float absmax) { return absmax > 0 ? __fdiv_rn(1.0f, absmax) : 0.0f; }

__device__ uint32_t code_of(float x) {
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i)
        code += x > (kCodeBook[i] + kCodeBook[i + 1]) * 0.5f;
    return code;
}

// A warp has four blocks of 64, eight weights a lane.
// budget: 40 registers, 0 shared
// claims: LDG.E.128 STG.E
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads)
    nf4_quantise_kernel(const T *weight, uint8_t *codes, float *absmax, int64_t size) {
    const int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kPerThread;
    float values[kPerThread];
    if (ALIGNED && first + kPerThread <= size) {
        const Vec<T, kPerThread> v = load_vec<kPerThread>(weight + first);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
            values[i] = widen(v[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
            values[i] = first + i < size ? widen(weight[first + i]) : 0.0f;
    }
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
        largest = fmaxf(largest, magnitude(values[i]));
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    if (first >= size)
        return;
    const float mine = stored(largest), inverse = inverse_of(mine);
    if (first % kBlock == 0)
        absmax[first / kBlock] = mine;
    Vec<uint8_t, kPerThread / 2> bytes;
#pragma unroll
    for (int i = 0; i < kPerThread / 2; ++i)
        bytes[i] = (uint8_t)(code_of(values[2 * i] * inverse) << 4 | code_of(values[2 * i + 1] * inverse));
    if (first + kPerThread <= size) {
        store_vec(codes + first / 2, bytes);
    } else {
#pragma unroll
        for (int i = 0; i < kPerThread / 2; ++i)
            if (first + 2 * i < size)
                codes[first / 2 + i] = bytes[i];
    }
}

// A block of threads a group, a thread an absolute maximum.
// budget: 32 registers, 32 bytes shared
__global__ void __launch_bounds__((int)kGroup)
    nf4_quantise_absmax_kernel(const float *absmax, const float *offset, uint8_t *codes, float *scales,
                               int64_t blocks) {
    const int64_t i = (int64_t)blockIdx.x * kGroup + threadIdx.x;
    const float x = i < blocks ? absmax[i] - *offset : 0.0f;
    const float scale = stored(block_max<(int)kGroup>(magnitude(x)));
    if (threadIdx.x == 0)
        scales[blockIdx.x] = scale;
    if (i >= blocks)
        return;
    const float normed = x * inverse_of(scale);
    int code = 0; // the number of midpoints that it exceeds
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        if (normed > (kDynamicMap[code + step - 1] + kDynamicMap[code + step]) * 0.5f)
            code += step;
    codes[i] = (uint8_t)code;
}

template <class T>
__device__ void decode(uint32_t codes, float absmax, const float (&table)[16], T *out, int64_t inside) {
    Vec<T, kPerThread> values;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
        narrow(table[codes >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15] * absmax, &values[i]);
    if (inside >= kPerThread) {
        store_vec(out, values);
    } else {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
            if (i < inside)
                out[i] = values[i];
    }
}

// ALIGNED: codes to 4 bytes and out to 16.
// budget: 40 registers, 64 bytes shared
// claims: STG.E.128
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantise_kernel(const uint8_t *codes, Absmax absmax, T *out, int64_t size) {
    LT_SHARED(float[16], table);
    if (threadIdx.x < 16)
        table[threadIdx.x] = kCodeBook[threadIdx.x];
    const int64_t first = ((int64_t)blockIdx.x * kThreads * kHeld + threadIdx.x) * kPerThread;
    constexpr int64_t kStep = (int64_t)kThreads * kPerThread;
    uint32_t held[kHeld] = {};
    float scales[kHeld];
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
        const int64_t at = first + c * kStep;
        if (at >= size)
            continue;
        if (ALIGNED && at + kPerThread <= size)
            held[c] = *(const uint32_t *)(codes + at / 2);
        else
            for (int i = 0; i < kPerThread / 2; ++i)
                if (at + 2 * i < size)
                    held[c] |= (uint32_t)codes[at / 2 + i] << 8 * i;
        scales[c] = absmax_at(absmax, at / kBlock);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kHeld; ++c) {
        const int64_t at = first + c * kStep, left = size - at;
        if (left > 0) {
            if constexpr (ALIGNED)
                decode(held[c], scales[c], table, out + at, left);
            else
                for (int i = 0; i < kPerThread && i < left; ++i)
                    narrow(table[held[c] >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15] * scales[c], out + at + i);
        }
    }
}

struct NF4 {
    static constexpr int kPerLane = 32; // half a block
    struct Chunk {
        Vec<uint32_t, 4> codes;
        float scale;
    };
    const uint8_t *codes;
    Absmax absmax;
    bool aligned;

    __device__ const float *prepare() const {
        LT_SHARED(float[16], table);
        if (threadIdx.x < 16)
            table[threadIdx.x] = kCodeBook[threadIdx.x];
        return table;
    }
    __device__ Chunk load(int64_t row, int64_t column, int64_t inputs) const {
        if (column >= inputs)
            return {};
        const int64_t at = row * inputs + column;
        return {load_codes(codes + at / 2, aligned, 16), absmax_at(absmax, at / kBlock)};
    }
    __device__ float value(const float *table, const Chunk &chunk, int i) const {
        return table[chunk.codes[i / 8] >> (8 * (i % 8 / 2) + (i % 2 ? 0 : 4)) & 15];
    }
};

// budget: 104 registers, 16.5625 KiB shared
// claims: LDG.E.128 LDS.128
template <class T, int TOKENS>
__global__ void __launch_bounds__(kLinearThreads)
    nf4_linear_kernel(NF4 weight, const T *x, int64_t x_stride, const T *bias, T *y, int64_t y_stride, int64_t tokens,
                      int64_t inputs, int64_t outputs) {
    linear_tile<NF4, T, TOKENS>(weight, x, x_stride, bias, y, y_stride, tokens, inputs, outputs);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_nf4_quantise(int dtype, const void *weight, uint8_t *codes, float *absmax, int64_t size,
                                           void *stream) {
    using namespace lt_cuda;
    if (size == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const bool aligned = aligned16(weight, 0);
        return launch(aligned ? nf4_quantise_kernel<T, true> : nf4_quantise_kernel<T, false>,
                      (unsigned)ceil_div(size, (int64_t)kThreads * kPerThread), kThreads, 0, stream, (const T *)weight,
                      codes, absmax, size);
    });
}

extern "C" LT_API int lt_cuda_nf4_quantise_absmax(const float *absmax, const float *offset, uint8_t *codes,
                                                  float *scales, int64_t blocks, void *stream) {
    using namespace lt_cuda;
    if (blocks == 0)
        return 0;
    return launch(nf4_quantise_absmax_kernel, (unsigned)ceil_div(blocks, kGroup), (unsigned)kGroup, 0, stream, absmax,
                  offset, codes, scales, blocks);
}

extern "C" LT_API int lt_cuda_nf4_dequantise(const uint8_t *codes, const float *absmax, const uint8_t *absmax_codes,
                                             const float *absmax_scales, const float *absmax_offset, int dtype,
                                             void *out, int64_t size, void *stream) {
    using namespace lt_cuda;
    if (size == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const bool aligned = (uintptr_t)codes % 4 == 0 && aligned16(out, 0);
        return launch(aligned ? nf4_dequantise_kernel<T, true> : nf4_dequantise_kernel<T, false>,
                      (unsigned)ceil_div(size, (int64_t)kThreads * kPerThread * kHeld), kThreads, 0, stream, codes,
                      Absmax{absmax, absmax_codes, absmax_scales, absmax_offset}, (T *)out, size);
    });
}

extern "C" LT_API int lt_cuda_nf4_linear(int dtype, const void *x, int64_t x_stride, const uint8_t *codes,
                                         const float *absmax, const uint8_t *absmax_codes, const float *absmax_scales,
                                         const float *absmax_offset, const void *bias, void *y, int64_t y_stride,
                                         int64_t rows, int64_t inputs, int64_t outputs, void *stream) {
    using namespace lt_cuda;
    if (rows == 0 || outputs == 0)
        return 0;
    if (inputs % kBlock)
        return (int)cudaErrorInvalidValue;
    const NF4 weight = {codes, {absmax, absmax_codes, absmax_scales, absmax_offset}, aligned16(codes, 0)};
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        return launch_linear(rows, outputs, [&](auto tokens, dim3 grid) {
            return launch(nf4_linear_kernel<T, decltype(tokens)::value>, grid, kLinearThreads, 0, stream, weight,
                          (const T *)x, x_stride, (const T *)bias, (T *)y, y_stride, rows, inputs, outputs);
        });
    });
}
