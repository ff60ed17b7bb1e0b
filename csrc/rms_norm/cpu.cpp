// RMSNorm. T rows of H columns; one row stays in cache between its two passes, so memory sees it once.
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

template <class T> float sum_of_squares(const T *x, int64_t cols) {
    vf a = {}, b = {};
    int64_t h = 0;
    for (; h + 2 * W <= cols; h += 2 * W) {
        const vf u = load(x + h), v = load(x + h + W);
        a += u * u;
        b += v * v;
    }
    for (; h + W <= cols; h += W) {
        const vf u = load(x + h);
        a += u * u;
    }
    const vf tail = load_part(x + h, cols - h);
    return sum(a + b + tail * tail);
}

template <class T, class U> void scale_row(const T *x, const U *weight, float rstd, T *y, int64_t cols) {
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        store(y + h, load(x + h) * rstd * load(weight + h));
    for (; h < cols; ++h)
        narrow(widen(x[h]) * rstd * widen(weight[h]), y + h);
}

template <class T, class U>
void backward_row(const T *dy, const T *x, const U *weight, float rstd, const T *residual, T *dx, int64_t cols) {
    vf dot = {};
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        dot += load(dy + h) * load(weight + h) * load(x + h);
    dot += load_part(dy + h, cols - h) * load_part(weight + h, cols - h) * load_part(x + h, cols - h);
    const float correction = sum(dot) * rstd * rstd * rstd / (float)cols;
    for (h = 0; h + W <= cols; h += W) {
        vf g = load(dy + h) * load(weight + h) * rstd - load(x + h) * correction;
        if (residual)
            g += load(residual + h);
        store(dx + h, g);
    }
    for (; h < cols; ++h) {
        float g = widen(dy[h]) * widen(weight[h]) * rstd - widen(x[h]) * correction;
        if (residual)
            g += widen(residual[h]);
        narrow(g, dx + h);
    }
}

template <class T> void add_weight_gradient(const T *dy, const T *x, float rstd, float *dweight, int64_t cols) {
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        store(dweight + h, load(dweight + h) + load(dy + h) * load(x + h) * rstd);
    for (; h < cols; ++h)
        dweight[h] += widen(dy[h]) * widen(x[h]) * rstd;
}

// Rows per partial sum of dweight: fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kRowsPerPartial = 256;
constexpr int64_t kRowsPerChunk = 32;

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(rms_norm_forward,
          (int dtype, const void *x_, int64_t x_stride, int weight_dtype, const void *weight_, void *y_,
           int64_t y_stride, float *rstd, int64_t rows, int64_t cols, float eps),
          (dtype, x_, x_stride, weight_dtype, weight_, y_, y_stride, rstd, rows, cols, eps)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "x", [&](auto t) {
        return with_dtype(weight_dtype, "weight", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const T *x = static_cast<const T *>(x_);
            const U *weight = static_cast<const U *>(weight_);
            T *y = static_cast<T *>(y_);
            parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    const float mean = sum_of_squares(x + t * x_stride, cols) / (float)cols;
                    rstd[t] = 1.0f / __builtin_sqrtf(mean + eps);
                    scale_row(x + t * x_stride, weight, rstd[t], y + t * y_stride, cols);
                }
            });
            return (int)LT_OK;
        });
    });
}

LT_DEFINE(rms_norm_backward,
          (int dtype, const void *dy_, int64_t dy_stride, const void *x_, int64_t x_stride, int weight_dtype,
           const void *weight_, const float *rstd, const void *residual_, int64_t residual_stride, void *dx_,
           int64_t dx_stride, float *dweight, int64_t rows, int64_t cols),
          (dtype, dy_, dy_stride, x_, x_stride, weight_dtype, weight_, rstd, residual_, residual_stride, dx_, dx_stride,
           dweight, rows, cols)) {
    using namespace lt::LT_ISA;
    const int64_t partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
    float *sums = nullptr;
    if (dweight) {
        sums = static_cast<float *>(lt::thread_scratch((partials + 1) * cols * 4));
        if (!sums)
            return lt::fail(LT_NO_MEMORY, "rms_norm_backward: no memory for %lld partial sums", (long long)partials);
    }
    const int64_t chunk = dweight ? kRowsPerPartial : kRowsPerChunk;
    const int status = with_dtype(dtype, "x", [&](auto t) {
        return with_dtype(weight_dtype, "weight", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const T *dy = static_cast<const T *>(dy_), *x = static_cast<const T *>(x_);
            const T *residual = static_cast<const T *>(residual_);
            const U *weight = static_cast<const U *>(weight_);
            T *dx = static_cast<T *>(dx_);
            parallel_for(rows, chunk, [&](int64_t begin, int64_t end, int) {
                float *mine = sums ? sums + begin / kRowsPerPartial * cols : nullptr;
                for (int64_t h = 0; mine && h < cols; ++h)
                    mine[h] = 0;
                for (int64_t t = begin; t < end; ++t) {
                    const T *dy_row = dy + t * dy_stride, *x_row = x + t * x_stride;
                    if (mine) // before dx is written: dx may be dy
                        add_weight_gradient(dy_row, x_row, rstd[t], mine, cols);
                    if (dx)
                        backward_row(dy_row, x_row, weight, rstd[t],
                                     residual ? residual + t * residual_stride : nullptr, dx + t * dx_stride, cols);
                }
            });
            return (int)LT_OK;
        });
    });
    for (int64_t h = 0; dweight && status == LT_OK && h < cols; ++h) {
        float total = 0;
        for (int64_t p = 0; p < partials; ++p)
            total += sums[p * cols + h];
        dweight[h] = total;
    }
    return status;
}
