// The bottleneck adapter. A block of rows that fits the second-level cache goes through the product down, the
// activation and the product up before the next one, so that x comes from memory once, y goes there once, and the
// hidden activations exist for one block at a time; the backward pass forms them again, with all gradients on the way.
#include "activation.h"
#include "kernel.h"
#include "skinny.h"

namespace lt {
namespace LT_ISA {
namespace {

// Activations of the adapter: those of activation.h, ReLU and none.
template <int ACTIVATION> LT_INLINE value_slope adapt(vf x) {
    if constexpr (ACTIVATION == LT_LINEAR)
        return {x, splat(1.0f)};
    else if constexpr (ACTIVATION == LT_RELU) // NaN stays; the slope at 0 is 0, as in PyTorch
        return {select(x <= 0.0f, vf{}, x), select(x <= 0.0f, vf{}, splat(1.0f))};
    else
        return activate_with_slope<ACTIVATION>(x);
}

// In place, over whole vectors: h becomes act(h), and gradient, where there is one, is multiplied by act'(h).
template <int ACTIVATION> void adapt_all(float *h, float *gradient, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        const value_slope v = adapt<ACTIVATION>(load(h + i));
        store(h + i, v.value);
        if (gradient)
            store(gradient + i, load(gradient + i) * v.slope);
    }
}

typedef void (*activation_pass)(float *h, float *gradient, int64_t n);

// A pass of its own over a block that is in the first-level cache, rather than five versions of every product.
activation_pass pass_of(int activation) {
    switch (activation) {
    case LT_SILU:
        return adapt_all<LT_SILU>;
    case LT_GELU:
        return adapt_all<LT_GELU>;
    case LT_GELU_TANH:
        return adapt_all<LT_GELU_TANH>;
    case LT_RELU:
        return adapt_all<LT_RELU>;
    case LT_LINEAR:
        return adapt_all<LT_LINEAR>;
    default:
        return nullptr;
    }
}

int unknown_activation(int activation) {
    return fail(LT_INVALID, "activation: code %d is none of enum lt_activation", activation);
}

// Packed factors, shared by all threads: D^T [hidden, r] and U^T [r, hidden] forward; D^T, U [hidden, r] and
// D [r, hidden] backward. Biases are filled up with zeros to whole vectors.
struct adapter {
    int64_t hidden, rank, r, stride; // r: rank in whole vectors; stride of packed [r, hidden]
    const float *down, *down_bias, *up, *up_bias;
    float scale;
    activation_pass activate;
    float *down_columns, *rows_of_factor, *up_packed, *down_bias_packed, *up_bias_packed;
};

adapter describe(int64_t hidden, int64_t rank, const float *down, const float *down_bias, const float *up,
                 const float *up_bias, float scale, int activation) {
    adapter a = {};
    a.hidden = hidden, a.rank = rank, a.r = whole_vectors(rank), a.stride = spread_stride(hidden);
    a.down = down, a.down_bias = down_bias, a.up = up, a.up_bias = up_bias, a.scale = scale;
    a.activate = pass_of(activation);
    return a;
}

// z [rows, r] = x D^T + down_bias, before the activation.
void project_down(const adapter &a, int64_t rows, block x, float *z) {
    tiled_product(
        rows, a.r / W, a.hidden, x.rows, x.stride, 1, a.down_columns, a.r,
        [=, &a](int64_t t, int64_t j, vf sum) { store(z + t * a.r + j, sum + load(a.down_bias_packed + j)); });
}

void pack_bias(const float *bias, int64_t n, float scale, float *out) {
    for (int64_t i = 0; i < whole_vectors(n); ++i)
        out[i] = bias && i < n ? bias[i] * scale : 0.0f;
}

// Floats of scratch that lay_out() divides: factors and biases.
int64_t packed_size(const adapter &a, bool backward) {
    return a.hidden * a.r * (backward ? 2 : 1) + a.rank * a.stride + a.r + whole_vectors(a.hidden);
}

float *lay_out(adapter &a, float *scratch, bool backward) {
    a.down_columns = scratch;
    a.rows_of_factor = a.down_columns + a.hidden * a.r;
    a.down_bias_packed = a.rows_of_factor + a.rank * a.stride;
    a.up_bias_packed = a.down_bias_packed + a.r;
    a.up_packed = a.up_bias_packed + whole_vectors(a.hidden);
    return a.up_packed + (backward ? a.hidden * a.r : 0);
}

void pack(const adapter &a, bool backward) {
    const int64_t slices = quotient(a.rank, 8);
    parallel_for(2 + slices, 1, [&](int64_t task, int64_t, int) {
        const int64_t begin = (task - 2) * 8, end = smaller(begin + 8, a.rank);
        if (task == 0) {
            pack_factor(a.down, 1, a.hidden, 0, a.hidden, a.rank, a.down_columns, a.r);
        } else if (task == 1) {
            pack_bias(a.down_bias, a.rank, 1.0f, a.down_bias_packed);
            pack_bias(a.up_bias, a.hidden, a.scale, a.up_bias_packed);
            if (backward)
                pack_factor(a.up, a.rank, 1, 0, a.hidden, a.rank, a.up_packed, a.r);
        } else if (backward) {
            pack_factor(a.down, a.hidden, 1, begin, end, a.hidden, a.rows_of_factor, a.stride);
        } else {
            pack_factor(a.up, 1, a.rank, begin, end, a.hidden, a.rows_of_factor, a.stride);
        }
    });
}

// ---- forward

template <class T>
void forward_block(const adapter &a, const T *x, int64_t x_stride, T *y, int64_t y_stride, int64_t rows, float *h,
                   float *x_copy, int64_t copy_stride) {
    project_down(a, rows, block_of(x, x_stride, rows, a.hidden, x_copy, copy_stride), h);
    a.activate(h, nullptr, rows * a.r);
    streamed_product(rows, a.hidden, a.rank, h, a.r, a.rows_of_factor, a.stride, [=, &a](int64_t t, int64_t n, vf sum) {
        put(x + t * x_stride + n, y + t * y_stride + n, sum * a.scale + load(a.up_bias_packed + n), a.hidden - n);
    });
}

// ---- backward

// Gradients asked for; where each one's partial sums are within a chunk's.
struct gradients {
    float *down, *down_bias, *up, *up_bias;
    int64_t down_at, down_bias_at, up_at, up_bias_at, size;
};

gradients plan_sums(const adapter &a, float *down, float *down_bias, float *up, float *up_bias) {
    gradients g = {down, down_bias, up, up_bias, 0, 0, 0, 0, 0};
    const int64_t wide = whole_vectors(a.hidden);
    g.up_at = down ? a.rank * wide : 0;
    g.down_bias_at = g.up_at + (up ? a.rank * wide : 0);
    g.up_bias_at = g.down_bias_at + (down_bias ? a.r : 0);
    g.size = g.up_bias_at + (up_bias ? wide : 0);
    return g;
}

// target [columns] (+)= the rows of b.
void add_rows(float *target, bool first, int64_t columns, int64_t rows, block b) {
    for (int64_t k = 0; k < columns; k += W) {
        vf total = first ? vf{} : load(target + k);
        for (int64_t t = 0; t < rows; ++t)
            total += load(b.rows + t * b.stride + k);
        store(target + k, total);
    }
}

template <class T> struct backward_tensors {
    const T *dy, *x;
    T *dx;
    int64_t dy_stride, x_stride, dx_stride;
};

// With h = act(z), z = x D^T + bias: dz = scale * (dy U) act'(z), dx = dy + dz D, and what the gradients add to their
// partial sums. Scratch: h and dz of the block, then copies of x and dy where they are needed.
template <class T>
void backward_block(const adapter &a, const gradients &g, const backward_tensors<T> &at, int64_t begin, int64_t rows,
                    bool first, float *partial, float *scratch, int64_t block_rows, int64_t copy_stride) {
    float *h = scratch, *dz = h + block_rows * a.r, *x_copy = dz + block_rows * a.r;
    float *dy_copy = x_copy + block_rows * copy_stride;
    const T *dy = at.dy + begin * at.dy_stride;
    const block x = block_of(at.x + begin * at.x_stride, at.x_stride, rows, a.hidden, x_copy, copy_stride);
    const block dy_block = block_of(dy, at.dy_stride, rows, a.hidden, dy_copy, copy_stride);
    project_down(a, rows, x, h);
    tiled_product(rows, a.r / W, a.hidden, dy_block.rows, dy_block.stride, 1, a.up_packed, a.r,
                  [=, &a](int64_t t, int64_t j, vf sum) { store(dz + t * a.r + j, sum * a.scale); });
    a.activate(h, dz, rows * a.r);
    if (at.dx) {
        T *dx = at.dx + begin * at.dx_stride;
        const int64_t dy_stride = at.dy_stride, dx_stride = at.dx_stride;
        streamed_product(rows, a.hidden, a.rank, dz, a.r, a.rows_of_factor, a.stride,
                         [=, &a](int64_t t, int64_t n, vf sum) {
                             put(dy + t * dy_stride + n, dx + t * dx_stride + n, sum, a.hidden - n);
                         });
    }
    const int64_t wide = whole_vectors(a.hidden);
    if (g.up)
        add_outer(partial + g.up_at, wide, first, a.rank, rows, h, a.r, dy_block);
    if (g.up_bias)
        add_rows(partial + g.up_bias_at, first, wide, rows, dy_block);
    if (g.down)
        add_outer(partial + g.down_at, wide, first, a.rank, rows, dz, a.r, x);
    if (g.down_bias)
        add_rows(partial + g.down_bias_at, first, a.r, rows, block{dz, a.r});
}

void finish(const adapter &a, const gradients &g, partial_sums sums) {
    const int64_t wide = whole_vectors(a.hidden);
    parallel_for(1 + quotient(a.hidden, kSlice), 1, [&](int64_t task, int64_t, int) {
        if (task == 0) {
            if (g.down_bias)
                finish_rows(sums, g.down_bias_at, a.r, 1, 0, a.rank, 1.0f, false, g.down_bias, a.rank);
            return;
        }
        const int64_t begin = (task - 1) * kSlice, end = smaller(begin + kSlice, a.hidden);
        if (g.down)
            finish_rows(sums, g.down_at, wide, a.rank, begin, end, 1.0f, false, g.down, a.hidden);
        if (g.up)
            finish_columns(sums, g.up_at, wide, a.rank, begin, end, a.scale, false, g.up, a.rank);
        if (g.up_bias)
            finish_rows(sums, g.up_bias_at, wide, 1, begin, end, a.scale, false, g.up_bias, a.hidden);
    });
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(bottleneck_forward,
          (int dtype, const void *x_, int64_t x_stride, const float *down, const float *down_bias, const float *up,
           const float *up_bias, float scale, int activation, void *y_, int64_t y_stride, int64_t rows, int64_t hidden,
           int64_t rank),
          (dtype, x_, x_stride, down, down_bias, up, up_bias, scale, activation, y_, y_stride, rows, hidden, rank)) {
    using namespace lt::LT_ISA;
    adapter a = describe(hidden, rank, down, down_bias, up, up_bias, scale, activation);
    if (!a.activate)
        return unknown_activation(activation);
    const int64_t copy_stride = needs_copy(dtype, hidden) ? spread_stride(hidden) : 0;
    const int64_t thread_size = kBlockRows * (a.r + copy_stride);
    const int64_t size = packed_size(a, false) + lt::max_threads() * thread_size;
    float *scratch = static_cast<float *>(lt::thread_scratch(size * 4));
    if (!scratch)
        return lt::fail(LT_NO_MEMORY, "bottleneck_forward: no memory for %lld bytes of blocks", (long long)size * 4);
    float *blocks = lay_out(a, scratch, false);
    pack(a, false);
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const T *x = static_cast<const T *>(x_);
        T *y = static_cast<T *>(y_);
        parallel_for(rows, kBlockRows, [&](int64_t begin, int64_t end, int thread) {
            float *h = blocks + thread * thread_size;
            forward_block(a, x + begin * x_stride, x_stride, y + begin * y_stride, y_stride, end - begin, h,
                          h + kBlockRows * a.r, copy_stride);
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(bottleneck_backward,
          (int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride, const float *down,
           const float *down_bias, const float *up, float scale, int activation, void *dx, int64_t dx_stride,
           float *ddown, float *ddown_bias, float *dup, float *dup_bias, int64_t rows, int64_t hidden, int64_t rank),
          (dtype, dy, dy_stride, x, x_stride, down, down_bias, up, scale, activation, dx, dx_stride, ddown, ddown_bias,
           dup, dup_bias, rows, hidden, rank)) {
    using namespace lt::LT_ISA;
    adapter a = describe(hidden, rank, down, down_bias, up, nullptr, scale, activation);
    if (!a.activate)
        return unknown_activation(activation);
    const gradients g = plan_sums(a, ddown, ddown_bias, dup, dup_bias);
    const row_chunks over = plan_chunks(rows, 2 * hidden, g.size);
    const int64_t copy_stride = needs_copy(dtype, hidden) ? spread_stride(hidden) : 0;
    const int64_t thread_size = over.block_rows * 2 * (a.r + copy_stride);
    const int64_t size = packed_size(a, true) + over.chunks * g.size + lt::max_threads() * thread_size;
    float *scratch = static_cast<float *>(lt::thread_scratch(size * 4));
    if (!scratch)
        return lt::fail(LT_NO_MEMORY, "bottleneck_backward: no memory for %lld bytes of partial sums and blocks",
                        (long long)size * 4);
    float *partials = lay_out(a, scratch, true), *blocks = partials + over.chunks * g.size;
    pack(a, true);
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const backward_tensors<T> at = {static_cast<const T *>(dy),
                                        static_cast<const T *>(x),
                                        static_cast<T *>(dx),
                                        dy_stride,
                                        x_stride,
                                        dx_stride};
        parallel_for(rows, over.chunk_rows, [&](int64_t begin, int64_t end, int thread) {
            float *partial = partials + begin / over.chunk_rows * g.size;
            for (int64_t i = begin; i < end; i += over.block_rows)
                backward_block(a, g, at, i, smaller(over.block_rows, end - i), i == begin, partial,
                               blocks + thread * thread_size, over.block_rows, copy_stride);
        });
        finish(a, g, {partials, over.chunks, g.size});
        return (int)LT_OK;
    });
}
