// Packed attention on CUDA: online softmax forward, and a backward that forms the probabilities again from lse (Dao
// 2023, arXiv:2307.08691). A block has kRows positions of one sequence: queries of one head (forward, dq), or keys of
// one key head, whose query heads it goes through in order (dk, dv); 16 rows a warp. What they meet streams by in tiles
// of two stages, one being copied while the other is used.
//
// Sequence s owns the slots from cu_seqlens[s] / kRows + s on, as many as its blocks or one more, so that the host
// knows the number of blocks from the number of tokens and of sequences alone.
#include "tiles.cuh"

namespace lt_cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -3.0e38f; // below any score, and finite: a row may see no key of the first tile

struct Problem {
    const int32_t *cu_seqlens;
    int64_t tokens;
    int sequences, heads, kv_heads, dim;
    float scale;
    int before, after; // how many positions before it and after it a token sees, besides itself
};

// ---- what a block does ---------------------------------------------------------------------------------------------

struct Own {
    int64_t token;     // where the sequence begins
    int length, first; // the sequence's length, the block's first position in it
};

template <int ROWS> __device__ Own own_block(const Problem &p, int slot) {
    int low = 0, high = p.sequences;
    while (high - low > 1) { // the last sequence whose slots begin at or before this one
        const int middle = (low + high) / 2;
        if (p.cu_seqlens[middle] / ROWS + middle <= slot)
            low = middle;
        else
            high = middle;
    }
    const int begin = p.cu_seqlens[low];
    return {begin, p.cu_seqlens[low + 1] - begin, (slot - begin / ROWS - low) * ROWS};
}

// Late blocks first: under a causal mask they cost the most. Heads that share keys follow each other.
__device__ int own_slot(int heads) { return (int)((gridDim.x - 1 - blockIdx.x) / heads); }
__device__ int own_head(int heads) { return (int)((gridDim.x - 1 - blockIdx.x) % heads); }

// Positions that meet [first, first + ROWS) when each reaches `back` before it and `ahead` after it.
template <int ROWS> struct Reach {
    int start, end;
    __device__ Reach(const Own &own, int back, int ahead)
        : start(max(own.first - back, 0)), end(min(own.first + ROWS + ahead, own.length)) {}
};

// What a warp has of the block's rows and columns: 16 rows, and COLUMNS columns where SPLIT warps share them.
template <int SPLIT, int COLUMNS> struct Part {
    int row = threadIdx.x / 32 / SPLIT * 16, column = threadIdx.x / 32 % SPLIT * COLUMNS;
};

// Whether some of the rows [first, first + ROWS) do not see some of the keys [key, key + KEYS).
template <int ROWS, int KEYS> __device__ bool needs_mask(const Problem &p, int first, int key, int length) {
    return key < first + ROWS - 1 - p.before || key + KEYS - 1 > first + p.after || key + KEYS > length;
}

__device__ bool sees(const Problem &p, int row, int key, int length) {
    return key >= row - p.before && key <= row + p.after && key < length;
}

__device__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Warps that share 16 rows, each with its part of the columns, so that `columns` sums a row fit the registers.
template <class T> constexpr int split_for(int columns) { return std::max(1, columns * (int)sizeof(T) / 512); }

template <class T, int D> struct ForwardShape {
    static constexpr int kRows = 64, kSplit = split_for<T>(D), kThreads = kRows / 16 * kSplit * 32;
    static constexpr int kKeys = (D <= 64 ? 128 : 64) / (int)sizeof(T);
    static constexpr int kBytes = (kRows + 4 * kKeys) * kPitch<T, D> * (int)sizeof(T);
};

