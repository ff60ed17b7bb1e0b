// Tiles of matrices in shared memory and their products on tensor cores: out [M, N] += a [M, K] b [K, N].
//
// A tile lies in shared memory as its matrix lies in global memory, with the depth K along its rows (K_INNER) or along
// its columns, copied 16 bytes at a time and past the registers where addresses allow it. Row strides are padded so
// that neither ldmatrix nor the plain loads of fragments meet in a bank. Products are of the type C: bfloat16 and half
// in one instruction; float as the sum of three products of tf32 parts (a = high + low), or of all four where memory is
// the limit anyway: each product then has a relative error of at most 4.3e-7, or 2.4e-7. Tiles of floats can also enter
// products of half precision, rounded on their way to the registers: so S and the factors of an adapter stay fp32 in
// memory.
#pragma once

#include "cuda_mma.cuh"

namespace lt_cuda {

template <class C> constexpr int kStep = sizeof(C) == 2 ? 16 : 8; // depth of one instruction

// Elements E of a tile with EXTENT rows of a or columns of b, for products of type C.
template <class E, class C, int EXTENT, int DEPTH, bool K_INNER> struct Tile {
    typedef E element;
    static constexpr int kDepth = DEPTH, kExtent = EXTENT;
    static constexpr bool kInner = K_INNER, kNarrowing = sizeof(E) != sizeof(C);
    static constexpr int kRows = K_INNER ? EXTENT : DEPTH, kColumns = K_INNER ? DEPTH : EXTENT;
    static constexpr int kPad = K_INNER ? (kNarrowing ? 8 : 16 / (int)sizeof(E)) : (kNarrowing ? 4 : 8);
    static constexpr int kStride = kColumns + kPad;
    static constexpr int kBytes = kRows * kStride * (int)sizeof(E);

    static __device__ const E *at(const E *tile, int extent, int k) {
        return tile + (K_INNER ? extent * kStride + k : k * kStride + extent);
    }
};

// Copies rows [row, ..) and columns [col, ..) of a matrix of rows x cols into the tile, zeros outside of it. `vector`:
// rows begin at multiples of 16 bytes and cols is a whole number of 16 bytes; then the copy is asynchronous.
template <class TILE, int THREADS>
__device__ inline void copy_tile(unsigned char *shared, const void *data, int64_t stride, int64_t row, int64_t rows,
                                 int col, int cols, bool vector) {
    typedef typename TILE::element E;
    constexpr int kInRow = TILE::kColumns / kVector<E>;
    static_assert(TILE::kRows * kInRow % THREADS == 0, "all threads copy as much");
#pragma unroll
    for (int i = threadIdx.x; i < TILE::kRows * kInRow; i += THREADS) {
        const int r = i / kInRow, c = i % kInRow * kVector<E>;
        const bool inside = row + r < rows;
        E *to = (E *)shared + r * TILE::kStride + c;
        const E *from = (const E *)data + (inside ? row + r : 0) * stride + col + c;
        if (vector) {
            cp_async_16(to, from, inside && col + c < cols);
        } else {
            E zero;
            narrow(0.0f, &zero);
#pragma unroll 1 // rare: no registers for it
            for (int j = 0; j < kVector<E>; ++j)
                to[j] = inside && col + c + j < cols ? from[j] : zero;
        }
    }
}

// One lane's part of a 16 x kStep fragment of a, or of two 8-column fragments of b.
template <class C> struct Fragment {
    uint32_t high[4];
};
template <> struct Fragment<float> {
    uint32_t high[4], low[4];
};

__device__ inline void split(float x, uint32_t *high, uint32_t *low) {
    const float h = to_tf32(x);
    *high = __float_as_uint(h);
    *low = __float_as_uint(to_tf32(x - h));
}

template <class C> __device__ inline uint32_t pack(float first, float second) {
    C both[2];
    narrow(first, both);
    narrow(second, both + 1);
    uint32_t bits;
    memcpy(&bits, both, sizeof bits);
    return bits;
}

// Values (extent, k) and (extent, k + 1) of a tile of floats, times `scale`, as a pair of C.
template <class TILE, class C> __device__ inline uint32_t narrowed(const float *tile, int extent, int k, float scale) {
    const float *at = TILE::at(tile, extent, k);
    if constexpr (TILE::kInner) {
        const Vec<float, 2> v = load_vec<2>(at);
        return pack<C>(v[0] * scale, v[1] * scale);
    } else {
        return pack<C>(at[0] * scale, at[TILE::kStride] * scale);
    }
}

template <class TILE, class C>
__device__ inline void load_a(Fragment<C> &f, const typename TILE::element *tile, int m, int k, int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (TILE::kNarrowing) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            f.high[i] = narrowed<TILE, C>(tile, m + g + i % 2 * 8, k + 2 * t + i / 2 * 8, 1.0f);
    } else if constexpr (sizeof(C) == 2) {
        if constexpr (TILE::kInner)
            ldmatrix_x4(f.high, TILE::at(tile, m + lane % 16, k + lane / 16 * 8));
        else
            ldmatrix_x4_trans(f.high, TILE::at(tile, m + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
    } else {
        uint32_t bits[4];
        if constexpr (TILE::kInner) {
            ldmatrix_x4(bits, TILE::at(tile, m + lane % 16, k + lane / 16 * 4));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                bits[i] = __float_as_uint(*TILE::at(tile, m + g + i % 2 * 8, k + t + i / 2 * 4));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            split(__uint_as_float(bits[i]), &f.high[i], &f.low[i]);
    }
}

// Columns n to n + 15 of b; a tile of floats is multiplied by `scale`, others are as they are.
template <class TILE, class C>
__device__ inline void load_b(Fragment<C> &f, const typename TILE::element *tile, int n, int k, float scale, int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (TILE::kNarrowing) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            f.high[i] = narrowed<TILE, C>(tile, n + g + i / 2 * 8, k + 2 * t + i % 2 * 8, scale);
    } else if constexpr (sizeof(C) == 2) {
        if constexpr (TILE::kInner)
            ldmatrix_x4(f.high, TILE::at(tile, n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        else
            ldmatrix_x4_trans(f.high, TILE::at(tile, n + lane / 16 * 8, k + lane / 8 % 2 * 8 + lane % 8));
    } else {
        uint32_t bits[4];
        if constexpr (TILE::kInner) {
            ldmatrix_x4(bits, TILE::at(tile, n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 4));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                bits[i] = __float_as_uint(*TILE::at(tile, n + g + i / 2 * 8, k + t + i % 2 * 4));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            split(__uint_as_float(bits[i]) * scale, &f.high[i], &f.low[i]);
    }
}

// d += a times columns 8 * half to 8 * half + 7 of b. Small products first; LOWS adds that of the two low parts.
template <bool LOWS>
__device__ inline void multiply(float (&d)[4], const Fragment<__nv_bfloat16> &a, const Fragment<__nv_bfloat16> &b,
                                int half) {
    mma_bf16_16816(d, a.high, b.high + 2 * half);
}
template <bool LOWS>
__device__ inline void multiply(float (&d)[4], const Fragment<__half> &a, const Fragment<__half> &b, int half) {
    mma_f16_16816(d, a.high, b.high + 2 * half);
}
template <bool LOWS>
__device__ inline void multiply(float (&d)[4], const Fragment<float> &a, const Fragment<float> &b, int half) {
    if constexpr (LOWS)
        mma_tf32_1688(d, a.low, b.low + 2 * half);
    mma_tf32_1688(d, a.low, b.high + 2 * half);
    mma_tf32_1688(d, a.high, b.low + 2 * half);
    mma_tf32_1688(d, a.high, b.high + 2 * half);
}

// sums, a warp's 16 MT x 8 NT part of out at (m, n) of the tiles, += the tiles' product, over the depth of b, which
// begins at depth a_k of a. Pairs of 8 columns from `pairs` on, and blocks of 16 rows from `row_blocks` on, hold
// nothing and are left out. `scale` is for a b of floats.
template <class A, class B, class C, bool LOWS, int MT, int NT>
__device__ inline void multiply_tiles(float (&sums)[MT][NT][4], const unsigned char *a, const unsigned char *b, int m,
                                      int n, float scale, int row_blocks = MT, int pairs = NT / 2, int a_k = 0) {
    static_assert(A::kDepth % B::kDepth == 0 && NT % 2 == 0, "whole tiles of b, pairs of columns");
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < B::kDepth; k += kStep<C>) {
        Fragment<C> from_a[MT];
#pragma unroll
        for (int i = 0; i < MT; ++i)
            if (i < row_blocks)
                load_a<A, C>(from_a[i], (const typename A::element *)a, m + 16 * i, a_k + k, lane);
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) {
            if (j >= pairs)
                continue;
            Fragment<C> from_b;
            load_b<B, C>(from_b, (const typename B::element *)b, n + 16 * j, k, scale, lane);
#pragma unroll
            for (int i = 0; i < MT; ++i)
                if (i < row_blocks) {
                    multiply<LOWS>(sums[i][2 * j], from_a[i], from_b, 0);
                    multiply<LOWS>(sums[i][2 * j + 1], from_a[i], from_b, 1);
                }
        }
    }
}

// Floats of shared memory that for_each_vector needs for a warp.
template <int NT> constexpr int kStagingStride = NT * 8 + 8;
template <int NT> constexpr int kStagingFloats = 16 * kStagingStride<NT>;

// f(row, column, values) for every V neighbouring values of a warp's part of out, such that lanes hold neighbours and
// the accesses f makes are wide. `staging` is the warp's own.
template <int V, int MT, int NT, class F>
__device__ inline void for_each_vector(const float (&sums)[MT][NT][4], float *staging, F f) {
    constexpr int kStride = kStagingStride<NT>, kInRow = NT * 8 / V;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Vec<float, 2> pair;
                pair[0] = sums[i][j][2 * half];
                pair[1] = sums[i][j][2 * half + 1];
                store_vec(staging + (g + 8 * half) * kStride + 8 * j + 2 * t, pair);
            }
        __syncwarp(kAllLanes);
#pragma unroll
        for (int v = lane; v < 16 * kInRow; v += 32) {
            const int row = v / kInRow, column = v % kInRow * V;
            f(16 * i + row, column, load_vec<V>(staging + row * kStride + column));
        }
        __syncwarp(kAllLanes);
    }
}

// The V elements at p as floats, those at or beyond `left` as zero; the whole of them in one access if `vector`.
template <int V, class T> __device__ inline Vec<float, V> load_values(const T *p, int64_t left, bool vector) {
    Vec<float, V> result;
    if (vector && left >= V) {
        const Vec<T, V> v = load_vec<V>(p);
#pragma unroll
        for (int i = 0; i < V; ++i)
            result[i] = widen(v[i]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            result[i] = i < left ? widen(p[i]) : 0.0f;
    }
    return result;
}

template <int V, class T>
__device__ inline void store_values(T *p, const Vec<float, V> &values, int64_t left, bool vector) {
    if (vector && left >= V) {
        Vec<T, V> v;
#pragma unroll
        for (int i = 0; i < V; ++i)
            narrow(values[i], &v[i]);
        store_global(p, v);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (i < left)
                narrow(values[i], p + i);
    }
}

// Whether a matrix with these rows can be copied and written 16 bytes at a time.
template <class T> bool vectors(const void *data, int64_t stride, int64_t cols) {
    return aligned16(data, stride * (int64_t)sizeof(T)) && cols % kVector<T> == 0;
}

} // namespace lt_cuda
