// Tiles of attention on CUDA: matrices in shared memory, products of a warp's 16 rows with them on tensor cores.
//
// A product's accumulators d[n][4] hold 16 rows by 8 columns per n: lane l has row l / 4 (d[0], d[1]) and row l / 4 + 8
// (d[2], d[3]), columns l % 4 * 2 and the next. They become the left operand of the next product in registers, without
// a way through shared memory: for 16-bit elements the layouts agree, for float the order of the summed index is
// permuted alike on both sides.
#pragma once

#include "../common/cuda_mma.cuh"

namespace lt_cuda {
namespace {

// Elements between rows of a tile of D columns. The 16 bytes beyond D put eight rows into different banks.
template <class T, int D> constexpr int kPitch = D + kVector<T>;

// ---- operands and products -----------------------------------------------------------------------------------------

// The left operand is 16 rows by kDepth, the right one kDepth by 16 columns, two tiles of the instruction.
template <class T> struct Product {
    static constexpr int kDepth = 16;
    struct Left {
        uint32_t r[4];
    };
    struct Right {
        uint32_t r[4];
    };

    // From x [16, kDepth].
    static __device__ Left left(const T *x, int pitch) {
        const int lane = threadIdx.x % 32;
        Left a;
        ldmatrix_x4(a.r, x + lane % 16 * pitch + lane / 16 * 8);
        return a;
    }
    // From accumulators: kDepth columns of them from s[0] on.
    static __device__ Left left(const float (*s)[4]) {
        return {{pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])}};
    }
    // From y [16, kDepth], whose rows are the columns of the operand.
    static __device__ Right right_of_rows(const T *y, int pitch) {
        const int lane = threadIdx.x % 32;
        Right b;
        ldmatrix_x4(b.r, y + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
        return b;
    }
    // From y [kDepth, 16].
    static __device__ Right right(const T *y, int pitch) {
        const int lane = threadIdx.x % 32;
        Right b;
        ldmatrix_x4_trans(b.r, y + lane % 16 * pitch + lane / 16 * 8);
        return b;
    }
    static __device__ void add(float (*d)[4], const Left &a, const Right &b) {
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            mma_bf16_16816(d[0], a.r, b.r);
            mma_bf16_16816(d[1], a.r, b.r + 2);
        } else {
            mma_f16_16816(d[0], a.r, b.r);
            mma_f16_16816(d[1], a.r, b.r + 2);
        }
    }

  private:
    static __device__ uint32_t pack(float low, float high) {
        Vec<T, 2> pair;
        narrow(low, &pair[0]);
        narrow(high, &pair[1]);
        uint32_t word;
        memcpy(&word, &pair, sizeof word);
        return word;
    }
};

// Floats by three products of tf32: each factor is split into a high and a low part, and low times low is dropped
// (Ootomo and Yokota 2022, arXiv:2203.03341). The tensor core truncates its sums, so that the long sum is kept outside.
template <> struct Product<float> {
    static constexpr int kDepth = 8;
    struct Part {
        uint32_t high, low;
        __device__ Part() {}
        __device__ Part(float x) {
            const float h = to_tf32(x);
            high = __float_as_uint(h);
            low = __float_as_uint(to_tf32(x - h));
        }
    };
    struct Left {
        uint32_t high[4], low[4];
        __device__ void set(int i, Part x) { high[i] = x.high, low[i] = x.low; }
    };
    typedef Left Right;

    static __device__ Left left(const float *x, int pitch) {
        const int lane = threadIdx.x % 32;
        x += lane / 4 * pitch + lane % 4;
        Left a;
        a.set(0, x[0]), a.set(1, x[8 * pitch]), a.set(2, x[4]), a.set(3, x[8 * pitch + 4]);
        return a;
    }
    // Index 2 t of the sum goes to place t, index 2 t + 1 to place t + 4; `right` does the same.
    static __device__ Left left(const float (*s)[4]) {
        Left a;
        a.set(0, s[0][0]), a.set(1, s[0][2]), a.set(2, s[0][1]), a.set(3, s[0][3]);
        return a;
    }
    static __device__ Right right_of_rows(const float *y, int pitch) {
        const int lane = threadIdx.x % 32;
        y += lane / 4 * pitch + lane % 4;
        Right b;
        b.set(0, y[0]), b.set(1, y[4]), b.set(2, y[8 * pitch]), b.set(3, y[8 * pitch + 4]);
        return b;
    }
    static __device__ Right right(const float *y, int pitch) {
        const int lane = threadIdx.x % 32;
        y += lane % 4 * 2 * pitch + lane / 4;
        Right b;
        b.set(0, y[0]), b.set(1, y[pitch]), b.set(2, y[8]), b.set(3, y[pitch + 8]);
        return b;
    }
    static __device__ void add(float (*d)[4], const Left &a, const Right &b) {
        float sums[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n)
            mma_tf32_1688(sums[n], a.low, b.high + 2 * n);
#pragma unroll
        for (int n = 0; n < 2; ++n)
            mma_tf32_1688(sums[n], a.high, b.low + 2 * n);
#pragma unroll
        for (int n = 0; n < 2; ++n)
            mma_tf32_1688(sums[n], a.high, b.high + 2 * n);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            d[i / 4][i % 4] += sums[i / 4][i % 4];
    }
};

