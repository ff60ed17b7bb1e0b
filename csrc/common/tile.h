// A register-tiled matrix product for skinny factors: C[i, :] = sum over k of c[i, k] * x[k, :], where the caller says
// what becomes of each finished vector. Coefficients are broadcast from anywhere (any two strides); x has rows of whole
// vectors. Low-rank products are all of this form: S = x A^T, dA = dS^T x and W + BA differ in strides only.
#pragma once

#include "leantune_kernels.h"
#include "simd.h"

#define LT_UNROLL _Pragma("GCC unroll 32")

namespace lt {
namespace LT_ISA {
namespace {

// Rows of a tile with `vectors` columns: accumulators, one row of x and one coefficient fill the registers (32 with
// AVX-512, 16 without).
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
    return vectors == 1 ? 12 : 8;
#else
    return vectors == 1 ? 8 : vectors == 2 ? 6 : 4;
#endif
}

template <int ROWS, int VECTORS, class Sink>
void tile(int64_t depth, const float *c, int64_t row_step, int64_t depth_step, const float *x, int64_t x_stride,
          Sink sink) {
    constexpr int STEPS = VECTORS == 1 ? 4 : 1; // several k at a time, so that addresses are computed less often
    vf sums[ROWS][VECTORS];
    LT_UNROLL for (int i = 0; i < ROWS; ++i) LT_UNROLL for (int v = 0; v < VECTORS; ++v) sums[i][v] = vf{};
    int64_t k = 0;
    for (; k + STEPS <= depth; k += STEPS) {
        vf row[STEPS][VECTORS];
        LT_UNROLL for (int s = 0; s < STEPS; ++s) LT_UNROLL for (int v = 0; v < VECTORS; ++v) row[s][v] =
            load(x + (k + s) * x_stride + v * W);
        LT_UNROLL for (int i = 0; i < ROWS; ++i) LT_UNROLL for (int s = 0; s < STEPS; ++s) {
            const vf coefficient = splat(c[i * row_step + (k + s) * depth_step]);
            LT_UNROLL for (int v = 0; v < VECTORS; ++v) sums[i][v] += coefficient * row[s][v];
        }
    }
    if constexpr (STEPS > 1)
        for (int64_t left = depth - k; left > 0; --left, ++k)
            LT_UNROLL for (int i = 0; i < ROWS; ++i) LT_UNROLL for (int v = 0; v < VECTORS; ++v) sums[i][v] +=
                splat(c[i * row_step + k * depth_step]) * load(x + k * x_stride + v * W);
    LT_UNROLL for (int i = 0; i < ROWS; ++i) LT_UNROLL for (int v = 0; v < VECTORS; ++v) sink(i, v, sums[i][v]);
}

// All rows of one panel of columns: full tiles, then halves of halves for the rest.
template <int ROWS, int VECTORS, class Sink>
void tile_panel(int64_t begin, int64_t rows, int64_t column, int64_t depth, const float *c, int64_t row_step,
                int64_t depth_step, const float *x, int64_t x_stride, Sink sink) {
    int64_t i = begin;
    for (; i + ROWS <= rows; i += ROWS)
        tile<ROWS, VECTORS>(depth, c + i * row_step, row_step, depth_step, x + column * W, x_stride,
                            [&](int row, int v, vf sum) { sink(i + row, (column + v) * W, sum); });
    if constexpr (ROWS > 1)
        tile_panel<ROWS / 2, VECTORS>(i, rows, column, depth, c, row_step, depth_step, x, x_stride, sink);
}

// sink(i, n, sum) for every row i and every n = 0, W, 2W, .. with sum[l] = sum over k < depth of c[i * row_step + k *
// depth_step] * x[k * x_stride + n + l].
template <class Sink>
void tiled_product(int64_t rows, int64_t vectors, int64_t depth, const float *c, int64_t row_step, int64_t depth_step,
                   const float *x, int64_t x_stride, Sink sink) {
    int64_t column = 0;
    for (; column + 3 <= vectors; column += 3)
        tile_panel<tile_rows(3), 3>(0, rows, column, depth, c, row_step, depth_step, x, x_stride, sink);
    if (column + 2 == vectors)
        tile_panel<tile_rows(2), 2>(0, rows, column, depth, c, row_step, depth_step, x, x_stride, sink);
    if (column + 1 == vectors)
        tile_panel<tile_rows(1), 1>(0, rows, column, depth, c, row_step, depth_step, x, x_stride, sink);
}

LT_INLINE int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

// A row stride, in floats, of at least n: whole vectors, and an odd number of cache lines, so that the same column of
// many rows does not fall into the same few sets of the cache.
LT_INLINE int64_t spread_stride(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Rows of any storage type as fp32, the last vector filled up with zeros.
template <class T>
void copy_rows(const T *x, int64_t x_stride, int64_t rows, int64_t cols, float *out, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) {
        const T *from = x + i * x_stride;
        float *to = out + i * stride;
        int64_t k = 0;
        for (; k + W <= cols; k += W)
            store(to + k, load(from + k));
        if (k < cols)
            store(to + k, load_part(from + k, cols - k));
    }
}

// Rows of fp32 with whole vectors, as products take them.
struct block {
    const float *rows;
    int64_t stride;
};

// Whether rows of this many columns must be copied to be a block.
LT_INLINE bool needs_copy(int dtype, int64_t cols) { return dtype != LT_F32 || cols % W != 0; }

// The rows themselves where they will do (their first use then runs behind the arithmetic), else a copy in `scratch`,
// widened and the last vector filled up with zeros.
LT_INLINE block as_block(const float *x, int64_t x_stride) { return {x, x_stride}; }
template <class T> LT_INLINE block as_block(const T *, int64_t) { return {nullptr, 0}; }

template <class T>
block block_of(const T *x, int64_t x_stride, int64_t rows, int64_t cols, float *scratch, int64_t stride) {
    if (as_block(x, x_stride).rows && cols % W == 0)
        return as_block(x, x_stride);
    copy_rows(x, x_stride, rows, cols, scratch, stride);
    return {scratch, stride};
}

// out[i, j] = x[i * row_step + j * col_step] for rows [begin, end), columns filled up with zeros to whole vectors.
// Blocks of 64 columns keep a transposing copy in the cache.
LT_INLINE void pack_factor(const float *x, int64_t row_step, int64_t col_step, int64_t begin, int64_t end, int64_t cols,
                           float *out, int64_t stride) {
    if (col_step == 1)
        return copy_rows(x + begin * row_step, row_step, end - begin, cols, out + begin * stride, stride);
    for (int64_t block = 0; block < whole_vectors(cols); block += 64)
        for (int64_t i = begin; i < end; ++i)
            for (int64_t j = block; j < block + 64 && j < whole_vectors(cols); ++j)
                out[i * stride + j] = j < cols ? x[i * row_step + j * col_step] : 0.0f;
}

} // namespace
} // namespace LT_ISA
} // namespace lt
