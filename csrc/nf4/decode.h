// NF4 codes to values: each block of 64 has a table of 16 values (code book times absmax), looked up by permutation.
#pragma once

#include "code_book.h"
#include "dynamic_map.h"
#include "stream.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kBlock = 64;      // weights that share an absolute maximum
constexpr int64_t kBlockBytes = 32; // of their codes
constexpr int64_t kGroup = 256;     // blocks whose absolute maxima share a scale
constexpr float kCodeBook[16] = {LT_NF4_CODE_BOOK};
constexpr float kDynamicMap[256] = {LT_DYNAMIC_MAP};

// Absolute maxima as they are stored: `values`, or where that is null 8-bit `codes` with scales and an offset.
struct absmax_list {
    const float *values;
    const uint8_t *codes;
    const float *scales, *offset;
};

// The product of two floats is exact in double, so that the sum is rounded alike with and without a fused instruction.
LT_INLINE float absmax_at(const absmax_list &a, int64_t block) {
    if (a.values)
        return a.values[block];
    return (float)((double)kDynamicMap[a.codes[block]] * (double)a.scales[block / kGroup] + (double)*a.offset);
}

typedef uint8_t vb_half __attribute__((vector_size(LT_W / 2)));
typedef uint64_t vq __attribute__((vector_size(4 * LT_W)));

// As widen_bytes of a whole vector.
LT_INLINE vq widen_bytes(vb_half bytes) {
#if defined(__AVX512F__)
    return (vq)_mm512_cvtepu8_epi64(_mm_set_epi64x(0, (int64_t)bytes));
#elif defined(__AVX2__)
    return (vq)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int)bytes));
#else
    return __builtin_convertvector(bytes, vq);
#endif
}

struct value_table {
    vf part[16 / LT_W];
};

LT_INLINE value_table scaled_code_book(float absmax) {
    value_table table;
    for (int i = 0; i < 16 / W; ++i)
        table.part[i] = load(kCodeBook + i * W) * absmax;
    return table;
}

// The values of W codes; only the low four bits of each lane of `code` count.
LT_INLINE vf look_up(const value_table &table, vu code) {
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)table.part[0]);
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps((__m256)table.part[0], (__m256i)code);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)table.part[1], (__m256i)code);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
    float values[16];
    memcpy(values, &table, sizeof values);
    vf v;
    for (int i = 0; i < W; ++i)
        v[i] = values[code[i] & 15];
    return v;
#endif
}

// The next 2 W weights of `codes` (W bytes): those at even places, which are in the high halves, and those at odd ones.
LT_INLINE void decode_pairs(const uint8_t *codes, const value_table &table, vf *even, vf *odd) {
    vb bytes;
    memcpy(&bytes, codes, sizeof bytes);
    const vu code = widen_bytes(bytes);
    *even = look_up(table, code >> 4);
    *odd = look_up(table, code);
}

// A block of 64 weights, in order.
template <bool STREAM> LT_INLINE void decode_block(const uint8_t *codes, float absmax, float *out) {
    const value_table table = scaled_code_book(absmax);
    for (int64_t i = 0; i < kBlock; i += W) {
        vb_half bytes;
        memcpy(&bytes, codes + i / 2, sizeof bytes);
        const vq wide = widen_bytes(bytes); // two lanes of 32 bits a byte, the first for its high half
        put<STREAM>(out + i, look_up(table, (vu)(wide >> 4 | wide << 32)));
    }
}

// The same in 16 bits: the table is rounded once, then its entries are moved, not computed.
template <bool STREAM, class T> LT_INLINE void decode_block(const uint8_t *codes, float absmax, T *out) {
    T table[16];
    for (int64_t i = 0; i < 16; i += W)
        store(table + i, load(kCodeBook + i) * absmax);
#if defined(__AVX512BW__)
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    for (int64_t i = 0; i < kBlock; i += 32) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        const __m512i code = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        put<STREAM>(out + i, _mm512_permutexvar_epi16(code, values));
    }
#elif defined(__AVX2__)
    const __m128i bytes_together = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i first = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), bytes_together);
    const __m128i second = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(table + 8)), bytes_together);
    const __m128i low_bytes = _mm_unpacklo_epi64(first, second), high_bytes = _mm_unpackhi_epi64(first, second);
    const __m128i low_half = _mm_set1_epi8(15);
    for (int64_t i = 0; i < kBlock; i += 32) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i / 2));
        const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half), odd = _mm_and_si128(bytes, low_half);
        const __m128i code[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int j = 0; j < 2; ++j) {
            const __m128i low = _mm_shuffle_epi8(low_bytes, code[j]), high = _mm_shuffle_epi8(high_bytes, code[j]);
            put<STREAM>(out + i + 16 * j, _mm_unpacklo_epi8(low, high));
            put<STREAM>(out + i + 16 * j + 8, _mm_unpackhi_epi8(low, high));
        }
    }
#else
    for (int64_t i = 0; i < kBlock / 2; ++i) {
        out[2 * i] = table[codes[i] >> 4];
        out[2 * i + 1] = table[codes[i] & 15];
    }
#endif
}

} // namespace
} // namespace LT_ISA
} // namespace lt
