// Row-wise 8-bit integers: quantise, dequantise, and the product of few rows with the codes themselves.
#include "stream.h"

#define LT_UNROLL _Pragma("GCC unroll 4")

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kRowsPerChunk = 16;
constexpr float kSmallest = 0x1p-119f; // below it absmax / 127 is subnormal, and the row is stored as zeros

typedef int8_t vc __attribute__((vector_size(LT_W)));
typedef int16_t vs __attribute__((vector_size(2 * LT_W)));

// To the nearest integer, ties to even, by the instruction: an addition that rounds could be fused with what precedes.
LT_INLINE vi nearest(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)x);
#else
    vi n;
    for (int i = 0; i < W; ++i)
        n[i] = (int32_t)__builtin_lrintf(x[i]);
    return n;
#endif
}

// W codes as floats. By name where the instruction exists: GCC takes a conversion over two doublings apart.
LT_INLINE vf load_codes(const int8_t *p) {
    vc codes;
    memcpy(&codes, p, sizeof codes);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)codes));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set_epi64x(0, (int64_t)codes)));
#else
    return __builtin_convertvector(codes, vf);
#endif
}

LT_INLINE vf load_codes_part(const int8_t *p, int64_t n) {
    vf v = {};
    for (int64_t i = 0; i < n; ++i)
        v[i] = (float)p[i];
    return v;
}

template <class T> void quantise_row(const T *x, int64_t cols, int8_t *codes, float *scale) {
    vf most = {}, bad = {};
    int64_t i = 0;
    for (; i + W <= cols; i += W) {
        const vf v = load(x + i);
        most = vmax((vf)((vu)v & 0x7fffffff), most);
        bad += v * 0.0f; // 0, or NaN after a NaN or infinity
    }
    const vf tail = load_part(x + i, cols - i);
    most = vmax((vf)((vu)tail & 0x7fffffff), most);
    const float invalid = sum(bad + tail * 0.0f), absmax = largest(most);
    *scale = invalid != 0 ? invalid : absmax < kSmallest ? 0.0f : absmax / 127.0f;
    if (!(*scale > 0)) {
        memset(codes, 0, (size_t)cols);
        return;
    }
    const float inverse = 127.0f / absmax;
    for (i = 0; i + W <= cols; i += W) {
        const vc packed = __builtin_convertvector(__builtin_convertvector(nearest(load(x + i) * inverse), vs), vc);
        memcpy(codes + i, &packed, sizeof packed);
    }
    const vi last = nearest(tail * inverse);
    for (int64_t k = i; k < cols; ++k)
        codes[k] = (int8_t)last[k - i];
}

template <bool STREAM, class T> void dequantise_row(const int8_t *codes, float scale, T *out, int64_t cols) {
    int64_t i = 0;
    for (; i + W <= cols; i += W) {
        T values[W];
        store(values, load_codes(codes + i) * scale);
        typedef uint8_t bytes __attribute__((vector_size(sizeof(T) * LT_W)));
        bytes v;
        memcpy(&v, values, sizeof v);
        put<STREAM>(out + i, v);
    }
    store_part(out + i, load_codes_part(codes + i, cols - i) * scale, cols - i);
}

// Rows of the weight whose products share each load of x.
constexpr int kOutputs = LT_W == 16 ? 4 : 2;

// sums[t * kOutputs + n] = <codes of row n, x[t]>, for TOKENS rows of x and OUTPUTS of the weight, `cols` apart.
template <int OUTPUTS, int TOKENS> void dot(const int8_t *codes, const float *x, int64_t cols, float *sums) {
    vf total[OUTPUTS][TOKENS] = {};
    vf w[OUTPUTS];
    int64_t i = 0;
    for (; i + W <= cols; i += W) {
        LT_UNROLL for (int n = 0; n < OUTPUTS; ++n) w[n] = load_codes(codes + n * cols + i);
        LT_UNROLL for (int t = 0; t < TOKENS; ++t) {
            const vf x_t = load(x + t * cols + i);
            LT_UNROLL for (int n = 0; n < OUTPUTS; ++n) total[n][t] += w[n] * x_t;
        }
    }
    for (int n = 0; n < OUTPUTS; ++n)
        for (int t = 0; t < TOKENS; ++t)
            sums[t * kOutputs + n] = sum(total[n][t] + load_codes_part(codes + n * cols + i, cols - i) *
                                                           load_part(x + t * cols + i, cols - i));
}

