// Rotary embedding on CUDA, in place: a block brings the angles of a few tokens to shared memory, once, and turns all
// heads of q and k of these tokens with them.
#include "../common/cuda_kernel.cuh"

namespace lt_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPairs = 512; // angles that a block has at a time
constexpr int kTokens = 32; // tokens of a block, at most
constexpr int64_t kMaxGrid = 0x7fffffff;

template <class T> struct Heads {
    T *data;
    int64_t token_stride, head_stride;
    int count;
};

struct Angles {
    const float *cos, *sin; // [rows, half]
    int64_t rows;
    const int64_t *positions;
    float sign;
};

template <class T> __device__ void turn_pair(T &first, T &second, float cos, float sin) {
    const float a = widen(first), b = widen(second);
    narrow(a * cos - b * sin, &first);
    narrow(b * cos + a * sin, &second);
}

// N pairs of a head, where the first members and the second ones lie apart.
template <int N, class T> __device__ void turn_apart(T *first, T *second, const float *cos, const float *sin) {
    Vec<T, N> a = load_vec<N>((const T *)first), b = load_vec<N>((const T *)second);
#pragma unroll
    for (int i = 0; i < N; ++i)
        turn_pair(a[i], b[i], cos[i], sin[i]);
    store_vec(first, a);
    store_vec(second, b);
}

// N pairs of a head, one after the other in 16 bytes.
template <int N, class T> __device__ void turn_neighbours(T *x, const float *cos, const float *sin) {
    Vec<T, 2 * N> v = load_vec<2 * N>((const T *)x);
#pragma unroll
    for (int i = 0; i < N; ++i)
        turn_pair(v[2 * i], v[2 * i + 1], cos[i], sin[i]);
    store_vec(x, v);
}

// A block takes `tile` tokens at a time, and of a very wide head kPairs pairs at a time.
// budget: 48 registers, 4352 bytes shared
// claims: LDG.128 STG.128
template <class T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(Heads<T> q, Heads<T> k, Angles angles, int64_t tokens, int64_t half, int tile) {
    LT_SHARED(float[kPairs], cos);
    LT_SHARED(float[kPairs], sin);
    LT_SHARED(int64_t[kTokens], position);
    const int heads = q.count + k.count;
    for (int64_t begin = (int64_t)blockIdx.x * tile; begin < tokens; begin += (int64_t)gridDim.x * tile) {
        const int here = (int)(tokens - begin < tile ? tokens - begin : tile);
        for (int64_t first = 0; first < half; first += kPairs) {
            const int pairs = (int)(half - first < kPairs ? half - first : kPairs), vectors = pairs / N;
            __syncthreads(); // the last angles have been used
            if ((int)threadIdx.x < here)
                position[threadIdx.x] = angles.positions[begin + threadIdx.x];
            __syncthreads();
            for (int i = threadIdx.x; i < here * pairs; i += kThreads) {
                const int64_t p = position[i / pairs], at = p * half + first + i % pairs;
                const bool known = p >= 0 && p < angles.rows;
                cos[i] = known ? angles.cos[at] : __uint_as_float(0x7fc00000u); // NaN
                sin[i] = known ? angles.sin[at] * angles.sign : __uint_as_float(0x7fc00000u);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < here * heads * vectors; i += kThreads) {
                const int pair = i % vectors * N, rest = i / vectors, head = rest % heads, token = rest / heads;
                T *x = head < q.count ? q.data + (begin + token) * q.token_stride + head * q.head_stride
                                      : k.data + (begin + token) * k.token_stride + (head - q.count) * k.head_stride;
                const float *c = cos + token * pairs + pair, *s = sin + token * pairs + pair;
                if constexpr (!INTERLEAVED)
                    turn_apart<N>(x + first + pair, x + half + first + pair, c, s);
                else if constexpr (N == 1) // a lone pair need not be aligned to its size
                    turn_apart<1>(x + 2 * (first + pair), x + 2 * (first + pair) + 1, c, s);
                else
                    turn_neighbours<N>(x + 2 * (first + pair), c, s);
            }
        }
    }
}

template <class T> bool aligned(const Heads<T> &x) {
    return x.count == 0 ||
           (aligned16(x.data, x.token_stride * sizeof(T)) && aligned16(x.data, x.head_stride * sizeof(T)));
}

template <class T>
int rope(Heads<T> q, Heads<T> k, Angles angles, int64_t tokens, int64_t half, bool interleaved, void *stream) {
    const int64_t fitting = kPairs / half, tile = fitting < 1 ? 1 : fitting < kTokens ? fitting : kTokens;
    const dim3 grid((unsigned)std::min(ceil_div(tokens, tile), kMaxGrid)), block(kThreads);
    constexpr int kMany = kVector<T>;
    const bool whole = aligned(q) && aligned(k) && half % (interleaved ? kMany / 2 : kMany) == 0;
    auto with = [&](auto kernel) {
        return launch(kernel, grid, block, 0, stream, q, k, angles, tokens, half, (int)tile);
    };
    if (interleaved)
        return whole ? with(rope_kernel<T, kMany / 2, true>) : with(rope_kernel<T, 1, true>);
    return whole ? with(rope_kernel<T, kMany, false>) : with(rope_kernel<T, 1, false>);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_rope(int dtype, void *q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads,
                                   void *k, int64_t k_token_stride, int64_t k_head_stride, int64_t k_heads,
                                   const float *cos, const float *sin, int64_t table_rows, const int64_t *positions,
                                   int64_t tokens, int64_t half, int interleaved, int inverse, void *stream) {
    using namespace lt_cuda;
    if (tokens == 0 || half == 0 || q_heads + k_heads == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        return rope<T>({(T *)q, q_token_stride, q_head_stride, (int)q_heads},
                       {(T *)k, k_token_stride, k_head_stride, (int)k_heads},
                       {cos, sin, table_rows, positions, inverse ? -1.0f : 1.0f}, tokens, half, interleaved != 0,
                       stream);
    });
}
