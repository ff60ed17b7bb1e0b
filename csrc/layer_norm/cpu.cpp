// LayerNorm. T rows of H columns; a row stays in cache between its passes, so memory sees it once. The variance is the
// mean of (x - mean)^2, taken in a pass of its own: the mean of x^2 less mean^2 loses its digits where the mean is
// large.
#include "norm.h"

namespace lt {
namespace LT_ISA {
namespace {

struct moments {
    float mean, variance;
};
template <class T> moments row_moments(const T *x, int64_t cols) {
    const int64_t few = cols < 64 ? cols : 64;
    const float about = sum_over(few, [=](int64_t h, auto kind) { return get(x + h, kind); }) / (float)few;
    const two_sums sums = two_sums_over(cols, [=](int64_t h, auto kind, auto &sum, auto &squares) {
        prefetch(x + h);
        const auto d = get(x + h, kind) - about;
        sum += d;
        squares += d * d;
    });
    const float rest = sums.a / (float)cols, variance = sums.b / (float)cols - rest * rest;
    return {about + rest, variance < 0 ? 0.0f : variance}; // NaN stays NaN
}

// bias may be null.
template <class T, class U>
void normalise(const T *x, float mean, float rstd, const U *weight, const U *bias, T *y, int64_t cols) {
    for_row(cols, [=](int64_t h, auto kind) {
        prefetch(y + h);
        auto v = (get(x + h, kind) - mean) * rstd * get(weight + h, kind);
        if (bias)
            v += get(bias + h, kind);
        put(y + h, v);
    });
}

// dx = rstd * (g - mean(g) - n * mean(g * n)) with g = dy * weight and n = (x - mean) * rstd; plus residual if not
// null.
template <class T, class U>
void input_gradient(const T *dy, const T *x, const U *weight, float mean, float rstd, const T *residual, T *dx,
                    int64_t cols) {
    const two_sums dots = two_sums_over(cols, [=](int64_t h, auto kind, auto &g_sum, auto &gx_sum) {
        prefetch(dy + h);
        prefetch(x + h);
        const auto g = get(dy + h, kind) * get(weight + h, kind);
        g_sum += g;
        gx_sum += g * (get(x + h, kind) - mean);
    });
    const float g_mean = dots.a / (float)cols, gn_mean = dots.b * rstd / (float)cols;
    for_row(cols, [=](int64_t h, auto kind) {
        prefetch(dx + h);
        const auto g = get(dy + h, kind) * get(weight + h, kind), n = (get(x + h, kind) - mean) * rstd;
        auto v = (g - g_mean - n * gn_mean) * rstd;
        if (residual)
            v += get(residual + h, kind);
        put(dx + h, v);
    });
}

// Adds one row to the partial sums of the gradients; each may be null.
template <class T>
void add_gradients(const T *dy, const T *x, float mean, float rstd, float *dweight, float *dbias, int64_t cols) {
    for_row(cols, [=](int64_t h, auto kind) {
        const auto d = get(dy + h, kind);
        if (dweight)
            put(dweight + h, get(dweight + h, kind) + d * ((get(x + h, kind) - mean) * rstd));
        if (dbias)
            put(dbias + h, get(dbias + h, kind) + d);
    });
}

// residual and s are null, or s = x + residual is stored and takes x's place.
int forward(int dtype, const void *x_, int64_t x_stride, const void *residual_, int64_t residual_stride, void *s_,
            int64_t s_stride, int weight_dtype, const void *weight_, const void *bias_, void *y_, int64_t y_stride,
            float *mean, float *rstd, int64_t rows, int64_t cols, float eps) {
    return with_dtype(dtype, "x", [&](auto t) {
        return with_dtype(weight_dtype, "weight", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const T *x = static_cast<const T *>(x_), *residual = static_cast<const T *>(residual_);
            const U *weight = static_cast<const U *>(weight_), *bias = static_cast<const U *>(bias_);
            T *s = static_cast<T *>(s_), *y = static_cast<T *>(y_);
            parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    const T *row = x + t * x_stride;
                    if (s) {
                        add_rows(row, residual + t * residual_stride, s + t * s_stride, cols);
                        row = s + t * s_stride;
                    }
                    const moments m = row_moments(row, cols);
                    mean[t] = m.mean;
                    rstd[t] = 1.0f / __builtin_sqrtf(m.variance + eps);
                    normalise(row, mean[t], rstd[t], weight, bias, y + t * y_stride, cols);
                }
            });
            return (int)LT_OK;
        });
    });
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(layer_norm_forward,
          (int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight, const void *bias, void *y,
           int64_t y_stride, float *mean, float *rstd, int64_t rows, int64_t cols, float eps),
          (dtype, x, x_stride, weight_dtype, weight, bias, y, y_stride, mean, rstd, rows, cols, eps)) {
    return lt::LT_ISA::forward(dtype, x, x_stride, nullptr, 0, nullptr, 0, weight_dtype, weight, bias, y, y_stride,
                               mean, rstd, rows, cols, eps);
}