// Scores become e^(score - m); o and the sums l of each row follow their running maximum m, in units of log2(e).
template <int N, int COLUMNS>
__device__ void online_softmax(const Problem &p, float (&s)[N / 8][4], float (&o)[COLUMNS / 8][4], float (&m)[2],
                               float (&l)[2], int row, int key, int length, bool masked) {
    const int column = key + threadIdx.x % 4 * 2;
    float highest[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[n][i] *= p.scale * kLog2E;
            if (masked && !sees(p, row + i / 2 * 8, column + n * 8 + i % 2, length))
                s[n][i] = -INFINITY;
            highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        highest[half] = quad_max(highest[half]);
        const float shrink = exp2f(m[half] - highest[half]);
        m[half] = highest[half];
        l[half] *= shrink;
#pragma unroll
        for (int c = 0; c < COLUMNS / 8; ++c)
            o[c][2 * half] *= shrink, o[c][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[n][i] = exp2f(s[n][i] - m[i / 2]);
            l[i / 2] += s[n][i];
        }
}

// budget: 255 registers, 0 shared, 130 KiB dynamic
// claims: HMMA LDSM LDGSTS STG.E.128
template <class T, int D>
__global__ void __launch_bounds__(ForwardShape<T, D>::kThreads)
    attention_forward_kernel(Problem p, View<const T> q, View<const T> k, View<const T> v, View<T> o, float *lse,
                             bool aligned) {
    typedef ForwardShape<T, D> Shape;
    constexpr int M = Shape::kRows, N = Shape::kKeys, kThreads = Shape::kThreads, pitch = kPitch<T, D>;
    constexpr int kColumns = D / Shape::kSplit;
    const Own own = own_block<M>(p, own_slot(p.heads));
    if (own.first >= own.length)
        return;
    const int head = own_head(p.heads), kv_head = head / (p.heads / p.kv_heads);
    LT_DYNAMIC_SHARED(bytes);
    T *q_tile = (T *)bytes, *k_tiles = q_tile + M * pitch, *v_tiles = k_tiles + 2 * N * pitch;
    const T *k_at = k.at(own.token, kv_head), *v_at = v.at(own.token, kv_head);
    const auto load = [&](int key, int stage) {
        load_tile<T, D, N, kThreads>(k_tiles + stage * N * pitch, k_at, k.stride, key, own.length, p.dim, aligned);
        load_tile<T, D, N, kThreads>(v_tiles + stage * N * pitch, v_at, v.stride, key, own.length, p.dim, aligned);
    };

    const Reach<M> keys(own, p.before, p.after);
    const Part<Shape::kSplit, kColumns> part;
    const int row = own.first + part.row + threadIdx.x % 32 / 4;
    float sums[kColumns / 8][4] = {}, m[2] = {kLowest, kLowest}, l[2] = {0, 0};
    load_tile<T, D, M, kThreads>(q_tile, q.at(own.token, head), q.stride, own.first, own.length, p.dim, aligned);
    load(keys.start, 0);
    cp_async_commit();
    for (int key = keys.start, stage = 0; key < keys.end; key += N, stage ^= 1) {
        if (key + N < keys.end)
            load(key + N, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        float s[N / 8][4];
        scores<T, D, N>(q_tile + part.row * pitch, k_tiles + stage * N * pitch, p.dim, s);
        online_softmax<N, kColumns>(p, s, sums, m, l, row, key, own.length,
                                    needs_mask<M, N>(p, own.first, key, own.length));
        accumulate<T, D, N, kColumns>(s, v_tiles + stage * N * pitch + part.column, sums);
        __syncthreads(); // the next turn copies over this stage
    }

    l[0] = quad_sum(l[0]), l[1] = quad_sum(l[1]);
    store_tile<T, D, kColumns>(sums, 1.0f / l[0], 1.0f / l[1], q_tile + part.row * pitch, o.at(own.token, head),
                               o.stride, own.first + part.row, own.length, part.column, p.dim, aligned);
    if (threadIdx.x % 4 == 0 && part.column == 0)
        for (int half = 0; half < 2; ++half)
            if (row + 8 * half < own.length)
                lse[head * p.tokens + own.token + row + 8 * half] = (m[half] + log2f(l[half])) * kLn2;
}

// ---- backward ------------------------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 256, kDeltaLanes = 8; // lanes for one row

// delta [heads, tokens] = sum_d grad * o, what the softmax's gradient takes off every dp of a row.
// budget: 64 registers, 0 shared
// claims: LDG.E.128
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(Problem p, View<const T> grad, View<const T> o, float *delta) {
    constexpr int V = kVector<T>;
    const int64_t item = ((int64_t)blockIdx.x * kDeltaThreads + threadIdx.x) / kDeltaLanes;
    const int64_t token = item / p.heads, head = item % p.heads;
    float sum = 0;
    if (token < p.tokens) {
        const T *a = grad.at(token, head), *b = o.at(token, head);
        for (int d = threadIdx.x % kDeltaLanes * V; d < p.dim; d += kDeltaLanes * V)
            if constexpr (ALIGNED) {
                const auto x = load_vec<V>(a + d), y = load_vec<V>(b + d);
#pragma unroll
                for (int i = 0; i < V; ++i)
                    sum = fmaf(widen(x[i]), widen(y[i]), sum);
            } else // the same elements in the same order, so that the result has the same bits
                for (int i = d; i < min(d + V, p.dim); ++i)
                    sum = fmaf(widen(a[i]), widen(b[i]), sum);
    }
    sum = quad_sum(sum);
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    if (token < p.tokens && threadIdx.x % kDeltaLanes == 0)
        delta[head * p.tokens + token] = sum;
}

// Of dq: kRows queries meet tiles of kOthers keys. Of dk and dv: kRows keys meet tiles of kOthers queries.
template <class T, int D, bool KEYS> struct BackwardShape {
    static constexpr int kRows = D > 128 && (KEYS || sizeof(T) == 4) ? 32 : 64;
    static constexpr int kSplit = split_for<T>(KEYS ? 2 * D : D);
    static constexpr int kThreads = kRows / 16 * kSplit * 32;
    static constexpr int kOthers = 64 / (int)sizeof(T);
    static constexpr int kBlocks = sizeof(T) == 2 && D <= 64 ? (KEYS ? 3 : 4) : 1;  // on a multiprocessor, at least
    static constexpr int kStatistics = KEYS ? 4 * kOthers * (int)sizeof(float) : 0; // lse and delta, two stages
    static constexpr int kBytes = (2 * kRows + 4 * kOthers) * kPitch<T, D> * (int)sizeof(T) + kStatistics;
};

// budget: 255 registers, 0 shared, 132 KiB dynamic
// claims: HMMA LDSM LDGSTS STG.E.128
template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D, false>::kThreads, BackwardShape<T, D, false>::kBlocks)
    attention_query_gradient_kernel(Problem p, View<const T> grad, View<const T> q, View<const T> k, View<const T> v,
                                    View<T> dq, const float *lse, const float *delta, bool aligned) {
    typedef BackwardShape<T, D, false> Shape;
    constexpr int M = Shape::kRows, N = Shape::kOthers, kThreads = Shape::kThreads, pitch = kPitch<T, D>;
    constexpr int kColumns = D / Shape::kSplit;
    const Own own = own_block<M>(p, own_slot(p.heads));
    if (own.first >= own.length)
        return;
    const int head = own_head(p.heads), kv_head = head / (p.heads / p.kv_heads);
    LT_DYNAMIC_SHARED(bytes);
    T *q_tile = (T *)bytes, *grad_tile = q_tile + M * pitch;
    T *k_tiles = grad_tile + M * pitch, *v_tiles = k_tiles + 2 * N * pitch;
    const T *k_at = k.at(own.token, kv_head), *v_at = v.at(own.token, kv_head);
    const auto load = [&](int key, int stage) {
        load_tile<T, D, N, kThreads>(k_tiles + stage * N * pitch, k_at, k.stride, key, own.length, p.dim, aligned);
        load_tile<T, D, N, kThreads>(v_tiles + stage * N * pitch, v_at, v.stride, key, own.length, p.dim, aligned);
    };

    const Reach<M> keys(own, p.before, p.after);
    const Part<Shape::kSplit, kColumns> part;
    const int row = own.first + part.row + threadIdx.x % 32 / 4;
    float lse_2[2], mean[2];
    for (int half = 0; half < 2; ++half) {
        const int64_t at = head * p.tokens + own.token + row + 8 * half;
        lse_2[half] = row + 8 * half < own.length ? lse[at] * kLog2E : 0.0f;
        mean[half] = row + 8 * half < own.length ? delta[at] : 0.0f;
    }
    float sums[kColumns / 8][4] = {};
    load_tile<T, D, M, kThreads>(q_tile, q.at(own.token, head), q.stride, own.first, own.length, p.dim, aligned);
    load_tile<T, D, M, kThreads>(grad_tile, grad.at(own.token, head), grad.stride, own.first, own.length, p.dim,
                                 aligned);
    load(keys.start, 0);
    cp_async_commit();
    for (int key = keys.start, stage = 0; key < keys.end; key += N, stage ^= 1) {
        if (key + N < keys.end)
            load(key + N, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const bool masked = needs_mask<M, N>(p, own.first, key, own.length);
        float s[N / 8][4], dp[N / 8][4];
        scores<T, D, N>(q_tile + part.row * pitch, k_tiles + stage * N * pitch, p.dim, s);
        scores<T, D, N>(grad_tile + part.row * pitch, v_tiles + stage * N * pitch, p.dim, dp);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = key + n * 8 + threadIdx.x % 4 * 2 + i % 2;
                s[n][i] = exp2f(s[n][i] * (p.scale * kLog2E) - lse_2[i / 2]) * (dp[n][i] - mean[i / 2]);
                if (masked && !sees(p, row + i / 2 * 8, column, own.length))
                    s[n][i] = 0;
            }
        accumulate<T, D, N, kColumns>(s, k_tiles + stage * N * pitch + part.column, sums);
        __syncthreads(); // the next turn copies over this stage
    }
    store_tile<T, D, kColumns>(sums, p.scale, p.scale, q_tile + part.row * pitch, dq.at(own.token, head), dq.stride,
                               own.first + part.row, own.length, part.column, p.dim, aligned);
}

// budget: 255 registers, 0 shared, 131 KiB dynamic
// claims: HMMA LDSM LDGSTS STG.E.128
template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D, true>::kThreads, BackwardShape<T, D, true>::kBlocks)
    attention_key_gradient_kernel(Problem p, View<const T> grad, View<const T> q, View<const T> k, View<const T> v,
                                  View<T> dk, View<T> dv, const float *lse, const float *delta, bool aligned) {
    typedef BackwardShape<T, D, true> Shape;
    constexpr int M = Shape::kRows, N = Shape::kOthers, kThreads = Shape::kThreads, pitch = kPitch<T, D>;
    constexpr int kColumns = D / Shape::kSplit;
    const Own own = own_block<M>(p, own_slot(p.kv_heads));
    if (own.first >= own.length)
        return;
    const int kv_head = own_head(p.kv_heads), group = p.heads / p.kv_heads;
    LT_DYNAMIC_SHARED(bytes);
    T *k_tile = (T *)bytes, *v_tile = k_tile + M * pitch;
    T *q_tiles = v_tile + M * pitch, *grad_tiles = q_tiles + 2 * N * pitch;
    float *statistics = (float *)(grad_tiles + 2 * N * pitch); // [stage][lse, delta][N]

    const Reach<M> rows(own, p.after, p.before);
    const int tiles = ceil_div(rows.end - rows.start, N);
    const auto load = [&](int i, int stage) { // tile i % tiles of the group's head i / tiles
        const int head = kv_head * group + i / tiles, row = rows.start + i % tiles * N;
        load_tile<T, D, N, kThreads>(q_tiles + stage * N * pitch, q.at(own.token, head), q.stride, row, own.length,
                                     p.dim, aligned);
        load_tile<T, D, N, kThreads>(grad_tiles + stage * N * pitch, grad.at(own.token, head), grad.stride, row,
                                     own.length, p.dim, aligned);
        if (threadIdx.x < N) {
            const int mine = row + (int)threadIdx.x;
            const int64_t at = head * p.tokens + own.token + mine;
            statistics[stage * 2 * N + threadIdx.x] = mine < own.length ? lse[at] * kLog2E : 0.0f;
            statistics[stage * 2 * N + N + threadIdx.x] = mine < own.length ? delta[at] : 0.0f;
        }
    };

    const Part<Shape::kSplit, kColumns> part;
    const int key = own.first + part.row + threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    float dk_sums[kColumns / 8][4] = {}, dv_sums[kColumns / 8][4] = {};
    load_tile<T, D, M, kThreads>(k_tile, k.at(own.token, kv_head), k.stride, own.first, own.length, p.dim, aligned);
    load_tile<T, D, M, kThreads>(v_tile, v.at(own.token, kv_head), v.stride, own.first, own.length, p.dim, aligned);
    load(0, 0);
    cp_async_commit();
    for (int i = 0; i < group * tiles; ++i) {
        const int stage = i % 2, row = rows.start + i % tiles * N;
        if (i + 1 < group * tiles)
            load(i + 1, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const T *q_tile = q_tiles + stage * N * pitch, *grad_tile = grad_tiles + stage * N * pitch;
        const float *lse_2 = statistics + stage * 2 * N, *mean = lse_2 + N;
        const bool masked = needs_mask<N, M>(p, row, own.first, own.length);
        float s[N / 8][4], dp[N / 8][4]; // transposed: a row is a key's
        scores<T, D, N>(k_tile + part.row * pitch, q_tile, p.dim, s);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = n * 8 + quad * 2 + e % 2;
                s[n][e] = exp2f(s[n][e] * (p.scale * kLog2E) - lse_2[column]);
                if (masked && !sees(p, row + column, key + e / 2 * 8, own.length))
                    s[n][e] = 0;
            }
        accumulate<T, D, N, kColumns>(s, grad_tile + part.column, dv_sums);
        scores<T, D, N>(v_tile + part.row * pitch, grad_tile, p.dim, dp);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s[n][e] *= dp[n][e] - mean[n * 8 + quad * 2 + e % 2];
        accumulate<T, D, N, kColumns>(s, q_tile + part.column, dk_sums);
        __syncthreads(); // the next turn copies over this stage
    }
    store_tile<T, D, kColumns>(dk_sums, p.scale, p.scale, k_tile + part.row * pitch, dk.at(own.token, kv_head),
                               dk.stride, own.first + part.row, own.length, part.column, p.dim, aligned);
    store_tile<T, D, kColumns>(dv_sums, 1.0f, 1.0f, v_tile + part.row * pitch, dv.at(own.token, kv_head), dv.stride,
                               own.first + part.row, own.length, part.column, p.dim, aligned);
}

