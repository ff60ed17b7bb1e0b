// RMSNorm on CUDA: a block takes one row at a time and holds it in registers between the two passes, so that memory
// sees each row once; what does not fit is read again. The weight gradient is summed in registers over the rows of a
// block, then over the blocks in a fixed order, without atomics.
#include "../common/cuda_norm.cuh"

namespace lt_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4; // vectors of a row that a thread holds
constexpr int64_t kRowsPerGroup = 16;

template <class T, int N> __device__ float sum_of_squares(const Vec<T, N> &x) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        total += widen(x[i]) * widen(x[i]);
    return total;
}

template <class T, class U, int N>
__device__ void scale(const Vec<T, N> &x, float rstd, const U *weight, T *y, int64_t h) {
    const Vec<U, N> w = load_vec<N>(weight + h);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i)
        narrow(widen(x[i]) * rstd * widen(w[i]), &result[i]);
    store_vec(y + h, result);
}

// With s, x + residual is stored there and takes x's place; s may be x or residual, as each thread writes only what it
// alone has read.
// budget: 80 registers, 32 bytes shared
// claims: LDG.128 STG.128
template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads, 3)
    rms_norm_forward_kernel(const T *x, int64_t x_stride, const T *residual, int64_t residual_stride, T *s,
                            int64_t s_stride, const U *weight, T *y, int64_t y_stride, float *rstd, int64_t rows,
                            int64_t cols, float eps) {
    const int64_t step = (int64_t)blockDim.x * N, first = (int64_t)threadIdx.x * N, rest = first + kHeld * step;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x_row = x + row * x_stride, *residual_row = residual + row * residual_stride;
        T *s_row = s + row * s_stride, *y_row = y + row * y_stride;
        Vec<T, N> held[kHeld], added[kHeld];
        float squares = 0;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                held[c] = load_vec<N>(x_row + first + c * step);
                if (s)
                    added[c] = load_vec<N>(residual_row + first + c * step);
            }
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                if (s) {
                    add_to(held[c], added[c]);
                    store_vec(s_row + first + c * step, held[c]);
                }
                squares += sum_of_squares(held[c]);
            }
        for (int64_t h = rest; h < cols; h += step) {
            Vec<T, N> v = load_vec<N>(x_row + h);
            if (s) {
                add_to(v, load_vec<N>(residual_row + h));
                store_vec(s_row + h, v);
            }
            squares += sum_of_squares(v);
        }
        const float r = rsqrtf(block_sum<kThreads>(squares) / (float)cols + eps);
        if (threadIdx.x == 0)
            rstd[row] = r;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols)
                scale(held[c], r, weight, y_row, first + c * step);
        for (int64_t h = rest; h < cols; h += step)
            scale(load_vec<N>((s ? s_row : x_row) + h), r, weight, y_row, h);
    }
}

template <class T, class U, int N>
__device__ float dot(const Vec<T, N> &dy, const Vec<T, N> &x, const U *weight, int64_t h) {
    const Vec<U, N> w = load_vec<N>(weight + h);
    float total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        total += widen(dy[i]) * widen(w[i]) * widen(x[i]);
    return total;
}

// dx = dy * weight * rstd - x * correction (+ residual)
template <class T, class U, int N>
__device__ void input_gradient(const Vec<T, N> &dy, const Vec<T, N> &x, const U *weight, float rstd, float correction,
                               const T *residual, T *dx, int64_t h) {
    const Vec<U, N> w = load_vec<N>(weight + h);
    Vec<T, N> added, result;
    if (residual)
        added = load_vec<N>(residual + h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float g = widen(dy[i]) * widen(w[i]) * rstd - widen(x[i]) * correction;
        narrow(residual ? g + widen(added[i]) : g, &result[i]);
    }
    store_vec(dx + h, result);
}

// Block g takes the rows g, g + gridDim.x, ... With DWEIGHT a row fits the registers, and partials[g, h] becomes the
// sum of dy * x * rstd over these rows. dx may be dy or residual: each thread writes only what it alone has read.
// budget: 128 registers, 32 bytes shared
// claims: LDG.128 STG.128
template <class T, class U, int N, bool DWEIGHT>
__global__ void __launch_bounds__(kThreads, 2)
    rms_norm_backward_kernel(const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, const U *weight,
                             const float *rstd, const T *residual, int64_t residual_stride, T *dx, int64_t dx_stride,
                             float *partials, int64_t rows, int64_t cols) {
    const int64_t step = (int64_t)blockDim.x * N, first = (int64_t)threadIdx.x * N, rest = first + kHeld * step;
    Vec<float, N> sums[kHeld] = {};
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *dy_row = dy + row * dy_stride, *x_row = x + row * x_stride;
        const T *residual_row = residual ? residual + row * residual_stride : nullptr;
        T *dx_row = dx + row * dx_stride;
        const float r = rstd[row];
        Vec<T, N> dy_held[kHeld], x_held[kHeld];
        float total = 0;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                dy_held[c] = load_vec<N>(dy_row + first + c * step);
                x_held[c] = load_vec<N>(x_row + first + c * step);
            }
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                total += dot(dy_held[c], x_held[c], weight, first + c * step);
                if constexpr (DWEIGHT)
