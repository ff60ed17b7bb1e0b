// LoRA's products with the skinny factors A [r, K] and B [N, r]. They are about as much memory traffic as arithmetic,
// so x, dy and the weight come from memory once: a block of rows that fits the second-level cache goes through all of
// its products before the next one, in place if it is fp32, else as a widened copy. S and dS exist for one block at a
// time.
#include "kernel.h"
#include "skinny.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kMostAdapters = 16;
constexpr int64_t kRowsPerTask = 8; // of a merge

// s [rows, rank] = scale * b factor, with a packed factor [depth, rank].
void project(int64_t rows, int64_t depth, block b, const float *factor, int64_t rank, float scale, float *s,
             int64_t s_stride) {
    tiled_product(rows, rank / W, depth, b.rows, b.stride, 1, factor, rank,
                  [=](int64_t t, int64_t j, vf sum) { store(s + t * s_stride + j, sum * scale); });
}

// ---- gradients

// What one call needs to know about sizes. Scratch holds, in this order: packed A's side by side [K, S columns], packed
// B's, the chunks' partial sums, and for each thread a block of x, a block of dy, and the block's S and dS.
struct gradient_plan {
    const lt_low_rank_adapter *adapters;
    int64_t count, rows, inputs;
    int64_t s_stride, x_stride, dy_stride; // of a thread's blocks, in floats; 0 for x or dy used in place
    int64_t s_column[kMostAdapters];       // where the adapter's columns of S and dS begin
    int64_t packed_b[kMostAdapters];       // offset from the first packed B
    int64_t partial_a[kMostAdapters];      // offset of dA in a chunk's partial sums
    int64_t partial_b[kMostAdapters];      // offset of dB^T
    int64_t packed_size, partial_size, thread_size;
    row_chunks over;
    bool need_s; // whether any adapter asks for db
    float *packed_as, *packed_bs, *partials, *blocks;

    int64_t b_stride(int64_t i) const { return whole_vectors(adapters[i].outputs); } // of a partial dB^T [r, N]
    int64_t a_stride() const { return whole_vectors(inputs); }                       // of a partial dA [r, K]
};

gradient_plan plan_gradients(int dtype, const lt_low_rank_adapter *adapters, int64_t count, int64_t rows,
                             int64_t inputs) {
    gradient_plan p = {};
    int64_t widest = 0;
    p.adapters = adapters;
    p.count = count;
    p.rows = rows;
    p.inputs = inputs;
    p.x_stride = needs_copy(dtype, inputs) ? spread_stride(inputs) : 0;
    for (int64_t i = 0; i < count; ++i) {
        const lt_low_rank_adapter &a = adapters[i];
        p.s_column[i] = p.s_stride;
        p.s_stride += whole_vectors(a.rank);
        p.dy_stride = larger(p.dy_stride, needs_copy(dtype, a.outputs) ? spread_stride(a.outputs) : 0);
        widest = larger(widest, a.outputs);
        p.packed_b[i] = p.packed_size;
        p.packed_size += a.outputs * whole_vectors(a.rank);
        p.need_s |= a.db != nullptr;
        p.partial_a[i] = p.partial_size;
        p.partial_size += a.da ? a.rank * p.a_stride() : 0;
        p.partial_b[i] = p.partial_size;
        p.partial_size += a.db ? a.rank * p.b_stride(i) : 0;
    }
    p.packed_size += inputs * p.s_stride;
    p.over = plan_chunks(rows, inputs + widest, p.partial_size);
    p.thread_size = p.over.block_rows * (p.x_stride + p.dy_stride + 2 * p.s_stride);
    return p;
}

void pack_adapter(const gradient_plan &p, int64_t i) {
    const lt_low_rank_adapter &a = p.adapters[i];
    pack_factor(a.a, 1, a.a_stride, 0, p.inputs, a.rank, p.packed_as + p.s_column[i], p.s_stride);
    pack_factor(a.b, a.b_stride, 1, 0, a.outputs, a.rank, p.packed_bs + p.packed_b[i], whole_vectors(a.rank));
}

