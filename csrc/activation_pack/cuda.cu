// What is kept for the backward pass, in bf16 and back, on CUDA. (In 8 bits: int8_quantise and int8_dequantise.)
#include "../common/cuda_kernel.cuh"

namespace lt_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;         // of bf16 in 16 bytes
constexpr int64_t kMaxGrid = 1 << 20; // blocks take more than one piece beyond

// A block has a piece of blockDim.x * N columns of a row.
// budget: 40 registers, 0 shared
// claims: LDG.E.128 STG.E.128
template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads)
    activation_pack_convert_kernel(const T *x, int64_t x_stride, U *y, int64_t y_stride, int64_t rows, int64_t cols) {
    const int64_t width = (int64_t)blockDim.x * N, across = ceil_div(cols, width);
    for (int64_t piece = blockIdx.x; piece < rows * across; piece += gridDim.x) {
        const int64_t row = piece / across, i = piece % across * width + (int64_t)threadIdx.x * N;
        if (i >= cols)
            continue;
        const Vec<T, N> v = load_vec<N>(x + row * x_stride + i);
        Vec<U, N> converted;
#pragma unroll
        for (int k = 0; k < N; ++k)
            narrow(widen(v[k]), &converted[k]);
        store_vec(y + row * y_stride + i, converted);
    }
}

template <class T, class U>
int convert(const T *x, int64_t x_stride, U *y, int64_t y_stride, int64_t rows, int64_t cols, void *stream) {
    if (rows == 0 || cols == 0)
        return 0;
    const bool aligned = cols % kPerThread == 0 && aligned16(x, x_stride * (int64_t)sizeof(T)) &&
                         aligned16(y, y_stride * (int64_t)sizeof(U));
    const int64_t vectors = aligned ? cols / kPerThread : cols;
    const unsigned threads = (unsigned)std::clamp<int64_t>(ceil_div(vectors, (int64_t)32) * 32, 32, kThreads);
    const int64_t pieces = rows * ceil_div(vectors, (int64_t)threads);
    return launch(aligned ? activation_pack_convert_kernel<T, U, kPerThread> : activation_pack_convert_kernel<T, U, 1>,
                  (unsigned)std::min(pieces, kMaxGrid), threads, 0, stream, x, x_stride, y, y_stride, rows, cols);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_pack_bf16(int dtype, const void *x, int64_t x_stride, void *packed, int64_t rows,
                                        int64_t cols, void *stream) {
    using namespace lt_cuda;
    return with_dtype(dtype, [&](auto t) {
        return convert((const decltype(t) *)x, x_stride, (__nv_bfloat16 *)packed, cols, rows, cols, stream);
    });
}

extern "C" LT_API int lt_cuda_unpack_bf16(const void *packed, int dtype, void *out, int64_t out_stride, int64_t rows,
                                          int64_t cols, void *stream) {
    using namespace lt_cuda;
    return with_dtype(dtype, [&](auto t) {
        return convert((const __nv_bfloat16 *)packed, cols, (decltype(t) *)out, out_stride, rows, cols, stream);
    });
}