// ---- launches ------------------------------------------------------------------------------------------------------

// f(std::integral_constant<int, D>): D columns hold a head, zeros beyond head_dim.
template <class F> int with_dim(int dim, F f) {
    if (dim <= 64)
        return f(std::integral_constant<int, 64>{});
    if (dim <= 128)
        return f(std::integral_constant<int, 128>{});
    return f(std::integral_constant<int, 256>{});
}

constexpr int64_t kMostBlocks = 0x7fffffff;

int64_t blocks_for(const Problem &p, int rows, int heads) { return (p.tokens / rows + p.sequences) * heads; }

// False for what no kernel here can take; 32-bit positions need room for a block beyond the last token.
bool fits(const Problem &p) {
    return p.sequences >= 0 && p.dim >= 1 && p.dim <= 256 && p.kv_heads >= 1 && p.heads >= 1 &&
           p.heads % p.kv_heads == 0 && p.tokens >= 0 && p.tokens < 1 << 30 && (p.sequences > 0 || p.tokens == 0) &&
           blocks_for(p, 32, p.heads) <= kMostBlocks && ceil_div(p.tokens * p.heads, 32) <= kMostBlocks;
}

Problem problem(const int32_t *cu_seqlens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                int causal, int64_t window, int64_t tokens) {
    const int before = (int)(window > 0 ? std::min(window - 1, tokens) : tokens);
    return {cu_seqlens, tokens, (int)sequences, (int)heads,         (int)kv_heads,
            (int)dim,   scale,  before,         causal ? 0 : before};
}

