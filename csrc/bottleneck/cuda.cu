// The bottleneck adapter on CUDA tensor cores. A block owns 64 rows: it forms their hidden activations on chip, 64 of
// the rank at a time with x coming through a cp.async pipeline, keeps them in shared memory as the operand of the
// second product, and streams the columns of y, each written once. The backward pass forms them again; h and dz [rows,
// rank], small beside x, then go to memory for the gradients of the weights (csrc/low_rank/cuda.cu: partials and
// reduce).
#include "../common/cuda_activation.cuh"
#include "../common/cuda_tile.cuh"

namespace lt_cuda {
namespace {

constexpr int kRows = 64, kColumns = 64, kMostRank = 256, kThreads = 256;
constexpr int64_t kMaxGrid = 0x7fffffff;

template <class T> struct Shape {
    static constexpr int kDepth = 64 / (int)sizeof(T);
    typedef Tile<T, T, kRows, kDepth, true> X;                // x or dy
    typedef Tile<float, T, kColumns, kDepth, true> RowFactor; // depth along its rows: x D^T, h U^T
    typedef Tile<float, T, kColumns, kDepth, false> Factor;   // depth along its columns: dy U, dz D
    typedef Tile<T, T, kRows, kMostRank, true> Held;          // h or dz
    static constexpr int kForwardStage = X::kBytes + RowFactor::kBytes, kForwardStages = 3;
    static constexpr int kBackwardStage = 2 * X::kBytes + RowFactor::kBytes + Factor::kBytes, kBackwardStages = 2;
    static constexpr int kForwardBytes = kForwardStages * kForwardStage;
    static constexpr int kBackwardBytes = kBackwardStages * kBackwardStage;
    static constexpr int kStaging = kThreads / 32 * kStagingFloats<2> * 4;
};
constexpr int kOutStages = 3; // of the second product's pipeline, which reuses the memory of the first

__device__ inline ValueSlope activate(int activation, float z) {
    if (activation == LT_LINEAR)
        return {z, 1.0f};
    if (activation == LT_RELU) // NaN stays; the slope at 0 is 0, as in PyTorch
        return {z <= 0.0f ? 0.0f : z, z <= 0.0f ? 0.0f : 1.0f};
    ValueSlope result;
    with_activation(activation, [&](auto f) { result = f(z); });
    return result;
}

// A warp's 16 x 32 part of the block's 64 x 64.
__device__ inline int warp_row() { return threadIdx.x / 64 * 16; }
__device__ inline int warp_column() { return threadIdx.x / 32 % 2 * 32; }

// f(row, column, i, j) for each pair of neighbours sums[0][j][i], sums[0][j][i + 1] that the lane holds.
template <class F> __device__ inline void for_each_pair(F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
            f(warp_row() + lane / 4 + i / 2 * 8, warp_column() + 8 * j + lane % 4 * 2, i, j);
}

template <class T> __device__ inline void hold(T *held, int row, int column, float first, float second) {
    Vec<T, 2> pair;
    narrow(first, &pair[0]);
    narrow(second, &pair[1]);
    store_vec(held + row * Shape<T>::Held::kStride + column, pair);
}

// What the second product adds to, and where the sum goes: out = source + scale * (held factor + bias).
template <class T> struct Result {
    const T *source;
    T *out;
    const float *bias;
    int64_t source_stride, out_stride;
    float scale;
    bool source_vector, out_vector;
};

// factor: as B, a tile of whose type is filled from [hidden, rank] (B::kInner) or [rank, hidden].
template <class B, class T>
__device__ inline void product_up(const T *held, unsigned char *shared, const float *factor, bool factor_vector,
                                  const Result<T> &result, int64_t row, int64_t rows, int hidden, int rank) {
    typedef Shape<T> S;
    const int last = ceil_div(rank, S::kDepth) - 1, columns = ceil_div(hidden, kColumns) * kColumns;
    const auto copy = [&](int column, int k, unsigned char *stage) {
        if (column < columns) {
            if constexpr (B::kInner)
                copy_tile<B, kThreads>(stage, factor, rank, column, hidden, k * S::kDepth, rank, factor_vector);
            else
                copy_tile<B, kThreads>(stage, factor, hidden, k * S::kDepth, rank, column, hidden, factor_vector);
        }
        cp_async_commit();
    };
    const auto advance = [&](int &column, int &k) {
        column += k == last ? kColumns : 0;
        k = k == last ? 0 : k + 1;
    };
    float *staging = (float *)(shared + kOutStages * B::kBytes) + threadIdx.x / 32 * kStagingFloats<2>;
    constexpr int V = kVector<T>;
    int ahead = 0, ahead_k = 0, stage = 0;
    for (int i = 0; i < kOutStages - 1; ++i, advance(ahead, ahead_k))
        copy(ahead, ahead_k, shared + i * B::kBytes);
    float sums[1][4][4] = {};
    for (int column = 0, k = 0; column < columns; advance(column, k)) {
        cp_async_wait<kOutStages - 2>();
        __syncthreads();
        copy(ahead, ahead_k, shared + (stage == 0 ? kOutStages - 1 : stage - 1) * B::kBytes);
        advance(ahead, ahead_k);
        multiply_tiles<typename S::Held, B, T, false>(sums, (const unsigned char *)held, shared + stage * B::kBytes,
                                                      warp_row(), warp_column(), 1.0f, 1, 2, k * S::kDepth);
        stage = stage == kOutStages - 1 ? 0 : stage + 1;
        if (k != last)
            continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float part[1][2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                part[0][i / 4][i % 4] = sums[0][2 * half + i / 4][i % 4];
                sums[0][2 * half + i / 4][i % 4] = 0;
            }
            for_each_vector<V>(part, staging, [&](int r, int c, Vec<float, V> values) {
                const int64_t t = row + warp_row() + r;
                const int n = column + warp_column() + 16 * half + c, left = hidden - n;
                if (t >= rows || left <= 0)
                    return;
                const auto base =
                    load_values<V>(result.source + t * result.source_stride + n, left, result.source_vector);
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const float bias = result.bias && i < left ? result.bias[n + i] : 0.0f;
                    values[i] = base[i] + result.scale * (values[i] + bias);
                }
                store_values(result.out + t * result.out_stride + n, values, left, result.out_vector);
            });
        }
    }
    cp_async_wait<0>();
}

