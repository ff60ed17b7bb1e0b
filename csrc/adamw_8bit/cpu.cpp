// AdamW with 8-bit moments: a block of 256 elements is widened, updated and quantised again while it is in the cache,
// 16 bytes a parameter in fp32, 10 in bf16. Dettmers et al. 2022, arXiv:2110.02861.
#include "../adamw/update.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int kBlock = LT_CODE_BLOCK;
constexpr int32_t kLastCell = LT_CELLS - 1;

struct code_tables {
    const float *book_m, *book_v;
    const int32_t *cells_m, *cells_v;
};

LT_INLINE code_tables tables_at(const void *tables) {
    const float *books = static_cast<const float *>(tables);
    const int32_t *cells = static_cast<const int32_t *>(tables) + 2 * 256;
    return {books, books + 256, cells, cells + LT_CELLS};
}

// table[index[i]] for every lane. With GCC's tuning for all processors, a plain loop loads lane by lane.
LT_INLINE vi gather(const int32_t *table, vi index) {
#if defined(__AVX512F__)
    return (vi)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (vi)_mm256_i32gather_epi32(table, (__m256i)index, 4);
#else
    for (int i = 0; i < W; ++i)
        index[i] = table[index[i]];
    return index;
#endif
}

// All blocks' arrays have kBlock elements; of the codes in memory, n exist.
LT_INLINE void decode(const uint8_t *codes, const float *book, float absmax, int n, float *x) {
    uint8_t whole[kBlock] = {};
    if (n < kBlock)
        codes = static_cast<const uint8_t *>(memcpy(whole, codes, (size_t)n));
    for (int i = 0; i < kBlock; i += W) {
        vb c;
        memcpy(&c, codes + i, sizeof c);
        store(x + i, (vf)gather(reinterpret_cast<const int32_t *>(book), (vi)widen_bytes(c)) * absmax);
    }
}

// Magnitudes are compared by their bits, where NaN is above infinity: neither is lost.
LT_INLINE float largest_magnitude(const float *x) {
    vi best = {};
    for (int i = 0; i < kBlock; i += W) {
        const vi magnitude = (vi)load(x + i) & 0x7fffffff;
        best = magnitude > best ? magnitude : best;
    }
    int32_t largest = 0;
    for (int lane = 0; lane < W; ++lane)
        largest = best[lane] > largest ? best[lane] : largest;
    float absmax;
    memcpy(&absmax, &largest, 4);
    return absmax;
}

// How many of the book's entries lie between 0 and the one nearest to |x / absmax|.
LT_INLINE vi ranks_of(vf x, float inverse, const int32_t *cells) {
    const vi bits = (vi)(x * inverse);
    vi cell = ((bits & 0x7fffffff) >> 16) - (104 << 7); // 2^-23 has the exponent 104
    cell = cell < 0 ? vi{} : cell;
    const vi entry = gather(cells, cell < kLastCell ? cell : vi{} + kLastCell);
    return (entry >> 16) - ((bits & 0xffff) > (entry & 0xffff)); // a true comparison is -1
}

// Zero is number 127 of the signed book, which has 128 entries above it and 127 below. Returns the block's absmax.
template <bool SIGNED> LT_INLINE float encode(float *x, const int32_t *cells, int n, uint8_t *codes) {
    for (int i = n; i < kBlock; ++i)
        x[i] = 0;
    const float absmax = largest_magnitude(x), inverse = absmax >= 0x1p-126f ? 1.0f / absmax : 0.0f;
    int32_t wide[kBlock];
    uint8_t whole[kBlock];
    for (int i = 0; i < kBlock; i += W) {
        const vf x_i = load(x + i);
        vi rank = ranks_of(x_i, inverse, cells);
        if (SIGNED)
            rank = x_i < 0 ? 127 - (rank < 127 ? rank : vi{} + 127) : 127 + rank;
        memcpy(wide + i, &rank, sizeof rank);
    }
    uint8_t *to = n < kBlock ? whole : codes;
    for (int i = 0; i < kBlock; ++i) // a loop of its own, which GCC packs well
        to[i] = (uint8_t)wide[i];
    if (n < kBlock)
        memcpy(codes, whole, (size_t)n);
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
    *absmax_m = encode<true>(m, tables.cells_m, n, codes_m);
    *absmax_v = encode<false>(v, tables.cells_v, n, codes_v);
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
