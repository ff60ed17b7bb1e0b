// Rotary embedding in place: every pair of columns of a head turns by its token's angle. Queries and keys turn in one
// call, so that a token's angles are read once for all its heads.
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

// Pairs (i, i + half).
template <class T> void rotate_halves(T *x, const float *cos, const float *sin, float sign, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const vf a = load(x + i), b = load(x + half + i);
        const vf c = load(cos + i), s = load(sin + i) * sign;
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = widen(x[i]), b = widen(x[half + i]), s = sin[i] * sign;
        narrow(a * cos[i] - b * s, x + i);
        narrow(b * cos[i] + a * s, x + half + i);
    }
}

typedef uint64_t vpairs __attribute__((vector_size(4 * LT_W)));

LT_INLINE vf swap_neighbours(vf v) {
    const vpairs pairs = (vpairs)v;
    return (vf)(pairs << 32 | pairs >> 32);
}

// Pairs (2 i, 2 i + 1): both members of a pair lie in one vector, whose neighbours are swapped instead. `angles` has
// the pair's cosine twice in its first 2 * half floats, then the sine twice, negated for the first of the pair.
template <class T> void rotate_neighbours(T *x, const float *angles, int64_t half) {
    const float *c = angles, *s = angles + 2 * half;
    int64_t i = 0;
    for (; i + W <= 2 * half; i += W) {
        const vf v = load(x + i);
        store(x + i, v * load(c + i) + swap_neighbours(v) * load(s + i));
    }
    for (; i < 2 * half; i += 2) {
        const float a = widen(x[i]), b = widen(x[i + 1]);
        narrow(a * c[i] + b * s[i], x + i);
        narrow(b * c[i + 1] + a * s[i + 1], x + i + 1);
    }
}

void spread_angles(const float *cos, const float *sin, float sign, int64_t half, float *angles) {
    for (int64_t i = 0; i < half; ++i) {
        angles[2 * i] = angles[2 * i + 1] = cos[i];
        angles[2 * half + 2 * i] = -sign * sin[i];
        angles[2 * half + 2 * i + 1] = sign * sin[i];
    }
}

constexpr int64_t kTokensPerChunk = 32;
constexpr int64_t kPairs = 1024; // of a head that are turned together, where they are neighbours

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(rope,
          (int dtype, void *q_, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, void *k_,
           int64_t k_token_stride, int64_t k_head_stride, int64_t k_heads, const float *cos, const float *sin,
           int64_t table_rows, const int64_t *positions, int64_t tokens, int64_t half, int interleaved, int inverse),
          (dtype, q_, q_token_stride, q_head_stride, q_heads, k_, k_token_stride, k_head_stride, k_heads, cos, sin,
           table_rows, positions, tokens, half, interleaved, inverse)) {
    using namespace lt::LT_ISA;
    for (int64_t t = 0; t < tokens; ++t)
        if (positions[t] < 0 || positions[t] >= table_rows)
            return lt::fail(LT_INVALID, "rope: positions[%lld] = %lld is outside [0, %lld)", (long long)t,
                            (long long)positions[t], (long long)table_rows);
    const float sign = inverse ? -1.0f : 1.0f;
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        T *q = static_cast<T *>(q_), *k = static_cast<T *>(k_);
        parallel_for(tokens, kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
            float angles[4 * kPairs];
            for (int64_t token = begin; token < end; ++token) {
                T *q_token = q + token * q_token_stride, *k_token = k + token * k_token_stride;
                const float *c = cos + positions[token] * half, *s = sin + positions[token] * half;
                if (!interleaved) {
                    for (int64_t head = 0; head < q_heads; ++head)
                        rotate_halves(q_token + head * q_head_stride, c, s, sign, half);
                    for (int64_t head = 0; head < k_heads; ++head)
                        rotate_halves(k_token + head * k_head_stride, c, s, sign, half);
                    continue;
                }
                for (int64_t pair = 0; pair < half; pair += kPairs) {
                    const int64_t pairs = half - pair < kPairs ? half - pair : kPairs;
                    spread_angles(c + pair, s + pair, sign, pairs, angles);
                    for (int64_t head = 0; head < q_heads; ++head)
                        rotate_neighbours(q_token + head * q_head_stride + 2 * pair, angles, pairs);
                    for (int64_t head = 0; head < k_heads; ++head)
                        rotate_neighbours(k_token + head * k_head_stride + 2 * pair, angles, pairs);
                }
            }
        });
        return (int)LT_OK;
    });
}
