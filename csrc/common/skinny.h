// Products with skinny factors, as low-rank updates and bottleneck adapters need them, over blocks of rows that stay in
// the second-level cache; and sums of gradients over chunks of rows, whose number does not depend on the threads.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kMostChunks = 16;         // partial sums of a gradient: a fixed number, whatever the threads
constexpr int64_t kPartialBytes = 16 << 20; // fewer chunks where the partial sums of a large layer pass this
constexpr int64_t kBlockBytes = 768 << 10;  // a block of rows, for a second-level cache of 1 MiB or more
constexpr int64_t kBlockRows = 48;          // a multiple of the rows of every tile
constexpr int64_t kStreamedRows = 8;        // rows of a result that are written together
constexpr int64_t kSlice = 128;             // columns of partial sums that are one task

LT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LT_INLINE int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out = base + sum for a vector of which only the first `left` lanes exist. Kept out of the tiles, where it is rare.
template <class T, class U>
__attribute__((noinline, cold)) void put_part(const T *base, U *out, const vf *sum, int64_t left) {
    store_part(out, load_part(base, left) + *sum, left);
}
template <class T, class U> LT_INLINE void put(const T *base, U *out, vf sum, int64_t left) {
    if (left >= W)
        store(out, load(base) + sum);
    else
        put_part(base, out, &sum, left);
}

// coefficients [rows, depth] x [depth, cols], for results that go to memory: a few rows at a time stream through.
template <class Sink>
void streamed_product(int64_t rows, int64_t cols, int64_t depth, const float *coefficients, int64_t row_step,
                      const float *x, int64_t x_stride, Sink sink) {
    for (int64_t t = 0; t < rows; t += kStreamedRows)
        tiled_product(smaller(kStreamedRows, rows - t), quotient(cols, W), depth, coefficients + t * row_step, row_step,
                      1, x, x_stride, [=](int64_t i, int64_t n, vf sum) { sink(t + i, n, sum); });
}

// target [r, columns] (+)= coefficients^T block, over the rows of the block.
inline void add_outer(float *target, int64_t stride, bool first, int64_t rank, int64_t rows, const float *coefficients,
                      int64_t s_stride, block b) {
    tiled_product(rank, stride / W, rows, coefficients, 1, s_stride, b.rows, b.stride,
                  [=](int64_t j, int64_t k, vf sum) {
                      float *to = target + j * stride + k;
                      store(to, first ? sum : load(to) + sum);
                  });
}

// ---- chunks of rows and their partial sums

// Rows go through in blocks; a chunk of whole blocks has partial sums of its own.
struct row_chunks {
    int64_t block_rows, chunk_rows, chunks;
};

// For rows of `width` floats in a block and `partial_size` floats of partial sums a chunk.
inline row_chunks plan_chunks(int64_t rows, int64_t width, int64_t partial_size) {
    row_chunks p = {kBlockRows, 0, 0};
    while (p.block_rows > 12 && p.block_rows * width * 4 > kBlockBytes)
        p.block_rows /= 2;
    const int64_t affordable = kPartialBytes / (larger(partial_size, 1) * 4);
    const int64_t most = larger(4, smaller(kMostChunks, affordable));
    p.chunk_rows = quotient(quotient(rows, most), p.block_rows) * p.block_rows;
    if (p.block_rows == kBlockRows && rows > kBlockRows) // half a block more or less, for chunks of equal size
        p.chunk_rows = larger(quotient(quotient(rows, most), kBlockRows / 2) * (kBlockRows / 2), kBlockRows);
    p.chunks = rows ? quotient(rows, p.chunk_rows) : 0;
    return p;
}

struct partial_sums {
    const float *first; // of chunk 0
    int64_t chunks, chunk_size;
};

// Sum over the chunks, in their order, of W neighbours.
LT_INLINE vf sum_partials(partial_sums p, int64_t offset) {
    vf total = {};
    for (int64_t c = 0; c < p.chunks; ++c)
        total += load(p.first + c * p.chunk_size + offset);
    return total;
}

// out [rank, begin..end) (+)= scale * partial sums [rank, stride] at `offset`.
inline void finish_rows(partial_sums p, int64_t offset, int64_t stride, int64_t rank, int64_t begin, int64_t end,
                        float scale, bool accumulate, float *out, int64_t out_stride) {
    for (int64_t j = 0; j < rank; ++j)
        for (int64_t k = begin; k < end; k += W) {
            const vf total = sum_partials(p, offset + j * stride + k) * scale;
            float *to = out + j * out_stride + k;
            if (accumulate)
                put(to, to, total, end - k);
            else if (end - k >= W)
                store(to, total);
            else
                store_part(to, total, end - k);
        }
}

// The transpose: out [begin..end, rank) (+)= scale * partial sums [rank, stride]^T at `offset`.
inline void finish_columns(partial_sums p, int64_t offset, int64_t stride, int64_t rank, int64_t begin, int64_t end,
                           float scale, bool accumulate, float *out, int64_t out_stride) {
    for (int64_t n = begin; n < end; n += W)
        for (int64_t j = 0; j < rank; ++j) {
            const vf total = sum_partials(p, offset + j * stride + n) * scale;
            for (int l = 0; l < W && n + l < end; ++l) {
                float *to = out + (n + l) * out_stride + j;
                *to = accumulate ? *to + total[l] : total[l];
            }
        }
}

} // namespace
} // namespace LT_ISA
} // namespace lt
