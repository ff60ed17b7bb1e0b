// Stores past the caches, for outputs too large to be found there again: a line that is written whole is then not read
// from memory first, which is a third of the traffic of a copy. Not for memory fresh from the system: that lies in the
// caches already, as the system has just cleared it.
#pragma once

#include "kernel.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kStreamBytes = 8 << 20; // beyond what a core's own caches hold

// Whether an output of so many bytes is worth it. Every store must lie at a multiple of its size.
LT_INLINE bool worth_streaming(const void *p, int64_t bytes) {
#if defined(__SSE2__)
    return (uintptr_t)p % 64 == 0 && bytes >= kStreamBytes;
#else
    (void)p;
    return bytes < 0;
#endif
}

// `v`, a vector of 16, 32 or 64 bytes.
template <bool STREAM, class V> LT_INLINE void put(void *p, V v) {
    if constexpr (!STREAM) {
        memcpy(p, &v, sizeof v);
#if defined(__AVX512F__)
    } else if constexpr (sizeof v == 64) {
        _mm512_stream_si512((__m512i *)p, (__m512i)v);
#endif
#if defined(__AVX2__)
    } else if constexpr (sizeof v == 32) {
        _mm256_stream_si256((__m256i *)p, (__m256i)v);
#endif
#if defined(__SSE2__)
    } else if constexpr (sizeof v == 16) {
        _mm_stream_si128((__m128i *)p, (__m128i)v);
#endif
    } else {
        memcpy(p, &v, sizeof v);
    }
}

// Before other threads may read what was streamed.
template <bool STREAM> LT_INLINE void streamed() {
#if defined(__SSE2__)
    if constexpr (STREAM)
        _mm_sfence();
#endif
}

} // namespace
} // namespace LT_ISA
} // namespace lt