// s = X Y^T: 16 rows of X [16, D] by the N rows of Y [N, D], whose columns from `dim` on are zeros.
template <class T, int D, int N> __device__ void scores(const T *x, const T *y, int dim, float (&s)[N / 8][4]) {
    typedef Product<T> P;
    constexpr int pitch = kPitch<T, D>;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
        s[i / 4][i % 4] = 0;
#pragma unroll 4
    for (int d = 0; d < dim; d += P::kDepth) {
        const auto a = P::left(x + d, pitch);
#pragma unroll
        for (int n = 0; n < N; n += 16)
            P::add(s + n / 8, a, P::right_of_rows(y + n * pitch + d, pitch));
    }
}

// sums += P Y: 16 rows of P [16, N], which are accumulators, by COLUMNS columns of Y [N, D].
template <class T, int D, int N, int COLUMNS>
__device__ void accumulate(const float (&p)[N / 8][4], const T *y, float (&sums)[COLUMNS / 8][4]) {
    typedef Product<T> P;
    constexpr int pitch = kPitch<T, D>;
#pragma unroll
    for (int n = 0; n < N; n += P::kDepth) {
        const auto a = P::left(p + n / 8);
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 16)
            P::add(sums + c / 8, a, P::right(y + n * pitch + c, pitch));
    }
}

// ---- between global and shared memory ------------------------------------------------------------------------------

// [tokens, heads, dim], the last dimension contiguous; `aligned`: every head of a token is whole vectors of 16 bytes.
template <class T> struct View {
    T *data;
    int64_t stride, head_stride;
    __device__ T *at(int64_t token, int64_t head) const { return data + token * stride + head * head_stride; }
};

// Rows [first, first + ROWS) of `from` [length, dim], zeros beyond its edges. They are there after a wait and a
// barrier.
template <class T, int D, int ROWS, int THREADS>
__device__ void load_tile(T *tile, const T *from, int64_t stride, int first, int length, int dim, bool aligned) {
    constexpr int kSize = kVector<T>, kInRow = D / kSize, pitch = kPitch<T, D>;
    if (aligned)
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * kInRow; i += THREADS) {
            const int r = i / kInRow, c = i % kInRow * kSize;
            const bool inside = first + r < length && c < dim;
            cp_async_16(tile + r * pitch + c, inside ? from + (first + r) * stride + c : from, inside);
        }
    else
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            const int r = i / D, c = i % D;
            if (first + r < length && c < dim)
                tile[r * pitch + c] = from[(first + r) * stride + c];
            else
                narrow(0.0f, tile + r * pitch + c);
        }
}

// A warp's accumulators, times a factor for its upper and for its lower eight rows, to columns [first_column,
// first_column + COLUMNS) of its 16 rows of `to` [length, dim], by way of its own part of `tile`, which nobody else
// uses any more.
template <class T, int D, int COLUMNS>
__device__ void store_tile(const float (&sums)[COLUMNS / 8][4], float upper, float lower, T *tile, T *to,
                           int64_t stride, int first, int length, int first_column, int dim, bool aligned) {
    constexpr int pitch = kPitch<T, D>, kSize = kVector<T>, kInRow = COLUMNS / kSize;
    const int lane = threadIdx.x % 32;
    tile += first_column;
    T *mine = tile + lane / 4 * pitch + lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < COLUMNS / 8; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Vec<T, 2> pair;
            narrow(sums[c][2 * half] * (half ? lower : upper), &pair[0]);
            narrow(sums[c][2 * half + 1] * (half ? lower : upper), &pair[1]);
            store_vec(mine + half * 8 * pitch + c * 8, pair);
        }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * kInRow; i += 32) {
        const int r = i / kInRow, c = i % kInRow * kSize, column = first_column + c;
        if (first + r >= length || column >= dim)
            continue;
        T *target = to + (first + r) * stride + column;
        if (aligned)
            store_vec(target, load_vec<kSize>(tile + r * pitch + c));
        else
            for (int e = 0; e < kSize && column + e < dim; ++e)
                target[e] = tile[r * pitch + c + e];
    }
}

} // namespace
} // namespace lt_cuda
