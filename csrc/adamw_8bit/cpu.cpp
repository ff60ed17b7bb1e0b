// AdamW with 8-bit moments: a block of 256 elements is widened, updated and quantised again while it is in the cache,
// 16 bytes a parameter in fp32, 10 in bf16. Dettmers et al. 2022, arXiv:2110.02861.
#include "../adamw/update.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int kBlock = LT_CODE_BLOCK;

struct code_tables {
    const float *book_m, *book_v;
    const int32_t *cells_m, *cells_v;
};

LT_INLINE code_tables tables_at(const void *tables) {
    const float *books = static_cast<const float *>(tables);
    const int32_t *cells = static_cast<const int32_t *>(tables) + 2 * 256;
    return {books, books + 256, cells, cells + LT_CELLS};
}

LT_INLINE void decode(const uint8_t *codes, const float *book, float absmax, int n, float *x) {
    for (int i = 0; i < n; ++i)
        x[i] = book[codes[i]] * absmax;
}

// Magnitudes are compared by their bits, where NaN is above infinity: neither is lost.
LT_INLINE float largest_magnitude(const float *x, int n) {
    int32_t bits[kBlock], best = 0;
    memcpy(bits, x, (size_t)n * 4);
    for (int i = 0; i < n; ++i) {
        const int32_t magnitude = bits[i] & 0x7fffffff;
        best = magnitude > best ? magnitude : best;
    }
    float absmax;
    memcpy(&absmax, &best, 4);
    return absmax;
}

// ranks[i]: how many of the book's entries lie between 0 and the one nearest to |x[i] / absmax|.
LT_INLINE void find_ranks(const float *x, float inverse, const int32_t *cells, int n, int32_t *ranks) {
    float scaled[kBlock];
    int32_t bits[kBlock], entries[kBlock];
    for (int i = 0; i < n; ++i)
        scaled[i] = x[i] * inverse;
    memcpy(bits, scaled, (size_t)n * 4);
    for (int i = 0; i < n; ++i) {
        const int32_t cell = ((bits[i] & 0x7fffffff) >> 16) - (104 << 7); // 2^-23 has the exponent 104
        entries[i] = cell < 0 ? 0 : cell < LT_CELLS ? cell : LT_CELLS - 1;
    }
    for (int i = 0; i < n; ++i) // apart: these loads are no vector instruction, all the rest is
        entries[i] = cells[entries[i]];
    for (int i = 0; i < n; ++i)
        ranks[i] = (entries[i] >> 16) + ((bits[i] & 0xffff) > (entries[i] & 0xffff));
}

LT_INLINE float inverse_of(float absmax) { return absmax >= 0x1p-126f ? 1.0f / absmax : 0.0f; }

LT_INLINE float encode_unsigned(const float *x, const int32_t *cells, int n, uint8_t *codes) {
    int32_t ranks[kBlock];
    const float absmax = largest_magnitude(x, n);
    find_ranks(x, inverse_of(absmax), cells, n, ranks);
    for (int i = 0; i < n; ++i)
        codes[i] = (uint8_t)ranks[i];
    return absmax;
}

// Zero is number 127; the book has 128 entries above it and 127 below.
LT_INLINE float encode_signed(const float *x, const int32_t *cells, int n, uint8_t *codes) {
    int32_t ranks[kBlock];
    const float absmax = largest_magnitude(x, n);
    find_ranks(x, inverse_of(absmax), cells, n, ranks);
    for (int i = 0; i < n; ++i) {
        const int32_t below = ranks[i] < 127 ? 127 - ranks[i] : 0, above = 127 + ranks[i];
        codes[i] = (uint8_t)(x[i] < 0 ? below : above);
    }
    return absmax;
}

LT_INLINE void update_block(float *p, const float *g, const lt_parameter &t, int64_t begin, int n,
                            const code_tables &tables, const adamw_numbers &u) {
    uint8_t *codes_m = static_cast<uint8_t *>(t.states[0]) + begin,
            *codes_v = static_cast<uint8_t *>(t.states[2]) + begin;
    float *absmax_m = static_cast<float *>(t.states[1]) + begin / kBlock;
    float *absmax_v = static_cast<float *>(t.states[3]) + begin / kBlock;
    float m[kBlock], v[kBlock];
    decode(codes_m, tables.book_m, *absmax_m, n, m);
    decode(codes_v, tables.book_v, *absmax_v, n, v);
    update_chunk(p, g, m, v, n, u);
    *absmax_m = encode_signed(m, tables.cells_m, n, codes_m);
    *absmax_v = encode_unsigned(v, tables.cells_v, n, codes_v);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(adamw_8bit,
          (const lt_parameter *list, int64_t tensors, const void *tables, double beta1, double beta2, double eps,
           double grad_scale, int64_t step, uint64_t seed),
          (list, tensors, tables, beta1, beta2, eps, grad_scale, step, seed)) {
    using namespace lt::LT_ISA;
    static_assert(kChunk % kBlock == 0 && LT_PIECE % kBlock == 0, "a block is never cut");
    const code_tables all = tables_at(tables);
    return update_parameters("adamw_8bit", list, tensors, step, seed,
                             [&](const lt_parameter &t, float *p, const float *g, int64_t begin, int64_t n) {
                                 const adamw_numbers u = numbers_of(t, beta1, beta2, eps, grad_scale, step);
                                 for (int64_t i = 0; i < n; i += kBlock)
                                     update_block(p + i, g + i, t, begin + i, (int)(n - i < kBlock ? n - i : kBlock),
                                                  all, u);
                             });
}
