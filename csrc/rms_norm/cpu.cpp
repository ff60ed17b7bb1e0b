// RMSNorm. T rows of H columns; one row stays in cache between its two passes, so memory sees it once.
#include "norm.h"

namespace lt {
namespace LT_ISA {
namespace {

template <class T> float sum_of_squares(const T *x, int64_t cols) {
    return sum_over(cols, [=](int64_t h, auto kind) {
        prefetch(x + h);
        const auto v = get(x + h, kind);
        return v * v;
    });
}

template <class T, class U> void scale_row(const T *x, const U *weight, float rstd, T *y, int64_t cols) {
    for_row(cols, [=](int64_t h, auto kind) {
        prefetch(y + h);
        put(y + h, get(x + h, kind) * rstd * get(weight + h, kind));
    });
}

template <class T, class U>
void backward_row(const T *dy, const T *x, const U *weight, float rstd, const T *residual, T *dx, int64_t cols) {
    const float dot = sum_over(cols, [=](int64_t h, auto kind) {
        prefetch(dy + h);
        prefetch(x + h);
        return get(dy + h, kind) * get(weight + h, kind) * get(x + h, kind);
    });
    const float correction = dot * rstd * rstd * rstd / (float)cols;
    for_row(cols, [=](int64_t h, auto kind) {
        prefetch(dx + h);
        auto g = get(dy + h, kind) * get(weight + h, kind) * rstd - get(x + h, kind) * correction;
        if (residual)
            g += get(residual + h, kind);
        put(dx + h, g);
    });
}

template <class T> void add_weight_gradient(const T *dy, const T *x, float rstd, float *dweight, int64_t cols) {
    for_row(cols, [=](int64_t h, auto kind) {
        put(dweight + h, get(dweight + h, kind) + get(dy + h, kind) * get(x + h, kind) * rstd);
    });
}

// residual and s are null, or s = x + residual is stored and takes x's place.
int forward(int dtype, const void *x_, int64_t x_stride, const void *residual_, int64_t residual_stride, void *s_,
            int64_t s_stride, int weight_dtype, const void *weight_, void *y_, int64_t y_stride, float *rstd,
            int64_t rows, int64_t cols, float eps) {
    return with_dtype(dtype, "x", [&](auto t) {
        return with_dtype(weight_dtype, "weight", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const T *x = static_cast<const T *>(x_), *residual = static_cast<const T *>(residual_);
            const U *weight = static_cast<const U *>(weight_);
            T *s = static_cast<T *>(s_), *y = static_cast<T *>(y_);
            parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    const T *row = x + t * x_stride;
                    if (s) {
                        add_rows(row, residual + t * residual_stride, s + t * s_stride, cols);
                        row = s + t * s_stride;
                    }
                    rstd[t] = 1.0f / __builtin_sqrtf(sum_of_squares(row, cols) / (float)cols + eps);
                    scale_row(row, weight, rstd[t], y + t * y_stride, cols);
                }
            });
            return (int)LT_OK;
        });
    });
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(rms_norm_forward,
          (int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight, void *y, int64_t y_stride,
           float *rstd, int64_t rows, int64_t cols, float eps),
          (dtype, x, x_stride, weight_dtype, weight, y, y_stride, rstd, rows, cols, eps)) {
    return lt::LT_ISA::forward(dtype, x, x_stride, nullptr, 0, nullptr, 0, weight_dtype, weight, y, y_stride, rstd,
                               rows, cols, eps);
}

LT_DEFINE(add_rms_norm_forward,
          (int dtype, const void *x, int64_t x_stride, const void *residual, int64_t residual_stride, void *s,
           int64_t s_stride, int weight_dtype, const void *weight, void *y, int64_t y_stride, float *rstd, int64_t rows,
           int64_t cols, float eps),
          (dtype, x, x_stride, residual, residual_stride, s, s_stride, weight_dtype, weight, y, y_stride, rstd, rows,
           cols, eps)) {
    return lt::LT_ISA::forward(dtype, x, x_stride, residual, residual_stride, s, s_stride, weight_dtype, weight, y,
                               y_stride, rstd, rows, cols, eps);
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
                if (mine)
                    memset(mine, 0, cols * sizeof(float));
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
    if (status == LT_OK && dweight)
        add_partials(sums, partials, cols, dweight, cols);
    return status;
}