// budget: 128 registers, 16 bytes shared, 95 KiB dynamic
// claims: HMMA LDSM LDGSTS LDG.E.128 STG.E.128
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_forward_kernel(const T *x, int64_t x_stride, bool x_vector, const float *down, bool down_vector,
                              const float *down_bias, const float *up, bool up_vector, int activation, Result<T> result,
                              int64_t rows, int hidden, int rank) {
    typedef Shape<T> S;
    LT_DYNAMIC_SHARED(shared);
    T *held = (T *)(shared + S::kForwardBytes);
    const int64_t row = (int64_t)blockIdx.x * kRows;
    for (int r = 0; r < rank; r += kColumns) {
        const auto copy = [&](int k, unsigned char *stage) {
            if (k < hidden) {
                copy_tile<typename S::X, kThreads>(stage, x, x_stride, row, rows, k, hidden, x_vector);
                copy_tile<typename S::RowFactor, kThreads>(stage + S::X::kBytes, down, hidden, r, rank, k, hidden,
                                                           down_vector);
            }
            cp_async_commit();
        };
        float sums[1][4][4] = {};
        for (int i = 0; i < S::kForwardStages - 1; ++i)
            copy(i * S::kDepth, shared + i * S::kForwardStage);
        int stage = 0;
        for (int k = 0; k < hidden; k += S::kDepth) {
            cp_async_wait<S::kForwardStages - 2>();
            __syncthreads();
            copy(k + (S::kForwardStages - 1) * S::kDepth,
                 shared + (stage == 0 ? S::kForwardStages - 1 : stage - 1) * S::kForwardStage);
            const unsigned char *a = shared + stage * S::kForwardStage;
            multiply_tiles<typename S::X, typename S::RowFactor, T, false>(sums, a, a + S::X::kBytes, warp_row(),
                                                                           warp_column(), 1.0f);
            stage = stage == S::kForwardStages - 1 ? 0 : stage + 1;
        }
        cp_async_wait<0>();
        __syncthreads(); // the stages are free
        for_each_pair([&](int m, int n, int i, int j) {
            float h[2];
#pragma unroll
            for (int l = 0; l < 2; ++l) {
                const float bias = down_bias && r + n + l < rank ? down_bias[r + n + l] : 0.0f;
                h[l] = activate(activation, sums[0][j][i + l] + bias).value;
            }
            hold(held, m, r + n, h[0], h[1]);
        });
    }
    product_up<typename S::RowFactor>(held, shared, up, up_vector, result, row, rows, hidden, rank);
}

