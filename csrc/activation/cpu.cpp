// Activations alone: y = act(x), and dx = dy * act'(x).
#include "activation.h"
#include "elementwise.h"

namespace lt {
namespace LT_ISA {
namespace {

template <int ACTIVATION, class T> void forward_span(const T *x, T *y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(x + i);
        prefetch(y + i);
        store(y + i, activate<ACTIVATION>(load(x + i)));
    }
    if (i < n)
        store_part(y + i, activate<ACTIVATION>(load_part(x + i, n - i)), n - i);
}

template <int ACTIVATION, class T> void backward_span(const T *dy, const T *x, T *dx, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(dy + i);
        prefetch(x + i);
        prefetch(dx + i);
        store(dx + i, load(dy + i) * activate_with_slope<ACTIVATION>(load(x + i)).slope);
    }
    if (i < n)
        store_part(dx + i, load_part(dy + i, n - i) * activate_with_slope<ACTIVATION>(load_part(x + i, n - i)).slope,
                   n - i);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(activation_forward,
          (int dtype, int activation, const void *x_, int64_t x_stride, void *y_, int64_t y_stride, int64_t rows,
           int64_t cols),
          (dtype, activation, x_, x_stride, y_, y_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "x", [&](auto t) {
        return with_activation(activation, [&](auto code) {
            typedef decltype(t) T;
            const T *x = static_cast<const T *>(x_);
            T *y = static_cast<T *>(y_);
            const bool in_one_piece = x_stride == cols && y_stride == cols;
            for_spans(rows, cols, in_one_piece, [&](int64_t row, int64_t begin, int64_t end) {
                forward_span<decltype(code)::value>(x + row * x_stride + begin, y + row * y_stride + begin,
                                                    end - begin);
            });
            return (int)LT_OK;
        });
    });
}

LT_DEFINE(activation_backward,
          (int dtype, int activation, const void *dy_, int64_t dy_stride, const void *x_, int64_t x_stride, void *dx_,
           int64_t dx_stride, int64_t rows, int64_t cols),
          (dtype, activation, dy_, dy_stride, x_, x_stride, dx_, dx_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "x", [&](auto t) {
        return with_activation(activation, [&](auto code) {
            typedef decltype(t) T;
            const T *dy = static_cast<const T *>(dy_), *x = static_cast<const T *>(x_);
            T *dx = static_cast<T *>(dx_);
            const bool in_one_piece = dy_stride == cols && x_stride == cols && dx_stride == cols;
            for_spans(rows, cols, in_one_piece, [&](int64_t row, int64_t begin, int64_t end) {
                backward_span<decltype(code)::value>(dy + row * dy_stride + begin, x + row * x_stride + begin,
                                                     dx + row * dx_stride + begin, end - begin);
            });
            return (int)LT_OK;
        });
    });
}
