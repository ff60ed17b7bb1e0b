// One block of query rows against one block of keys: which keys a row sees, softmax and products of what it sees.
//
// Scores are held transposed, S[key, row]: a vector is one key's score for W rows, so that maximum, exponential and sum
// need no step across lanes, and both S.V and the gradients read S as a broadcast operand.
#pragma once

#include "products.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kRows = 64;       // query rows of a block
constexpr int64_t kRowsPadded = 66; // the same in whole tiles
constexpr int64_t kKeys = 48;       // keys of a block: whole tiles
constexpr int64_t kSeesAll = (int64_t)1 << 40;
constexpr float kLowest = -3.0e38f; // below any score, and finite: a row may see no key of the first block
static_assert(kRowsPadded % kTileRows == 0 && kKeys % kTileRows == 0, "whole tiles");

// ---- which keys a row sees -----------------------------------------------------------------------------------------

// Row r of the block sees the keys r + low to r + high of the block.
struct band {
    int64_t low, high;

    int64_t first_key(int64_t row) const { return most(row + low, (int64_t)0); }
    int64_t keys_end(int64_t row, int64_t keys) const { return least(row + high + 1, keys); }
    int64_t first_row(int64_t key) const { return most(key - high, (int64_t)0); }
    int64_t rows_end(int64_t key, int64_t rows) const { return least(key - low + 1, rows); }
};

// What the rows [row, row + W) see: some of them the keys [first, end), all of them those of [full, full_end).
struct sight {
    int64_t first, full, full_end, end;
    sight(int64_t row, band seen, int64_t keys) {
        end = most(seen.keys_end(row + W - 1, keys), (int64_t)0);
        first = least(seen.first_key(row), end);
        full = least(seen.first_key(row + W - 1), end);
        full_end = most(seen.keys_end(row, keys), full);
    }
};

// Lanes of the rows [row, row + W) that see key j.
LT_INLINE vi sees(int64_t row, band seen, int64_t j) {
    vi lanes;
    for (int i = 0; i < W; ++i)
        lanes[i] = i;
    const int64_t from = most(j - seen.high - row, (int64_t)0), to = least(j - seen.low - row, (int64_t)W);
    return (lanes >= (int32_t)from) & (lanes <= (int32_t)to);
}

// Products by tiles of rows or keys may read kTileRows - 1 keys beyond those that these rows see.
LT_INLINE void clear_unseen(float *s, int64_t row, const sight &seen, int64_t keys) {
    for (int64_t j = most(seen.first - kTileRows, (int64_t)0); j < seen.first; ++j)
        store(s + j * kRows + row, vf{});
    for (int64_t j = seen.end; j < least(seen.end + kTileRows, keys); ++j)
        store(s + j * kRows + row, vf{});
}

// ---- softmax -------------------------------------------------------------------------------------------------------

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

// Scores of unseen keys [from, to) become -infinity; the highest of the rest and of `highest`.
LT_INLINE vf mask_scores(float *s, int64_t row, band seen, int64_t from, int64_t to, vf highest) {
    for (int64_t j = from; j < to; ++j) {
        const vf x = sees(row, seen, j) ? load(s + j * kRows + row) : splat(-__builtin_inff());
        store(s + j * kRows + row, x);
        highest = maximum(x, highest);
    }
    return highest;
}

// S [keys, kRows] becomes e^(S - m), with the running maximum m and sum l of each row; factor = e^(m before - m after).
void online_softmax(float *s, int64_t keys, int64_t lanes, band seen, float *m, float *l, float *factor) {
    for (int64_t row = 0; row < lanes; row += W) {
        const sight these(row, seen, keys);
        const vf before = load(m + row);
        vf highest = mask_scores(s, row, seen, these.first, these.full, before), total = {};
        for (int64_t j = these.full; j < these.full_end; ++j)
            highest = maximum(load(s + j * kRows + row), highest);
        highest = mask_scores(s, row, seen, these.full_end, these.end, highest);
        for (int64_t j = these.first; j < these.end; ++j) {
            const vf e = exp_of_negative(load(s + j * kRows + row) - highest);
            store(s + j * kRows + row, e);
            total += e;
        }
        clear_unseen(s, row, these, keys);
        const vf shrink = exp_of_negative(before - highest);
        store(factor + row, shrink);
        store(l + row, load(l + row) * shrink + total);
        store(m + row, highest);
    }
}

