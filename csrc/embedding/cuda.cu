// Embedding on CUDA. Forward: a warp copies a row. Backward: the sorted ids are cut into pieces of fixed size; a block
// adds up the rows of a piece, id by id, and what belongs to an id that goes on over several pieces is added in order
// by a second kernel. No atomics.
#include "../common/cuda_kernel.cuh"

namespace lt_cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPiece = 64; // sorted ids of a block
constexpr int kAhead = 4;  // rows that are loaded together
constexpr int64_t kMaxGrid = 0x7fffffff;

// budget: 40 registers, 0 bytes shared
// claims: LDG.128 STG.128
template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(const T *weight, int64_t weight_stride, const int64_t *ids, U *y, int64_t y_stride,
                             int64_t tokens, int64_t vocabulary, int64_t cols, float scale) {
    const int lane = threadIdx.x % 32;
    for (int64_t token = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32; token < tokens;
         token += (int64_t)gridDim.x * kWarps) {
        const int64_t id = __shfl_sync(kAllLanes, lane == 0 ? ids[token] : int64_t(0), 0);
        const bool known = id >= 0 && id < vocabulary;
        for (int64_t h = (int64_t)lane * N; h < cols; h += 32 * N) {
            Vec<T, N> from = {};
            if (known)
                from = load_vec<N>(weight + id * weight_stride + h);
            Vec<U, N> to;
#pragma unroll
            for (int i = 0; i < N; ++i)
                narrow(known ? widen(from[i]) * scale : __uint_as_float(0x7fc00000u), &to[i]); // NaN
            store_vec(y + token * y_stride + h, to);
        }
    }
}

// budget: 32 registers, 0 bytes shared
// claims: STG.128
template <int N>
__global__ void __launch_bounds__(kThreads)
    embedding_clear_kernel(uint16_t *x, int64_t stride, int64_t rows, int64_t cols) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
        for (int64_t h = (int64_t)threadIdx.x * N; h < cols; h += kThreads * N)
            store_vec(x + row * stride + h, Vec<uint16_t, N>{});
}

struct Table { // the gradient of the weight
    int dtype;
    void *data;
    int64_t stride, vocabulary, cols, padding;
    float scale;
    int accumulate;

    __device__ bool kept(int64_t id) const { return id >= 0 && id < vocabulary && id != padding; }

    template <class U, int N> __device__ void write_as(int64_t id, int64_t h, const float (&sum)[N]) const {
        U *row = (U *)data + id * stride + h;
        Vec<U, N> v = {};
        if (accumulate)
            v = load_vec<N>((const U *)row);
#pragma unroll
        for (int i = 0; i < N; ++i)
            narrow((accumulate ? widen(v[i]) : 0.0f) + sum[i] * scale, &v[i]);
        store_vec(row, v);
    }

    template <int N> __device__ void write(int64_t id, int64_t h, const float (&sum)[N]) const {
        if (dtype == LT_F32)
            write_as<float>(id, h, sum);
        else if (dtype == LT_BF16)
            write_as<__nv_bfloat16>(id, h, sum);
        else
            write_as<__half>(id, h, sum);
    }
};

template <int N> __device__ void store_part(float *part, float (&sum)[N]) {
    Vec<float, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i)
        v[i] = sum[i];
    store_vec(part, v);
}

// grid (pieces, blocks of columns). A run of equal ids within the piece is written; what came in from the piece before,
// or goes on in the next alone, is left in sums[piece, 0] and sums[piece, 1].
// budget: 64 registers, 1040 bytes shared
// claims: LDG.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    embedding_pieces_kernel(const T *dy, int64_t dy_stride, const int64_t *ids, const int64_t *order, Table table,
                            float *sums, int64_t tokens) {
    LT_SHARED(int64_t[kPiece + 2], id); // id[i + 1] is the piece's number i; before it and behind it, its neighbours
    LT_SHARED(int64_t[kPiece], token);
    const int64_t piece = blockIdx.x, begin = piece * kPiece;
    const int count = (int)(tokens - begin < kPiece ? tokens - begin : kPiece);
    for (int i = threadIdx.x; i < count + 2; i += kThreads) {
        const int64_t at = begin + i - 1;
        id[i] = at >= 0 && at < tokens ? ids[at] : -1;
        if (i > 0 && i <= count)
            token[i - 1] = order[at];
    }
    __syncthreads();
    const int64_t h = ((int64_t)blockIdx.y * kThreads + threadIdx.x) * N;
    if (h >= table.cols)
        return;
    float sum[N] = {};
    bool came_in = begin > 0 && id[0] == id[1];
    for (int first = 0; first < count; first += kAhead) {
        Vec<T, N> rows[kAhead] = {};
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
            if (first + j < count && table.kept(id[first + j + 1]))
                rows[j] = load_vec<N>(dy + token[first + j] * dy_stride + h);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int i = first + j;
            if (i >= count)
                break;
#pragma unroll
            for (int e = 0; e < N; ++e)
                sum[e] += widen(rows[j][e]);
            const bool goes_on = begin + i + 1 < tokens && id[i + 2] == id[i + 1];
            if (goes_on && i + 1 < count)
                continue;
            if (came_in || goes_on)
                store_part(sums + (2 * piece + !came_in) * table.cols + h, sum);
            else if (table.kept(id[i + 1]))
                table.write(id[i + 1], h, sum);
            came_in = false;
#pragma unroll
            for (int e = 0; e < N; ++e)
                sum[e] = 0;
        }
    }
}

