// What the norms share on CUDA: the choice of types and threads, and partial sums of the parameters' gradients.
#pragma once

#include "cuda_kernel.cuh"

namespace lt_cuda {

constexpr int64_t kMaxBlocks = 2048; // enough to fill a device; each then goes from row to row

// Blocks of a backward pass that sums gradients of parameters, each over `rows_each` rows or more, so that the partial
// sums are few beside what is read.
inline int64_t norm_groups(int64_t rows, int64_t rows_each) {
    return std::min<int64_t>(1024, ceil_div(rows, rows_each));
}

// A thread for each vector of the row, in whole warps, up to `most`.
inline unsigned threads_for(int64_t vectors, int most) {
    return (unsigned)std::clamp<int64_t>(ceil_div(vectors, 32) * 32, 32, most);
}

// f(T{}, U{}, N) for the types of x and of the weight, which is as x or fp32, and the number of elements an access
// takes: as many as 16 bytes hold where aligned(sizeof(T)) says that all rows allow it, else one.
template <class Aligned, class F> int with_types(int dtype, int weight_dtype, int64_t cols, Aligned aligned, F f) {
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const auto with_weight = [&](auto u) {
            if (cols % kVector<T> == 0 && aligned((int64_t)sizeof(T)))
                return f(t, u, std::integral_constant<int, kVector<T>>{});
            return f(t, u, std::integral_constant<int, 1>{});
        };
        if (weight_dtype == dtype)
            return with_weight(t);
        return weight_dtype == LT_F32 ? with_weight(float{}) : (int)cudaErrorInvalidValue;
    });
}

// x becomes x + residual, rounded to T.
template <class T, int N> __device__ inline void add_to(Vec<T, N> &x, const Vec<T, N> &residual) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        narrow(widen(x[i]) + widen(residual[i]), &x[i]);
}

constexpr int kSumColumns = 32, kSumGroups = 32; // threads of a block that adds partial sums

// total[h] = sum over the groups of partials[group, h], in a fixed order. Grid: blocks of kSumColumns columns.
__device__ inline void add_partials(const float *partials, float *total, int64_t groups, int64_t cols) {
    LT_SHARED(float[kSumGroups][kSumColumns + 1], sums);
    const int64_t h = (int64_t)blockIdx.x * kSumColumns + threadIdx.x;
    float sum = 0;
    if (h < cols)
        for (int64_t g = threadIdx.y; g < groups; g += kSumGroups)
            sum += partials[g * cols + h];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && h < cols) {
        sum = 0;
        for (int g = 0; g < kSumGroups; ++g)
            sum += sums[g][threadIdx.x];
        total[h] = sum;
    }
}

} // namespace lt_cuda