// h = act(z) and dz = scale * (dy U) act'(z) [rows, rank] fp32; dx = dy + dz D unless result.out is null.
// budget: 128 registers, 16 bytes shared, 104 KiB dynamic
// claims: HMMA LDSM LDGSTS LDG.E.128 STG.E.128
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    bottleneck_backward_kernel(const T *x, int64_t x_stride, bool x_vector, const float *down, bool down_vector,
                               const float *down_bias, const float *up, bool up_vector, float scale, int activation,
                               float *h_out, float *dz_out, Result<T> result, int64_t rows, int hidden, int rank) {
    typedef Shape<T> S;
    LT_DYNAMIC_SHARED(shared);
    T *held = (T *)(shared + S::kBackwardBytes);
    const int64_t row = (int64_t)blockIdx.x * kRows;
    const T *dy = result.source;
    for (int r = 0; r < rank; r += kColumns) {
        const auto copy = [&](int k, unsigned char *stage) {
            if (k < hidden) {
                copy_tile<typename S::X, kThreads>(stage, x, x_stride, row, rows, k, hidden, x_vector);
                stage += S::X::kBytes;
                copy_tile<typename S::X, kThreads>(stage, dy, result.source_stride, row, rows, k, hidden,
                                                   result.source_vector);
                stage += S::X::kBytes;
                copy_tile<typename S::RowFactor, kThreads>(stage, down, hidden, r, rank, k, hidden, down_vector);
                copy_tile<typename S::Factor, kThreads>(stage + S::RowFactor::kBytes, up, rank, k, hidden, r, rank,
                                                        up_vector);
            }
            cp_async_commit();
        };
        float z[1][4][4] = {}, dh[1][4][4] = {};
        for (int i = 0; i < S::kBackwardStages - 1; ++i)
            copy(i * S::kDepth, shared + i * S::kBackwardStage);
        int stage = 0;
        for (int k = 0; k < hidden; k += S::kDepth) {
            cp_async_wait<S::kBackwardStages - 2>();
            __syncthreads();
            copy(k + (S::kBackwardStages - 1) * S::kDepth,
                 shared + (stage == 0 ? S::kBackwardStages - 1 : stage - 1) * S::kBackwardStage);
            const unsigned char *a = shared + stage * S::kBackwardStage, *b = a + 2 * S::X::kBytes;
            multiply_tiles<typename S::X, typename S::RowFactor, T, false>(z, a, b, warp_row(), warp_column(), 1.0f);
            multiply_tiles<typename S::X, typename S::Factor, T, false>(dh, a + S::X::kBytes, b + S::RowFactor::kBytes,
                                                                        warp_row(), warp_column(), 1.0f);
            stage = stage == S::kBackwardStages - 1 ? 0 : stage + 1;
        }
        cp_async_wait<0>();
        __syncthreads();
        for_each_pair([&](int m, int n, int i, int j) {
            float dz[2];
#pragma unroll
            for (int l = 0; l < 2; ++l) {
                const bool there = r + n + l < rank;
                const float bias = down_bias && there ? down_bias[r + n + l] : 0.0f;
                const ValueSlope a = activate(activation, z[0][j][i + l] + bias);
                dz[l] = scale * dh[0][j][i + l] * a.slope;
                if (there && row + m < rows) {
                    h_out[(row + m) * rank + r + n + l] = a.value;
                    dz_out[(row + m) * rank + r + n + l] = dz[l];
                }
            }
            hold(held, m, r + n, dz[0], dz[1]);
        });
    }
    if (result.out)
        product_up<typename S::Factor>(held, shared, down, down_vector, result, row, rows, hidden, rank);
}

template <class T>
Result<T> make_result(const void *source, int64_t source_stride, const float *bias, void *out, int64_t out_stride,
                      float scale, int64_t hidden) {
    return {(const T *)source,
            (T *)out,
            bias,
            source_stride,
            out_stride,
            scale,
            vectors<T>(source, source_stride, hidden),
            vectors<T>(out, out_stride, hidden)};
}