// The same for any number of rows of x.
template <int OUTPUTS> void dot_all(const int8_t *codes, const float *x, int64_t rows, int64_t cols, float *sums) {
    int64_t t = 0;
    for (; t + 4 <= rows; t += 4)
        dot<OUTPUTS, 4>(codes, x + t * cols, cols, sums + t * kOutputs);
    for (; t + 2 <= rows; t += 2)
        dot<OUTPUTS, 2>(codes, x + t * cols, cols, sums + t * kOutputs);
    for (; t < rows; ++t)
        dot<OUTPUTS, 1>(codes, x + t * cols, cols, sums + t * kOutputs);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(int8_quantise,
          (int dtype, const void *x_, int64_t x_stride, int8_t *codes, float *scales, int64_t rows, int64_t cols),
          (dtype, x_, x_stride, codes, scales, rows, cols)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "x", [&](auto t) {
        const decltype(t) *x = static_cast<const decltype(t) *>(x_);
        parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t row = begin; row < end; ++row)
                quantise_row(x + row * x_stride, cols, codes + row * cols, scales + row);
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(int8_dequantise,
          (const int8_t *codes, const float *scales, int dtype, void *out_, int64_t out_stride, int64_t rows,
           int64_t cols, int reused),
          (codes, scales, dtype, out_, out_stride, rows, cols, reused)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "out", [&](auto t) {
        typedef decltype(t) T;
        T *out = static_cast<T *>(out_);
        const int64_t row_bytes = out_stride * (int64_t)sizeof(T);
        const bool stream = reused && row_bytes % 64 == 0 && worth_streaming(out, rows * row_bytes);
        parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t row = begin; row < end; ++row)
                (stream ? dequantise_row<true, T> : dequantise_row<false, T>)(codes + row * cols, scales[row],
                                                                              out + row * out_stride, cols);
            streamed<true>();
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(int8_linear,
          (int dtype, const void *x_, int64_t x_stride, const int8_t *codes, const float *scales, const void *bias_,
           void *y_, int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs),
          (dtype, x_, x_stride, codes, scales, bias_, y_, y_stride, rows, inputs, outputs)) {
    using namespace lt::LT_ISA;
    // x in fp32, then the sums of each group of kOutputs rows of the weight
    const int64_t groups = (outputs + kOutputs - 1) / kOutputs;
    float *prepared = static_cast<float *>(lt::thread_scratch((rows * (inputs + groups * kOutputs) + 1) * 4));
    if (!prepared)
        return lt::fail(LT_NO_MEMORY, "int8_linear: no memory for %lld rows of x", (long long)rows);
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const T *x = static_cast<const T *>(x_), *bias = static_cast<const T *>(bias_);
        T *y = static_cast<T *>(y_);
        for (int64_t t = 0; t < rows; ++t)
            for (int64_t k = 0; k < inputs; ++k)
                prepared[t * inputs + k] = widen(x[t * x_stride + k]);
        parallel_for(groups, kRowsPerChunk / kOutputs, [&](int64_t begin, int64_t end, int) {
            for (int64_t g = begin; g < end; ++g) {
                float *sums = prepared + rows * inputs + g * kOutputs * rows;
                const int64_t first = g * kOutputs, count = outputs - first < kOutputs ? outputs - first : kOutputs;
                if (count == kOutputs)
                    dot_all<kOutputs>(codes + first * inputs, prepared, rows, inputs, sums);
                for (int64_t n = 0; count < kOutputs && n < count; ++n)
                    dot_all<1>(codes + (first + n) * inputs, prepared, rows, inputs, sums + n);
                for (int64_t t = 0; t < rows; ++t)
                    for (int64_t n = 0; n < count; ++n)
                        narrow(sums[t * kOutputs + n] * scales[first + n] + (bias ? widen(bias[first + n]) : 0.0f),
                               y + t * y_stride + first + n);
            }
        });
        return (int)LT_OK;
    });
}
