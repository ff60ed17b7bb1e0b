// Activations and their slopes on vectors. All three are x * s(x) with a sigmoid-like s in [0, 1], computed from one
// exponential of -|.|, so that nothing overflows and the negative tail keeps its relative accuracy.
#pragma once

#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

// 1 / x to about 1 ulp, for x in [2^-100, 2^100].
LT_INLINE vf vreciprocal(vf x) {
#if defined(__AVX512F__)
    const vf r = (vf)_mm512_rcp14_ps((__m512)x); // a division blocks the divider for 16 cycles, this does not
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

LT_INLINE vf vabs(vf x) { return (vf)(as_bits(x) & 0x7fffffffu); }

// 2^(-factor * z) for z >= 0 and factor * z <= 127.4, from where on the result is 0. NaN stays NaN. A minimax
// polynomial of relative error 1e-7 for the fraction; the product's own rounding adds factor * z times 2^-24.
LT_INLINE vf vexp2_minus(vf z, float factor) {
    const vf magic = splat(12583039.0f); // 1.5 * 2^23 + 127: adding it rounds to an integer, biased as an exponent
    const vf shifted = magic - z * factor;
    const vf f = (magic - shifted) - z * factor;
    vf p = splat(1.326472731307149e-3f);
    p = p * f + 9.671512991189957e-3f;
    p = p * f + 5.550733581185341e-2f;
    p = p * f + 2.4022242426872253e-1f;
    p = p * f + 6.931470036506653e-1f;
    p = p * f + 1.0f;
    return p * (vf)(as_bits(shifted) << 23);
}

// s(z) = 1 / (1 + e^-z), and its complement 1 - s.
struct share {
    vf s, rest;
};
LT_INLINE share logistic(vf z) {
    const vf limit = splat(88.3f), size = vabs(z);
    const vf e = vexp2_minus(limit < size ? limit : size, 1.44269504088896341f);
    const vf r = vreciprocal(1.0f + e), small = e * r;
    const vi positive = z > 0.0f;
    return {positive ? r : small, positive ? small : r};
}

// Phi(x), the normal distribution function, and e^(-x^2 / 2). Phi(-a) = e^(-a^2 / 2) * t * P(t) with t = 1 / (1 + c a):
// a minimax fit of P for a in [0, 13.3], relative error 2.5e-8; beyond, the exponential is 0 in fp32.
struct normal {
    vf phi, gauss;
};
LT_INLINE normal normal_distribution(vf x) {
    const vf limit = splat(13.285f), size = vabs(x);
    const vf a = limit < size ? limit : size;
    const vf gauss = vexp2_minus(a * a, 0.7213475204444817f);
    const vf t = vreciprocal(a * 0.34f + 1.0f), u = t - 0.5f;
    vf p = splat(-0.026471851f);
    p = p * u + 0.03526252f;
    p = p * u + 0.03230798f;
    p = p * u - 0.06772998f;
    p = p * u - 0.06747644f;
    p = p * u + 0.10799363f;
    p = p * u + 0.29794392f;
    p = p * u + 0.3410649f;
    p = p * u + 0.24713932f;
    const vf tail = gauss * (p * t);
    return {x > 0.0f ? 1.0f - tail : tail, gauss};
}

// act(x) and act'(x) of the activation that LT_ACTIVATION numbers.
template <int ACTIVATION> LT_INLINE vf activate(vf x) {
    if (ACTIVATION == LT_GELU)
        return x * normal_distribution(x).phi;
    if (ACTIVATION == LT_GELU_TANH) // (1 + tanh(u)) / 2 = logistic(2 u)
        return x * logistic(x * (1.5957691216057308f + 0.07135481627260025f * x * x)).s;
    return x * logistic(x).s;
}

struct value_slope {
    vf value, slope;
};
template <int ACTIVATION> LT_INLINE value_slope activate_with_slope(vf x) {
    if (ACTIVATION == LT_GELU) {
        const normal n = normal_distribution(x);
        return {x * n.phi, n.phi + x * n.gauss * 0.3989422804014327f};
    }
    if (ACTIVATION == LT_GELU_TANH) {
        const share l = logistic(x * (1.5957691216057308f + 0.07135481627260025f * x * x));
        const vf value = x * l.s;
        return {value, l.s + value * l.rest * (1.5957691216057308f + 0.21406444881780076f * x * x)};
    }
    const share l = logistic(x);
    const vf value = x * l.s;
    return {value, l.s + value * l.rest};
}

// Calls f(constant) with the activation's code as a compile-time value.
template <int CODE> struct activation_code {
    static constexpr int value = CODE;
};
template <class F> int with_activation(int activation, F f) {
    switch (activation) {
    case LT_SILU:
        return f(activation_code<LT_SILU>{});
    case LT_GELU:
        return f(activation_code<LT_GELU>{});
    case LT_GELU_TANH:
        return f(activation_code<LT_GELU_TANH>{});
    default:
        return fail(LT_INVALID, "activation: code %d is none of LT_SILU, LT_GELU, LT_GELU_TANH", activation);
    }
}

} // namespace
} // namespace LT_ISA
} // namespace lt
