// LayerNorm on CUDA: a block takes one row at a time and holds it in registers between its passes, so that memory sees
// each row once; what does not fit is read again. Gradients of weight and bias are summed in registers over the rows of
// a block, then over the blocks in a fixed order, without atomics.
#include "../common/cuda_norm.cuh"

namespace lt_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kHeld = 2; // vectors of a row that a thread holds
constexpr int64_t kRowsPerGroup = 32;

template <class T, int N> __device__ float sum_of(const Vec<T, N> &x) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        total += widen(x[i]);
    return total;
}

// Adds the sum of the differences from `mean`, and of their squares.
template <class T, int N> __device__ void add_moments(const Vec<T, N> &x, float mean, float &sum, float &squares) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float d = widen(x[i]) - mean;
        sum += d;
        squares += d * d;
    }
}

template <class T, class U, int N>
__device__ void normalise(const Vec<T, N> &x, float mean, float rstd, const U *weight, const U *bias, T *y, int64_t h) {
    const Vec<U, N> w = load_vec<N>(weight + h);
    Vec<U, N> b;
    if (bias)
        b = load_vec<N>(bias + h);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float v = (widen(x[i]) - mean) * rstd * widen(w[i]);
        narrow(bias ? v + widen(b[i]) : v, &result[i]);
    }
    store_vec(y + h, result);
}

// With s, x + residual is stored there and takes x's place; s may be x or residual, as each thread writes only what it
// alone has read.
// budget: 96 registers, 64 bytes shared
// claims: LDG.128 STG.128
template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads, 1)
    layer_norm_forward_kernel(const T *x, int64_t x_stride, const T *residual, int64_t residual_stride, T *s,
                              int64_t s_stride, const U *weight, const U *bias, T *y, int64_t y_stride, float *mean,
                              float *rstd, int64_t rows, int64_t cols, float eps) {
    const int64_t step = (int64_t)blockDim.x * N, first = (int64_t)threadIdx.x * N, rest = first + kHeld * step;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x_row = x + row * x_stride, *residual_row = residual + row * residual_stride;
        T *s_row = s + row * s_stride, *y_row = y + row * y_stride;
        Vec<T, N> held[kHeld], added[kHeld];
        float total = 0;
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
                total += sum_of(held[c]);
            }
        for (int64_t h = rest; h < cols; h += step) {
            Vec<T, N> v = load_vec<N>(x_row + h);
            if (s) {
                add_to(v, load_vec<N>(residual_row + h));
                store_vec(s_row + h, v);
            }
            total += sum_of(v);
        }
        const T *summed = s ? s_row : x_row;
        // The first mean is rounded where it is large; the differences from it give the rest of it, and the variance.
        const float about = block_sum<kThreads>(total) / (float)cols;
        float sum = 0, squares = 0;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols)
                add_moments(held[c], about, sum, squares);
        for (int64_t h = rest; h < cols; h += step)
            add_moments(load_vec<N>(summed + h), about, sum, squares);
        const float correction = block_sum<kThreads>(sum) / (float)cols, m = about + correction;
        const float variance = block_sum<kThreads>(squares) / (float)cols - correction * correction;
        const float r = rsqrtf(fmaxf(variance, 0.0f) + eps);
        if (threadIdx.x == 0) {
            mean[row] = m;
            rstd[row] = r;
        }
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols)
                normalise(held[c], m, r, weight, bias, y_row, first + c * step);
        for (int64_t h = rest; h < cols; h += step)
            normalise(load_vec<N>(summed + h), m, r, weight, bias, y_row, h);
    }
}

// Adds the sums of g = dy * weight and of g * (x - mean).
template <class T, class U, int N>
__device__ void add_dots(const Vec<T, N> &dy, const Vec<T, N> &x, const U *weight, float mean, float &g_sum,
                         float &gx_sum, int64_t h) {
    const Vec<U, N> w = load_vec<N>(weight + h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float g = widen(dy[i]) * widen(w[i]);
        g_sum += g;
        gx_sum += g * (widen(x[i]) - mean);
    }
}

struct Row { // what turns dy into dx: dx = (dy * weight - g_mean - (x - mean) * slope) * rstd
    float mean, rstd, g_mean, slope;
};

