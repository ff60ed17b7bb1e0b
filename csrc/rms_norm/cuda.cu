// RMSNorm on CUDA: one block a row; the weight gradient by partial sums over fixed groups of rows, no atomics.
// Compiled for sm_80, sm_90 and sm_100; not yet run on a device (see README, Limits).
#include "../common/cuda_kernel.cuh"

using namespace lt_cuda;

namespace {

constexpr int kThreads = 256;
constexpr int64_t kRowsPerPartial = 256; // as in cpu.cpp

template <class T, class U>
__global__ void __launch_bounds__(kThreads) forward(const T *x, int64_t x_stride, const U *weight, T *y,
                                                    int64_t y_stride, float *rstd, int64_t cols, float eps) {
    const int64_t row = blockIdx.x;
    x += row * x_stride;
    y += row * y_stride;
    float squares = 0;
    for (int64_t h = threadIdx.x; h < cols; h += kThreads)
        squares += widen(x[h]) * widen(x[h]);
    const float r = rsqrtf(block_sum<kThreads>(squares) / (float)cols + eps);
    if (threadIdx.x == 0)
        rstd[row] = r;
    for (int64_t h = threadIdx.x; h < cols; h += kThreads)
        narrow(widen(x[h]) * r * widen(weight[h]), y + h);
}

template <class T, class U>
__global__ void __launch_bounds__(kThreads)
    backward(const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, const U *weight, const float *rstd,
             const T *residual, int64_t residual_stride, T *dx, int64_t dx_stride, int64_t cols) {
    const int64_t row = blockIdx.x;
    dy += row * dy_stride;
    x += row * x_stride;
    dx += row * dx_stride;
    const float r = rstd[row];
    float dot = 0;
    for (int64_t h = threadIdx.x; h < cols; h += kThreads)
        dot += widen(dy[h]) * widen(weight[h]) * widen(x[h]);
    const float correction = block_sum<kThreads>(dot) * r * r * r / (float)cols;
    for (int64_t h = threadIdx.x; h < cols; h += kThreads) {
        float g = widen(dy[h]) * widen(weight[h]) * r - widen(x[h]) * correction;
        if (residual)
            g += widen(residual[row * residual_stride + h]);
        narrow(g, dx + h);
    }
}

// grid (column blocks, groups of rows): partials[group, h] = sum over the group's rows of dy * x * rstd.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_partials(const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, const float *rstd, float *partials,
                    int64_t rows, int64_t cols) {
    const int64_t h = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (h >= cols)
        return;
    const int64_t begin = (int64_t)blockIdx.y * kRowsPerPartial;
    const int64_t end = begin + kRowsPerPartial < rows ? begin + kRowsPerPartial : rows;
    float total = 0;
    for (int64_t t = begin; t < end; ++t)
        total += widen(dy[t * dy_stride + h]) * widen(x[t * x_stride + h]) * rstd[t];
    partials[blockIdx.y * cols + h] = total;
}

__global__ void __launch_bounds__(kThreads)
    sum_partials(const float *partials, float *dweight, int64_t groups, int64_t cols) {
    const int64_t h = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (h >= cols)
        return;
    float total = 0;
    for (int64_t g = 0; g < groups; ++g)
        total += partials[g * cols + h];
    dweight[h] = total;
}

} // namespace

extern "C" LT_API int lt_cuda_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype,
                                               const void *weight, void *y, int64_t y_stride, float *rstd, int64_t rows,
                                               int64_t cols, float eps, void *stream) {
    if (rows == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        return with_dtype(weight_dtype, [&](auto u) {
            using T = decltype(t);
            using U = decltype(u);
            forward<T, U><<<(unsigned)rows, kThreads, 0, (cudaStream_t)stream>>>(
                (const T *)x, x_stride, (const U *)weight, (T *)y, y_stride, rstd, cols, eps);
            return launched();
        });
    });
}

// `partials` holds ceil(rows / 256) * cols floats where dweight is asked for.
extern "C" LT_API int lt_cuda_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x,
                                                int64_t x_stride, int weight_dtype, const void *weight,
                                                const float *rstd, const void *residual, int64_t residual_stride,
                                                void *dx, int64_t dx_stride, float *dweight, float *partials,
                                                int64_t rows, int64_t cols, void *stream) {
    const cudaStream_t s = (cudaStream_t)stream;
    if (rows == 0)
        return dweight ? (int)cudaMemsetAsync(dweight, 0, cols * sizeof(float), s) : 0;
    return with_dtype(dtype, [&](auto t) {
        return with_dtype(weight_dtype, [&](auto u) {
            using T = decltype(t);
            using U = decltype(u);
            const unsigned columns = (unsigned)((cols + kThreads - 1) / kThreads);
            const unsigned groups = (unsigned)((rows + kRowsPerPartial - 1) / kRowsPerPartial);
            if (dweight) { // before dx is written: dx may be dy
                weight_partials<T><<<dim3(columns, groups), kThreads, 0, s>>>((const T *)dy, dy_stride, (const T *)x,
                                                                              x_stride, rstd, partials, rows, cols);
                sum_partials<<<columns, kThreads, 0, s>>>(partials, dweight, groups, cols);
            }
            backward<T, U><<<(unsigned)rows, kThreads, 0, s>>>((const T *)dy, dy_stride, (const T *)x, x_stride,
                                                               (const U *)weight, rstd, (const T *)residual,
                                                               residual_stride, (T *)dx, dx_stride, cols);
            return launched();
        });
    });
}
