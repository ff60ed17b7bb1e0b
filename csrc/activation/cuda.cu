// Activations alone on CUDA: y = act(x), and dx = dy * act'(x).
#include "../common/cuda_activation.cuh"

namespace lt_cuda {
namespace {

// y may be x.
// budget: 40 registers, 0 shared
// claims: LDG.128 STG.128
template <class T, int N>
__global__ void __launch_bounds__(kSpan) activation_forward_kernel(int activation, const T *x, int64_t x_stride, T *y,
                                                                   int64_t y_stride, int64_t rows, int64_t cols) {
    for_vectors<N>(rows, cols, [&](int64_t row, int64_t col) {
        Vec<T, N> v = load_vec<N>(x + row * x_stride + col);
        with_activation(activation, [&](auto act) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                narrow(act(widen(v[i])).value, &v[i]);
        });
        store_global(y + row * y_stride + col, v);
    });
}

// dx may be dy or x.
// budget: 40 registers, 0 shared
// claims: LDG.128 STG.128
template <class T, int N>
__global__ void __launch_bounds__(kSpan)
    activation_backward_kernel(int activation, const T *dy, int64_t dy_stride, const T *x, int64_t x_stride, T *dx,
                               int64_t dx_stride, int64_t rows, int64_t cols) {
    for_vectors<N>(rows, cols, [&](int64_t row, int64_t col) {
        Vec<T, N> d = load_vec<N>(dy + row * dy_stride + col);
        const Vec<T, N> v = load_vec<N>(x + row * x_stride + col);
        with_activation(activation, [&](auto act) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                narrow(widen(d[i]) * act(widen(v[i])).slope, &d[i]);
        });
        store_global(dx + row * dx_stride + col, d);
    });
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_activation_forward(int dtype, int activation, const void *x, int64_t x_stride, void *y,
                                                 int64_t y_stride, int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (!known_activation(activation))
        return (int)cudaErrorInvalidValue;
    if (rows == 0 || cols == 0)
        return 0;
    const Matrix matrices[] = {{x, x_stride}, {y, y_stride}};
    return elementwise(dtype, matrices, rows, cols, [&](auto t, auto n) {
        using T = decltype(t);
        constexpr int N = decltype(n)::value;
        return launch(activation_forward_kernel<T, N>, elementwise_grid<N>(rows, cols), kSpan, 0, stream, activation,
                      (const T *)x, x_stride, (T *)y, y_stride, rows, cols);
    });
}

extern "C" LT_API int lt_cuda_activation_backward(int dtype, int activation, const void *dy, int64_t dy_stride,
                                                  const void *x, int64_t x_stride, void *dx, int64_t dx_stride,
                                                  int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (!known_activation(activation))
        return (int)cudaErrorInvalidValue;
    if (rows == 0 || cols == 0)
        return 0;
    const Matrix matrices[] = {{dy, dy_stride}, {x, x_stride}, {dx, dx_stride}};
    return elementwise(dtype, matrices, rows, cols, [&](auto t, auto n) {
        using T = decltype(t);
        constexpr int N = decltype(n)::value;
        return launch(activation_backward_kernel<T, N>, elementwise_grid<N>(rows, cols), kSpan, 0, stream, activation,
                      (const T *)dy, dy_stride, (const T *)x, x_stride, (T *)dx, dx_stride, rows, cols);
    });
}