template <class T, class U, int N>
__device__ void input_gradient(const Vec<T, N> &dy, const Vec<T, N> &x, const U *weight, const Row &row,
                               const T *residual, T *dx, int64_t h) {
    const Vec<U, N> w = load_vec<N>(weight + h);
    Vec<T, N> added, result;
    if (residual)
        added = load_vec<N>(residual + h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float g = widen(dy[i]) * widen(w[i]);
        const float v = (g - row.g_mean - (widen(x[i]) - row.mean) * row.slope) * row.rstd;
        narrow(residual ? v + widen(added[i]) : v, &result[i]);
    }
    store_vec(dx + h, result);
}

// Block g takes the rows g, g + gridDim.x, ... With SUMS a row fits the registers, and partials [2, gridDim.x, cols]
// become the sums of dy * n and of dy over these rows. dx may be dy or residual: each thread writes only what it alone
// has read.
// budget: 128 registers, 64 bytes shared
// claims: LDG.128 STG.128
template <class T, class U, int N, bool SUMS>
__global__ void __launch_bounds__(kThreads, 1)
    layer_norm_backward_kernel(const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, const U *weight,
                               const float *mean, const float *rstd, const T *residual, int64_t residual_stride, T *dx,
                               int64_t dx_stride, float *partials, int64_t rows, int64_t cols) {
    const int64_t step = (int64_t)blockDim.x * N, first = (int64_t)threadIdx.x * N, rest = first + kHeld * step;
    Vec<float, N> weight_sums[kHeld] = {}, bias_sums[kHeld] = {};
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *dy_row = dy + row * dy_stride, *x_row = x + row * x_stride;
        const T *residual_row = residual ? residual + row * residual_stride : nullptr;
        T *dx_row = dx + row * dx_stride;
        Row r = {mean[row], rstd[row], 0, 0};
        Vec<T, N> dy_held[kHeld], x_held[kHeld];
        float g_sum = 0, gx_sum = 0;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                dy_held[c] = load_vec<N>(dy_row + first + c * step);
                x_held[c] = load_vec<N>(x_row + first + c * step);
            }
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                add_dots(dy_held[c], x_held[c], weight, r.mean, g_sum, gx_sum, first + c * step);
                if constexpr (SUMS)
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        weight_sums[c][i] += widen(dy_held[c][i]) * ((widen(x_held[c][i]) - r.mean) * r.rstd);
                        bias_sums[c][i] += widen(dy_held[c][i]);
                    }
            }
        if constexpr (!SUMS)
            for (int64_t h = rest; h < cols; h += step)
                add_dots(load_vec<N>(dy_row + h), load_vec<N>(x_row + h), weight, r.mean, g_sum, gx_sum, h);
        r.g_mean = block_sum<kThreads>(g_sum) / (float)cols;
        r.slope = block_sum<kThreads>(gx_sum) / (float)cols * r.rstd * r.rstd;
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols)
                input_gradient(dy_held[c], x_held[c], weight, r, residual_row, dx_row, first + c * step);
        if constexpr (!SUMS)
            for (int64_t h = rest; h < cols; h += step)
                input_gradient(load_vec<N>(dy_row + h), load_vec<N>(x_row + h), weight, r, residual_row, dx_row, h);
    }
    if constexpr (SUMS)
#pragma unroll
        for (int c = 0; c < kHeld; ++c)
            if (first + c * step < cols) {
                store_vec(partials + blockIdx.x * cols + first + c * step, weight_sums[c]);
                store_vec(partials + ((int64_t)gridDim.x + blockIdx.x) * cols + first + c * step, bias_sums[c]);
            }
}

// The same partial sums where a row does not fit the registers. Grid: (blocks of columns, groups of rows).
// budget: 40 registers, 0 shared
template <class T>
__global__ void __launch_bounds__(kThreads)
    layer_norm_partials_kernel(const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, const float *mean,
                               const float *rstd, float *partials, int64_t rows, int64_t cols) {
    const int64_t h = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (h >= cols)
        return;
    float weight_sum = 0, bias_sum = 0;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const float d = widen(dy[row * dy_stride + h]);
        weight_sum += d * ((widen(x[row * x_stride + h]) - mean[row]) * rstd[row]);
        bias_sum += d;
    }
    partials[blockIdx.y * cols + h] = weight_sum;
    partials[((int64_t)gridDim.y + blockIdx.y) * cols + h] = bias_sum;
}