bool too_large(int64_t rows, int64_t hidden, int64_t rank) {
    return rank < 1 || rank > kMostRank || hidden > kMaxGrid - kColumns || ceil_div(rows, (int64_t)kRows) > kMaxGrid;
}

} // namespace
} // namespace lt_cuda

using namespace lt_cuda;

extern "C" LT_API int lt_cuda_bottleneck_forward(int dtype, const void *x, int64_t x_stride, const float *down,
                                                 const float *down_bias, const float *up, const float *up_bias,
                                                 float scale, int activation, void *y, int64_t y_stride, int64_t rows,
                                                 int64_t hidden, int64_t rank, void *stream) {
    if (too_large(rows, hidden, rank))
        return (int)cudaErrorInvalidValue;
    if (rows == 0 || hidden == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        typedef Shape<T> S;
        static_assert(kOutStages * S::RowFactor::kBytes + S::kStaging <= S::kForwardBytes, "fits the free stages");
        return launch(bottleneck_forward_kernel<T>, dim3((unsigned)ceil_div(rows, (int64_t)kRows)), dim3(kThreads),
                      S::kForwardBytes + S::Held::kBytes, stream, (const T *)x, x_stride,
                      vectors<T>(x, x_stride, hidden), down, vectors<float>(down, hidden, hidden), down_bias, up,
                      vectors<float>(up, rank, rank), activation,
                      make_result<T>(x, x_stride, up_bias, y, y_stride, scale, hidden), rows, (int)hidden, (int)rank);
    });
}

extern "C" LT_API int lt_cuda_bottleneck_backward(int dtype, const void *dy, int64_t dy_stride, const void *x,
                                                  int64_t x_stride, const float *down, const float *down_bias,
                                                  const float *up, float scale, int activation, void *dx,
                                                  int64_t dx_stride, float *ddown, float *ddown_bias, float *dup,
                                                  float *dup_bias, int64_t rows, int64_t hidden, int64_t rank, float *h,
                                                  float *dz, float *partials, int64_t chunk_rows, void *stream) {
    if (too_large(rows, hidden, rank) || chunk_rows < 1)
        return (int)cudaErrorInvalidValue;
    const int64_t chunks = ceil_div(rows, chunk_rows);
    float *sums = partials + chunks * rank * hidden;
    int status = rows == 0 || hidden == 0 ? 0 : with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        typedef Shape<T> S;
        static_assert(kOutStages * S::Factor::kBytes + S::kStaging <= S::kBackwardBytes, "fits the free stages");
        return launch(
            bottleneck_backward_kernel<T>, dim3((unsigned)ceil_div(rows, (int64_t)kRows)), dim3(kThreads),
            S::kBackwardBytes + S::Held::kBytes, stream, (const T *)x, x_stride, vectors<T>(x, x_stride, hidden), down,
            vectors<float>(down, hidden, hidden), down_bias, up, vectors<float>(up, rank, rank), scale, activation, h,
            dz, make_result<T>(dy, dy_stride, nullptr, dx, dx_stride, 1.0f, hidden), rows, (int)hidden, (int)rank);
    });
    if (!status && (ddown || ddown_bias))
        status = lt_cuda_low_rank_partials(dtype, dz, rank, x, x_stride, partials, nullptr, ddown_bias ? sums : nullptr,
                                           rows, chunk_rows, rank, hidden, stream);
    if (!status && ddown)
        status =
            lt_cuda_low_rank_reduce(partials, chunks, rank * hidden, ddown, hidden, 1, rank, hidden, 1.0f, 0, stream);
    if (!status && ddown_bias)
        status = lt_cuda_low_rank_reduce(sums, chunks, rank, ddown_bias, rank, 1, 1, rank, 1.0f, 0, stream);
    if (!status && (dup || dup_bias))
        status = lt_cuda_low_rank_partials(dtype, h, rank, dy, dy_stride, partials, dup_bias ? sums : nullptr, nullptr,
                                           rows, chunk_rows, rank, hidden, stream);
    if (!status && dup)
        status = lt_cuda_low_rank_reduce(partials, chunks, rank * hidden, dup, 1, rank, rank, hidden, scale, 0, stream);
    if (!status && dup_bias)
        status = lt_cuda_low_rank_reduce(sums, chunks, hidden, dup_bias, hidden, 1, 1, hidden, scale, 0, stream);
    return status;
}
