// Dropout by a counter-based generator: whether element i is kept is a function of (seed, offset + i) alone, so that
// the backward pass makes the mask again instead of storing it. Philox4x32-10: Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#include "kernel.h"
#include "philox.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kCounters = 64; // generated together
constexpr int64_t kWords = 4 * kCounters;
constexpr int64_t kElementsPerChunk = 64 * kWords;

// A multiplication by 0 rather than a selection: NaN and infinity stay visible, as they do in PyTorch.
template <class T> void apply(const T *x, const uint32_t *words, uint32_t threshold, float scale, T *y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(x + i);
        prefetch(y + i);
        vu w;
        memcpy(&w, words + i, sizeof w);
        store(y + i, load(x + i) * select((vi)(w >= threshold), splat(scale), vf{}));
    }
    for (; i < n; ++i)
        narrow(widen(x[i]) * (words[i] >= threshold ? scale : 0.0f), y + i);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(dropout,
          (int dtype, const void *x_, void *y_, int64_t size, uint64_t seed, uint64_t offset, uint32_t threshold,
           float scale),
          (dtype, x_, y_, size, seed, offset, threshold, scale)) {
    using namespace lt::LT_ISA;
    return with_dtype(dtype, "x", [&](auto t) {
        typedef decltype(t) T;
        const T *x = static_cast<const T *>(x_);
        T *y = static_cast<T *>(y_);
        parallel_for(size, kElementsPerChunk, [&](int64_t begin, int64_t end, int) {
            uint32_t words[kWords];
            while (begin < end) {
                const uint64_t element = offset + (uint64_t)begin;
                const int64_t skip = (int64_t)(element % 4);
                const int64_t n = end - begin < kWords - skip ? end - begin : kWords - skip;
                philox_run<kCounters>(element / 4, 0, 0, seed, words);
                apply(x + begin, words + skip, threshold, scale, y + begin, n);
                begin += n;
            }
        });
        return (int)LT_OK;
    });
}
