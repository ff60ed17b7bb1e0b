// LoRA's products on CUDA tensor cores: mma.sync with ldmatrix and a cp.async pipeline, which sm_80, sm_90 and sm_100
// all run. (sm_90's wgmma would pay for the dense part of the linear layer; it is left out because no measurement here
// could show it right.)
//
// One kernel serves y = x W^T + bias + s (x A^T) B^T and the gradient of its input: the sum over the depth simply goes
// on from W to the low-rank factors, [x, S] . [W, s B]^T, and in the gradient from one layer of a group to the next, so
// that the result is written once and never read. S = x A^T and the gradients of A and B are skinny products with
// kernels of their own, bound by the one read of x or dy.
#include "product.cuh"

namespace lt_cuda {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;

// ---- y = base + bias + sum over the parts of (x w + scale * s q)

// budget: 168 registers, 16 bytes shared, 72 KiB dynamic
// claims: HMMA LDSM LDGSTS LDG.E.128 STG.E.128
template <class T, bool K_INNER>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 ? 2 : 1)
    low_rank_product_kernel(Parts parts, const T *bias, const T *base, T *y, int64_t y_stride, int64_t rows,
                            int outputs, bool vector) {
    typedef Product<T, K_INNER> P;
    LT_DYNAMIC_SHARED(shared);
    // Blocks go through 8 tiles of rows before the next tile of columns, so that x and the weight meet in the cache.
    const int64_t row_tiles = ceil_div(rows, (int64_t)kTile), column_tiles = ceil_div(outputs, kTile);
    const int64_t group = blockIdx.x / (8 * column_tiles), inside = blockIdx.x % (8 * column_tiles);
    const int64_t height = row_tiles - 8 * group < 8 ? row_tiles - 8 * group : 8;
    const int64_t row = (8 * group + inside % height) * kTile, column = inside / height * kTile;
    const int warp = threadIdx.x / 32, m = warp / 4 * 64, n = warp % 4 * 32;

    float sums[4][4][4] = {};
    Cursor ahead = {0, 0, true}, now;
    P::settle(parts, ahead);
    now = ahead;
    for (int s = 0; s < kStages - 1; ++s) {
        P::copy(parts, ahead, shared + s * P::kStageBytes, row, rows, column, outputs);
        if (ahead.part < parts.count)
            P::advance(parts, ahead);
    }
    int stage = 0;
    while (now.part < parts.count) {
        cp_async_wait<kStages - 2>();
        __syncthreads(); // this stage is there for everybody; the one before has been used by everybody
        const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
        P::copy(parts, ahead, shared + free_stage * P::kStageBytes, row, rows, column, outputs);
        if (ahead.part < parts.count)
            P::advance(parts, ahead);
        const unsigned char *a = shared + stage * P::kStageBytes, *b = a + P::kFirst;
        if (now.low)
            multiply_tiles<typename P::S, typename P::Q, T, false>(sums, a, b, m, n, parts.part[now.part].scale);
        else
            multiply_tiles<typename P::X, typename P::W, T, false>(sums, a, b, m, n, 1.0f);
        P::advance(parts, now);
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();

    float *staging = (float *)shared + warp * kStagingFloats<4>;
    constexpr int V = kVector<T>;
    for_each_vector<V>(sums, staging, [&](int r, int c, Vec<float, V> values) {
        const int64_t i = row + m + r, j = column + n + c, left = outputs - j;
        if (i >= rows || left <= 0)
            return;
        if (bias) {
            const Vec<float, V> add = load_values<V>(bias + j, left, false);
#pragma unroll
            for (int l = 0; l < V; ++l)
                values[l] += add[l];
        }
        if (base) {
            const Vec<float, V> add = load_values<V>(base + i * y_stride + j, left, vector);
#pragma unroll
            for (int l = 0; l < V; ++l)
                values[l] += add[l];
        }
        store_values(y + i * y_stride + j, values, left, vector);
    });
}

template <class T, bool K_INNER>
int launch_product(const Parts &parts, const void *bias, const void *base, void *y, int64_t y_stride, int64_t rows,
                   int64_t outputs, void *stream) {
    const int64_t tiles = ceil_div(rows, (int64_t)kTile) * ceil_div(outputs, (int64_t)kTile);
    if (tiles == 0)
        return 0;
    if (tiles > kMaxGrid || outputs > kMaxGrid)
        return (int)cudaErrorInvalidConfiguration;
    constexpr int kStaging = kProductThreads / 32 * kStagingFloats<4> * 4;
    constexpr int kBytes = Product<T, K_INNER>::kBytes > kStaging ? Product<T, K_INNER>::kBytes : kStaging;
    return launch(low_rank_product_kernel<T, K_INNER>, dim3((unsigned)tiles), dim3(kProductThreads), kBytes, stream,
                  parts, (const T *)bias, (const T *)base, (T *)y, y_stride, rows, (int)outputs,
                  vectors<T>(y, y_stride, outputs));
}

// ---- s [rows, rank] = x p

constexpr int kSkinnyThreads = 128, kSkinnyTile = 64;

// p lies as [rank, depth] (K_INNER) or [depth, rank].
template <class T, bool K_INNER> struct Projection {
    static constexpr int kDepth = 64 / (int)sizeof(T);
    typedef Tile<T, T, kSkinnyTile, kDepth, true> X;
    typedef Tile<float, T, kSkinnyTile, kDepth, K_INNER> P;
    static constexpr int kStageBytes = X::kBytes + P::kBytes;
};

// budget: 168 registers, 16 bytes shared, 45 KiB dynamic
// claims: HMMA LDSM LDGSTS
template <class T, bool K_INNER>
__global__ void __launch_bounds__(kSkinnyThreads, 3)
    low_rank_project_kernel(const T *x, int64_t x_stride, bool x_vector, const float *p, int64_t p_stride,
                            bool p_vector, float *s, int64_t s_stride, int64_t rows, int depth, int rank) {
    typedef Projection<T, K_INNER> J;
    LT_DYNAMIC_SHARED(shared);
    const int64_t row = (int64_t)blockIdx.x * kSkinnyTile;
    const int column = blockIdx.y * kSkinnyTile, m = threadIdx.x / 32 * 16;
    const int pairs = ceil_div(rank - column < kSkinnyTile ? rank - column : kSkinnyTile, 16);
    const auto copy = [&](int k, unsigned char *stage) {
        if (k < depth) {
            copy_tile<typename J::X, kSkinnyThreads>(stage, x, x_stride, row, rows, k, depth, x_vector);
            if constexpr (K_INNER)
                copy_tile<typename J::P, kSkinnyThreads>(stage + J::X::kBytes, p, p_stride, column, rank, k, depth,
                                                         p_vector);
            else
                copy_tile<typename J::P, kSkinnyThreads>(stage + J::X::kBytes, p, p_stride, k, depth, column, rank,
                                                         p_vector);
        }
        cp_async_commit();
    };
    float sums[1][8][4] = {};
    for (int i = 0; i < kStages - 1; ++i)
        copy(i * J::kDepth, shared + i * J::kStageBytes);
    int stage = 0;
    for (int k = 0; k < depth; k += J::kDepth) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        copy(k + (kStages - 1) * J::kDepth, shared + (stage == 0 ? kStages - 1 : stage - 1) * J::kStageBytes);
        const unsigned char *a = shared + stage * J::kStageBytes;
        multiply_tiles<typename J::X, typename J::P, T, true>(sums, a, a + J::X::kBytes, m, 0, 1.0f, 1, pairs);
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t r = row + m + lane / 4 + i / 2 * 8;
            const int c = column + 8 * j + lane % 4 * 2 + i % 2;
            if (r < rows && c < rank)
                s[r * s_stride + c] = sums[0][j][i];
        }
}

