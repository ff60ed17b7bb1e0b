// A list of tensors as one run of work: tensor after tensor is cut into pieces of at most LT_PIECE elements, none of
// them across a boundary, so that many small tensors cost one parallel region and the pieces never depend on the
// threads. On top of it, what all optimizers share: parameters and gradients of any storage type reach the update as
// fp32, and go back as the header says.
#pragma once

#include "kernel.h"
#include "philox.h"

namespace lt {
namespace LT_ISA {
namespace {

struct piece {
    int64_t tensor, begin, end; // elements [begin, end) of tensor number `tensor`
};

// Fills first_piece[0 .. tensors]: the number of the tensor's first piece; the last entry is the number of all pieces.
LT_INLINE int64_t count_pieces(const lt_parameter *list, int64_t tensors, int64_t *first_piece) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < tensors; ++i) {
        first_piece[i] = pieces;
        pieces += (list[i].size + LT_PIECE - 1) / LT_PIECE;
    }
    first_piece[tensors] = pieces;
    return pieces;
}

LT_INLINE piece find_piece(const lt_parameter *list, int64_t tensors, const int64_t *first_piece, int64_t number) {
    int64_t low = 0, high = tensors; // the last tensor whose first piece is not beyond `number` is in [low, high)
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first_piece[middle] <= number)
            low = middle;
        else
            high = middle;
    }
    const int64_t begin = (number - first_piece[low]) * LT_PIECE;
    return {low, begin, list[low].size - begin < LT_PIECE ? list[low].size : begin + LT_PIECE};
}

LT_INLINE int check_grads(const char *op, const lt_parameter *list, int64_t tensors) {
    for (int64_t i = 0; i < tensors; ++i)
        if (list[i].grad && (list[i].grad_dtype < LT_F32 || list[i].grad_dtype > LT_F16))
            return fail(LT_INVALID, "%s: grad_dtype %lld of tensor %lld is none of LT_F32, LT_BF16, LT_F16", op,
                        (long long)list[i].grad_dtype, (long long)i);
    return LT_OK;
}

LT_INLINE int check_parameters(const char *op, const lt_parameter *list, int64_t tensors, int64_t step) {
    if (step < 1 || step > 0xffffffffLL)
        return fail(LT_INVALID, "%s: step %lld is outside [1, 2^32)", op, (long long)step);
    for (int64_t i = 0; i < tensors; ++i) {
        if (list[i].dtype < LT_F32 || list[i].dtype > LT_F16)
            return fail(LT_INVALID, "%s: dtype %lld of tensor %lld is none of LT_F32, LT_BF16, LT_F16", op,
                        (long long)list[i].dtype, (long long)i);
        if (list[i].dtype == LT_F16 && list[i].size > 0 && !list[i].master)
            return fail(LT_INVALID, "%s: tensor %lld is LT_F16, which needs a master", op, (long long)i);
    }
    return check_grads(op, list, tensors);
}

constexpr int kChunk = 1024; // staged at a time; a multiple of eight, so that a counter of the noise is never cut

LT_INLINE void widen_chunk(const void *from, int64_t dtype, int64_t begin, int64_t n, float *to) {
    with_dtype((int)dtype, "list", [&](auto t) {
        const decltype(t) *x = static_cast<const decltype(t) *>(from) + begin;
        int64_t i = 0;
        for (; i + W <= n; i += W)
            store(to + i, load(x + i));
        store_part(to + i, load_part(x + i, n - i), n - i);
        return (int)LT_OK;
    });
}

LT_INLINE void narrow_chunk(const float *from, void *to, int64_t dtype, int64_t begin, int64_t n) {
    with_dtype((int)dtype, "list", [&](auto t) {
        decltype(t) *y = static_cast<decltype(t) *>(to) + begin;
        int64_t i = 0;
        for (; i + W <= n; i += W)
            store(y + i, load(from + i));
        store_part(y + i, load_part(from + i, n - i), n - i);
        return (int)LT_OK;
    });
}

LT_INLINE vh round_by(vf x, const uint16_t *noise) {
    vh halves;
    memcpy(&halves, noise, sizeof halves);
    const vu u = as_bits(x), is_nan = (vu)(x != x);
    const vu rounded = (u + __builtin_convertvector(halves, vu)) >> 16, quiet = (u >> 16) | 0x40;
    return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), vh);
}

