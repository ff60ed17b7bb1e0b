// Philox4x32-10, the counter-based generator behind every random number: Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011. A counter of four 32-bit words and a key of two give four words, the
// same on every machine. The counter's first two words are a 64-bit number that counts through the elements, the other
// two are the caller's: (0, 0) for dropout, (tensor, step) for stochastic rounding.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(LT_CUDA_HOST)
#define LT_PHILOX __host__ __device__ inline
#define LT_PHILOX_NAMESPACE lt_cuda
#else
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#define LT_PHILOX static inline __attribute__((always_inline))
#define LT_PHILOX_NAMESPACE lt::LT_ISA
#endif

namespace LT_PHILOX_NAMESPACE {

constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u; // the golden ratio and sqrt(3) - 1, as fractions of 2^32
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;

LT_PHILOX void philox_round(uint32_t &c0, uint32_t &c1, uint32_t &c2, uint32_t &c3, uint32_t key0, uint32_t key1) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)a;
}

// words[0..3] at (counter, third, fourth) under key `seed`.
LT_PHILOX void philox(uint64_t counter, uint32_t third, uint32_t fourth, uint64_t seed, uint32_t *words) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = third, c3 = fourth;
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        philox_round(c0, c1, c2, c3, key0, key1);
        key0 += kPhiloxKeyStep0;
        key1 += kPhiloxKeyStep1;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

#if !defined(__CUDACC__) && !defined(LT_CUDA_HOST)

// One word to a lane of 64 bits; what lies in the upper halves is ignored, and so never cleared.
typedef uint64_t philox_lanes __attribute__((vector_size(4 * LT_W)));

LT_PHILOX philox_lanes philox_product(philox_lanes x, uint32_t factor) {
    const philox_lanes y = philox_lanes{} + factor;
#if defined(__AVX512F__)
    return (philox_lanes)_mm512_mul_epu32((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (philox_lanes)_mm256_mul_epu32((__m256i)x, (__m256i)y);
#else
    return (x & 0xffffffffu) * y;
#endif
}

// words[4 k + j] = word j at counter `first` + k, for COUNTERS counters (a multiple of eight).
template <int COUNTERS>
LT_PHILOX void philox_run(uint64_t first, uint32_t third, uint32_t fourth, uint64_t seed, uint32_t *words) {
    constexpr int kLanes = LT_W / 2;
    for (int k = 0; k < COUNTERS; k += kLanes) {
        philox_lanes c0, c1, c2 = philox_lanes{} + third, c3 = philox_lanes{} + fourth;
        for (int lane = 0; lane < kLanes; ++lane)
            c0[lane] = first + (uint64_t)(k + lane);
        c1 = c0 >> 32;
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const philox_lanes a = philox_product(c0, 0xD2511F53u), b = philox_product(c2, 0xCD9E8D57u);
            c0 = (b >> 32) ^ c1 ^ (philox_lanes{} + key0);
            c1 = b;
            c2 = (a >> 32) ^ c3 ^ (philox_lanes{} + key1);
            c3 = a;
            key0 += kPhiloxKeyStep0;
            key1 += kPhiloxKeyStep1;
        }
        const philox_lanes front = (c0 & 0xffffffffu) | c1 << 32, back = (c2 & 0xffffffffu) | c3 << 32;
        uint64_t pairs[2 * kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            pairs[2 * lane] = front[lane];
            pairs[2 * lane + 1] = back[lane];
        }
        memcpy(words + 4 * k, pairs, sizeof pairs);
    }
}

#endif

} // namespace LT_PHILOX_NAMESPACE