template <class T, bool K_INNER>
int launch_projection(const void *x, int64_t x_stride, const float *p, int64_t p_stride, float *s, int64_t s_stride,
                      int64_t rows, int64_t depth, int64_t rank, void *stream) {
    const dim3 grid((unsigned)ceil_div(rows, (int64_t)kSkinnyTile), (unsigned)ceil_div(rank, (int64_t)kSkinnyTile));
    return launch(low_rank_project_kernel<T, K_INNER>, grid, dim3(kSkinnyThreads),
                  kStages * Projection<T, K_INNER>::kStageBytes, stream, (const T *)x, x_stride,
                  vectors<T>(x, x_stride, depth), p, p_stride, vectors<float>(p, p_stride, K_INNER ? depth : rank), s,
                  s_stride, rows, (int)depth, (int)rank);
}

// ---- c^T x over chunks of rows, and their sums

constexpr int kGradientColumns = 128;

template <class T> struct Gradient {
    static constexpr int kDepth = 64 / (int)sizeof(T);
    typedef Tile<float, T, kSkinnyTile, kDepth, false> C;
    typedef Tile<T, T, kGradientColumns, kDepth, false> X;
    static constexpr int kStageBytes = C::kBytes + X::kBytes;
};

// partials [chunk, rank, cols] = c^T x over the chunk's rows; c [rows, rank], x [rows, cols]. Where asked for, also the
// sums over the chunk's rows of x (x_sums [chunk, cols]) and of c (c_sums [chunk, rank]).
// budget: 168 registers, 16 bytes shared, 51 KiB dynamic
// claims: HMMA LDSM LDGSTS STG.E.128
template <class T>
__global__ void __launch_bounds__(kSkinnyThreads, 3)
    low_rank_gradient_kernel(const float *c, int64_t c_stride, bool c_vector, const T *x, int64_t x_stride,
                             bool x_vector, float *partials, float *x_sums, float *c_sums, int64_t rows,
                             int64_t chunk_rows, int rank, int cols) {
    typedef Gradient<T> G;
    LT_DYNAMIC_SHARED(shared);
    const int column = blockIdx.x * kGradientColumns, r = blockIdx.y * kSkinnyTile, n = threadIdx.x / 32 * 32;
    const int64_t chunk = blockIdx.z, begin = chunk * chunk_rows;
    const int64_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
    const int row_blocks = ceil_div(rank - r < kSkinnyTile ? rank - r : kSkinnyTile, 16);
    const auto copy = [&](int64_t t, unsigned char *stage) {
        if (t < end) {
            copy_tile<typename G::C, kSkinnyThreads>(stage, c, c_stride, t, end, r, rank, c_vector);
            copy_tile<typename G::X, kSkinnyThreads>(stage + G::C::kBytes, x, x_stride, t, end, column, cols, x_vector);
        }
        cp_async_commit();
    };
    const bool sum_x = x_sums && blockIdx.y == 0, sum_c = c_sums && blockIdx.x == 0 && threadIdx.x < kSkinnyTile;
    float sums[4][4][4] = {}, x_sum = 0, c_sum = 0;
    for (int i = 0; i < kStages - 1; ++i)
        copy(begin + i * G::kDepth, shared + i * G::kStageBytes);
    int stage = 0;
    for (int64_t t = begin; t < end; t += G::kDepth) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        copy(t + (kStages - 1) * G::kDepth, shared + (stage == 0 ? kStages - 1 : stage - 1) * G::kStageBytes);
        const unsigned char *a = shared + stage * G::kStageBytes, *b = a + G::C::kBytes;
        multiply_tiles<typename G::C, typename G::X, T, true>(sums, a, b, 0, n, 1.0f, row_blocks);
        if (sum_x) // a column a thread; rows past the end are zeros
            for (int i = 0; i < G::kDepth; ++i)
                x_sum += widen(((const T *)b)[i * G::X::kStride + threadIdx.x]);
        if (sum_c)
            for (int i = 0; i < G::kDepth; ++i)
                c_sum += ((const float *)a)[i * G::C::kStride + threadIdx.x];
        stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (sum_x && column + (int)threadIdx.x < cols)
        x_sums[chunk * cols + column + threadIdx.x] = x_sum;
    if (sum_c && r + (int)threadIdx.x < rank)
        c_sums[chunk * rank + r + threadIdx.x] = c_sum;
    float *staging = (float *)shared + threadIdx.x / 32 * kStagingFloats<4>;
    for_each_vector<4>(sums, staging, [&](int i, int j, const Vec<float, 4> &values) {
        const int at = column + n + j;
        if (r + i < rank && at < cols)
            store_values(partials + (chunk * rank + r + i) * cols + at, values, cols - at, cols % 4 == 0);
    });
}

