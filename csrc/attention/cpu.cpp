// Packed attention: blocks of query rows meet blocks of keys, with an online softmax (Dao et al. 2022,
// arXiv:2205.14135); only the log-sum-exp of each row is kept, and backward forms the probabilities again.
//
// Scores are held transposed, S[key, row]: a vector is one key's score for W rows, so that maximum, exponential and sum
// need no step across lanes, and both S.V and the gradients read S as a broadcast operand. K and V stay as they are;
// Q (and dO in backward) is transposed once a block. The heads of a group share each block of K and V.
#include <stdlib.h>

#include "products.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kRows = 64;       // query rows of a block
constexpr int64_t kRowsPadded = 66; // the same in whole tiles
constexpr int64_t kKeys = 48;       // keys of a block: whole tiles
constexpr int64_t kChunkKeys = 384; // keys whose gradients stay in cache while the queries pass by
constexpr int64_t kMostSlots = 4;   // a sequence's keys are split into this many items at most: dQ is kept per slot
constexpr int64_t kSeesAll = 1 << 30;
static_assert(kRowsPadded % kTileRows == 0 && kKeys % kTileRows == 0 && kChunkKeys % kKeys == 0, "whole tiles");

struct problem {
    const int32_t *cu_seqlens;
    int64_t sequences, heads, kv_heads, dim;
    float scale;
    bool causal;

    int64_t tokens() const { return cu_seqlens[sequences]; }
    int64_t length(int64_t s) const { return cu_seqlens[s + 1] - cu_seqlens[s]; }
    int64_t group() const { return heads / kv_heads; }
    int64_t padded_dim() const { return round_up(dim, W); }
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

// ---- softmax of a block --------------------------------------------------------------------------------------------

// e^x for x <= 0 to about 1 ulp (the polynomial of vexp in simd.h); 0 below -87.3, NaN stays NaN.
LT_INLINE vf exp_of_negative(vf x) {
    const vf low = splat(-87.33654f), magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const vi in_range = ~(x < low);
    const vf y = x < low ? low : x;
    const vf shifted = y * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    const vf f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vf e = splat(1.9875691500e-4f);
    e = e * f + 1.3981999507e-3f;
    e = e * f + 8.3334519073e-3f;
    e = e * f + 4.1665795894e-2f;
    e = e * f + 1.6666665459e-1f;
    e = e * f + 5.0000001201e-1f;
    e = e * (f * f) + f + 1.0f;
    const vf result = (vf)(as_bits(e) + (as_bits(shifted) << 23)); // e * 2^n: magic's own bits fall off the top
    return (vf)((vi)result & in_range);
}

LT_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

// Which keys of a block the rows [row, row + W) see, where row r sees keys 0 to r + diagonal: all of them see keys
// below `all`, some of them those below `some`.
struct sight {
    int64_t all, some;
    sight(int64_t row, int64_t diagonal, int64_t keys)
        : all(most(least(row + diagonal + 1, keys), (int64_t)0)), some(most(least(row + diagonal + W, keys), all)) {}
};

// Lanes of the rows [row, row + W) that see key j.
LT_INLINE vi sees(int64_t row, int64_t diagonal, int64_t j) {
    vi lanes;
    for (int i = 0; i < W; ++i)
        lanes[i] = i;
    return lanes >= (int32_t)(j - diagonal - row);
}

// Products by tiles of rows may read kTileRows - 1 keys more than these rows see.
LT_INLINE void clear_unseen(float *s, int64_t row, int64_t some, int64_t keys) {
    for (int64_t j = some; j < least(some + kTileRows, keys); ++j)
        store(s + j * kRows + row, vf{});
}

// S [keys, kRows] becomes e^(S - m), with the running maximum m and sum l of each row; factor = e^(m before - m after).
void online_softmax(float *s, int64_t keys, int64_t lanes, int64_t diagonal, float *m, float *l, float *factor) {
    for (int64_t row = 0; row < lanes; row += W) {
        const sight seen(row, diagonal, keys);
        const vf before = load(m + row);
        vf highest = before, total = {};
        for (int64_t j = 0; j < seen.all; ++j)
            highest = maximum(load(s + j * kRows + row), highest);
        for (int64_t j = seen.all; j < seen.some; ++j) {
            const vf x = sees(row, diagonal, j) ? load(s + j * kRows + row) : splat(-__builtin_inff());
            store(s + j * kRows + row, x);
            highest = maximum(x, highest);
        }
        for (int64_t j = 0; j < seen.some; ++j) {
            const vf e = exp_of_negative(load(s + j * kRows + row) - highest);
            store(s + j * kRows + row, e);
            total += e;
        }
        clear_unseen(s, row, seen.some, keys);
        const vf shrink = exp_of_negative(before - highest);
        store(factor + row, shrink);
        store(l + row, load(l + row) * shrink + total);
        store(m + row, highest);
    }
}

// S becomes P = e^(S - lse), dP becomes dS = P * (dP - delta); zero where a row does not see a key.
void softmax_gradient(float *s, float *dp, int64_t keys, int64_t lanes, int64_t diagonal, const float *lse,
                      const float *delta) {
    for (int64_t row = 0; row < lanes; row += W) {
        const sight seen(row, diagonal, keys);
        const vf base = load(lse + row), mean = load(delta + row);
        for (int64_t j = 0; j < seen.all; ++j) {
            const vf e = exp_of_negative(load(s + j * kRows + row) - base);
            store(s + j * kRows + row, e);
            store(dp + j * kRows + row, e * (load(dp + j * kRows + row) - mean));
        }
        for (int64_t j = seen.all; j < seen.some; ++j) {
            const vi mask = sees(row, diagonal, j);
            const vf e = exp_of_negative(load(s + j * kRows + row) - base);
            const vf g = e * (load(dp + j * kRows + row) - mean);
            store(s + j * kRows + row, mask ? e : vf{});
            store(dp + j * kRows + row, mask ? g : vf{});
        }
        clear_unseen(s, row, seen.some, keys);
        clear_unseen(dp, row, seen.some, keys);
    }
}

// ---- products of a block, leaving out what lies above the diagonal -------------------------------------------------

// S[key, row] = sum_d K[key, d] * QT[d, row]
void scores(const float *k, const float *qt, int64_t keys, int64_t lanes, int64_t dim, int64_t ld, int64_t diagonal,
            float *s) {
    for (int64_t j = 0; j < keys; j += kTileRows) {
        const int64_t first = most(j - diagonal, (int64_t)0) / W * W; // rows before it see none of these keys
        strip<false>(k + j * ld, ld, qt + first, kRows, dim, s + j * kRows + first, kRows, lanes - first, OVERWRITE);
    }
}

// O[row, d] (+)= sum_key S[key, row] * V[key, d]
void rows_from_keys(const float *s, const float *v, int64_t keys, int64_t rows, int64_t ld, int64_t diagonal, float *o,
                    start mode, const float *factor = nullptr) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t depth = least(diagonal + r + kTileRows, keys);
        if (depth > 0)
            strip<true>(s + r, kRows, v, ld, depth, o + r * ld, ld, ld, mode, factor ? factor + r : nullptr);
    }
}