#pragma unroll
                    for (int i = 0; i < N; ++i)
                        sums[c][i] += widen(dy_held[c][i]) * widen(x_held[c][i]) * r;
            }
        if constexpr (!DWEIGHT)
            for (int64_t h = rest; h < cols; h += step)
                total += dot(load_vec<N>(dy_row + h), load_vec<N>(x_row + h), weight, h);
        const float correction = block_sum<kThreads>(total) * r * r * r / (float)cols;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols)
                input_gradient(dy_held[c], x_held[c], weight, r, correction, residual_row, dx_row, first + c * step);
        if constexpr (!DWEIGHT)
            for (int64_t h = rest; h < cols; h += step)
                input_gradient(load_vec<N>(dy_row + h), load_vec<N>(x_row + h), weight, r, correction, residual_row,
                               dx_row, h);
    }
    if constexpr (DWEIGHT)
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols)
                store_vec(partials + blockIdx.x * cols + first + c * step, sums[c]);
}

// The same partial sums where a row does not fit the registers. Grid: (blocks of columns, groups of rows).
// budget: 40 registers, 0 shared
template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_weight_partials_kernel(const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, const float *rstd,
                                    float *partials, int64_t rows, int64_t cols) {
    const int64_t h = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (h >= cols)
        return;
    float total = 0;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
        total += widen(dy[row * dy_stride + h]) * widen(x[row * x_stride + h]) * rstd[row];
    partials[blockIdx.y * cols + h] = total;
}

// budget: 40 registers, 4.125 KiB shared
__global__ void __launch_bounds__(kSumColumns *kSumGroups)
    rms_norm_sum_partials_kernel(const float *partials, float *dweight, int64_t groups, int64_t cols) {
    add_partials(partials, dweight, groups, cols);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_add_rms_norm_forward(int dtype, const void *x, int64_t x_stride, const void *residual,
                                                   int64_t residual_stride, void *s, int64_t s_stride, int weight_dtype,
                                                   const void *weight, void *y, int64_t y_stride, float *rstd,
                                                   int64_t rows, int64_t cols, float eps, void *stream) {
    using namespace lt_cuda;
    if (rows == 0)
        return 0;
    const auto aligned = [&](int64_t bytes) {
        return aligned16(x, x_stride * bytes) && aligned16(residual, residual_stride * bytes) &&
               aligned16(s, s_stride * bytes) && aligned16(weight, 0) && aligned16(y, y_stride * bytes);
    };
    return with_types(dtype, weight_dtype, cols, aligned, [&](auto t, auto u, auto n) {
        using T = decltype(t);
        using U = decltype(u);
        constexpr int N = decltype(n)::value;
        return launch(rms_norm_forward_kernel<T, U, N>, (unsigned)std::min(rows, kMaxBlocks),
                      threads_for(cols / N, kThreads), 0, stream, (const T *)x, x_stride, (const T *)residual,
                      residual_stride, (T *)s, s_stride, (const U *)weight, (T *)y, y_stride, rstd, rows, cols, eps);
    });
}

extern "C" LT_API int lt_cuda_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype,
                                               const void *weight, void *y, int64_t y_stride, float *rstd, int64_t rows,
                                               int64_t cols, float eps, void *stream) {
    return lt_cuda_add_rms_norm_forward(dtype, x, x_stride, nullptr, 0, nullptr, 0, weight_dtype, weight, y, y_stride,
                                        rstd, rows, cols, eps, stream);
}

extern "C" LT_API int lt_cuda_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x,
                                                int64_t x_stride, int weight_dtype, const void *weight,
                                                const float *rstd, const void *residual, int64_t residual_stride,
                                                void *dx, int64_t dx_stride, float *dweight, float *partials,
                                                int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (rows == 0)
        return dweight ? (int)cudaMemsetAsync(dweight, 0, cols * sizeof(float), (cudaStream_t)stream) : 0;
    const int64_t groups = norm_groups(rows, kRowsPerGroup);
    const auto aligned = [&](int64_t bytes) {
        return aligned16(dy, dy_stride * bytes) && aligned16(x, x_stride * bytes) && aligned16(weight, 0) &&
               aligned16(residual, residual_stride * bytes) && aligned16(dx, dx_stride * bytes) &&
               aligned16(partials, 0);
    };
    const int status = with_types(dtype, weight_dtype, cols, aligned, [&](auto t, auto u, auto n) {
        using T = decltype(t);
        using U = decltype(u);
        constexpr int N = decltype(n)::value;
        const unsigned threads = threads_for(cols / N, kThreads);
        const auto backward = [&](auto kernel, int64_t blocks) {
            return launch(kernel, (unsigned)blocks, threads, 0, stream, (const T *)dy, dy_stride, (const T *)x,
                          x_stride, (const U *)weight, rstd, (const T *)residual, residual_stride, (T *)dx, dx_stride,
                          partials, rows, cols);
        };
        if (dweight && cols <= (int64_t)kHeld * threads * N)
            return backward(rms_norm_backward_kernel<T, U, N, true>, groups);
        if (dweight) { // before dx is written, as dx may be dy
            const dim3 grid((unsigned)ceil_div(cols, kThreads), (unsigned)groups);
            if (int failed = launch(rms_norm_weight_partials_kernel<T>, grid, kThreads, 0, stream, (const T *)dy,
                                    dy_stride, (const T *)x, x_stride, rstd, partials, rows, cols))
                return failed;
        }
        return backward(rms_norm_backward_kernel<T, U, N, false>, std::min(rows, kMaxBlocks));
    });
    if (status || !dweight)
        return status;
    return launch(rms_norm_sum_partials_kernel, (unsigned)ceil_div(cols, kSumColumns), dim3(kSumColumns, kSumGroups), 0,
                  stream, partials, dweight, groups, cols);
}