// out [rank, cols], of any two strides, (+)= scale * the sum of the chunks in their order.
// budget: 40 registers, 16 bytes shared
__global__ void __launch_bounds__(256)
    low_rank_reduce_kernel(const float *partials, int64_t chunks, int64_t chunk_stride, float *out, int64_t out_r,
                           int64_t out_k, int64_t rank, int64_t cols, float scale, bool accumulate) {
    const int64_t step = (int64_t)gridDim.x * 256;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < rank * cols; i += step) {
        float total = 0;
        for (int64_t c = 0; c < chunks; ++c)
            total += partials[c * chunk_stride + i];
        float *to = out + i / cols * out_r + i % cols * out_k;
        *to = accumulate ? *to + total * scale : total * scale;
    }
}

// ---- out = weight + scale * B A

constexpr int kMergeRows = 64, kMergeColumns = 128, kMergeDepth = 16, kMergeThreads = 256;

// A thread holds 4 rows of 8 columns. Bound by memory up to rank 64 or so, hence plain fp32 arithmetic, without error.
// budget: 128 registers, 13 KiB shared
// claims: LDG.E.128 STG.E.128
template <class T>
__global__ void __launch_bounds__(kMergeThreads, 2)
    low_rank_merge_kernel(const T *weight, int64_t weight_stride, bool weight_vector, const float *a, int64_t a_stride,
                          const float *b, int64_t b_stride, float *out, int64_t out_stride, bool out_vector,
                          int64_t outputs, int inputs, int rank, float scale) {
    LT_SHARED(float[kMergeDepth][kMergeColumns], of_a);
    LT_SHARED(float[kMergeRows][kMergeDepth + 4], of_b);
    const int64_t column_tiles = ceil_div(inputs, kMergeColumns);
    const int64_t row = blockIdx.x / column_tiles * kMergeRows;
    const int column = (int)(blockIdx.x % column_tiles) * kMergeColumns;
    const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 8, left = inputs - column - n;
    float sums[4][8] = {};
    const T *from = weight + (row + m) * weight_stride + column + n;
    const bool whole = weight_vector && left >= 8;
    Vec<T, 8> kept[4]; // asked for before the product, needed after it
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (whole && row + m + i < outputs)
            kept[i] = load_vec<8>(from + i * weight_stride);
    for (int k = 0; k < rank; k += kMergeDepth) {
        __syncthreads();
        for (int i = threadIdx.x; i < kMergeDepth * kMergeColumns; i += kMergeThreads) {
            const int r = k + i / kMergeColumns, c = column + i % kMergeColumns;
            of_a[i / kMergeColumns][i % kMergeColumns] = r < rank && c < inputs ? a[r * a_stride + c] : 0.0f;
        }
        for (int i = threadIdx.x; i < kMergeRows * kMergeDepth; i += kMergeThreads) {
            const int64_t r = row + i / kMergeDepth;
            const int c = k + i % kMergeDepth;
            of_b[i / kMergeDepth][i % kMergeDepth] = r < outputs && c < rank ? b[r * b_stride + c] : 0.0f;
        }
        __syncthreads();
#pragma unroll 2
        for (int d = 0; d < kMergeDepth; ++d) {
            const Vec<float, 8> from_a = load_vec<8>(&of_a[d][n]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    sums[i][j] = fmaf(of_b[m + i][d], from_a[j], sums[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (row + m + i < outputs) {
            Vec<float, 8> values;
            if (whole) {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    values[j] = widen(kept[i][j]);
            } else {
                values = load_values<8>(from + i * weight_stride, left, false);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j)
                values[j] += scale * sums[i][j];
            store_values(out + (row + m + i) * out_stride + column + n, values, left, out_vector);
        }
}

} // namespace
} // namespace lt_cuda

using namespace lt_cuda;

extern "C" LT_API int lt_cuda_low_rank_merge(int dtype, const void *weight, int64_t weight_stride, const float *a,
                                             int64_t a_stride, const float *b, int64_t b_stride, float *out,
                                             int64_t out_stride, int64_t outputs, int64_t inputs, int64_t rank,
                                             float scale, void *stream) {
    const int64_t tiles = ceil_div(outputs, (int64_t)kMergeRows) * ceil_div(inputs, (int64_t)kMergeColumns);
    if (tiles == 0)
        return 0;
    if (tiles > kMaxGrid)
        return (int)cudaErrorInvalidConfiguration;
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        // Eight columns at a time: 16 bytes of half precision, twice 16 of fp32.
        return launch(low_rank_merge_kernel<T>, dim3((unsigned)tiles), dim3(kMergeThreads), 0, stream,
                      (const T *)weight, weight_stride, aligned16(weight, weight_stride * sizeof(T)), a, a_stride, b,
                      b_stride, out, out_stride, aligned16(out, out_stride * 4), outputs, (int)inputs, (int)rank,
                      scale);
    });
}

extern "C" LT_API int lt_cuda_low_rank_project(int dtype, const void *x, int64_t x_stride, const float *p,
                                               int64_t p_input_step, int64_t p_rank_step, float *s, int64_t s_stride,
                                               int64_t rows, int64_t inputs, int64_t rank, void *stream) {
    if (rows == 0 || rank == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        if (p_input_step == 1)
            return launch_projection<T, true>(x, x_stride, p, p_rank_step, s, s_stride, rows, inputs, rank, stream);
        if (p_rank_step == 1)
            return launch_projection<T, false>(x, x_stride, p, p_input_step, s, s_stride, rows, inputs, rank, stream);
        return (int)cudaErrorInvalidValue;
    });
}