// Grid: (blocks of columns, 2): dweight and dbias, of which either may be null.
// budget: 40 registers, 4.125 KiB shared
__global__ void __launch_bounds__(kSumColumns *kSumGroups)
    layer_norm_sum_partials_kernel(const float *partials, float *dweight, float *dbias, int64_t groups, int64_t cols) {
    float *total = blockIdx.y == 0 ? dweight : dbias;
    if (total) // the same for the whole block
        add_partials(partials + blockIdx.y * groups * cols, total, groups, cols);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_add_layer_norm_forward(int dtype, const void *x, int64_t x_stride, const void *residual,
                                                     int64_t residual_stride, void *s, int64_t s_stride,
                                                     int weight_dtype, const void *weight, const void *bias, void *y,
                                                     int64_t y_stride, float *mean, float *rstd, int64_t rows,
                                                     int64_t cols, float eps, void *stream) {
    using namespace lt_cuda;
    if (rows == 0)
        return 0;
    const auto aligned = [&](int64_t bytes) {
        return aligned16(x, x_stride * bytes) && aligned16(residual, residual_stride * bytes) &&
               aligned16(s, s_stride * bytes) && aligned16(weight, 0) && aligned16(bias, 0) &&
               aligned16(y, y_stride * bytes);
    };
    return with_types(dtype, weight_dtype, cols, aligned, [&](auto t, auto u, auto n) {
        using T = decltype(t);
        using U = decltype(u);
        constexpr int N = decltype(n)::value;
        return launch(layer_norm_forward_kernel<T, U, N>, (unsigned)std::min(rows, kMaxBlocks),
                      threads_for(cols / N, kThreads), 0, stream, (const T *)x, x_stride, (const T *)residual,
                      residual_stride, (T *)s, s_stride, (const U *)weight, (const U *)bias, (T *)y, y_stride, mean,
                      rstd, rows, cols, eps);
    });
}

extern "C" LT_API int lt_cuda_layer_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype,
                                                 const void *weight, const void *bias, void *y, int64_t y_stride,
                                                 float *mean, float *rstd, int64_t rows, int64_t cols, float eps,
                                                 void *stream) {
    return lt_cuda_add_layer_norm_forward(dtype, x, x_stride, nullptr, 0, nullptr, 0, weight_dtype, weight, bias, y,
                                          y_stride, mean, rstd, rows, cols, eps, stream);
}

extern "C" LT_API int lt_cuda_layer_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x,
                                                  int64_t x_stride, int weight_dtype, const void *weight,
                                                  const float *mean, const float *rstd, const void *residual,
                                                  int64_t residual_stride, void *dx, int64_t dx_stride, float *dweight,
                                                  float *dbias, float *partials, int64_t rows, int64_t cols,
                                                  void *stream) {
    using namespace lt_cuda;
    if (rows == 0) {
        for (float *total : {dweight, dbias})
            if (total)
                if (int failed = (int)cudaMemsetAsync(total, 0, cols * sizeof(float), (cudaStream_t)stream))
                    return failed;
        return 0;
    }
    const bool sums = dweight || dbias;
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
                          x_stride, (const U *)weight, mean, rstd, (const T *)residual, residual_stride, (T *)dx,
                          dx_stride, partials, rows, cols);
        };
        if (sums && cols <= (int64_t)kHeld * threads * N)
            return backward(layer_norm_backward_kernel<T, U, N, true>, groups);
        if (sums) { // before dx is written, as dx may be dy
            const dim3 grid((unsigned)ceil_div(cols, kThreads), (unsigned)groups);
            if (int failed = launch(layer_norm_partials_kernel<T>, grid, kThreads, 0, stream, (const T *)dy, dy_stride,
                                    (const T *)x, x_stride, mean, rstd, partials, rows, cols))
                return failed;
        }
        return backward(layer_norm_backward_kernel<T, U, N, false>, std::min(rows, kMaxBlocks));
    });
    if (status || !sums)
        return status;
    return launch(layer_norm_sum_partials_kernel, dim3((unsigned)ceil_div(cols, kSumColumns), 2),
                  dim3(kSumColumns, kSumGroups), 0, stream, partials, dweight, dbias, groups, cols);
}
