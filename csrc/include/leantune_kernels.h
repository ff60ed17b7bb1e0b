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

/* ---- CUDA ---------------------------------------------------------------------------------------------------------
 * lt_cuda_<name> is lt_<name> on device pointers, in the library built from csrc/<op>/cuda.cu; it is declared beside
 * its twin. Scratch memory, where one is needed, is an argument and lies on the device; `stream`, always last, is a
 * cudaStream_t. The result is 0 or the cudaError_t of the launch.
 */
LT_API const char *lt_cuda_error_string(int status);

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

/* The weight is of x's dtype or fp32. `partials`: min(1024, ceil(rows / 8)) * cols floats, needed with dweight. */
LT_API int lt_cuda_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                                    void *y, int64_t y_stride, float *rstd, int64_t rows, int64_t cols, float eps,
                                    void *stream);
LT_API int lt_cuda_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                     int weight_dtype, const void *weight, const float *rstd, const void *residual,
                                     int64_t residual_stride, void *dx, int64_t dx_stride, float *dweight,
                                     float *partials, int64_t rows, int64_t cols, void *stream);

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

/* ---- Cross-entropy of rows of logits ------------------------------------------------------------------------------
 * losses[t] = lse - (1 - label_smoothing) * x[targets[t]] - label_smoothing * mean(x) + z_loss * lse^2,
 * x = logits[t], lse = log(sum(exp(x))). With need_gradient != 0 the logits are overwritten by the gradient of
 * scale * row_scale[t] * losses[t] (row_scale null: 1); without, they are left as they are.
 */
LT_API int lt_cross_entropy_rows(float *logits, int64_t stride, const int64_t *targets, const float *row_scale,
                                 float scale, float label_smoothing, float z_loss, int need_gradient, double *losses,
                                 int64_t rows, int64_t cols);

/* ---- AdamW over a list of tensors ---------------------------------------------------------------------------------
 * In place, with decoupled decay, at step `step` (from 1), on fp32 parameters and moments; every array has `tensors`
 * entries, tensors are contiguous, grad_dtypes are enum lt_dtype. A null gradient leaves its tensor as it is.
 *   g = grad_scale * grad;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
 *   p = (1 - lr weight_decay) p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
 */
LT_API int lt_adamw(int64_t tensors, const int64_t *sizes, float *const *params, const void *const *grads,
                    const int64_t *grad_dtypes, float *const *exp_avgs, float *const *exp_avg_sqs, const double *lr,
                    const double *weight_decay, double beta1, double beta2, double eps, double grad_scale,
                    int64_t step);

/* ---- Sum of squares over a list of tensors ------------------------------------------------------------------------
 * For the global gradient norm. Tensors are contiguous, dtypes are enum lt_dtype.
 */
LT_API int lt_sum_of_squares(int64_t tensors, const int64_t *sizes, const void *const *data, const int64_t *dtypes,
                             double *result);

/* ---- Dropout ------------------------------------------------------------------------------------------------------
 * y[i] = x[i] * (u >= threshold ? scale : 0); u is word e % 4 of Philox4x32-10 at counter e / 4 with key `seed`,
 * e = offset + i. The backward pass is the same call on the gradient. y may be x.
 */
LT_API int lt_dropout(int dtype, const void *x, void *y, int64_t size, uint64_t seed, uint64_t offset,
                      uint32_t threshold, float scale);

/* ---- packed attention -----------------------------------------------------------------------------------------------
 * o[t, h] = sum_j softmax_j(scale * <q[t, h], k[j, h']>) * v[j, h'] over the tokens j of t's own sequence, j <= t where
 * causal, with h' = h / (heads / kv_heads). Token t of head h is at t * x_stride + h * x_head, head_dim contiguous
 * elements. Sequence s holds tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1; cu_seqlens starts at 0 and never falls.
 * lse [heads, tokens] is the logarithm of the softmax's denominator, kept for backward. `grad` is the gradient of o.
 */
LT_API int lt_attention_forward(int dtype, const void *q, int64_t q_stride, int64_t q_head, const void *k,
                                int64_t k_stride, int64_t k_head, const void *v, int64_t v_stride, int64_t v_head,
                                void *o, int64_t o_stride, int64_t o_head, float *lse, const int32_t *cu_seqlens,
                                int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                int causal);
