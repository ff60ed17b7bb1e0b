// The operands of low_rank_product_kernel: y = base + bias + sum over the parts of (x w + scale * s q), as one sum over
// all depths, low-rank and dense, of one layer after the other.
#pragma once

#include "../common/cuda_tile.cuh"

namespace lt_cuda {
namespace {

constexpr int kStages = 3; // of the cp.async pipelines

// One layer's share. w lies as [outputs, depth] (K_INNER) or [depth, outputs]; q as [outputs, rank] or [rank, outputs].
struct Part {
    const void *x, *w;
    const float *s, *q;
    int64_t x_stride, w_stride, s_stride, q_stride;
    int depth, rank;
    float scale;
    bool x_vector, w_vector, s_vector, q_vector;
};
constexpr int kMostParts = 16;
struct Parts {
    Part part[kMostParts];
    int count;
};

constexpr int kTile = 128, kProductThreads = 256, kRankDepth = 16;

// Where the walk over all depths is: low-rank part first, then x w, of one layer after the other.
struct Cursor {
    int part, k;
    bool low;
};

template <class T, bool K_INNER> struct Product {
    static constexpr int kDepth = 64 / (int)sizeof(T);
    typedef Tile<T, T, kTile, kDepth, true> X;
    typedef Tile<T, T, kTile, kDepth, K_INNER> W;
    typedef Tile<float, T, kTile, kRankDepth, true> S;
    typedef Tile<float, T, kTile, kRankDepth, K_INNER> Q;
    static constexpr int kFirst = X::kBytes > S::kBytes ? X::kBytes : S::kBytes;
    static constexpr int kStageBytes = kFirst + (W::kBytes > Q::kBytes ? W::kBytes : Q::kBytes);
    static constexpr int kBytes = kStages * kStageBytes;

    static __device__ void settle(const Parts &parts, Cursor &c) {
        while (c.part < parts.count && c.k >= (c.low ? parts.part[c.part].rank : parts.part[c.part].depth)) {
            c.k = 0;
            if (!c.low)
                ++c.part;
            c.low = !c.low;
        }
    }
    static __device__ void advance(const Parts &parts, Cursor &c) {
        c.k += c.low ? kRankDepth : kDepth;
        settle(parts, c);
    }

    template <class TILE>
    static __device__ void copy_factor(unsigned char *to, const void *data, int64_t stride, int64_t column, int outputs,
                                       int k, int depth, bool vector) {
        if constexpr (K_INNER)
            copy_tile<TILE, kProductThreads>(to, data, stride, column, outputs, k, depth, vector);
        else
            copy_tile<TILE, kProductThreads>(to, data, stride, k, depth, (int)column, outputs, vector);
    }

    static __device__ void copy(const Parts &parts, const Cursor &c, unsigned char *stage, int64_t row, int64_t rows,
                                int64_t column, int outputs) {
        if (c.part < parts.count) {
            const Part &p = parts.part[c.part];
            if (c.low) {
                copy_tile<S, kProductThreads>(stage, p.s, p.s_stride, row, rows, c.k, p.rank, p.s_vector);
                copy_factor<Q>(stage + kFirst, p.q, p.q_stride, column, outputs, c.k, p.rank, p.q_vector);
            } else {
                copy_tile<X, kProductThreads>(stage, p.x, p.x_stride, row, rows, c.k, p.depth, p.x_vector);
                copy_factor<W>(stage + kFirst, p.w, p.w_stride, column, outputs, c.k, p.depth, p.w_vector);
            }
        }
        cp_async_commit();
    }
};

template <class T, bool K_INNER>
Part make_part(const void *x, int64_t x_stride, const void *w, int64_t w_stride, int64_t depth, const float *s,
               int64_t s_stride, const float *q, int64_t q_stride, int64_t rank, int64_t outputs, float scale) {
    return {x,
            w,
            s,
            q,
            x_stride,
            w_stride,
            s_stride,
            q_stride,
            (int)depth,
            (int)rank,
            scale,
            vectors<T>(x, x_stride, depth),
            vectors<T>(w, w_stride, K_INNER ? depth : outputs),
            vectors<float>(s, s_stride, rank),
            vectors<float>(q, q_stride, K_INNER ? rank : outputs)};
}

} // namespace
} // namespace lt_cuda
