// AdamW with 8-bit moments over a list of tensors in one launch: 16 bytes a parameter in fp32, 10 in bf16. A warp holds
// a block of 256 elements in registers, eight a thread, between reading its codes and writing the new ones; the code
// books and cells lie in shared memory, where lookups at random addresses are cheap, and blocks of threads stay for
// many pieces, so that these 26 KB are read seldom.
#include "../adamw/update.cuh"

namespace lt_cuda {
namespace {

constexpr int kBooks = 2 * 256;
constexpr int kTableWords = kBooks + 2 * LT_CELLS;
constexpr int kTableBytes = kTableWords * 4;
constexpr int64_t kMostBlocks = 1024;
static_assert(LT_CODE_BLOCK == 32 * kRun && LT_PIECE % LT_CODE_BLOCK == 0, "a warp's run is a block");

struct Tables {
    const float *book_m, *book_v;
    const uint32_t *cells_m, *cells_v;
};

__device__ inline void load_codes(const uint8_t *codes, int64_t i, int n, bool aligned, Vec<uint8_t, kRun> &run) {
    if (aligned && n == kRun) {
        run = load_vec<kRun>(codes + i);
    } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            run[k] = k < n ? codes[i + k] : 0;
    }
}

__device__ inline void store_codes(uint8_t *codes, int64_t i, int n, bool aligned, const Vec<uint8_t, kRun> &run) {
    if (aligned && n == kRun) {
        store_whole(codes + i, run);
    } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (k < n)
                codes[i + k] = run[k];
    }
}

__device__ inline void decode(const Vec<uint8_t, kRun> &codes, const float *book, float absmax, float *x) {
#pragma unroll
    for (int k = 0; k < kRun; ++k)
        x[k] = book[codes[k]] * absmax;
}

// Over the warp; magnitudes are compared by their bits, where NaN is above infinity.
__device__ inline float largest_magnitude(const float *x, int n) {
    uint32_t best = 0;
#pragma unroll
    for (int k = 0; k < kRun; ++k)
        best = k < n ? max(best, __float_as_uint(x[k]) & 0x7fffffffu) : best;
    for (int lanes = 16; lanes > 0; lanes /= 2)
        best = max(best, __shfl_xor_sync(kAllLanes, best, lanes));
    return __uint_as_float(best);
}

__device__ inline int rank_of(float scaled, const uint32_t *cells) {
    const uint32_t bits = __float_as_uint(scaled) & 0x7fffffffu;
    const int cell = (int)(bits >> 16) - (104 << 7); // 2^-23 has the exponent 104
    const uint32_t entry = cells[max(0, min(cell, LT_CELLS - 1))];
    return (int)(entry >> 16) + ((bits & 0xffff) > (entry & 0xffff));
}

template <bool SIGNED>
__device__ inline Vec<uint8_t, kRun> encode(const float *x, float absmax, const uint32_t *cells) {
    const float inverse = absmax >= 0x1p-126f ? 1.0f / absmax : 0.0f;
    Vec<uint8_t, kRun> codes;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
        const int rank = rank_of(x[k] * inverse, cells); // zero is number 127 of the signed book
        codes[k] = (uint8_t)(!SIGNED ? rank : x[k] < 0 ? 127 - min(rank, 127) : 127 + rank);
    }
    return codes;
}

__device__ inline void update_piece(const lt_parameter &t, const lt_piece &piece, const Tables &tables,
                                    const AdamwNumbers &u) {
    const Span span = span_of(t, piece);
    const AdamwRates rates = adamw_rates(t, u);
    uint8_t *const codes_m = global((uint8_t *)t.states[0]), *const codes_v = global((uint8_t *)t.states[2]);
    float *const absmax_m = global((float *)t.states[1]), *const absmax_v = global((float *)t.states[3]);
    const int lane = threadIdx.x % 32;
    // All lanes of a warp go round as often: they exchange their maxima.
    for (int64_t at = (int64_t)(threadIdx.x / 32) * LT_CODE_BLOCK; at < span.size; at += kListThreads * kRun) {
        const int64_t block = (span.begin + at) / LT_CODE_BLOCK, i = span.begin + at + lane * kRun;
        const int64_t left = span.size - at - lane * kRun;
        const int n = (int)(left < 0 ? 0 : left < kRun ? left : (int64_t)kRun);
        float p[kRun], g[kRun], m[kRun], v[kRun];
        Vec<uint8_t, kRun> run_m, run_v;
        load_value(t, i, n, span.aligned, p);
        load_run_of(t.grad, t.grad_dtype, i, n, span.aligned, g);
        load_codes(codes_m, i, n, span.aligned, run_m);
        load_codes(codes_v, i, n, span.aligned, run_v);
        const float old_m = absmax_m[block], old_v = absmax_v[block];
        decode(run_m, tables.book_m, old_m, m);
        decode(run_v, tables.book_v, old_v, v);
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            adamw_update(p[k], g[k], m[k], v[k], u, rates);
        const float new_m = largest_magnitude(m, n), new_v = largest_magnitude(v, n);
        __syncwarp(kAllLanes); // every lane has read the old ones
        if (lane == 0) {
            absmax_m[block] = new_m;
            absmax_v[block] = new_v;
        }
        store_codes(codes_m, i, n, span.aligned, encode<true>(m, new_m, tables.cells_m));
        store_codes(codes_v, i, n, span.aligned, encode<false>(v, new_v, tables.cells_v));
        store_value(t, piece.tensor, i, n, span.aligned, u.step, u.seed, p);
    }
}

// budget: 96 registers, 26 KiB shared
// claims: LDG.E.128 STG.E.128
__global__ void __launch_bounds__(kListThreads, 2)
    adamw_8bit_kernel(const lt_parameter *list, const lt_piece *pieces, int64_t count, const uint32_t *tables,
                      AdamwNumbers u) {
    LT_SHARED(uint32_t[kTableWords], words);
    for (int i = threadIdx.x; i < kTableWords; i += kListThreads)
        words[i] = tables[i];
    __syncthreads();
    const Tables at = {(const float *)&words[0], (const float *)&words[256], &words[kBooks], &words[kBooks + LT_CELLS]};
    for (int64_t number = blockIdx.x; number < count; number += gridDim.x) {
        const lt_piece piece = pieces[number];
        const lt_parameter &t = list[piece.tensor];
        if (t.grad)
            update_piece(t, piece, at, u);
    }
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_adamw_8bit(const lt_parameter *list, const lt_piece *pieces, int64_t count,
                                         const void *tables, double beta1, double beta2, double eps, double grad_scale,
                                         int64_t step, uint64_t seed, void *stream) {
    using namespace lt_cuda;
    if (count == 0)
        return 0;
    const dim3 grid((unsigned)(count < kMostBlocks ? count : kMostBlocks));
    return launch(adamw_8bit_kernel, grid, dim3(kListThreads), 0, stream, list, pieces, count, (const uint32_t *)tables,
                  adamw_numbers(beta1, beta2, eps, grad_scale, step, seed));
}