LT_INLINE void narrow_chunk_stochastically(const float *from, bf16 *to, int64_t tensor, int64_t begin, int64_t n,
                                           int64_t step, uint64_t seed) {
    uint32_t words[kChunk / 2];
    uint16_t noise[kChunk];
    philox_run<kChunk / 8>((uint64_t)begin / 8, (uint32_t)tensor, (uint32_t)step, seed, words);
    memcpy(noise, words, sizeof noise); // little-endian: the lower half comes first
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vh rounded = round_by(load(from + i), noise + i);
        memcpy(to + begin + i, &rounded, sizeof rounded);
    }
    if (i < n) {
        const vh rounded = round_by(load_part(from + i, n - i), noise + i);
        memcpy(to + begin + i, &rounded, (size_t)(n - i) * 2);
    }
}

// update(tensor, p, g, begin, n) for every chunk: p, g are fp32, n elements from number `begin` of list[tensor] on.
template <class F>
LT_INLINE void update_piece(const lt_parameter &t, const piece &at, int64_t step, uint64_t seed, F update) {
    float staged_p[kChunk], staged_g[kChunk];
    for (int64_t begin = at.begin; begin < at.end; begin += kChunk) {
        const int64_t n = at.end - begin < kChunk ? at.end - begin : kChunk;
        const float *g = static_cast<const float *>(t.grad) + begin;
        if (t.grad_dtype != LT_F32) {
            widen_chunk(t.grad, t.grad_dtype, begin, n, staged_g);
            g = staged_g;
        }
        float *p = (t.dtype == LT_F32 ? static_cast<float *>(t.data) : t.master) + begin;
        const bool stochastic = t.dtype != LT_F32 && !t.master;
        if (stochastic) {
            widen_chunk(t.data, t.dtype, begin, n, staged_p);
            p = staged_p;
        }
        update(p, g, begin, n);
        if (stochastic)
            narrow_chunk_stochastically(p, static_cast<bf16 *>(t.data), at.tensor, begin, n, step, seed);
        else if (t.dtype != LT_F32)
            narrow_chunk(p, t.data, t.dtype, begin, n);
    }
}

// update(t, p, g, begin, n) over all of the list, in parallel: see update_piece.
template <class F>
LT_INLINE int update_parameters(const char *op, const lt_parameter *list, int64_t tensors, int64_t step, uint64_t seed,
                                F update) {
    if (const int status = check_parameters(op, list, tensors, step))
        return status;
    int64_t *first_piece = static_cast<int64_t *>(thread_scratch((tensors + 1) * 8));
    if (!first_piece)
        return fail(LT_NO_MEMORY, "%s: no memory for a list of %lld tensors", op, (long long)tensors);
    const int64_t pieces = count_pieces(list, tensors, first_piece);
    parallel_for(pieces, 1, [&](int64_t number, int64_t, int) {
        const piece at = find_piece(list, tensors, first_piece, number);
        const lt_parameter &t = list[at.tensor];
        if (t.grad)
            update_piece(t, at, step, seed,
                         [&](float *p, const float *g, int64_t begin, int64_t n) { update(t, p, g, begin, n); });
    });
    return LT_OK;
}

LT_INLINE vf vsqrt(vf x) {
    for (int i = 0; i < W; ++i)
        x[i] = __builtin_sqrtf(x[i]);
    return x;
}

// a / (sqrt(v) * factor + eps).
LT_INLINE vf over_root(vf a, vf v, float factor, float eps) {
#if defined(__AVX512F__)
    // Root and quotient block the divider for 36 cycles a vector, more than memory takes. Estimates of 14 bits, each
    // corrected once, are within 2 ulp of them. A lane where the correction meets 0 * infinity takes the long way.
    const __mmask16 some = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const vf r = (vf)_mm512_maskz_rsqrt14_ps(some, (__m512)v);
    vf root = v * r;
    root += (v - root * root) * (r * 0.5f);
    const vf d = root * factor + eps, inverse = (vf)_mm512_rcp14_ps((__m512)d);
    vf q = a * inverse;
    q += (a - q * d) * inverse;
    const vi plain = (d >= 0x1p-60f) & (d <= 0x1p60f) & (q - q == 0.0f);
    if (__builtin_expect(_mm512_movepi32_mask((__m512i)plain) == 0xffff, 1))
        return q;
    return select(plain, q, a / (vsqrt(v) * factor + eps));
#else
    return a / (vsqrt(v) * factor + eps);
#endif
}

} // namespace
} // namespace LT_ISA
} // namespace lt
