// Packed attention: blocks of query rows meet blocks of keys, with an online softmax (Dao et al. 2022,
// arXiv:2205.14135); only the log-sum-exp of each row is kept, and backward forms the probabilities again.
//
// Scores are held transposed, S[key, row]: a vector is one key's score for W rows, so that maximum, exponential and sum
// need no step across lanes, and both S.V and the gradients read S as a broadcast operand. K and V stay as they are;
// Q (and dO in backward) is transposed once a block. The heads of a group share each block of K and V.
#include <stdlib.h>

#include "block.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kChunkKeys = 384; // keys whose gradients stay in cache while the queries pass by
constexpr int64_t kMostSlots = 4;   // a sequence's keys are split into this many items at most: dQ is kept per slot
static_assert(kChunkKeys % kKeys == 0, "whole blocks");

struct problem {
    const int32_t *cu_seqlens;
    int64_t sequences, heads, kv_heads, dim;
    float scale;
    int64_t before, after; // how many tokens before it and after it a token sees, besides itself

    problem(const int32_t *bounds, int64_t n, int64_t hq, int64_t hk, int64_t d, float scale_, int causal,
            int64_t window)
        : cu_seqlens(bounds), sequences(n), heads(hq), kv_heads(hk), dim(d), scale(scale_),
          before(window > 0 ? window - 1 : kSeesAll), after(causal ? 0 : before) {}
    int64_t tokens() const { return cu_seqlens[sequences]; }
    int64_t length(int64_t s) const { return cu_seqlens[s + 1] - cu_seqlens[s]; }
    int64_t group() const { return heads / kv_heads; }
    int64_t padded_dim() const { return round_up(dim, W); }
    // What the tokens [from, to) see, or are seen by, of a sequence.
    int64_t first_key(int64_t from) const { return most(from - before, (int64_t)0); }
    int64_t keys_end(int64_t to, int64_t length) const { return least(to + after, length); }
    int64_t first_row(int64_t from) const { return most(from - after, (int64_t)0); }
    int64_t rows_end(int64_t to, int64_t length) const { return least(to + before, length); }
};

// [tokens, heads, dim] with a contiguous last dimension.
template <class T> struct view {
    T *data;
    int64_t stride, head_stride;
    T *at(int64_t token, int64_t head) const { return data + token * stride + head * head_stride; }
};

// ---- items of work -------------------------------------------------------------------------------------------------

struct item {
    int64_t cost;
    int32_t sequence, kv_head, block;
};

int by_cost_descending(const void *a, const void *b) {
    const item *x = static_cast<const item *>(a), *y = static_cast<const item *>(b);
    return (x->cost < y->cost) - (x->cost > y->cost);
}

// Keys of one slot of a backward item. It depends on the sequence alone, never on the number of threads or the pack.
int64_t slot_keys(int64_t length) {
    const int64_t slots = least(kMostSlots, (length + kChunkKeys - 1) / kChunkKeys);
    return slots ? round_up((length + slots - 1) / slots, kKeys) : kKeys;
}

// One item per (sequence, kv head, block of `size(length)` positions), the costliest first, so that threads end
// together. With items null it only counts.
template <class SIZE, class COST> int64_t plan(const problem &p, SIZE size, COST cost, item *items) {
    int64_t count = 0;
    for (int64_t s = 0; s < p.sequences; ++s) {
        const int64_t length = p.length(s), step = size(length);
        for (int64_t begin = 0; begin < length; begin += step)
            for (int64_t h = 0; h < p.kv_heads; ++h, ++count)
                if (items)
                    items[count] = {cost(begin, least(begin + step, length), length), (int32_t)s, (int32_t)h,
                                    (int32_t)(begin / step)};
    }
    if (items)
        qsort(items, (size_t)count, sizeof(item), by_cost_descending);
    return count;
}

// Hands out pieces of one block of scratch, each aligned for vectors. On no memory at all it only measures.
struct carver {
    float *memory;
    int64_t used;
    float *take(int64_t floats) {
        float *piece = memory ? memory + used : nullptr;
        used += round_up(floats, 16);
        return piece;
    }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// One block of query rows in all heads of a group.
struct forward_scratch {
    float *k, *v, *q, *s;           // a block each
    float *qt, *o, *m, *l, *factor; // one per head of the group
    int64_t head_floats, floats;

