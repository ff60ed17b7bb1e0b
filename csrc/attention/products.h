// Small dense products for attention: C (+)= A.B in fp32, a tile of C in registers, A broadcast, B and C in vectors.
// The caller owns padding: C has whole vectors of columns and kTileRows-fold rows, A and B are readable as far.
#pragma once

#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = W == 16 ? 4 : 2; // 24 of 32 registers, or 12 of 16, accumulate

enum start { OVERWRITE, ADD, RESCALE }; // C = A.B, C = C + A.B, C = diag(factor).C + A.B

template <class T> LT_INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T> LT_INLINE T most(T a, T b) { return a > b ? a : b; }
LT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// kTileRows x VECTORS*W of C over `depth` > 0 terms. A is [kTileRows, depth], or [depth, kTileRows] where TRANSPOSED.
template <int VECTORS, bool TRANSPOSED>
__attribute__((noinline)) void tile(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c,
                                    int64_t ldc, start mode, const float *factor) {
    vf sums[kTileRows][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
        const float f = mode == RESCALE ? factor[m] : 1.0f;
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n)
            sums[m][n] = mode == OVERWRITE ? vf{} : load(c + m * ldc + n * W) * f;
    }
    int64_t k = 0;
    do { // no test before the first term: merging with an empty sum costs a copy of every register
        vf row[VECTORS];
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n)
            row[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 8
        for (int m = 0; m < kTileRows; ++m) {
            const vf x = splat(TRANSPOSED ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 8
            for (int n = 0; n < VECTORS; ++n)
                sums[m][n] += x * row[n];
        }
    } while (++k < depth);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; ++n)
            store(c + m * ldc + n * W, sums[m][n]);
}

// The same over any number of columns that is a multiple of W.
template <bool TRANSPOSED>
void strip(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c, int64_t ldc, int64_t cols,
           start mode, const float *factor = nullptr) {
    constexpr int V = kTileVectors;
    int64_t n = 0;
    for (; n + V * W <= cols; n += V * W)
        tile<V, TRANSPOSED>(a, lda, b + n, ldb, depth, c + n, ldc, mode, factor);
    switch ((cols - n) / W) {
    case 3:
        return tile<V == 4 ? 3 : 1, TRANSPOSED>(a, lda, b + n, ldb, depth, c + n, ldc, mode, factor);
    case 2:
        return tile<V == 4 ? 2 : 1, TRANSPOSED>(a, lda, b + n, ldb, depth, c + n, ldc, mode, factor);
    case 1:
        return tile<1, TRANSPOSED>(a, lda, b + n, ldb, depth, c + n, ldc, mode, factor);
    }
}

// ---- packing -------------------------------------------------------------------------------------------------------

// [rows, dim] of any storage type, times factor, to fp32 rows of `ld` elements; zeros beyond dim and up to `padded`
// rows.
template <class T>
void pack(const T *from, int64_t stride, int64_t rows, int64_t dim, float factor, float *to, int64_t ld,
          int64_t padded) {
    for (int64_t r = 0; r < rows; ++r) {
        int64_t d = 0;
        for (; d + W <= dim; d += W)
            store(to + r * ld + d, load(from + r * stride + d) * factor);
        for (; d < ld; ++d)
            to[r * ld + d] = d < dim ? widen(from[r * stride + d]) * factor : 0.0f;
    }
    for (int64_t i = rows * ld; i < padded * ld; ++i)
        to[i] = 0;
}

// One row back to its storage type, times factor.
template <class T> void unpack(const float *from, int64_t dim, float factor, T *to) {
    int64_t d = 0;
    for (; d + W <= dim; d += W)
        store(to + d, load(from + d) * factor);
    for (; d < dim; ++d)
        narrow(from[d] * factor, to + d);
}

// Lanes of two vectors in turn: a0 b0 a1 b1 ..., the first W of them or the last.
#if LT_W == 16
#define LT_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LT_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LT_W == 8
#define LT_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LT_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LT_LOW 0, 4, 1, 5
#define LT_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
#define LT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// to[d, r] = from[r, d]; rows and dim are multiples of W.
LT_INLINE void transpose(const float *from, int64_t ld_from, int64_t rows, int64_t dim, float *to, int64_t ld_to) {
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t d = 0; d < dim; d += W) {
            vf block[W], mixed[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                block[i] = load(from + (r + i) * ld_from + d);
#pragma GCC unroll 4
            for (int step = 1; step < W; step *= 2) { // log2(W) perfect shuffles of the rows transpose them
#pragma GCC unroll 8
                for (int i = 0; i < W / 2; ++i) {
                    mixed[2 * i] = LT_SHUFFLE(block[i], block[i + W / 2], LT_LOW);
                    mixed[2 * i + 1] = LT_SHUFFLE(block[i], block[i + W / 2], LT_HIGH);
                }
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
                    block[i] = mixed[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                store(to + (d + i) * ld_to + r, block[i]);
        }
}

} // namespace
} // namespace LT_ISA
} // namespace lt
