// NF4 weights (QLoRA, Dettmers et al. 2023): quantise, dequantise, and the product of few rows with the codes
// themselves.
#include "decode.h"

#define LT_UNROLL _Pragma("GCC unroll 4")

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kBlocksPerChunk = 256;
constexpr int64_t kGroupsPerChunk = 8;
constexpr float kSmallest = 0x1p-126f; // below it 1 / absmax overflows, and the block is stored as zeros

// What is stored of a block whose largest magnitude is `largest`; `bad` is NaN where the block has a NaN or infinity.
LT_INLINE float stored_absmax(float largest, float bad) {
    return bad != 0 ? bad : largest < kSmallest ? 0.0f : largest;
}

LT_INLINE float midpoint(const float *values, int i) { return (values[i] + values[i + 1]) * 0.5f; }

// codes [ceil(n / 2)] and absmax of n <= 64 weights; where n is odd, the half byte over is the code of zero.
template <class T> void quantise_block(const T *x, int64_t n, uint8_t *codes, float *absmax) {
    float values[kBlock];
    vf most = {}, bad = {};
    for (int64_t i = 0; i < kBlock; i += W) {
        const vf v = n - i >= W ? load(x + i) : load_part(x + i, n - i);
        store(values + i, v);
        most = vmax((vf)((vu)v & 0x7fffffff), most);
        bad += v * 0.0f; // 0, or NaN after a NaN or infinity
    }
    *absmax = stored_absmax(largest(most), sum(bad));
    const float inverse = *absmax > 0 ? 1.0f / *absmax : 0.0f;
    uint8_t code[kBlock];
    for (int64_t i = 0; i < kBlock; i += W) {
        const vf v = load(values + i) * inverse;
        vi below = {}; // minus the number of midpoints that v exceeds
        for (int m = 0; m < 15; ++m)
            below += v > midpoint(kCodeBook, m);
        const vb bytes = __builtin_convertvector(__builtin_convertvector(-below, vh), vb);
        memcpy(code + i, &bytes, sizeof bytes);
    }
    for (int64_t i = 0; i < (n + 1) / 2; ++i)
        codes[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
}

LT_INLINE uint8_t nearest_in_dynamic_map(float v) {
    int code = 0;
    for (int step = 128; step > 0; step /= 2)
        if (v > midpoint(kDynamicMap, code + step - 1))
            code += step;
    return (uint8_t)code;
}

void quantise_group(const float *absmax, float offset, int64_t n, uint8_t *codes, float *scale) {
    float most = 0, bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float v = absmax[i] - offset;
        most = __builtin_fabsf(v) > most ? __builtin_fabsf(v) : most;
        bad += v * 0.0f;
    }
    *scale = stored_absmax(most, bad);
    const float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
    for (int64_t i = 0; i < n; ++i)
        codes[i] = nearest_in_dynamic_map((absmax[i] - offset) * inverse);
}

template <bool STREAM, class T>
void dequantise_blocks(const uint8_t *codes, const absmax_list &absmax, int64_t begin, int64_t end, T *out,
                       int64_t size) {
    for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kBlock, n = size - first;
        if (n >= kBlock) {
            decode_block<STREAM>(codes + first / 2, absmax_at(absmax, b), out + first);
        } else {
            uint8_t last[kBlockBytes] = {};
            T values[kBlock];
            memcpy(last, codes + first / 2, (size_t)((n + 1) / 2));
            decode_block<false>(last, absmax_at(absmax, b), values);
            memcpy(out + first, values, (size_t)n * sizeof(T));
        }
    }
    streamed<STREAM>();
}

// x [K] widened, the even places of each 2 W columns before the odd ones, as decode_pairs gives the weights.
template <class T> void split_pairs(const T *x, int64_t cols, float *out) {
    for (int64_t k = 0; k < cols; k += 2 * W)
        for (int64_t i = 0; i < W; ++i) {
            out[k + i] = widen(x[k + 2 * i]);
            out[k + W + i] = widen(x[k + 2 * i + 1]);
        }
}

// Rows of the weight whose products share each load of x: with the sums of four tokens they fill the registers.
constexpr int kOutputs = LT_W == 16 ? 4 : 2;

// sums[t * kOutputs + n] = <row n of the weight, x[t]> for `blocks` blocks a row and TOKENS rows of x, one after the
// other; `codes` and `first_block` are where the first row of the weight starts.
template <int OUTPUTS, int TOKENS>
void dot(const uint8_t *codes, const absmax_list &absmax, int64_t first_block, int64_t blocks, const float *x,
         float *sums) {
    vf total[OUTPUTS][TOKENS] = {};
    const int64_t cols = blocks * kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
        value_table table[OUTPUTS];
        LT_UNROLL for (int n = 0; n < OUTPUTS; ++n) table[n] =
            scaled_code_book(absmax_at(absmax, first_block + n * blocks + b));
        for (int64_t i = 0; i < kBlockBytes; i += W) {
            const float *at = x + b * kBlock + 2 * i;
            vf even[OUTPUTS], odd[OUTPUTS];
            LT_UNROLL for (int n = 0; n < OUTPUTS; ++n)
                decode_pairs(codes + (n * blocks + b) * kBlockBytes + i, table[n], &even[n], &odd[n]);
            LT_UNROLL for (int t = 0; t < TOKENS; ++t) {
                const vf x_even = load(at + t * cols), x_odd = load(at + t * cols + W);
                LT_UNROLL for (int n = 0; n < OUTPUTS; ++n) {
                    total[n][t] += even[n] * x_even;
                    total[n][t] += odd[n] * x_odd;
                }
            }
        }
    }
    for (int n = 0; n < OUTPUTS; ++n)
        for (int t = 0; t < TOKENS; ++t)
            sums[t * kOutputs + n] = sum(total[n][t]);
}

