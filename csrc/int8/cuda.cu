// Row-wise 8-bit integers on CUDA: a block quantises a row in two passes, of which the cache serves the second; a
// thread dequantises 16 codes at a time; few rows are multiplied with the codes themselves.
#include "../common/cuda_quantised.cuh"

namespace lt_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;               // codes in 16 bytes
constexpr int64_t kMaxGrid = 1 << 20;        // blocks take more than one row, or tile, beyond
constexpr float kSmallest = 1.50463277e-36f; // 2^-119: below it absmax / 127 is subnormal

// |x|, infinite for what is not finite, so that a maximum keeps it.
__device__ float magnitude(float x) { return fabsf(x) <= 3.402823466e38f ? fabsf(x) : INFINITY; }

// budget: 48 registers, 32 bytes shared
// claims: LDG.E.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    int8_quantise_kernel(const T *x, int64_t x_stride, int8_t *codes, float *scales, int64_t rows, int64_t cols) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x_row = x + row * x_stride;
        float largest = 0;
        for (int64_t i = (int64_t)threadIdx.x * N; i < cols; i += (int64_t)blockDim.x * N) {
            const Vec<T, N> v = load_vec<N>(x_row + i);
#pragma unroll
            for (int k = 0; k < N; ++k)
                largest = fmaxf(largest, magnitude(widen(v[k])));
        }
        largest = block_max<kThreads>(largest);
        const bool usable = largest >= kSmallest && largest < INFINITY;
        if (threadIdx.x == 0)
            scales[row] = usable ? __fdiv_rn(largest, 127.0f) : largest < INFINITY ? 0.0f : NAN;
        const float inverse = usable ? __fdiv_rn(127.0f, largest) : 0.0f;
        for (int64_t i = (int64_t)threadIdx.x * N; i < cols; i += (int64_t)blockDim.x * N) {
            const Vec<T, N> v = load_vec<N>(x_row + i);
            Vec<int8_t, N> packed;
#pragma unroll
            for (int k = 0; k < N; ++k)
                packed[k] = (int8_t)(usable ? __float2int_rn(widen(v[k]) * inverse) : 0);
            store_vec(codes + row * cols + i, packed);
        }
    }
}

// A block has a piece of blockDim.x * N columns of a row.
// budget: 40 registers, 0 shared
// claims: LDG.E.128 STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(kThreads) int8_dequantise_kernel(const int8_t *codes, const float *scales, T *out,
                                                                   int64_t out_stride, int64_t rows, int64_t cols) {
    const int64_t width = (int64_t)blockDim.x * N, across = ceil_div(cols, width);
    for (int64_t piece = blockIdx.x; piece < rows * across; piece += gridDim.x) {
        const int64_t row = piece / across, i = piece % across * width + (int64_t)threadIdx.x * N;
        if (i >= cols)
            continue;
        const Vec<int8_t, N> v = load_vec<N>(codes + row * cols + i);
        const float scale = scales[row];
        Vec<T, N> values;
#pragma unroll
        for (int k = 0; k < N; ++k)
            narrow((float)v[k] * scale, &values[k]);
        store_vec(out + row * out_stride + i, values);
    }
}

struct Int8 {
    static constexpr int kPerLane = kPerThread;
    struct Chunk {
        Vec<uint32_t, 4> codes;
        float scale;
    };
    const int8_t *codes;
    const float *scales;
    bool aligned;

    __device__ const float *prepare() const { return nullptr; }
    __device__ Chunk load(int64_t row, int64_t column, int64_t inputs) const {
        if (column >= inputs)
            return {};
        return {load_codes(codes + row * inputs + column, aligned, inputs - column), scales[row]};
    }
    __device__ float value(const float *, const Chunk &chunk, int i) const {
        return (float)(int8_t)(chunk.codes[i / 4] >> 8 * (i % 4));
    }
};

// budget: 112 registers, 8.25 KiB shared
// claims: LDG.E.128 LDS.128
template <class T, int TOKENS>
__global__ void __launch_bounds__(kLinearThreads)
    int8_linear_kernel(Int8 weight, const T *x, int64_t x_stride, const T *bias, T *y, int64_t y_stride, int64_t tokens,
                       int64_t inputs, int64_t outputs) {
    linear_tile<Int8, T, TOKENS>(weight, x, x_stride, bias, y, y_stride, tokens, inputs, outputs);
}

// A thread for each vector of the row, in whole warps, up to kThreads.
unsigned threads_for(int64_t vectors) {
    return (unsigned)std::clamp<int64_t>(ceil_div(vectors, (int64_t)32) * 32, 32, kThreads);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_int8_quantise(int dtype, const void *x, int64_t x_stride, int8_t *codes, float *scales,
                                            int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (rows == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        constexpr int N = kVector<T>;
        const bool aligned = cols % N == 0 && aligned16(x, x_stride * (int64_t)sizeof(T)) && (uintptr_t)codes % N == 0;
        return launch(aligned ? int8_quantise_kernel<T, N> : int8_quantise_kernel<T, 1>,
                      (unsigned)std::min(rows, kMaxGrid), threads_for(aligned ? cols / N : cols), 0, stream,
                      (const T *)x, x_stride, codes, scales, rows, cols);
    });
}

extern "C" LT_API int lt_cuda_int8_dequantise(const int8_t *codes, const float *scales, int dtype, void *out,
                                              int64_t out_stride, int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (rows == 0 || cols == 0)
        return 0;
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const bool aligned =
            cols % kPerThread == 0 && aligned16(codes, cols) && aligned16(out, out_stride * (int64_t)sizeof(T));
        const int64_t vectors = aligned ? cols / kPerThread : cols;
        const unsigned threads = threads_for(vectors);
        const int64_t pieces = rows * ceil_div(vectors, (int64_t)threads);
        return launch(aligned ? int8_dequantise_kernel<T, kPerThread> : int8_dequantise_kernel<T, 1>,
                      (unsigned)std::min(pieces, kMaxGrid), threads, 0, stream, codes, scales, (T *)out, out_stride,
                      rows, cols);
    });
}

extern "C" LT_API int lt_cuda_int8_linear(int dtype, const void *x, int64_t x_stride, const int8_t *codes,
                                          const float *scales, const void *bias, void *y, int64_t y_stride,
                                          int64_t rows, int64_t inputs, int64_t outputs, void *stream) {
    using namespace lt_cuda;
    if (rows == 0 || outputs == 0)
        return 0;
    const Int8 weight = {codes, scales, aligned16(codes, inputs)};
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        return launch_linear(rows, outputs, [&](auto tokens, dim3 grid) {
            return launch(int8_linear_kernel<T, decltype(tokens)::value>, grid, kLinearThreads, 0, stream, weight,
                          (const T *)x, x_stride, (const T *)bias, (T *)y, y_stride, rows, inputs, outputs);
        });
    });
}
