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

// Group g of kVector<T> elements starts at g * kVector<T> - skip. WHOLE: groups lie at multiples of 16 bytes.
// budget: 40 registers, 0 bytes shared
template <class T, bool WHOLE>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const T *x, T *y, int64_t size, int64_t groups, Mask mask) {
    constexpr int kElements = kVector<T>;
    for (int64_t group = (int64_t)blockIdx.x * kThreads + threadIdx.x; group < groups;
         group += (int64_t)gridDim.x * kThreads) {
        uint32_t words[kElements];
#pragma unroll
        for (int c = 0; c < kElements / 4; ++c)
            philox(mask.first_counter + (uint64_t)group * (kElements / 4) + c, 0, 0, mask.seed, words + 4 * c);
        const int64_t begin = group * kElements - mask.skip;
        if (WHOLE && begin + kElements <= size) {
            Vec<T, kElements> v = load_vec<kElements>(x + begin);
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                narrow(masked(widen(v[i]), words[i], mask), &v[i]);
            store_vec(y + begin, v);
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                if (begin + i >= 0 && begin + i < size)
                    narrow(masked(widen(x[begin + i]), words[i], mask), y + begin + i);
        }
    }
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_dropout(int dtype, const void *x, void *y, int64_t size, uint64_t seed, uint64_t offset,
                                      uint32_t threshold, float scale, void *stream) {
    using namespace lt_cuda;
    if (size == 0)
        return 0;
    const Mask mask = {offset / 4, seed, (int)(offset % 4), threshold, scale};
    return with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const int64_t groups = ceil_div(size + mask.skip, (int64_t)kVector<T>);
        const dim3 grid((unsigned)std::min(ceil_div(groups, (int64_t)kThreads), kMaxGrid)), block(kThreads);
        const bool whole = mask.skip == 0 && aligned16(x, 0) && aligned16(y, 0);
        return launch(whole ? dropout_kernel<T, true> : dropout_kernel<T, false>, grid, block, 0, stream, (const T *)x,
                      (T *)y, size, groups, mask);
    });
}