extern "C" LT_API int lt_cuda_low_rank_linear(int dtype, const void *x, int64_t x_stride, const void *weight,
                                              int64_t weight_stride, const void *bias, const float *s, int64_t s_stride,
                                              const float *b, int64_t b_stride, void *y, int64_t y_stride, int64_t rows,
                                              int64_t inputs, int64_t outputs, int64_t rank, float scale,
                                              void *stream) {
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        Parts parts = {};
        parts.count = 1;
        parts.part[0] = make_part<T, true>(x, x_stride, weight, weight_stride, inputs, s, s_stride, b, b_stride, rank,
                                           outputs, scale);
        return launch_product<T, true>(parts, bias, nullptr, y, y_stride, rows, outputs, stream);
    });
}

extern "C" LT_API int lt_cuda_low_rank_input_gradient(int dtype, const lt_cuda_low_rank_layer *layers, int64_t count,
                                                      void *dx, int64_t dx_stride, int64_t rows, int64_t inputs,
                                                      void *stream) {
    if (count < 0 || count > kMostParts)
        return (int)cudaErrorInvalidValue;
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        Parts parts = {};
        parts.count = (int)count;
        for (int i = 0; i < count; ++i) {
            const lt_cuda_low_rank_layer &l = layers[i];
            parts.part[i] = make_part<T, false>(l.dy, l.dy_stride, l.weight, l.weight_stride, l.outputs, l.ds,
                                                l.ds_stride, l.a, l.a_stride, l.rank, inputs, l.scale);
        }
        return launch_product<T, false>(parts, nullptr, nullptr, dx, dx_stride, rows, inputs, stream);
    });
}