// dV[key, d] += sum_row S[key, row] * dO[row, d]
void keys_from_rows(const float *s, const float *grad, int64_t keys, int64_t rows, int64_t ld, int64_t diagonal,
                    float *dv) {
    for (int64_t j = 0; j < keys; j += kTileRows) {
        const int64_t first = most(j - diagonal, (int64_t)0);
        if (first < rows)
            strip<false>(s + j * kRows + first, kRows, grad + first * ld, ld, rows - first, dv + j * ld, ld, ld, ADD);
    }
}

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
    const int64_t end = p.causal ? row + rows : length;
    for (int64_t g = 0; g < p.group(); ++g) {
        const int64_t at = g * z.head_floats;
        pack(q.at(begin + row, w.kv_head * p.group() + g), q.stride, rows, p.dim, p.scale, z.q, ld, lanes);
        transpose(z.q, ld, lanes, ld, z.qt + at, kRows);
        for (int64_t r = 0; r < kRows; ++r)
            z.m[at + r] = -__builtin_inff(), z.l[at + r] = 0;
    }
    for (int64_t key = 0; key < end; key += kKeys) {
        const int64_t keys = least(kKeys, end - key), diagonal = p.causal ? row - key : kSeesAll;
        pack(k.at(begin + key, w.kv_head), k.stride, keys, p.dim, 1.0f, z.k, ld, round_up(keys, kTileRows));
        pack(v.at(begin + key, w.kv_head), v.stride, keys, p.dim, 1.0f, z.v, ld, keys);
        for (int64_t g = 0; g < p.group(); ++g) {
            const int64_t at = g * z.head_floats;
            scores(z.k, z.qt + at, keys, lanes, p.dim, ld, diagonal, z.s);
            online_softmax(z.s, keys, lanes, diagonal, z.m + at, z.l + at, z.factor + at);
            rows_from_keys(z.s, z.v, keys, rows, ld, diagonal, z.o + at, key ? RESCALE : OVERWRITE, z.factor + at);
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

// dQ of the block, scaled: to its place, or to the slot's share, which a later chunk of the slot adds to.
template <class T>
void store_rows(const problem &p, const gradients<T> &x, int64_t token, int64_t head, int64_t rows, int64_t ld,
                const float *dq, float *slot, bool first_chunk) {
    for (int64_t r = 0; r < rows; ++r) {
        if (!slot) {
            unpack(dq + r * ld, p.dim, p.scale, x.dq.at(token + r, head));
            continue;
        }
        float *share = slot + ((token + r) * p.heads + head) * p.dim;
        for (int64_t d = 0; d < p.dim; ++d)
            share[d] = (first_chunk ? 0.0f : share[d]) + dq[r * ld + d] * p.scale;
    }
}

// Keys [first, end) of one kv head against all rows that see them. `slot` is null where the sequence has a single slot.
template <class T>
void backward_chunk(const problem &p, const gradients<T> &x, const item &w, int64_t first, int64_t end, float *slot,
                    bool first_chunk, const backward_scratch &z) {
    const int64_t begin = p.cu_seqlens[w.sequence], length = p.length(w.sequence), ld = p.padded_dim();
    const int64_t padded = round_up(end - first, kTileRows);
    pack(x.k.at(begin + first, w.kv_head), x.k.stride, end - first, p.dim, 1.0f, z.k, ld, padded);
    pack(x.v.at(begin + first, w.kv_head), x.v.stride, end - first, p.dim, 1.0f, z.v, ld, padded);
    for (int64_t i = 0; i < padded * ld; ++i)
        z.dk[i] = z.dv[i] = 0;
    for (int64_t row = p.causal ? first / kRows * kRows : 0; row < length; row += kRows)
        for (int64_t head = w.kv_head * p.group(); head < (w.kv_head + 1) * p.group(); ++head) {
            const int64_t rows = least(kRows, length - row), lanes = round_up(rows, W);
            load_rows(p, x, begin + row, head, rows, z);
            for (int64_t key = first; key < (p.causal ? least(end, row + rows) : end); key += kKeys) {
                const int64_t keys = least(kKeys, end - key), diagonal = p.causal ? row - key : kSeesAll;
                const int64_t at = (key - first) * ld;
                scores(z.k + at, z.qt, keys, lanes, p.dim, ld, diagonal, z.s);
                scores(z.v + at, z.grad_t, keys, lanes, p.dim, ld, diagonal, z.ds);
                softmax_gradient(z.s, z.ds, keys, lanes, diagonal, z.lse, z.delta);
                keys_from_rows(z.s, z.grad, keys, rows, ld, diagonal, z.dv + at);
                keys_from_rows(z.ds, z.q, keys, rows, ld, diagonal, z.dk + at);
                rows_from_keys(z.ds, z.k + at, keys, rows, ld, diagonal, z.dq, ADD);
            }
            store_rows(p, x, begin + row, head, rows, ld, z.dq, slot, first_chunk);
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
            float *total = x.slots + (begin + t) * p.heads * p.dim;
            for (int64_t s = 1; s * size < (p.causal ? t + 1 : length); ++s)
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
           int causal),
          (dtype, q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, o, o_stride, o_head, lse, cu_seqlens,
           sequences, heads, kv_heads, head_dim, scale, causal)) {
    using namespace lt::LT_ISA;
    const problem p = {cu_seqlens, sequences, heads, kv_heads, head_dim, scale, causal != 0};
    if (int status = check("attention_forward", p))
        return status;
    const auto size = [](int64_t) { return kRows; };
    const auto cost = [&](int64_t, int64_t end, int64_t length) { return p.causal ? end : length; };
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
           int64_t kv_heads, int64_t head_dim, float scale, int causal),
          (dtype, grad, grad_stride, grad_head, q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, o,
           o_stride, o_head, lse, dq, dq_stride, dq_head, dk, dk_stride, dk_head, dv, dv_stride, dv_head, cu_seqlens,
           sequences, heads, kv_heads, head_dim, scale, causal)) {
    using namespace lt::LT_ISA;
    const problem p = {cu_seqlens, sequences, heads, kv_heads, head_dim, scale, causal != 0};
    if (int status = check("attention_backward", p))
        return status;
    const auto cost = [&](int64_t begin, int64_t end, int64_t length) {
        return (end - begin) * (p.causal ? length - (begin + end) / 2 : length);
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
