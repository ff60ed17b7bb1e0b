/* leantune_kernels: fine-tuning kernels behind a plain C interface. No framework: raw pointers, sizes and strides.
 *
 * Conventions
 *   - Matrices are row-major; the last dimension is contiguous, rows are `*_stride` elements apart (never bytes).
 *   - dtype codes name the storage of the tensors; all arithmetic and every statistic is fp32.
 *   - Every function returns LT_OK or an error code; lt_last_error() then says what was wrong, on that thread.
 *   - Sizes and offsets are 64-bit. Pointers need only the alignment of their element.
 *   - Outputs are fully overwritten unless a parameter says "accumulated".
 *   - Same inputs, same instruction level: same bits, whatever the number of threads.
 */
#ifndef LEANTUNE_KERNELS_H
#define LEANTUNE_KERNELS_H

#include <stdint.h>

#define LT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum lt_status { LT_OK = 0, LT_INVALID = 1, LT_NO_MEMORY = 2 };
enum lt_dtype { LT_F32 = 0, LT_BF16 = 1, LT_F16 = 2 };

/* ---- the library ------------------------------------------------------------------------------------------------- */

LT_API const char *lt_last_error(void);

/* Instruction level in use: "base", "avx2" or "avx512". LEANTUNE_ISA in the environment, or lt_set_isa, lowers it. */
LT_API const char *lt_isa(void);
LT_API int lt_set_isa(const char *name);

/* Use the OpenMP runtime that the process has loaded, if any, instead of a pool of our own; returns its path or "". */
LT_API const char *lt_adopt_openmp(void);

/* Threads per call: 0 (the default) follows the adopted runtime, or the processors available. */
LT_API int lt_set_num_threads(int threads);
LT_API int lt_num_threads(void);

/* ---- RMSNorm ------------------------------------------------------------------------------------------------------
 * y[t, h] = x[t, h] * rstd[t] * weight[h],  rstd[t] = 1 / sqrt(mean_h(x[t, h]^2) + eps).
 * Backward: dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dy * weight, plus `residual` where not null (the
 * gradient that reaches x past the norm; may be dx itself). dweight [cols] is fp32; null skips it.
 */
LT_API int lt_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                               void *y, int64_t y_stride, float *rstd, int64_t rows, int64_t cols, float eps);
LT_API int lt_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                int weight_dtype, const void *weight, const float *rstd, const void *residual,
                                int64_t residual_stride, void *dx, int64_t dx_stride, float *dweight, int64_t rows,
                                int64_t cols);

/* ---- Rotary embedding ---------------------------------------------------------------------------------------------
 * In place, for every token and head: (x[i], x[i + half]) becomes (x[i] c - x[i + half] s, x[i + half] c + x[i] s) with
 * c, s = cos, sin[positions[token], i]; cos and sin are dense [.., half]. Columns from 2 * half on stay as they are.
 * `inverse` turns the other way (the backward pass). positions are not checked here.
 */
LT_API int lt_rope(int dtype, void *x, int64_t token_stride, int64_t head_stride, const float *cos, const float *sin,
                   const int64_t *positions, int64_t tokens, int64_t heads, int64_t half, int inverse);

/* ---- SwiGLU -------------------------------------------------------------------------------------------------------
 * h = silu(gate) * up. Backward is in place: dh becomes h, gate becomes d_gate, up becomes d_up.
 */
LT_API int lt_swiglu_forward(int dtype, const void *gate, int64_t gate_stride, const void *up, int64_t up_stride,
                             void *h, int64_t h_stride, int64_t rows, int64_t cols);
LT_API int lt_swiglu_backward(int dtype, void *dh, int64_t dh_stride, void *gate, int64_t gate_stride, void *up,
                              int64_t up_stride, int64_t rows, int64_t cols);

/* ---- CUDA --------------------------------------------------------------------------------------------------------
 * The same operations on device pointers, in the library built from csrc/<op>/cuda.cu (leantune_kernels/_cuda*.so).
 * `stream` is a cudaStream_t; the result is 0 or the cudaError_t of the launch. `partials` is device scratch of ceil(rows / 256) * cols floats, needed with dweight.
 */
LT_API int lt_cuda_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                                    void *y, int64_t y_stride, float *rstd, int64_t rows, int64_t cols, float eps,
                                    void *stream);
LT_API int lt_cuda_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                     int weight_dtype, const void *weight, const float *rstd, const void *residual,
                                     int64_t residual_stride, void *dx, int64_t dx_stride, float *dweight,
                                     float *partials, int64_t rows, int64_t cols, void *stream);

#ifdef __cplusplus
}
#endif
#endif
