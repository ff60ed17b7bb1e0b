// Dropout on CUDA: each thread makes the random words of 16 bytes of elements, and keeps or drops them.
#include "../common/cuda_kernel.cuh"
#include "../common/philox.h"

namespace lt_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 1 << 20;

struct Mask {
    uint64_t first_counter, seed;
    int skip; // words of the first counter that belong to elements before x
    uint32_t threshold;
    float scale;
};

// A multiplication by 0 rather than a selection: NaN and infinity stay visible, as they do in PyTorch.
__device__ inline float masked(float x, uint32_t word, const Mask &mask) {
    return x * (word >= mask.threshold ? mask.scale : 0.0f);
}

// Group g of kVector<T> elements starts at g * kVector<T> - skip. WHOLE: each group is within x, at a multiple of 16
// bytes.
// budget: 40 registers, 0 bytes shared
// claims: LDG.128 STG.128
template <class T, bool WHOLE>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const T *x, T *y, int64_t size, int64_t groups, Mask mask) {
    constexpr int kElements = kVector<T>;
    for (int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x; group < groups;
         group += (int64_t)gridDim.x * kThreads) {
        uint32_t words[kElements];
#pragma unroll
        for (int c = 0; c < kElements / 4; ++c)
            philox(mask.first_counter + (uint64_t)group * (kElements / 4) + c, 0, 0, mask.seed, words + 4 * c);
        const int64_t begin = WHOLE ? group * kElements : group * kElements - mask.skip;
        if constexpr (WHOLE) {
            const Vec<T, kElements> v = load_vec<kElements>(x + begin);
            Vec<T, kElements> result;
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                narrow(masked(widen(v[i]), words[i], mask), &result[i]);
            store_vec(y + begin, result);
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                if (begin + i >= 0 && begin + i < size)
                    narrow(masked(widen(x[begin + i]), words[i], mask), y + begin + i);
        }
    }
}

template <class T, bool WHOLE> int dropout(const T *x, T *y, int64_t size, Mask mask, void *stream) {
    const int64_t groups = ceil_div(size + mask.skip, (int64_t)kVector<T>);
    const dim3 grid((unsigned)std::min(ceil_div(groups, (int64_t)kThreads), kMaxGrid)), block(kThreads);
    return size ? launch(dropout_kernel<T, WHOLE>, grid, block, 0, stream, x, y, size, groups, mask) : 0;
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_dropout(int dtype, const void *x, void *y, int64_t size, uint64_t seed, uint64_t offset,
                                      uint32_t threshold, float scale, void *stream) {
    using namespace lt_cuda;
    Mask mask = {offset / 4, seed, (int)(offset % 4), threshold, scale};
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const bool aligned = mask.skip == 0 && aligned16(x, 0) && aligned16(y, 0);
        const int64_t whole = aligned ? size / kVector<T> * kVector<T> : 0;
        const int status = dropout<T, true>((const T *)x, (T *)y, whole, mask, stream);
        mask.first_counter += (uint64_t)whole / 4;
        return status ? status : dropout<T, false>((const T *)x + whole, (T *)y + whole, size - whole, mask, stream);
    });
}