LT_DEFINE(add_layer_norm_forward,
          (int dtype, const void *x, int64_t x_stride, const void *residual, int64_t residual_stride, void *s,
           int64_t s_stride, int weight_dtype, const void *weight, const void *bias, void *y, int64_t y_stride,
           float *mean, float *rstd, int64_t rows, int64_t cols, float eps),
          (dtype, x, x_stride, residual, residual_stride, s, s_stride, weight_dtype, weight, bias, y, y_stride, mean,
           rstd, rows, cols, eps)) {
    return lt::LT_ISA::forward(dtype, x, x_stride, residual, residual_stride, s, s_stride, weight_dtype, weight, bias,
                               y, y_stride, mean, rstd, rows, cols, eps);
}

LT_DEFINE(layer_norm_backward,
          (int dtype, const void *dy_, int64_t dy_stride, const void *x_, int64_t x_stride, int weight_dtype,
           const void *weight_, const float *mean, const float *rstd, const void *residual_, int64_t residual_stride,
           void *dx_, int64_t dx_stride, float *dweight, float *dbias, int64_t rows, int64_t cols),
          (dtype, dy_, dy_stride, x_, x_stride, weight_dtype, weight_, mean, rstd, residual_, residual_stride, dx_,
           dx_stride, dweight, dbias, rows, cols)) {
    using namespace lt::LT_ISA;
    const bool parameters = dweight || dbias;
    const int64_t partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial, step = 2 * cols;
    float *sums = nullptr; // [partials, 2, cols]: of dweight, of dbias
    if (parameters) {
        sums = static_cast<float *>(lt::thread_scratch((partials + 1) * step * 4));
        if (!sums)
            return lt::fail(LT_NO_MEMORY, "layer_norm_backward: no memory for %lld partial sums", (long long)partials);
    }
    const int status = with_dtype(dtype, "x", [&](auto t) {
        return with_dtype(weight_dtype, "weight", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const T *dy = static_cast<const T *>(dy_), *x = static_cast<const T *>(x_);
            const T *residual = static_cast<const T *>(residual_);
            const U *weight = static_cast<const U *>(weight_);
            T *dx = static_cast<T *>(dx_);
            parallel_for(rows, parameters ? kRowsPerPartial : kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
                float *mine = sums ? sums + begin / kRowsPerPartial * step : nullptr;
                if (mine)
                    memset(mine, 0, step * sizeof(float));
                for (int64_t t = begin; t < end; ++t) {
                    const T *dy_row = dy + t * dy_stride, *x_row = x + t * x_stride;
                    if (mine) // before dx is written: dx may be dy
                        add_gradients(dy_row, x_row, mean[t], rstd[t], dweight ? mine : nullptr,
                                      dbias ? mine + cols : nullptr, cols);
                    if (dx)
                        input_gradient(dy_row, x_row, weight, mean[t], rstd[t],
                                       residual ? residual + t * residual_stride : nullptr, dx + t * dx_stride, cols);
                }
            });
            return (int)LT_OK;
        });
    });
    if (status == LT_OK && dweight)
        add_partials(sums, partials, step, dweight, cols);
    if (status == LT_OK && dbias)
        add_partials(sums + cols, partials, step, dbias, cols);
    return status;
}
