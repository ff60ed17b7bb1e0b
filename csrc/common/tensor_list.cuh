// Lists of tensors on CUDA: one launch for all, a block of threads for each piece. A thread takes eight elements at a
// time; parameters and gradients of any storage type reach the update as fp32 and go back as the header says. The
// storage type is the same for a whole block of threads, so that asking for it costs a branch that nobody diverges
// from.
#pragma once

#include "cuda_kernel.cuh"
#include "philox.h"

namespace lt_cuda {

constexpr int kListThreads = 256;
constexpr int kRun = 8; // elements a thread takes together: two accesses of 16 bytes in fp32, one in half precision

// f(T{}) for the storage type T that `dtype` names, on the device.
template <class F> __device__ inline void with_storage_type(int64_t dtype, F f) {
    if (dtype == LT_F32)
        f(float{});
    else if (dtype == LT_BF16)
        f(__nv_bfloat16{});
    else
        f(__half{});
}

struct Span { // a block's piece
    int64_t begin, size;
    bool aligned; // every array of the tensor starts at a multiple of 16 bytes
};

// An address that came out of memory, of which the compiler cannot see that it is one of global memory.
template <class T> __device__ inline T *global(T *pointer) {
#if !defined(LT_CUDA_HOST)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

__device__ inline bool is_aligned(const void *pointer) { return (uintptr_t)pointer % 16 == 0; }

__device__ inline Span span_of(const lt_parameter &t, const lt_piece &piece) {
    const int64_t left = t.size - piece.begin;
    bool aligned = is_aligned(t.data) && is_aligned(t.master) && is_aligned(t.grad);
    for (int k = 0; k < 4; ++k)
        aligned = aligned && is_aligned(t.states[k]);
    return {piece.begin, left < LT_PIECE ? left : (int64_t)LT_PIECE, aligned};
}

// store_vec that stays one access of 16 bytes: past the branches on the storage type nvcc splits a plain one again.
template <class T, int N> __device__ inline void store_whole(T *x, const Vec<T, N> &run) {
#if defined(LT_CUDA_HOST)
    store_vec(x, run);
#else
    typedef typename Vec<T, N>::word word;
#pragma unroll
    for (int i = 0; i < Vec<T, N>::kWords; ++i) {
        word w;
        memcpy(&w, (const char *)&run + i * sizeof w, sizeof w);
        __stwb((word *)x + i, w);
    }
#endif
}

// kRun elements from number `i` on, of which the first n exist; the others are zero.
template <class T> __device__ inline void load_run(const T *from, int64_t i, int n, bool aligned, float *values) {
    const T *const x = global(from);
    if (aligned && n == kRun) {
        const Vec<T, kRun> run = load_vec<kRun>(x + i);
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            values[k] = widen(run[k]);
    } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            values[k] = k < n ? widen(x[i + k]) : 0.0f;
    }
}

template <class T> __device__ inline void store_run(T *to, int64_t i, int n, bool aligned, const float *values) {
    T *const x = global(to);
    if (aligned && n == kRun) {
        Vec<T, kRun> run;
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            narrow(values[k], &run[k]);
        store_whole(x + i, run);
    } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (k < n)
                narrow(values[k], x + i + k);
    }
}

__device__ inline void load_run_of(const void *x, int64_t dtype, int64_t i, int n, bool aligned, float *values) {
    with_storage_type(dtype, [&](auto t) { load_run((const decltype(t) *)x, i, n, aligned, values); });
}

// The parameter: its master where it has one.
__device__ inline void load_value(const lt_parameter &t, int64_t i, int n, bool aligned, float *values) {
    if (t.master)
        load_run(t.master, i, n, aligned, values);
    else
        load_run_of(t.data, t.dtype, i, n, aligned, values);
}

// bf16 as its bits, rounded up or down by the 16 random bits of each element; i is a multiple of eight.
__device__ inline void store_stochastically(__nv_bfloat16 *data, int64_t tensor, int64_t i, int n, bool aligned,
                                            int64_t step, uint64_t seed, const float *values) {
    uint32_t words[4];
    philox((uint64_t)i / 8, (uint32_t)tensor, (uint32_t)step, seed, words);
    Vec<uint16_t, kRun> run;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
        const uint32_t bits = __float_as_uint(values[k]), noise = words[k / 2] >> (k % 2 * 16) & 0xffff;
        run[k] = (uint16_t)(values[k] != values[k] ? (bits >> 16) | 0x40 : (bits + noise) >> 16);
    }
    uint16_t *const to = global((uint16_t *)data) + i;
    if (aligned && n == kRun) {
        store_whole(to, run);
    } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (k < n)
                to[k] = run[k];
    }
}

__device__ inline void store_value(const lt_parameter &t, int64_t tensor, int64_t i, int n, bool aligned, int64_t step,
                                   uint64_t seed, const float *values) {
    if (t.dtype == LT_F32) {
        store_run((float *)t.data, i, n, aligned, values);
    } else if (!t.master) {
        store_stochastically((__nv_bfloat16 *)t.data, tensor, i, n, aligned, step, seed, values);
    } else {
        store_run(t.master, i, n, aligned, values);
        if (t.dtype == LT_BF16)
            store_run((__nv_bfloat16 *)t.data, i, n, aligned, values);
        else
            store_run((__half *)t.data, i, n, aligned, values);
    }
}

// body(i, n) for each run of the piece that is this thread's: n elements from number i of the tensor on.
template <class F> __device__ inline void for_each_run(const Span &span, F body) {
    for (int64_t at = (int64_t)threadIdx.x * kRun; at < span.size; at += (int64_t)kListThreads * kRun)
        body(span.begin + at, (int)(span.size - at < kRun ? span.size - at : (int64_t)kRun));
}

} // namespace lt_cuda