// One block of rows: S and dS, and what they add to the partial sums. x and dy are read from memory here and only here.
template <class T>
void gradient_block(const gradient_plan &p, const T *x, int64_t x_stride, int64_t begin, int64_t rows, bool first,
                    float *partial, float *scratch) {
    float *s = scratch, *ds = s + p.over.block_rows * p.s_stride;
    float *x_copy = ds + p.over.block_rows * p.s_stride, *dy_copy = x_copy + p.over.block_rows * p.x_stride;
    const block x_block = block_of(x + begin * x_stride, x_stride, rows, p.inputs, x_copy, p.x_stride);
    if (p.need_s)
        project(rows, p.inputs, x_block, p.packed_as, p.s_stride, 1.0f, s, p.s_stride);
    for (int64_t i = 0; i < p.count; ++i) {
        const lt_low_rank_adapter &a = p.adapters[i];
        const block dy_block = block_of(static_cast<const T *>(a.dy) + begin * a.dy_stride, a.dy_stride, rows,
                                        a.outputs, dy_copy, p.dy_stride);
        if (a.da)
            project(rows, a.outputs, dy_block, p.packed_bs + p.packed_b[i], whole_vectors(a.rank), a.scale,
                    ds + p.s_column[i], p.s_stride);
        if (a.db)
            add_outer(partial + p.partial_b[i], p.b_stride(i), first, a.rank, rows, s + p.s_column[i], p.s_stride,
                      dy_block);
    }
    for (int64_t i = 0; i < p.count; ++i)
        if (p.adapters[i].da)
            add_outer(partial + p.partial_a[i], p.a_stride(), first, p.adapters[i].rank, rows, ds + p.s_column[i],
                      p.s_stride, x_block);
}

// ---- y += scale * (x P) Q

struct add_plan {
    int64_t inputs, outputs, rank, x_stride, s_stride, q_stride;
    float *p, *q, *blocks; // packed P [K, r] and Q [r, N]; for each thread S of a block and, if needed, a copy of its x
    float scale;
};

