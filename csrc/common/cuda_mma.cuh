// Tensor cores and asynchronous copies (sm_80 and later), each one instruction. Every lane of the warp takes part in
// mma_* and ldmatrix_*; the layouts of the fragments are those of the PTX manual, "Matrix fragments for mma":
// with g = lane / 4 and t = lane % 4, for elements of 16 bits (two a register, the lower column in the lower half)
//   a [16, 16]: a[0] row g, columns 2t..; a[1] row g + 8; a[2] row g, columns 2t + 8..; a[3] row g + 8, columns 2t
//   + 8.. b [16, 8]:  b[0] rows 2t, 2t + 1, column g; b[1] rows 2t + 8, 2t + 9 d [16, 8]:  d[0], d[1] row g, columns
//   2t, 2t + 1; d[2], d[3] row g + 8
// and for tf32
//   a [16, 8]:  a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4)
//   b [8, 8]:   b[0] (t, g), b[1] (t + 4, g)
#pragma once

#include "cuda_kernel.cuh"

namespace lt_cuda {

#if defined(LT_CUDA_HOST)

// `place` is where the kernel calls; nobody passes it.
inline void mma_bf16_16816(float d[4], const uint32_t a[4], const uint32_t b[2],
                           lt_host::Place place = lt_host::Place::here()) {
    lt_host::mma_16816(lt_host::Element::BF16, d, a, b, place);
}
inline void mma_f16_16816(float d[4], const uint32_t a[4], const uint32_t b[2],
                          lt_host::Place place = lt_host::Place::here()) {
    lt_host::mma_16816(lt_host::Element::F16, d, a, b, place);
}
inline void mma_tf32_1688(float d[4], const uint32_t a[4], const uint32_t b[2],
                          lt_host::Place place = lt_host::Place::here()) {
    lt_host::mma_tf32_1688(d, a, b, place);
}
inline void ldmatrix_x4(uint32_t r[4], const void *shared, lt_host::Place place = lt_host::Place::here()) {
    lt_host::ldmatrix("ldmatrix_x4", 4, false, r, shared, place);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void *shared, lt_host::Place place = lt_host::Place::here()) {
    lt_host::ldmatrix("ldmatrix_x4_trans", 4, true, r, shared, place);
}
inline void ldmatrix_x2(uint32_t r[2], const void *shared, lt_host::Place place = lt_host::Place::here()) {
    lt_host::ldmatrix("ldmatrix_x2", 2, false, r, shared, place);
}
inline void ldmatrix_x2_trans(uint32_t r[2], const void *shared, lt_host::Place place = lt_host::Place::here()) {
    lt_host::ldmatrix("ldmatrix_x2_trans", 2, true, r, shared, place);
}
inline void cp_async_16(void *shared, const void *global, bool valid) { lt_host::cp_async_16(shared, global, valid); }
inline void cp_async_commit() { lt_host::cp_async_commit(); }
template <int PENDING> inline void cp_async_wait() { lt_host::cp_async_wait(PENDING); }

// To nearest, ties away from zero, as cvt.rna does.
inline float to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? x : __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

#else

// d += a b
__device__ inline void mma_bf16_16816(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_f16_16816(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_tf32_1688(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Eight-by-eight matrices of 16-bit elements: lane 8 m + i gives the address of row i of matrix m (16 bytes, aligned),
// r[m] is the lane's fragment of matrix m; _trans of the transposed matrix.
__device__ inline uint32_t shared_address(const void *shared) { return (uint32_t)__cvta_generic_to_shared(shared); }
__device__ inline void ldmatrix_x4(uint32_t r[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t r[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}
__device__ inline void ldmatrix_x2(uint32_t r[2], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t r[2], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

// 16 bytes from global to shared memory, past the registers; zeros where not `valid` (`global` is not read then).
// They are there after cp_async_wait<PENDING>(), which leaves at most PENDING of the last commits under way, for the
// thread that copied; for others after a barrier as well. A kernel waits for all its copies before it ends.
__device__ inline void cp_async_16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// To nearest, ties away from zero. The tensor core itself ignores the lower 13 bits.
__device__ inline float to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

#endif

} // namespace lt_cuda