extern "C" LT_API int lt_cuda_low_rank_add(int dtype, const void *x, int64_t x_stride, const float *p,
                                           int64_t p_input_step, int64_t p_rank_step, const float *q,
                                           int64_t q_rank_step, int64_t q_output_step, void *y, int64_t y_stride,
                                           int64_t rows, int64_t inputs, int64_t rank, int64_t outputs, float scale,
                                           float *s, void *stream) {
    if (int status = lt_cuda_low_rank_project(dtype, x, x_stride, p, p_input_step, p_rank_step, s, rank, rows, inputs,
                                              rank, stream))
        return status;
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        Parts parts = {};
        parts.count = 1;
        if (q_rank_step == 1) {
            parts.part[0] =
                make_part<T, true>(nullptr, 0, nullptr, 0, 0, s, rank, q, q_output_step, rank, outputs, scale);
            return launch_product<T, true>(parts, nullptr, y, y, y_stride, rows, outputs, stream);
        }
        if (q_output_step != 1)
            return (int)cudaErrorInvalidValue;
        parts.part[0] = make_part<T, false>(nullptr, 0, nullptr, 0, 0, s, rank, q, q_rank_step, rank, outputs, scale);
        return launch_product<T, false>(parts, nullptr, y, y, y_stride, rows, outputs, stream);
    });
}

extern "C" LT_API int lt_cuda_low_rank_partials(int dtype, const float *c, int64_t c_stride, const void *x,
                                                int64_t x_stride, float *partials, float *x_sums, float *c_sums,
                                                int64_t rows, int64_t chunk_rows, int64_t rank, int64_t cols,
                                                void *stream) {
    if (rows == 0 || rank == 0 || cols == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        const dim3 grid((unsigned)ceil_div(cols, (int64_t)kGradientColumns),
                        (unsigned)ceil_div(rank, (int64_t)kSkinnyTile), (unsigned)ceil_div(rows, chunk_rows));
        constexpr int kStaging = kSkinnyThreads / 32 * kStagingFloats<4> * 4;
        constexpr int kPipeline = kStages * Gradient<T>::kStageBytes;
        return launch(low_rank_gradient_kernel<T>, grid, dim3(kSkinnyThreads),
                      kPipeline > kStaging ? kPipeline : kStaging, stream, c, c_stride,
                      vectors<float>(c, c_stride, rank), (const T *)x, x_stride, vectors<T>(x, x_stride, cols),
                      partials, x_sums, c_sums, rows, chunk_rows, (int)rank, (int)cols);
    });
}

extern "C" LT_API int lt_cuda_low_rank_reduce(const float *partials, int64_t chunks, int64_t chunk_stride, float *out,
                                              int64_t out_rank_step, int64_t out_col_step, int64_t rank, int64_t cols,
                                              float scale, int accumulate, void *stream) {
    if (rank * cols == 0)
        return 0;
    const int64_t blocks = ceil_div(rank * cols, (int64_t)256);
    return launch(low_rank_reduce_kernel, dim3((unsigned)(blocks < 65536 ? blocks : 65536)), dim3(256), 0, stream,
                  partials, chunks, chunk_stride, out, out_rank_step, out_col_step, rank, cols, scale, accumulate != 0);
}