template <class T> bool whole_vectors(const void *data, int64_t stride, int64_t head_stride, int64_t dim) {
    return dim % kVector<T> == 0 && aligned16(data, stride * sizeof(T)) && aligned16(data, head_stride * sizeof(T));
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_attention_forward(int dtype, const void *q, int64_t q_stride, int64_t q_head,
                                                const void *k, int64_t k_stride, int64_t k_head, const void *v,
                                                int64_t v_stride, int64_t v_head, void *o, int64_t o_stride,
                                                int64_t o_head, float *lse, const int32_t *cu_seqlens,
                                                int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                                float scale, int causal, int64_t window, int64_t tokens, void *stream) {
    using namespace lt_cuda;
    const Problem p = problem(cu_seqlens, sequences, heads, kv_heads, head_dim, scale, causal, window, tokens);
    if (!fits(p))
        return (int)cudaErrorInvalidValue;
    if (tokens == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const bool aligned =
            whole_vectors<T>(q, q_stride, q_head, head_dim) && whole_vectors<T>(k, k_stride, k_head, head_dim) &&
            whole_vectors<T>(v, v_stride, v_head, head_dim) && whole_vectors<T>(o, o_stride, o_head, head_dim);
        return with_dim(p.dim, [&](auto d) {
            constexpr int D = decltype(d)::value;
            typedef ForwardShape<T, D> Shape;
            return launch(attention_forward_kernel<T, D>, (unsigned)blocks_for(p, Shape::kRows, p.heads),
                          Shape::kThreads, Shape::kBytes, stream, p, View<const T>{(const T *)q, q_stride, q_head},
                          View<const T>{(const T *)k, k_stride, k_head}, View<const T>{(const T *)v, v_stride, v_head},
                          View<T>{(T *)o, o_stride, o_head}, lse, aligned);
        });
    });
}

