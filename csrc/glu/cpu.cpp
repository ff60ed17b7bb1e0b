// Gated activations. The backward pass overwrites its three inputs with the three tensors that the layer needs next, so
// that the widest activations of the model exist once: (dh, gate, up) becomes (h, d_gate, d_up), h recomputed on the
// way.
#include "activation.h"
#include "elementwise.h"

namespace lt {
namespace LT_ISA {
namespace {

template <int ACTIVATION, class T> void forward_span(const T *gate, const T *up, T *h, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(gate + i);
        prefetch(up + i);
        prefetch(h + i);
        store(h + i, activate<ACTIVATION>(load(gate + i)) * load(up + i));
    }
    if (i < n)
        store_part(h + i, activate<ACTIVATION>(load_part(gate + i, n - i)) * load_part(up + i, n - i), n - i);
}

// Replaces the values by the results; all lanes are independent, so a partial vector needs no mask.
template <int ACTIVATION> LT_INLINE void backward_lanes(vf *dh, vf *gate, vf *up) {
    const value_slope a = activate_with_slope<ACTIVATION>(*gate);
    const vf upstream = *dh;
    *dh = a.value * *up;
    *gate = upstream * *up * a.slope;
    *up = upstream * a.value;
}

// An output may be any of the inputs; h may be null.
template <int ACTIVATION, class T>
void backward_span(const T *dh, const T *gate, const T *up, T *h, T *d_gate, T *d_up, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(dh + i);
        prefetch(gate + i);
        prefetch(up + i);
        prefetch(d_gate + i);
        prefetch(d_up + i);
        vf d = load(dh + i), g = load(gate + i), u = load(up + i);
        backward_lanes<ACTIVATION>(&d, &g, &u);
        if (h)
            store(h + i, d);
        store(d_gate + i, g);
        store(d_up + i, u);
    }
    if (i < n) {
        vf d = load_part(dh + i, n - i), g = load_part(gate + i, n - i), u = load_part(up + i, n - i);
        backward_lanes<ACTIVATION>(&d, &g, &u);
        if (h)
            store_part(h + i, d, n - i);
        store_part(d_gate + i, g, n - i);
        store_part(d_up + i, u, n - i);
    }
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(glu_forward,
          (int dtype, int activation, const void *gate_, int64_t gate_stride, const void *up_, int64_t up_stride,
           void *h_, int64_t h_stride, int64_t rows, int64_t cols),
          (dtype, activation, gate_, gate_stride, up_, up_stride, h_, h_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "gate", [&](auto t) {
        return with_activation(activation, [&](auto code) {
            typedef decltype(t) T;
            const T *gate = static_cast<const T *>(gate_), *up = static_cast<const T *>(up_);
            T *h = static_cast<T *>(h_);
            const bool in_one_piece = gate_stride == cols && up_stride == cols && h_stride == cols;
            for_spans(rows, cols, in_one_piece, [&](int64_t row, int64_t begin, int64_t end) {
                forward_span<decltype(code)::value>(gate + row * gate_stride + begin, up + row * up_stride + begin,
                                                    h + row * h_stride + begin, end - begin);
            });
            return (int)LT_OK;
        });
    });
}

LT_DEFINE(glu_backward,
          (int dtype, int activation, const void *dh_, int64_t dh_stride, const void *gate_, int64_t gate_stride,
           const void *up_, int64_t up_stride, void *h_, int64_t h_stride, void *d_gate_, int64_t d_gate_stride,
           void *d_up_, int64_t d_up_stride, int64_t rows, int64_t cols),
          (dtype, activation, dh_, dh_stride, gate_, gate_stride, up_, up_stride, h_, h_stride, d_gate_, d_gate_stride,
           d_up_, d_up_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "gate", [&](auto t) {
        return with_activation(activation, [&](auto code) {
            typedef decltype(t) T;
            const T *dh = static_cast<const T *>(dh_), *gate = static_cast<const T *>(gate_);
            const T *up = static_cast<const T *>(up_);
            T *h = static_cast<T *>(h_), *d_gate = static_cast<T *>(d_gate_), *d_up = static_cast<T *>(d_up_);
            const bool in_one_piece = dh_stride == cols && gate_stride == cols && up_stride == cols &&
                                      (!h || h_stride == cols) && d_gate_stride == cols && d_up_stride == cols;
            for_spans(rows, cols, in_one_piece, [&](int64_t row, int64_t begin, int64_t end) {
                backward_span<decltype(code)::value>(
                    dh + row * dh_stride + begin, gate + row * gate_stride + begin, up + row * up_stride + begin,
                    h ? h + row * h_stride + begin : nullptr, d_gate + row * d_gate_stride + begin,
                    d_up + row * d_up_stride + begin, end - begin);
            });
            return (int)LT_OK;
        });
    });
}
