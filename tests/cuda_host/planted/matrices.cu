// Tensor-core products of one tile, and conversions: compared with plain ones by the test.
#include "../../../csrc/common/cuda_mma.cuh"

using namespace lt_cuda;

namespace {

template <class T> __device__ void multiply(float d[4], const uint32_t a[4], const uint32_t b[2]);
template <> __device__ void multiply<__nv_bfloat16>(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    mma_bf16_16816(d, a, b);
}
template <> __device__ void multiply<__half>(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    mma_f16_16816(d, a, b);
}

__device__ void add_to(float *out, const float d[4]) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i)
        out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] += d[i];
}

// out [16, 8] += a [16, 16] b [16, 8]; the fragments come from ldmatrix: with TRANSPOSED, a lies as [k, m], b as [n,
// k].
template <class T, bool TRANSPOSED> __global__ void product_kernel(const T *a, const T *b, float *out) {
    LT_SHARED(T[16][24], a_tile);
    LT_SHARED(T[16][24], b_tile);
    const int lane = threadIdx.x, b_columns = TRANSPOSED ? 16 : 8, b_rows = 128 / b_columns;
    cp_async_16(&a_tile[lane / 2][lane % 2 * 8], a + 8 * lane, true);
    const int row = lane * 8 / b_columns;
    if (row < b_rows)
        cp_async_16(&b_tile[row][lane * 8 % b_columns], b + 8 * lane, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t a_fragment[4], b_fragment[2];
    if constexpr (TRANSPOSED) {
        ldmatrix_x4_trans(a_fragment, &a_tile[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
        ldmatrix_x2(b_fragment, &b_tile[lane % 8][lane / 8 % 2 * 8]);
    } else {
        ldmatrix_x4(a_fragment, &a_tile[lane % 16][lane / 16 * 8]);
        ldmatrix_x2_trans(b_fragment, &b_tile[lane % 16][0]);
    }
    float d[4] = {};
    multiply<T>(d, a_fragment, b_fragment);
    add_to(out, d);
}

// out [16, 8] += a [16, 8] b [8, 8] in tf32, the inputs as they are or rounded first.
template <bool ROUNDED> __global__ void product_tf32_kernel(const float *a, const float *b, float *out) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t a_fragment[4], b_fragment[2];
    const auto bits = [](float x) { return __float_as_uint(ROUNDED ? to_tf32(x) : x); };
    for (int r = 0; r < 4; ++r)
        a_fragment[r] = bits(a[(g + r % 2 * 8) * 8 + t + r / 2 * 4]);
    for (int r = 0; r < 2; ++r)
        b_fragment[r] = bits(b[(t + r * 4) * 8 + g]);
    float d[4] = {};
    mma_tf32_1688(d, a_fragment, b_fragment);
    add_to(out, d);
}

// out = the elements rounded to T; cp.async of the invalid half gives zeros.
template <class T> __global__ void convert_kernel(const float *in, T *out, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        narrow(in[i], out + i);
}

__global__ void zero_fill_kernel(const float *in, float *out) {
    LT_SHARED(float[32][4], tile);
    cp_async_16(tile[threadIdx.x], in + 4 * threadIdx.x, threadIdx.x < 16);
    cp_async_commit();
    cp_async_wait<0>();
    store_vec(out + 4 * threadIdx.x, load_vec<4>(tile[threadIdx.x]));
}

} // namespace

extern "C" LT_API int planted_product(int dtype, int transposed, const void *a, const void *b, float *out) {
    const auto run = [&](auto t) {
        using T = decltype(t);
        const auto kernel = transposed ? product_kernel<T, true> : product_kernel<T, false>;
        return launch(kernel, 1, 32, 0, nullptr, (const T *)a, (const T *)b, out);
    };
    return dtype == LT_BF16 ? run(__nv_bfloat16{}) : run(__half{});
}

extern "C" LT_API int planted_product_tf32(int rounded, const float *a, const float *b, float *out) {
    const auto kernel = rounded ? product_tf32_kernel<true> : product_tf32_kernel<false>;
    return launch(kernel, 1, 32, 0, nullptr, a, b, out);
}

extern "C" LT_API int planted_convert(int dtype, const float *in, void *out, int n) {
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        return launch(convert_kernel<T>, 1, 32, 0, nullptr, in, (T *)out, n);
    });
}

extern "C" LT_API int planted_zero_fill(const float *in, float *out) {
    return launch(zero_fill_kernel, 1, 32, 0, nullptr, in, out);
}