extern "C" LT_API int lt_cuda_attention_backward(
    int dtype, const void *grad, int64_t grad_stride, int64_t grad_head, const void *q, int64_t q_stride,
    int64_t q_head, const void *k, int64_t k_stride, int64_t k_head, const void *v, int64_t v_stride, int64_t v_head,
    const void *o, int64_t o_stride, int64_t o_head, const float *lse, void *dq, int64_t dq_stride, int64_t dq_head,
    void *dk, int64_t dk_stride, int64_t dk_head, void *dv, int64_t dv_stride, int64_t dv_head,
    const int32_t *cu_seqlens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
    int causal, int64_t window, float *delta, int64_t tokens, void *stream) {
    using namespace lt_cuda;
    const Problem p = problem(cu_seqlens, sequences, heads, kv_heads, head_dim, scale, causal, window, tokens);
    if (!fits(p))
        return (int)cudaErrorInvalidValue;
    if (tokens == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const View<const T> grad_ = {(const T *)grad, grad_stride, grad_head}, o_ = {(const T *)o, o_stride, o_head};
        const View<const T> q_ = {(const T *)q, q_stride, q_head}, k_ = {(const T *)k, k_stride, k_head};
        const View<const T> v_ = {(const T *)v, v_stride, v_head};
        const View<T> dq_ = {(T *)dq, dq_stride, dq_head}, dk_ = {(T *)dk, dk_stride, dk_head};
        const View<T> dv_ = {(T *)dv, dv_stride, dv_head};
        const bool grad_aligned = whole_vectors<T>(grad, grad_stride, grad_head, head_dim);
        const bool aligned =
            grad_aligned && whole_vectors<T>(q, q_stride, q_head, head_dim) &&
            whole_vectors<T>(k, k_stride, k_head, head_dim) && whole_vectors<T>(v, v_stride, v_head, head_dim) &&
            whole_vectors<T>(dq, dq_stride, dq_head, head_dim) && whole_vectors<T>(dk, dk_stride, dk_head, head_dim) &&
            whole_vectors<T>(dv, dv_stride, dv_head, head_dim);
        const bool vectors = grad_aligned && whole_vectors<T>(o, o_stride, o_head, head_dim);
        const auto delta_kernel = vectors ? attention_delta_kernel<T, true> : attention_delta_kernel<T, false>;
        const int64_t blocks = ceil_div(tokens * heads * kDeltaLanes, kDeltaThreads);
        if (int status = launch(delta_kernel, (unsigned)blocks, kDeltaThreads, 0, stream, p, grad_, o_, delta))
            return status;
        return with_dim(p.dim, [&](auto d) {
            constexpr int D = decltype(d)::value;
            typedef BackwardShape<T, D, false> Queries;
            typedef BackwardShape<T, D, true> Keys;
            if (int status =
                    launch(attention_query_gradient_kernel<T, D>, (unsigned)blocks_for(p, Queries::kRows, p.heads),
                           Queries::kThreads, Queries::kBytes, stream, p, grad_, q_, k_, v_, dq_, lse, delta, aligned))
                return status;
            return launch(attention_key_gradient_kernel<T, D>, (unsigned)blocks_for(p, Keys::kRows, p.kv_heads),
                          Keys::kThreads, Keys::kBytes, stream, p, grad_, q_, k_, v_, dk_, dv_, lse, delta, aligned);
        });
    });
}
