// Rotary embedding in place: pair (i, i + R/2) of every head turns by the token's angle. Queries and keys lie side by
// side in one buffer, so one call turns both and memory is read and written once.
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

template <class T> void rotate_head(T *x, const float *cos, const float *sin, float sign, int64_t half) {
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

constexpr int64_t kTokensPerChunk = 32;

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(rope,
          (int dtype, void *x_, int64_t token_stride, int64_t head_stride, const float *cos, const float *sin,
           const int64_t *positions, int64_t tokens, int64_t heads, int64_t half, int inverse),
          (dtype, x_, token_stride, head_stride, cos, sin, positions, tokens, heads, half, inverse)) {
    using namespace lt::LT_ISA;
    const float sign = inverse ? -1.0f : 1.0f;
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        T *x = static_cast<T *>(x_);
        parallel_for(tokens, kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t token = begin; token < end; ++token) {
                const int64_t angle = positions[token] * half;
                for (int64_t head = 0; head < heads; ++head)
                    rotate_head(x + token * token_stride + head * head_stride, cos + angle, sin + angle, sign, half);
            }
        });
        return (int)LT_OK;
    });
}
