// Vectors of W floats by the compiler's vector extension: W is 16 with AVX-512, 8 with AVX2, 4 otherwise. Storage types
// (float, bf16, f16) are widened to float at load and rounded to nearest even at store; arithmetic is always fp32.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LT_W 16
#elif defined(__AVX2__)
#define LT_W 8
#else
#define LT_W 4
#endif
#define LT_INLINE static inline __attribute__((always_inline))

namespace lt {
namespace LT_ISA {
namespace {

constexpr int W = LT_W;
typedef float vf __attribute__((vector_size(4 * LT_W)));
typedef int32_t vi __attribute__((vector_size(4 * LT_W)));
typedef uint32_t vu __attribute__((vector_size(4 * LT_W)));
typedef uint16_t vh __attribute__((vector_size(2 * LT_W)));
typedef uint8_t vb __attribute__((vector_size(LT_W)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

LT_INLINE vf splat(float x) { return x - vf{}; } // x - 0 keeps the sign of zero
LT_INLINE vf as_float(vu x) { return (vf)x; }
LT_INLINE vu as_bits(vf x) { return (vu)x; }
LT_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
LT_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }

LT_INLINE float widen(float x) { return x; }
LT_INLINE float widen(bf16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
LT_INLINE float widen(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    // Subnormals and normals alike: move the bits up and multiply by 2^112, which adjusts the exponent's bias.
    uint32_t u = (uint32_t)(x.bits & 0x7fff) << 13;
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    memcpy(&u, &f, 4);
    if ((x.bits & 0x7c00) == 0x7c00)
        u |= 0x7f800000u; // infinity and NaN
    u |= (uint32_t)(x.bits & 0x8000) << 16;
    memcpy(&f, &u, 4);
    return f;
#endif
}

LT_INLINE void narrow(float x, float *out) { *out = x; }
LT_INLINE void narrow(float x, bf16 *out) {
    uint32_t u;
    memcpy(&u, &x, 4);
    out->bits = (x != x) ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
LT_INLINE void narrow(float x, f16 *out) {
#if defined(__F16C__)
    out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) {
        out->bits = sign | 0x7e00;
    } else if (u >= 0x477ff000u) { // rounds to 2^16 or more
        out->bits = sign | 0x7c00;
    } else if (u < 0x38800000u) { // below 2^-14: let the adder round to a multiple of 2^-24
        float f;
        memcpy(&f, &u, 4);
        f += 0.5f;
        memcpy(&u, &f, 4);
        out->bits = sign | (uint16_t)(u - 0x3f000000u);
    } else {
        out->bits = sign | (uint16_t)((u - 0x38000000u + 0xfff + ((u >> 13) & 1)) >> 13);
    }
#endif
}

LT_INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
LT_INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

LT_INLINE vf load(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return as_float(__builtin_convertvector(h, vu) << 16);
}
LT_INLINE void store(bf16 *p, vf v) {
    const vu u = as_bits(v);
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vu quiet = (u >> 16) | 0x40;
    const vu is_nan = (vu)(v != v);
    const vh h = __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), vh);
    memcpy(p, &h, sizeof h);
}

LT_INLINE vf load(const f16 *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf v;
    for (int i = 0; i < W; ++i)
        v[i] = widen(p[i]);
    return v;
#endif
}
LT_INLINE void store(f16 *p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i)
        narrow(v[i], p + i);
#endif
}

// By name where the instruction exists: GCC takes conversions over more than one doubling apart, lane by lane.
LT_INLINE vu widen_bytes(vb bytes) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (int64_t)bytes));
#else
    return __builtin_convertvector(bytes, vu);
#endif
}

// Asks for the memory 2 KiB behind p: where much is computed between two loads, the processor itself asks too late
// (measured: a GELU beyond cache gets from 0.57 to 0.75 of a copy's bandwidth, a LayerNorm a tenth faster).
LT_INLINE void prefetch(const void *p) { __builtin_prefetch(static_cast<const char *>(p) + 2048); }

// The last n < W elements; lanes beyond are zero.
template <class T> LT_INLINE vf load_part(const T *p, int64_t n) {
    vf v = {};
    for (int64_t i = 0; i < n; ++i)
        v[i] = widen(p[i]);
    return v;
}
template <class T> LT_INLINE void store_part(T *p, vf v, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        narrow(v[i], p + i);
}

LT_INLINE float sum(vf v) {
    float lanes[LT_W];
    memcpy(lanes, &v, sizeof v);
    for (int width = LT_W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i)
            lanes[i] += lanes[i + width];
    return lanes[0];
}
LT_INLINE float largest(vf v) {
    float best = v[0];
    for (int i = 1; i < W; ++i)
        best = v[i] > best ? v[i] : best;
    return best;
}

// e^x to about 1 ulp: 2^n * e^f with |f| <= ln2/2 and a polynomial of degree 6 (coefficients of Cephes' expf).
// Below -87.3 the result is 0, above 88.3 infinity or near it; NaN stays NaN.
LT_INLINE vf vexp(vf x) {
    const vf low = splat(-87.33654f), high = splat(88.72283f);
    const vi underflow = x < low;
    const vi overflow = x > high;
    vf y = select(underflow, low, select(overflow, high, x));
    const vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = y * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    vf f = y - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    // 2^n in two factors, so that n = 128 does not overflow the exponent field on the way.
    const vi exponent = (vi)(as_bits(shifted) - as_bits(magic));
    const vi half = exponent >> 1;
    const vf scale = (vf)((half + 127) << 23), rest = (vf)((exponent - half + 127) << 23);
    const vf result = p * scale * rest;
    return select(underflow, splat(0.0f), select(overflow, splat(__builtin_inff()), result));
}

// 1 / (1 + e^-x), without overflow for any finite x.
LT_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

} // namespace
} // namespace LT_ISA
} // namespace lt