template <class T>
void add_block(const add_plan &plan, const T *x, int64_t x_stride, T *y, int64_t y_stride, int64_t rows,
               float *scratch) {
    float *s = scratch, *x_copy = s + kBlockRows * plan.s_stride;
    project(rows, plan.inputs, block_of(x, x_stride, rows, plan.inputs, x_copy, plan.x_stride), plan.p, plan.s_stride,
            plan.scale, s, plan.s_stride);
    streamed_product(rows, plan.outputs, plan.rank, s, plan.s_stride, plan.q, plan.q_stride,
                     [=](int64_t t, int64_t n, vf sum) {
                         T *to = y + t * y_stride + n;
                         put(to, to, sum, plan.outputs - n);
                     });
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(low_rank_merge,
          (int dtype, const void *weight_, int64_t weight_stride, const float *a, int64_t a_stride, const float *b,
           int64_t b_stride, float *out, int64_t out_stride, int64_t outputs, int64_t inputs, int64_t rank,
           float scale),
          (dtype, weight_, weight_stride, a, a_stride, b, b_stride, out, out_stride, outputs, inputs, rank, scale)) {
    using namespace lt::LT_ISA;
    const int64_t stride = spread_stride(inputs);
    float *packed = static_cast<float *>(lt::thread_scratch(larger(rank * stride, 1) * 4));
    if (!packed)
        return lt::fail(LT_NO_MEMORY, "low_rank_merge: no memory for a copy of A [%lld, %lld]", (long long)rank,
                        (long long)inputs);
    pack_factor(a, a_stride, 1, 0, rank, inputs, packed, stride);
    return with_dtype(dtype, "weight", [&](auto t) {
        typedef decltype(t) T;
        const T *weight = static_cast<const T *>(weight_);
        parallel_for(outputs, kRowsPerTask, [&](int64_t begin, int64_t end, int) {
            streamed_product(end - begin, inputs, rank, b + begin * b_stride, b_stride, packed, stride,
                             [=](int64_t i, int64_t k, vf sum) {
                                 put(weight + (begin + i) * weight_stride + k, out + (begin + i) * out_stride + k,
                                     sum * scale, inputs - k);
                             });
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(low_rank_gradients,
          (int dtype, const void *x_, int64_t x_stride, int64_t rows, int64_t inputs,
           const lt_low_rank_adapter *adapters, int64_t count, int accumulate),
          (dtype, x_, x_stride, rows, inputs, adapters, count, accumulate)) {
    using namespace lt::LT_ISA;
    if (count > kMostAdapters)
        return lt::fail(LT_INVALID, "low_rank_gradients: %lld adapters, at most %lld share a call", (long long)count,
                        (long long)kMostAdapters);
    gradient_plan p = plan_gradients(dtype, adapters, count, rows, inputs);
    const int64_t blocks = lt::max_threads() * p.thread_size;
    const int64_t size = p.packed_size + p.over.chunks * p.partial_size + blocks;
    p.packed_as = static_cast<float *>(lt::thread_scratch(larger(size, 1) * 4));
    if (!p.packed_as)
        return lt::fail(LT_NO_MEMORY,
                        "low_rank_gradients: no memory for %lld bytes of partial "
                        "sums and blocks",
                        (long long)size * 4);
    p.packed_bs = p.packed_as + inputs * p.s_stride;
    p.partials = p.packed_as + p.packed_size;
    p.blocks = p.partials + p.over.chunks * p.partial_size;
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const T *x = static_cast<const T *>(x_);
        parallel_for(count, 1, [&](int64_t i, int64_t, int) { pack_adapter(p, i); });
        parallel_for(rows, p.over.chunk_rows, [&](int64_t begin, int64_t end, int thread) {
            float *partial = p.partials + begin / p.over.chunk_rows * p.partial_size;
            for (int64_t t = begin; t < end; t += p.over.block_rows)
                gradient_block(p, x, x_stride, t, smaller(p.over.block_rows, end - t), t == begin, partial,
                               p.blocks + thread * p.thread_size);
        });
        for (int64_t i = 0; i < count; ++i) {
            const int64_t a_slices = adapters[i].da ? quotient(inputs, kSlice) : 0;
            const int64_t b_slices = adapters[i].db ? quotient(adapters[i].outputs, kSlice) : 0;
            const partial_sums sums = {p.partials, p.over.chunks, p.partial_size};
            parallel_for(a_slices + b_slices, 1, [&](int64_t slice, int64_t, int) {
                const lt_low_rank_adapter &a = adapters[i];
                const int64_t begin = (slice < a_slices ? slice : slice - a_slices) * kSlice;
                if (slice < a_slices)
                    finish_rows(sums, p.partial_a[i], p.a_stride(), a.rank, begin, smaller(begin + kSlice, inputs),
                                1.0f, accumulate, a.da, a.da_stride);
                else
                    finish_columns(sums, p.partial_b[i], p.b_stride(i), a.rank, begin,
                                   smaller(begin + kSlice, a.outputs), a.scale, accumulate, a.db, a.db_stride);
            });
        }
        return (int)LT_OK;
    });
}

LT_DEFINE(low_rank_add,
          (int dtype, const void *x_, int64_t x_stride, const float *p, int64_t p_input_step, int64_t p_rank_step,
           const float *q, int64_t q_rank_step, int64_t q_output_step, void *y_, int64_t y_stride, int64_t rows,
           int64_t inputs, int64_t rank, int64_t outputs, float scale),
          (dtype, x_, x_stride, p, p_input_step, p_rank_step, q, q_rank_step, q_output_step, y_, y_stride, rows, inputs,
           rank, outputs, scale)) {
    using namespace lt::LT_ISA;
    add_plan plan = {};
    plan.inputs = inputs, plan.outputs = outputs, plan.rank = rank, plan.scale = scale;
    plan.s_stride = whole_vectors(rank), plan.q_stride = spread_stride(outputs);
    plan.x_stride = needs_copy(dtype, inputs) ? spread_stride(inputs) : 0;
    const int64_t p_size = inputs * plan.s_stride, q_size = rank * plan.q_stride;
    const int64_t thread_size = kBlockRows * (plan.x_stride + plan.s_stride);
    const int64_t size = p_size + q_size + lt::max_threads() * thread_size;
    plan.p = static_cast<float *>(lt::thread_scratch(size * 4));
    if (!plan.p)
        return lt::fail(LT_NO_MEMORY, "low_rank_add: no memory for %lld bytes of blocks", (long long)size * 4);
    plan.q = plan.p + p_size;
    plan.blocks = plan.q + q_size;
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const T *x = static_cast<const T *>(x_);
        T *y = static_cast<T *>(y_);
        parallel_for(1 + quotient(rank, 8), 1, [&](int64_t task, int64_t, int) {
            if (task == 0)
                pack_factor(p, p_input_step, p_rank_step, 0, inputs, rank, plan.p, plan.s_stride);
            else
                pack_factor(q, q_rank_step, q_output_step, (task - 1) * 8, smaller(task * 8, rank), outputs, plan.q,
                            plan.q_stride);
        });
        parallel_for(rows, kBlockRows, [&](int64_t begin, int64_t end, int thread) {
            add_block(plan, x + begin * x_stride, x_stride, y + begin * y_stride, y_stride, end - begin,
                      plan.blocks + thread * thread_size);
        });
        return (int)LT_OK;
    });
}