// S becomes P = e^(S - lse), dP becomes dS = P * (dP - delta), for keys [from, to); MASKED: zero where not seen.
template <bool MASKED>
LT_INLINE void gradient_of_keys(float *s, float *dp, int64_t row, band seen, int64_t from, int64_t to, vf lse,
                                vf delta) {
    for (int64_t j = from; j < to; ++j) {
        const vf e = exp_of_negative(load(s + j * kRows + row) - lse);
        const vf g = e * (load(dp + j * kRows + row) - delta);
        const vi lanes = MASKED ? sees(row, seen, j) : vi{};
        store(s + j * kRows + row, MASKED ? (lanes ? e : vf{}) : e);
        store(dp + j * kRows + row, MASKED ? (lanes ? g : vf{}) : g);
    }
}

void softmax_gradient(float *s, float *dp, int64_t keys, int64_t lanes, band seen, const float *lse,
                      const float *delta) {
    for (int64_t row = 0; row < lanes; row += W) {
        const sight these(row, seen, keys);
        const vf base = load(lse + row), mean = load(delta + row);
        gradient_of_keys<true>(s, dp, row, seen, these.first, these.full, base, mean);
        gradient_of_keys<false>(s, dp, row, seen, these.full, these.full_end, base, mean);
        gradient_of_keys<true>(s, dp, row, seen, these.full_end, these.end, base, mean);
        clear_unseen(s, row, these, keys);
        clear_unseen(dp, row, these, keys);
    }
}

// ---- products, leaving out the tiles that no row sees --------------------------------------------------------------

// S[key, row] = sum_d K[key, d] * QT[d, row]
void scores(const float *k, const float *qt, int64_t keys, int64_t lanes, int64_t dim, int64_t ld, band seen,
            float *s) {
    for (int64_t j = 0; j < keys; j += kTileRows) {
        const int64_t first = seen.first_row(j) / W * W, end = round_up(seen.rows_end(j + kTileRows - 1, lanes), W);
        if (first < end)
            strip<false>(k + j * ld, ld, qt + first, kRows, dim, s + j * kRows + first, kRows, end - first, OVERWRITE);
    }
}

// dV[key, d] += sum_row S[key, row] * dO[row, d]
void keys_from_rows(const float *s, const float *grad, int64_t keys, int64_t rows, int64_t ld, band seen, float *dv) {
    for (int64_t j = 0; j < keys; j += kTileRows) {
        const int64_t first = seen.first_row(j), depth = seen.rows_end(j + kTileRows - 1, rows) - first;
        if (depth > 0)
            strip<false>(s + j * kRows + first, kRows, grad + first * ld, ld, depth, dv + j * ld, ld, ld, ADD);
    }
}

// dQ[row, d] += sum_key S[key, row] * K[key, d]
void add_rows(const float *s, const float *k, int64_t keys, int64_t rows, int64_t ld, band seen, float *dq) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t first = seen.first_key(r), depth = seen.keys_end(r + kTileRows - 1, keys) - first;
        if (depth > 0)
            strip<true>(s + first * kRows + r, kRows, k + first * ld, ld, depth, dq + r * ld, ld, ld, ADD);
    }
}

// O[row, d] = (later ? factor[row] * O[row, d] : 0) + sum_key S[key, row] * V[key, d]
void renew_rows(const float *s, const float *v, int64_t keys, int64_t rows, int64_t ld, band seen, float *o, bool later,
                const float *factor) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t first = seen.first_key(r), depth = seen.keys_end(r + kTileRows - 1, keys) - first;
        if (depth > 0)
            strip<true>(s + first * kRows + r, kRows, v + first * ld, ld, depth, o + r * ld, ld, ld,
                        later ? RESCALE : OVERWRITE, factor + r);
        else if (!later) // these rows see keys of later blocks only
            for (int64_t i = r * ld; i < least(r + kTileRows, kRowsPadded) * ld; ++i)
                o[i] = 0;
    }
}

} // namespace
} // namespace LT_ISA
} // namespace lt