LT_API int lt_attention_backward(int dtype, const void *grad, int64_t grad_stride, int64_t grad_head, const void *q,
                                 int64_t q_stride, int64_t q_head, const void *k, int64_t k_stride, int64_t k_head,
                                 const void *v, int64_t v_stride, int64_t v_head, const void *o, int64_t o_stride,
                                 int64_t o_head, const float *lse, void *dq, int64_t dq_stride, int64_t dq_head,
                                 void *dk, int64_t dk_stride, int64_t dk_head, void *dv, int64_t dv_stride,
                                 int64_t dv_head, const int32_t *cu_seqlens, int64_t sequences, int64_t heads,
                                 int64_t kv_heads, int64_t head_dim, float scale, int causal);

/* ---- Low-rank products (LoRA) -------------------------------------------------------------------------------------
 * For a linear layer of K inputs and N outputs with fp32 factors A [r, K] and B [N, r].
 * merge:     out [N, K] fp32 = weight + scale * B A. rank 0 is a plain copy. out may be the weight.
 * gradients: with S = x A^T and dS = scale * dy B, da [r, K] = dS^T x and db [N, r] = scale * dy^T S, overwritten, or
 *            accumulated if `accumulate`. Adapters of one call share x, which is read once; at most 16 of them.
 * add:       y [rows, N] += scale * (x P) Q, accumulated, with P [K, r] and Q [r, N] of any two strides each: A^T and
 *            B^T for the forward pass, B and A for the gradient of the input. y must not be x.
 */
typedef struct lt_low_rank_adapter {
    const void *dy; /* [rows, outputs], dtype of x */
    int64_t dy_stride;
    const float *a;
    int64_t a_stride;
    const float *b;
    int64_t b_stride;
    float *da;
    int64_t da_stride;
    float *db;
    int64_t db_stride;
    int64_t outputs, rank;
    float scale;
} lt_low_rank_adapter;

LT_API int lt_low_rank_merge(int dtype, const void *weight, int64_t weight_stride, const float *a, int64_t a_stride,
                             const float *b, int64_t b_stride, float *out, int64_t out_stride, int64_t outputs,
                             int64_t inputs, int64_t rank, float scale);
LT_API int lt_low_rank_gradients(int dtype, const void *x, int64_t x_stride, int64_t rows, int64_t inputs,
                                 const lt_low_rank_adapter *adapters, int64_t count, int accumulate);
LT_API int lt_low_rank_add(int dtype, const void *x, int64_t x_stride, const float *p, int64_t p_input_step,
                           int64_t p_rank_step, const float *q, int64_t q_rank_step, int64_t q_output_step, void *y,
                           int64_t y_stride, int64_t rows, int64_t inputs, int64_t rank, int64_t outputs, float scale);

/* ---- NF4 weights --------------------------------------------------------------------------------------------------
 * 4-bit NormalFloat (QLoRA) of a dense array of `size` elements, in blocks of 64: absmax [ceil(size / 64)] is a block's
 * largest magnitude, codes [ceil(size / 2)] hold two elements a byte, the first in the high half: the number of
 * midpoints of the code book that element * (1 / absmax) exceeds. A block below 2^-126 becomes zeros, one with a NaN or
 * an infinity NaN.
 * quantise_absmax: absmax - offset in 8 bits of the signed dynamic code book, a scale for each 256 blocks. Readers take
 * absmax, or where it is null absmax_codes [ceil(size / 64)], absmax_scales [ceil(size / 16384)] and absmax_offset [1].
 * dequantise: `reused` says that out is memory written before; a large one is then stored past the caches, which is
 * faster, but slower for pages that the system hands out, and so clears, at the first touch.
 * linear: y [rows, outputs] = x [rows, inputs] W^T + bias (null: none) for few rows; inputs is a multiple of 64.
 */
LT_API int lt_nf4_quantise(int dtype, const void *weight, uint8_t *codes, float *absmax, int64_t size);
LT_API int lt_nf4_quantise_absmax(const float *absmax, const float *offset, uint8_t *codes, float *scales,
                                  int64_t blocks);