// The same for any number of rows of x.
template <int OUTPUTS>
void dot_all(const uint8_t *codes, const absmax_list &absmax, int64_t first_block, int64_t blocks, const float *x,
             int64_t rows, float *sums) {
    const int64_t cols = blocks * kBlock;
    int64_t t = 0;
    for (; t + 4 <= rows; t += 4)
        dot<OUTPUTS, 4>(codes, absmax, first_block, blocks, x + t * cols, sums + t * kOutputs);
    for (; t + 2 <= rows; t += 2)
        dot<OUTPUTS, 2>(codes, absmax, first_block, blocks, x + t * cols, sums + t * kOutputs);
    for (; t < rows; ++t)
        dot<OUTPUTS, 1>(codes, absmax, first_block, blocks, x + t * cols, sums + t * kOutputs);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(nf4_quantise, (int dtype, const void *weight_, uint8_t *codes, float *absmax, int64_t size),
          (dtype, weight_, codes, absmax, size)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "weight", [&](auto t) {
        typedef decltype(t) T;
        const T *weight = static_cast<const T *>(weight_);
        parallel_for((size + kBlock - 1) / kBlock, kBlocksPerChunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t b = begin; b < end; ++b) {
                const int64_t first = b * kBlock, n = size - first < kBlock ? size - first : kBlock;
                quantise_block(weight + first, n, codes + first / 2, absmax + b);
            }
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(nf4_quantise_absmax,
          (const float *absmax, const float *offset, uint8_t *codes, float *scales, int64_t blocks),
          (absmax, offset, codes, scales, blocks)) {
    using namespace lt::LT_ISA;
    parallel_for((blocks + kGroup - 1) / kGroup, 16, [&](int64_t begin, int64_t end, int) {
        for (int64_t g = begin; g < end; ++g) {
            const int64_t first = g * kGroup, n = blocks - first < kGroup ? blocks - first : kGroup;
            quantise_group(absmax + first, *offset, n, codes + first, scales + g);
        }
    });
    return LT_OK;
}

LT_DEFINE(nf4_dequantise,
          (const uint8_t *codes, const float *absmax, const uint8_t *absmax_codes, const float *absmax_scales,
           const float *absmax_offset, int dtype, void *out_, int64_t size, int reused),
          (codes, absmax, absmax_codes, absmax_scales, absmax_offset, dtype, out_, size, reused)) {
    using namespace lt::LT_ISA;
    const absmax_list list = {absmax, absmax_codes, absmax_scales, absmax_offset};
    return with_dtype(dtype, "out", [&](auto t) {
        typedef decltype(t) T;
        T *out = static_cast<T *>(out_);
        const bool stream = reused && worth_streaming(out, size * (int64_t)sizeof(T));
        parallel_for((size + kBlock - 1) / kBlock, kBlocksPerChunk, [&](int64_t begin, int64_t end, int) {
            if (stream)
                dequantise_blocks<true>(codes, list, begin, end, out, size);
            else
                dequantise_blocks<false>(codes, list, begin, end, out, size);
        });
        return (int)LT_OK;
    });
}

LT_DEFINE(nf4_linear,
          (int dtype, const void *x_, int64_t x_stride, const uint8_t *codes, const float *absmax,
           const uint8_t *absmax_codes, const float *absmax_scales, const float *absmax_offset, const void *bias_,
           void *y_, int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs),
          (dtype, x_, x_stride, codes, absmax, absmax_codes, absmax_scales, absmax_offset, bias_, y_, y_stride, rows,
           inputs, outputs)) {
    using namespace lt::LT_ISA;
    if (inputs % kBlock)
        return lt::fail(LT_INVALID, "nf4_linear: inputs=%lld is not a multiple of 64; dequantise the weight instead",
                        (long long)inputs);
    // x, then the sums of each group of kOutputs rows of the weight
    const int64_t groups = (outputs + kOutputs - 1) / kOutputs;
    float *prepared = static_cast<float *>(lt::thread_scratch((rows * (inputs + groups * kOutputs) + 1) * 4));
    if (!prepared)
        return lt::fail(LT_NO_MEMORY, "nf4_linear: no memory for %lld rows of x", (long long)rows);
    const absmax_list list = {absmax, absmax_codes, absmax_scales, absmax_offset};
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const T *x = static_cast<const T *>(x_), *bias = static_cast<const T *>(bias_);
        T *y = static_cast<T *>(y_);
        for (int64_t t = 0; t < rows; ++t)
            split_pairs(x + t * x_stride, inputs, prepared + t * inputs);
        parallel_for(groups, kGroupsPerChunk, [&](int64_t begin, int64_t end, int) {
            const int64_t blocks = inputs / kBlock;
            for (int64_t g = begin; g < end; ++g) {
                float *sums = prepared + rows * inputs + g * kOutputs * rows;
                const int64_t first = g * kOutputs, count = outputs - first < kOutputs ? outputs - first : kOutputs;
                const uint8_t *row = codes + first * blocks * kBlockBytes;
                if (count == kOutputs)
                    dot_all<kOutputs>(row, list, first * blocks, blocks, prepared, rows, sums);
                for (int64_t n = 0; count < kOutputs && n < count; ++n)
                    dot_all<1>(row + n * blocks * kBlockBytes, list, (first + n) * blocks, blocks, prepared, rows,
                               sums + n);
                for (int64_t t = 0; t < rows; ++t)
                    for (int64_t n = 0; n < count; ++n)
                        narrow(sums[t * kOutputs + n] + (bias ? widen(bias[first + n]) : 0.0f),
                               y + t * y_stride + first + n);
            }
        });
        return (int)LT_OK;
    });
}
