// SwiGLU. The backward pass overwrites its three inputs with the three tensors that the layer needs next, so that the
// widest activations of the model exist once: (dh, gate, up) becomes (h, d_gate, d_up), h recomputed on the way.
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

LT_INLINE vf swish(vf gate) { return gate * vsigmoid(gate); }

// Replaces the values by the results; all lanes are independent, so a partial vector needs no mask.
LT_INLINE void backward_lanes(vf *dh, vf *gate, vf *up) {
    const vf sigmoid = vsigmoid(*gate);
    const vf silu = *gate * sigmoid, upstream = *dh;
    *dh = silu * *up;
    const vf slope = sigmoid + silu * (1.0f - sigmoid); // silu'(gate)
    *gate = upstream * *up * slope;
    *up = upstream * silu;
}

template <class T> void forward_row(const T *gate, const T *up, T *h, int64_t cols) {
    int64_t i = 0;
    for (; i + W <= cols; i += W)
        store(h + i, swish(load(gate + i)) * load(up + i));
    if (i < cols)
        store_part(h + i, swish(load_part(gate + i, cols - i)) * load_part(up + i, cols - i), cols - i);
}

template <class T> void backward_row(T *dh, T *gate, T *up, int64_t cols) {
    int64_t i = 0;
    for (; i + W <= cols; i += W) {
        vf d = load(dh + i), g = load(gate + i), u = load(up + i);
        backward_lanes(&d, &g, &u);
        store(dh + i, d);
        store(gate + i, g);
        store(up + i, u);
    }
    if (i < cols) {
        const int64_t n = cols - i;
        vf d = load_part(dh + i, n), g = load_part(gate + i, n), u = load_part(up + i, n);
        backward_lanes(&d, &g, &u);
        store_part(dh + i, d, n);
        store_part(gate + i, g, n);
        store_part(up + i, u, n);
    }
}

constexpr int64_t kRowsPerChunk = 8;

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(swiglu_forward,
          (int dtype, const void *gate_, int64_t gate_stride, const void *up_, int64_t up_stride, void *h_,
           int64_t h_stride, int64_t rows, int64_t cols),
          (dtype, gate_, gate_stride, up_, up_stride, h_, h_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "gate", [&](auto t) {
        typedef decltype(t) T;
        const T *gate = static_cast<const T *>(gate_), *up = static_cast<const T *>(up_);
        T *h = static_cast<T *>(h_);
        parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t)
                forward_row(gate + t * gate_stride, up + t * up_stride, h + t * h_stride, cols);
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(swiglu_backward,
          (int dtype, void *dh_, int64_t dh_stride, void *gate_, int64_t gate_stride, void *up_, int64_t up_stride,
           int64_t rows, int64_t cols),
          (dtype, dh_, dh_stride, gate_, gate_stride, up_, up_stride, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "dh", [&](auto t) {
        typedef decltype(t) T;
        T *dh = static_cast<T *>(dh_), *gate = static_cast<T *>(gate_), *up = static_cast<T *>(up_);
        parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t)
                backward_row(dh + t * dh_stride, gate + t * gate_stride, up + t * up_stride, cols);
        });
        return (int)LT_OK;
    });
}
