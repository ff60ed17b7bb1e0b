// Gated activations on CUDA. Backward writes over its inputs where the caller passes the same memory twice: (dh, gate,
// up) becomes (h, d_gate, d_up), each thread writing only what it alone has read.
#include "../common/cuda_activation.cuh"

namespace lt_cuda {
namespace {

// budget: 40 registers, 0 shared
// claims: LDG.128 STG.128
template <class T, int N>
__global__ void __launch_bounds__(kSpan)
    glu_forward_kernel(int activation, const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, T *h,
                       int64_t h_stride, int64_t rows, int64_t cols) {
    for_vectors<N>(rows, cols, [&](int64_t row, int64_t col) {
        Vec<T, N> g = load_vec<N>(gate + row * gate_stride + col);
        const Vec<T, N> u = load_vec<N>(up + row * up_stride + col);
        with_activation(activation, [&](auto act) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                narrow(act(widen(g[i])).value * widen(u[i]), &g[i]);
        });
        store_global(h + row * h_stride + col, g);
    });
}

// h may be null.
// budget: 64 registers, 0 shared
// claims: LDG.128 STG.128
template <class T, int N>
__global__ void __launch_bounds__(kSpan)
    glu_backward_kernel(int activation, const T *dh, int64_t dh_stride, const T *gate, int64_t gate_stride, const T *up,
                        int64_t up_stride, T *h, int64_t h_stride, T *d_gate, int64_t d_gate_stride, T *d_up,
                        int64_t d_up_stride, int64_t rows, int64_t cols) {
    for_vectors<N>(rows, cols, [&](int64_t row, int64_t col) {
        Vec<T, N> d = load_vec<N>(dh + row * dh_stride + col);
        Vec<T, N> g = load_vec<N>(gate + row * gate_stride + col);
        Vec<T, N> u = load_vec<N>(up + row * up_stride + col);
        with_activation(activation, [&](auto act) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const ValueSlope a = act(widen(g[i]));
                const float upstream = widen(d[i]), other = widen(u[i]);
                narrow(a.value * other, &d[i]);
                narrow(upstream * other * a.slope, &g[i]);
                narrow(upstream * a.value, &u[i]);
            }
        });
        if (h)
            store_global(h + row * h_stride + col, d);
        store_global(d_gate + row * d_gate_stride + col, g);
        store_global(d_up + row * d_up_stride + col, u);
    });
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_glu_forward(int dtype, int activation, const void *gate, int64_t gate_stride,
                                          const void *up, int64_t up_stride, void *h, int64_t h_stride, int64_t rows,
                                          int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (!known_activation(activation))
        return (int)cudaErrorInvalidValue;
    if (rows == 0 || cols == 0)
        return 0;
    const Matrix matrices[] = {{gate, gate_stride}, {up, up_stride}, {h, h_stride}};
    return elementwise(dtype, matrices, rows, cols, [&](auto t, auto n) {
        using T = decltype(t);
        constexpr int N = decltype(n)::value;
        return launch(glu_forward_kernel<T, N>, elementwise_grid<N>(rows, cols), kSpan, 0, stream, activation,
                      (const T *)gate, gate_stride, (const T *)up, up_stride, (T *)h, h_stride, rows, cols);
    });
}

extern "C" LT_API int lt_cuda_glu_backward(int dtype, int activation, const void *dh, int64_t dh_stride,
                                           const void *gate, int64_t gate_stride, const void *up, int64_t up_stride,
                                           void *h, int64_t h_stride, void *d_gate, int64_t d_gate_stride, void *d_up,
                                           int64_t d_up_stride, int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (!known_activation(activation))
        return (int)cudaErrorInvalidValue;
    if (rows == 0 || cols == 0)
        return 0;
    const Matrix matrices[] = {{dh, dh_stride}, {gate, gate_stride},     {up, up_stride},
                               {h, h_stride},   {d_gate, d_gate_stride}, {d_up, d_up_stride}};
    return elementwise(dtype, matrices, rows, cols, [&](auto t, auto n) {
        using T = decltype(t);
        constexpr int N = decltype(n)::value;
        return launch(glu_backward_kernel<T, N>, elementwise_grid<N>(rows, cols), kSpan, 0, stream, activation,
                      (const T *)dh, dh_stride, (const T *)gate, gate_stride, (const T *)up, up_stride, (T *)h,
                      h_stride, (T *)d_gate, d_gate_stride, (T *)d_up, d_up_stride, rows, cols);
    });
}