    forward_scratch(const problem &p, float *memory) {
        carver c = {memory, 0};
        const int64_t ld = p.padded_dim();
        k = c.take(kKeys * ld), v = c.take(kKeys * ld), q = c.take(kRows * ld), s = c.take(kKeys * kRows + 16);
        const int64_t shared = c.used;
        qt = c.take(kRows * ld), o = c.take(kRowsPadded * ld);
        m = c.take(kRowsPadded), l = c.take(kRowsPadded), factor = c.take(kRowsPadded);
        head_floats = c.used - shared;
        floats = shared + p.group() * head_floats;
    }
};

template <class T>
void forward_item(const problem &p, const item &w, view<const T> q, view<const T> k, view<const T> v, view<T> o,
                  float *lse, forward_scratch z) {
    const int64_t begin = p.cu_seqlens[w.sequence], length = p.length(w.sequence), row = w.block * kRows;
    const int64_t rows = least(kRows, length - row), lanes = round_up(rows, W), ld = p.padded_dim();
    const int64_t start = p.first_key(row), end = p.keys_end(row + rows, length);
    for (int64_t g = 0; g < p.group(); ++g) {
        const int64_t at = g * z.head_floats;
        pack(q.at(begin + row, w.kv_head * p.group() + g), q.stride, rows, p.dim, p.scale, z.q, ld, lanes);
        transpose(z.q, ld, lanes, ld, z.qt + at, kRows);
        for (int64_t r = 0; r < kRows; ++r)
            z.m[at + r] = kLowest, z.l[at + r] = 0;
    }
    for (int64_t key = start; key < end; key += kKeys) {
        const int64_t keys = least(kKeys, end - key);
        const band seen = {row - key - p.before, row - key + p.after};
        pack(k.at(begin + key, w.kv_head), k.stride, keys, p.dim, 1.0f, z.k, ld, round_up(keys, kTileRows));
        pack(v.at(begin + key, w.kv_head), v.stride, keys, p.dim, 1.0f, z.v, ld, keys);
        for (int64_t g = 0; g < p.group(); ++g) {
            const int64_t at = g * z.head_floats;
            scores(z.k, z.qt + at, keys, lanes, p.dim, ld, seen, z.s);
            online_softmax(z.s, keys, lanes, seen, z.m + at, z.l + at, z.factor + at);
            renew_rows(z.s, z.v, keys, rows, ld, seen, z.o + at, key > start, z.factor + at);
        }
    }
    for (int64_t g = 0; g < p.group(); ++g) {
        const int64_t at = g * z.head_floats, head = w.kv_head * p.group() + g;
        for (int64_t r = 0; r < rows; ++r) {
            unpack(z.o + at + r * ld, p.dim, 1.0f / z.l[at + r], o.at(begin + row + r, head));
            lse[head * p.tokens() + begin + row + r] = z.m[at + r] + __builtin_logf(z.l[at + r]);
        }
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T> struct gradients {
    view<const T> grad, q, k, v, o;
    const float *lse;
    view<T> dq, dk, dv;
    float *slots; // [slot, token, head, dim], of sequences that have more than one slot
};

struct backward_scratch {
    float *k, *v, *dk, *dv;             // a chunk of keys
    float *q, *qt, *grad, *grad_t, *dq; // a block of rows
    float *lse, *delta, *s, *ds;
    int64_t floats;

    backward_scratch(const problem &p, float *memory) {
        carver c = {memory, 0};
        const int64_t ld = p.padded_dim();
        k = c.take(kChunkKeys * ld), v = c.take(kChunkKeys * ld);
        dk = c.take(kChunkKeys * ld), dv = c.take(kChunkKeys * ld);
        q = c.take(kRows * ld), qt = c.take(kRows * ld), grad = c.take(kRows * ld), grad_t = c.take(kRows * ld);
        dq = c.take(kRowsPadded * ld), lse = c.take(kRows), delta = c.take(kRows);
        s = c.take(kKeys * kRows + 16), ds = c.take(kKeys * kRows + 16);
        floats = c.used;
    }
};

template <class T> float dot(const T *a, const T *b, int64_t n) {
    vf total = {};
    int64_t i = 0;
    for (; i + W <= n; i += W)
        total += load(a + i) * load(b + i);
    return sum(total + load_part(a + i, n - i) * load_part(b + i, n - i));
}

// A block of rows of one head, ready to meet keys.
template <class T>
void load_rows(const problem &p, const gradients<T> &x, int64_t token, int64_t head, int64_t rows,
               const backward_scratch &z) {
    const int64_t lanes = round_up(rows, W), ld = p.padded_dim();
    pack(x.q.at(token, head), x.q.stride, rows, p.dim, p.scale, z.q, ld, lanes);
    pack(x.grad.at(token, head), x.grad.stride, rows, p.dim, 1.0f, z.grad, ld, lanes);
    transpose(z.q, ld, lanes, ld, z.qt, kRows);
    transpose(z.grad, ld, lanes, ld, z.grad_t, kRows);
    for (int64_t r = 0; r < lanes; ++r) {
        z.lse[r] = r < rows ? x.lse[head * p.tokens() + token + r] : 0.0f;
        z.delta[r] = r < rows ? dot(x.grad.at(token + r, head), x.o.at(token + r, head), p.dim) : 0.0f;
    }
    for (int64_t i = 0; i < kRowsPadded * ld; ++i)
        z.dq[i] = 0;
}

// dQ of the block, scaled: to its place, or to the slot's share, where `fresh` says that nothing is there yet.
template <class T>
void store_rows(const problem &p, const gradients<T> &x, int64_t token, int64_t head, int64_t rows, int64_t ld,
                const float *dq, float *slot, bool fresh) {
    for (int64_t r = 0; r < rows; ++r) {
        if (!slot) {
            unpack(dq + r * ld, p.dim, p.scale, x.dq.at(token + r, head));
            continue;
        }
        float *share = slot + ((token + r) * p.heads + head) * p.dim;
        for (int64_t d = 0; d < p.dim; ++d)
            share[d] = (fresh ? 0.0f : share[d]) + dq[r * ld + d] * p.scale;
    }
}

// Keys [first, end) of one kv head against all rows that see them. `slot` is null where the sequence has a single slot.
template <class T>
void backward_chunk(const problem &p, const gradients<T> &x, const item &w, int64_t first, int64_t end, float *slot,
                    bool first_chunk, const backward_scratch &z) {
    const int64_t begin = p.cu_seqlens[w.sequence], length = p.length(w.sequence), ld = p.padded_dim();
    const int64_t padded = round_up(end - first, kTileRows), rows_end = p.rows_end(end, length);
    pack(x.k.at(begin + first, w.kv_head), x.k.stride, end - first, p.dim, 1.0f, z.k, ld, padded);
    pack(x.v.at(begin + first, w.kv_head), x.v.stride, end - first, p.dim, 1.0f, z.v, ld, padded);
    for (int64_t i = 0; i < padded * ld; ++i)
        z.dk[i] = z.dv[i] = 0;
    for (int64_t row = p.first_row(first) / kRows * kRows; row < rows_end; row += kRows) {
        const int64_t rows = least(kRows, length - row), lanes = round_up(rows, W);
        const int64_t from = first + most(p.first_key(row) - first, (int64_t)0) / kKeys * kKeys; // whole blocks, tiles
        const int64_t to = least(end, p.keys_end(row + rows, length));
        const bool fresh = first_chunk || row >= p.rows_end(first, length); // the slot's chunk before came not so far
        for (int64_t head = w.kv_head * p.group(); head < (w.kv_head + 1) * p.group(); ++head) {
            load_rows(p, x, begin + row, head, rows, z);
            for (int64_t key = from; key < to; key += kKeys) {
                const int64_t keys = least(kKeys, end - key), at = (key - first) * ld;
                const band seen = {row - key - p.before, row - key + p.after};
                scores(z.k + at, z.qt, keys, lanes, p.dim, ld, seen, z.s);
                scores(z.v + at, z.grad_t, keys, lanes, p.dim, ld, seen, z.ds);
                softmax_gradient(z.s, z.ds, keys, lanes, seen, z.lse, z.delta);
                keys_from_rows(z.s, z.grad, keys, rows, ld, seen, z.dv + at);
                keys_from_rows(z.ds, z.q, keys, rows, ld, seen, z.dk + at);
                add_rows(z.ds, z.k + at, keys, rows, ld, seen, z.dq);
            }
            store_rows(p, x, begin + row, head, rows, ld, z.dq, slot, fresh);
        }
    }
    for (int64_t j = first; j < end; ++j) {
        unpack(z.dk + (j - first) * ld, p.dim, 1.0f, x.dk.at(begin + j, w.kv_head));
        unpack(z.dv + (j - first) * ld, p.dim, 1.0f, x.dv.at(begin + j, w.kv_head));
    }
}

// dQ of a sequence with several slots: the sum of their shares, in order. A row has shares of the slots it sees.
template <class T> void sum_slots(const problem &p, const gradients<T> &x, int64_t sequence) {
    const int64_t begin = p.cu_seqlens[sequence], length = p.length(sequence), size = slot_keys(length);
    const int64_t share = p.tokens() * p.heads * p.dim;
    parallel_for(length, kRows, [&](int64_t from, int64_t to, int) {
        for (int64_t t = from; t < to; ++t) {
            const int64_t first = p.first_key(t) / size;
            float *total = x.slots + first * share + (begin + t) * p.heads * p.dim;
            for (int64_t s = 1; (first + s) * size < p.keys_end(t + 1, length); ++s)
                for (int64_t i = 0; i < p.heads * p.dim; ++i)
                    total[i] += total[s * share + i];
            for (int64_t h = 0; h < p.heads; ++h)
                unpack(total + h * p.dim, p.dim, 1.0f, x.dq.at(begin + t, h));
        }
    });
}

int check(const char *name, const problem &p) {
    if (p.sequences < 0 || p.dim < 1 || p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads)
        return fail(LT_INVALID, "%s: sequences=%lld, heads=%lld, kv_heads=%lld, head_dim=%lld do not fit", name,
                    (long long)p.sequences, (long long)p.heads, (long long)p.kv_heads, (long long)p.dim);
    for (int64_t s = 0; s < p.sequences; ++s)
        if (p.cu_seqlens[0] != 0 || p.length(s) < 0)
            return fail(LT_INVALID, "%s: cu_seqlens must start at 0 and never fall; it does at sequence %lld", name,
                        (long long)s);
    return LT_OK;
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(attention_forward,
          (int dtype, const void *q, int64_t q_stride, int64_t q_head, const void *k, int64_t k_stride, int64_t k_head,
           const void *v, int64_t v_stride, int64_t v_head, void *o, int64_t o_stride, int64_t o_head, float *lse,
           const int32_t *cu_seqlens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
           int causal, int64_t window),
          (dtype, q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, o, o_stride, o_head, lse, cu_seqlens,
           sequences, heads, kv_heads, head_dim, scale, causal, window)) {
    using namespace lt::LT_ISA;
    const problem p(cu_seqlens, sequences, heads, kv_heads, head_dim, scale, causal, window);
    if (int status = check("attention_forward", p))
        return status;
    const auto size = [](int64_t) { return kRows; };
    const auto cost = [&](int64_t begin, int64_t end, int64_t length) {
        return p.keys_end(end, length) - p.first_key(begin);
    };
    const int64_t count = plan(p, size, cost, nullptr), each = forward_scratch(p, nullptr).floats;
    const int64_t list = round_up(count * (int64_t)sizeof(item), 64), bytes = list + lt::max_threads() * each * 4;
    char *memory = static_cast<char *>(lt::thread_scratch(bytes));
    if (!memory)
        return lt::fail(LT_NO_MEMORY, "attention_forward: no memory for %lld bytes of scratch", (long long)bytes);
    item *items = reinterpret_cast<item *>(memory);
    float *areas = reinterpret_cast<float *>(memory + list);
    plan(p, size, cost, items);
    return with_dtype(dtype, "q", [&](auto t) {
        typedef decltype(t) T;
        const view<const T> q_ = {static_cast<const T *>(q), q_stride, q_head};
        const view<const T> k_ = {static_cast<const T *>(k), k_stride, k_head};
        const view<const T> v_ = {static_cast<const T *>(v), v_stride, v_head};
        const view<T> o_ = {static_cast<T *>(o), o_stride, o_head};
        parallel_for(count, 1, [&](int64_t i, int64_t, int thread) {
            forward_item(p, items[i], q_, k_, v_, o_, lse, forward_scratch(p, areas + thread * each));
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(attention_backward,
          (int dtype, const void *grad, int64_t grad_stride, int64_t grad_head, const void *q, int64_t q_stride,
           int64_t q_head, const void *k, int64_t k_stride, int64_t k_head, const void *v, int64_t v_stride,
           int64_t v_head, const void *o, int64_t o_stride, int64_t o_head, const float *lse, void *dq,
           int64_t dq_stride, int64_t dq_head, void *dk, int64_t dk_stride, int64_t dk_head, void *dv,
           int64_t dv_stride, int64_t dv_head, const int32_t *cu_seqlens, int64_t sequences, int64_t heads,
           int64_t kv_heads, int64_t head_dim, float scale, int causal, int64_t window),
          (dtype, grad, grad_stride, grad_head, q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, o,
           o_stride, o_head, lse, dq, dq_stride, dq_head, dk, dk_stride, dk_head, dv, dv_stride, dv_head, cu_seqlens,
           sequences, heads, kv_heads, head_dim, scale, causal, window)) {
    using namespace lt::LT_ISA;
    const problem p(cu_seqlens, sequences, heads, kv_heads, head_dim, scale, causal, window);
    if (int status = check("attention_backward", p))
        return status;
    const auto cost = [&](int64_t begin, int64_t end, int64_t length) {
        return (end - begin) * (p.rows_end((begin + end) / 2, length) - p.first_row((begin + end) / 2));
    };
    int64_t slots = 0;
    for (int64_t s = 0; s < sequences; ++s)
        if (slot_keys(p.length(s)) < p.length(s))
            slots = most(slots, (p.length(s) + slot_keys(p.length(s)) - 1) / slot_keys(p.length(s)));
    const int64_t count = plan(p, slot_keys, cost, nullptr), each = backward_scratch(p, nullptr).floats;
    const int64_t share = p.tokens() * heads * head_dim; // pages of a slot that no row touches cost no memory
    const int64_t list = round_up(count * (int64_t)sizeof(item), 64);
    const int64_t bytes = list + (lt::max_threads() * each + slots * share) * 4;
    char *memory = static_cast<char *>(lt::thread_scratch(bytes));
    if (!memory)
        return lt::fail(LT_NO_MEMORY, "attention_backward: no memory for %lld bytes of scratch", (long long)bytes);
    item *items = reinterpret_cast<item *>(memory);
    float *areas = reinterpret_cast<float *>(memory + list);
    float *shares = areas + lt::max_threads() * each;
    plan(p, slot_keys, cost, items);
    return with_dtype(dtype, "q", [&](auto t) {
        typedef decltype(t) T;
        const gradients<T> x = {{static_cast<const T *>(grad), grad_stride, grad_head},
                                {static_cast<const T *>(q), q_stride, q_head},
                                {static_cast<const T *>(k), k_stride, k_head},
                                {static_cast<const T *>(v), v_stride, v_head},
                                {static_cast<const T *>(o), o_stride, o_head},
                                lse,
                                {static_cast<T *>(dq), dq_stride, dq_head},
                                {static_cast<T *>(dk), dk_stride, dk_head},
                                {static_cast<T *>(dv), dv_stride, dv_head},
                                shares};
        parallel_for(count, 1, [&](int64_t i, int64_t, int thread) {
            const item w = items[i];
            const int64_t length = p.length(w.sequence), size = slot_keys(length);
            const int64_t first = w.block * size, end = least(first + size, length);
            float *slot = size < length ? shares + w.block * share : nullptr;
            const backward_scratch z(p, areas + thread * each);
            for (int64_t c = first; c < end; c += kChunkKeys)
                backward_chunk(p, x, w, c, least(c + kChunkKeys, end), slot, c == first, z);
        });
        for (int64_t s = 0; s < sequences; ++s)
            if (slot_keys(p.length(s)) < p.length(s))
                sum_slots(p, x, s);
        return (int)LT_OK;
    });
}