// grid (pieces - 1, blocks of columns): the run that begins in this piece and goes on, its parts in order.
// budget: 40 registers, 0 bytes shared
// claims: LDG.128
template <int N>
__global__ void __launch_bounds__(kThreads)
    embedding_join_kernel(const int64_t *ids, Table table, const float *sums, int64_t tokens) {
    int64_t piece = blockIdx.x;
    const int64_t begin = piece * kPiece, id = ids[begin + kPiece];
    const int64_t h = ((int64_t)blockIdx.y * kThreads + threadIdx.x) * N;
    if (h >= table.cols || ids[begin + kPiece - 1] != id || (begin > 0 && ids[begin - 1] == id) || !table.kept(id))
        return;
    float sum[N] = {};
    const Vec<float, N> own = load_vec<N>(sums + (2 * piece + 1) * table.cols + h);
#pragma unroll
    for (int e = 0; e < N; ++e)
        sum[e] = own[e];
    for (++piece; piece * kPiece < tokens && ids[piece * kPiece] == id; ++piece) {
        const Vec<float, N> part = load_vec<N>(sums + 2 * piece * table.cols + h);
#pragma unroll
        for (int e = 0; e < N; ++e)
            sum[e] += part[e];
    }
    table.write(id, h, sum);
}

int clear(const Table &table, void *stream) {
    const int64_t halves = table.dtype == LT_F32 ? 2 : 1; // of 16 bits
    const dim3 grid((unsigned)std::min(table.vocabulary, (int64_t)1 << 16)), block(kThreads);
    const bool whole = table.cols * halves % 8 == 0 && aligned16(table.data, table.stride * halves * 2);
    return launch(whole ? embedding_clear_kernel<8> : embedding_clear_kernel<1>, grid, block, 0, stream,
                  (uint16_t *)table.data, table.stride * halves, table.vocabulary, table.cols * halves);
}

template <class T, int N>
int sum_rows(const T *dy, int64_t dy_stride, const int64_t *ids, const int64_t *order, const Table &table, float *sums,
             int64_t tokens, void *stream) {
    const int64_t pieces = ceil_div(tokens, (int64_t)kPiece), columns = ceil_div(table.cols, (int64_t)kThreads * N);
    if (pieces > kMaxGrid || columns > 65535)
        return (int)cudaErrorInvalidValue;
    const dim3 block(kThreads);
    const int status = launch(embedding_pieces_kernel<T, N>, dim3((unsigned)pieces, (unsigned)columns), block, 0,
                              stream, dy, dy_stride, ids, order, table, sums, tokens);
    if (status || pieces == 1)
        return status;
    return launch(embedding_join_kernel<N>, dim3((unsigned)(pieces - 1), (unsigned)columns), block, 0, stream, ids,
                  table, (const float *)sums, tokens);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_embedding_forward(int dtype, const void *weight, int64_t weight_stride,
                                                const int64_t *ids, int y_dtype, void *y, int64_t y_stride,
                                                int64_t tokens, int64_t vocabulary, int64_t cols, float scale,
                                                void *stream) {
    using namespace lt_cuda;
    if (tokens == 0 || cols == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        return with_dtype(y_dtype, [&](auto u) {
            using T = decltype(t);
            using U = decltype(u);
            constexpr int kMany = std::min(kVector<T>, kVector<U>);
            const bool whole =
                cols % kMany == 0 && aligned16(weight, weight_stride * sizeof(T)) && aligned16(y, y_stride * sizeof(U));
            const dim3 grid((unsigned)std::min(ceil_div(tokens, (int64_t)kWarps), kMaxGrid)), block(kThreads);
            return launch(whole ? embedding_forward_kernel<T, U, kMany> : embedding_forward_kernel<T, U, 1>, grid,
                          block, 0, stream, (const T *)weight, weight_stride, ids, (U *)y, y_stride, tokens, vocabulary,
                          cols, scale);
        });
    });
}

extern "C" LT_API int lt_cuda_embedding_backward(int dtype, const void *dy, int64_t dy_stride,
                                                 const int64_t *sorted_ids, const int64_t *order, int dweight_dtype,
                                                 void *dweight, int64_t dweight_stride, int64_t tokens,
                                                 int64_t vocabulary, int64_t cols, float scale, int64_t padding_idx,
                                                 int accumulate, float *sums, void *stream) {
    using namespace lt_cuda;
    const Table table = {dweight_dtype, dweight, dweight_stride, vocabulary, cols, padding_idx, scale, accumulate};
    const int64_t width = dweight_dtype == LT_F32 ? 4 : 2;
    if (vocabulary == 0 || cols == 0)
        return 0;
    if (dweight_dtype != LT_F32 && dweight_dtype != LT_BF16 && dweight_dtype != LT_F16)
        return (int)cudaErrorInvalidValue;
    if (!accumulate)
        if (int status = clear(table, stream))
            return status;
    if (tokens == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        constexpr int kMany = kVector<T>;
        const bool whole = cols % kMany == 0 && aligned16(dy, dy_stride * sizeof(T)) &&
                           aligned16(dweight, dweight_stride * width) && aligned16(sums, 0);
        return (whole ? sum_rows<T, kMany> : sum_rows<T, 1>)((const T *)dy, dy_stride, sorted_ids, order, table, sums,
                                                             tokens, stream);
    });
}