LT_API int lt_nf4_dequantise(const uint8_t *codes, const float *absmax, const uint8_t *absmax_codes,
                             const float *absmax_scales, const float *absmax_offset, int dtype, void *out, int64_t size,
                             int reused);
LT_API int lt_nf4_linear(int dtype, const void *x, int64_t x_stride, const uint8_t *codes, const float *absmax,
                         const uint8_t *absmax_codes, const float *absmax_scales, const float *absmax_offset,
                         const void *bias, void *y, int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs);

LT_API int lt_cuda_nf4_quantise(int dtype, const void *weight, uint8_t *codes, float *absmax, int64_t size,
                                void *stream);
LT_API int lt_cuda_nf4_quantise_absmax(const float *absmax, const float *offset, uint8_t *codes, float *scales,
                                       int64_t blocks, void *stream);
LT_API int lt_cuda_nf4_dequantise(const uint8_t *codes, const float *absmax, const uint8_t *absmax_codes,
                                  const float *absmax_scales, const float *absmax_offset, int dtype, void *out,
                                  int64_t size, void *stream);
LT_API int lt_cuda_nf4_linear(int dtype, const void *x, int64_t x_stride, const uint8_t *codes, const float *absmax,
                              const uint8_t *absmax_codes, const float *absmax_scales, const float *absmax_offset,
                              const void *bias, void *y, int64_t y_stride, int64_t rows, int64_t inputs,
                              int64_t outputs, void *stream);

/* ---- int8 weights and activations ---------------------------------------------------------------------------------
 * Row by row: scales [rows] = absmax / 127, codes [rows, cols] (dense) = x * (127 / absmax) rounded to the nearest,
 * ties to even. A row below 2^-119 becomes zeros; one with a NaN or an infinity has codes 0 and the scale NaN.
 * dequantise: `reused` as in nf4_dequantise.
 * linear: y [rows, outputs] = x [rows, inputs] W^T + bias (null: none) for few rows.
 */
LT_API int lt_int8_quantise(int dtype, const void *x, int64_t x_stride, int8_t *codes, float *scales, int64_t rows,
                            int64_t cols);
LT_API int lt_int8_dequantise(const int8_t *codes, const float *scales, int dtype, void *out, int64_t out_stride,
                              int64_t rows, int64_t cols, int reused);
LT_API int lt_int8_linear(int dtype, const void *x, int64_t x_stride, const int8_t *codes, const float *scales,
                          const void *bias, void *y, int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs);

LT_API int lt_cuda_int8_quantise(int dtype, const void *x, int64_t x_stride, int8_t *codes, float *scales, int64_t rows,
                                 int64_t cols, void *stream);
LT_API int lt_cuda_int8_dequantise(const int8_t *codes, const float *scales, int dtype, void *out, int64_t out_stride,
                                   int64_t rows, int64_t cols, void *stream);
LT_API int lt_cuda_int8_linear(int dtype, const void *x, int64_t x_stride, const int8_t *codes, const float *scales,
                               const void *bias, void *y, int64_t y_stride, int64_t rows, int64_t inputs,
                               int64_t outputs, void *stream);

/* ---- Activations kept in bf16 -------------------------------------------------------------------------------------
 * packed [rows, cols] (dense) is x rounded to the nearest bf16, ties to even; unpack is the way back. For 8 bits a row
 * see int8_quantise and int8_dequantise.
 */
LT_API int lt_pack_bf16(int dtype, const void *x, int64_t x_stride, void *packed, int64_t rows, int64_t cols);
LT_API int lt_unpack_bf16(const void *packed, int dtype, void *out, int64_t out_stride, int64_t rows, int64_t cols);

LT_API int lt_cuda_pack_bf16(int dtype, const void *x, int64_t x_stride, void *packed, int64_t rows, int64_t cols,
                             void *stream);
LT_API int lt_cuda_unpack_bf16(const void *packed, int dtype, void *out, int64_t out_stride, int64_t rows, int64_t cols,
                               void *stream);

#ifdef __cplusplus
}
#endif
#endif
