// Dropout by a counter-based generator: whether element i is kept is a function of (seed, offset + i) alone, so that
// the backward pass makes the mask again instead of storing it. Philox4x32-10: Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kCounters = 64; // generated together; plain loops over them, which the compiler turns into vectors
constexpr int64_t kWords = 4 * kCounters;
constexpr int64_t kElementsPerChunk = 64 * kWords;

// words[4 k + j] = word j of Philox4x32-10 at counter `first` + k under key `seed`.
void philox(uint64_t first, uint64_t seed, uint32_t *words) {
    uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    for (int64_t k = 0; k < kCounters; ++k) {
        const uint64_t counter = first + (uint64_t)k;
        c0[k] = (uint32_t)counter;
        c1[k] = (uint32_t)(counter >> 32);
        c2[k] = c3[k] = 0;
    }
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int64_t k = 0; k < kCounters; ++k) {
            const uint64_t a = (uint64_t)c0[k] * 0xD2511F53u, b = (uint64_t)c2[k] * 0xCD9E8D57u;
            c0[k] = (uint32_t)(b >> 32) ^ c1[k] ^ key0;
            c1[k] = (uint32_t)b;
            c2[k] = (uint32_t)(a >> 32) ^ c3[k] ^ key1;
            c3[k] = (uint32_t)a;
        }
        key0 += 0x9E3779B9u; // the golden ratio and sqrt(3) - 1, as fractions of 2^32
        key1 += 0xBB67AE85u;
    }
    for (int64_t k = 0; k < kCounters; ++k) {
        words[4 * k] = c0[k];
        words[4 * k + 1] = c1[k];
        words[4 * k + 2] = c2[k];
        words[4 * k + 3] = c3[k];
    }
}

// A multiplication by 0 rather than a selection: NaN and infinity stay visible, as they do in PyTorch.
template <class T> void apply(const T *x, const uint32_t *words, uint32_t threshold, float scale, T *y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
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
                philox(element / 4, seed, words);
                apply(x + begin, words + skip, threshold, scale, y + begin, n);
                begin += n;
            }
        });
        return (int)LT_OK;
    });
}
