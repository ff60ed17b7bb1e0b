/* leantune_kernels: fine-tuning kernels behind a plain C interface. No framework: raw pointers, sizes and strides.
 *
 * Conventions
 *   - Matrices are row-major; the last dimension is contiguous, rows are `*_stride` elements apart (never bytes).
 *   - dtype codes name the storage of the tensors; all arithmetic and every statistic is fp32.
 *   - Every function returns LT_OK or an error code; lt_last_error() then says what was wrong, on that thread.
 *   - Sizes and offsets are 64-bit. Pointers need only the alignment of their element.
 *   - Outputs are fully overwritten unless a parameter says "accumulated".
 *   - Same inputs, same instruction level: same bits, whatever the number of threads.
 *   - The caller answers for these, which are not checked: sizes are not negative; no pointer is null where its size is
 *     above 0, but for those that may be; rows of an output do not overlap, and outputs overlap nothing but what a
 *     comment allows.
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
enum lt_activation { LT_SILU = 0, LT_GELU = 1, LT_GELU_TANH = 2, LT_RELU = 3, LT_LINEAR = 4 };

/* ---- the library ------------------------------------------------------------------------------------------------- */

LT_API const char *lt_last_error(void);

/* Instruction level in use: "base", "avx2" or "avx512". LEANTUNE_ISA in the environment, or lt_set_isa, lowers it. A
 * value of LEANTUNE_ISA that is no level, or beyond the processor, is ignored; lt_set_isa reports it as LT_INVALID. */
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
 * cudaStream_t. The result is 0 or the cudaError_t of the launch. */
LT_API const char *lt_cuda_error_string(int status);

/* ---- RMSNorm ------------------------------------------------------------------------------------------------------
 * y[t, h] = x[t, h] * rstd[t] * weight[h],  rstd[t] = 1 / sqrt(mean_h(x[t, h]^2) + eps).
 * Backward: dx = rstd * (g - x * rstd^2 * mean(g * x)) with g = dy * weight, plus `residual` where not null (the
 * gradient that reaches x past the norm; may be dx itself). dweight [cols] is fp32; null skips it. */
LT_API int lt_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                               void *y, int64_t y_stride, float *rstd, int64_t rows, int64_t cols, float eps);
LT_API int lt_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                int weight_dtype, const void *weight, const float *rstd, const void *residual,
                                int64_t residual_stride, void *dx, int64_t dx_stride, float *dweight, int64_t rows,
                                int64_t cols);

/* s = x + residual, rounded to its dtype, and y the norm of s; s may be x or residual. Backward: that of s, with the
 * gradient that reaches s otherwise as `residual`; the result is the gradient of x and of residual alike. */
LT_API int lt_add_rms_norm_forward(int dtype, const void *x, int64_t x_stride, const void *residual,
                                   int64_t residual_stride, void *s, int64_t s_stride, int weight_dtype,
                                   const void *weight, void *y, int64_t y_stride, float *rstd, int64_t rows,
                                   int64_t cols, float eps);

/* The weight is of x's dtype or fp32. `partials`: min(1024, ceil(rows / 16)) * cols floats, needed with dweight. */
LT_API int lt_cuda_add_rms_norm_forward(int dtype, const void *x, int64_t x_stride, const void *residual,
                                        int64_t residual_stride, void *s, int64_t s_stride, int weight_dtype,
                                        const void *weight, void *y, int64_t y_stride, float *rstd, int64_t rows,
                                        int64_t cols, float eps, void *stream);
LT_API int lt_cuda_rms_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                                    void *y, int64_t y_stride, float *rstd, int64_t rows, int64_t cols, float eps,
                                    void *stream);
LT_API int lt_cuda_rms_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                     int weight_dtype, const void *weight, const float *rstd, const void *residual,
                                     int64_t residual_stride, void *dx, int64_t dx_stride, float *dweight,
                                     float *partials, int64_t rows, int64_t cols, void *stream);

/* ---- LayerNorm ----------------------------------------------------------------------------------------------------
 * y[t, h] = (x[t, h] - mean[t]) * rstd[t] * weight[h] + bias[h] with the mean and 1 / sqrt(variance + eps) of row t;
 * bias may be null and has weight's dtype. lt_add_layer_norm_forward: of s = x + residual, as for RMSNorm.
 * Backward: dx = rstd * (g - mean(g) - n * mean(g * n)) with g = dy * weight and n = (x - mean) * rstd, plus `residual`
 * where not null (may be dx). dweight and dbias [cols] are fp32; null skips each. */
LT_API int lt_layer_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                                 const void *bias, void *y, int64_t y_stride, float *mean, float *rstd, int64_t rows,
                                 int64_t cols, float eps);
LT_API int lt_add_layer_norm_forward(int dtype, const void *x, int64_t x_stride, const void *residual,
                                     int64_t residual_stride, void *s, int64_t s_stride, int weight_dtype,
                                     const void *weight, const void *bias, void *y, int64_t y_stride, float *mean,
                                     float *rstd, int64_t rows, int64_t cols, float eps);
LT_API int lt_layer_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                  int weight_dtype, const void *weight, const float *mean, const float *rstd,
                                  const void *residual, int64_t residual_stride, void *dx, int64_t dx_stride,
                                  float *dweight, float *dbias, int64_t rows, int64_t cols);

/* The weight and bias are of x's dtype or fp32. `partials`: 2 * min(1024, ceil(rows / 32)) * cols floats, needed with
 * dweight or dbias. */
LT_API int lt_cuda_layer_norm_forward(int dtype, const void *x, int64_t x_stride, int weight_dtype, const void *weight,
                                      const void *bias, void *y, int64_t y_stride, float *mean, float *rstd,
                                      int64_t rows, int64_t cols, float eps, void *stream);
LT_API int lt_cuda_add_layer_norm_forward(int dtype, const void *x, int64_t x_stride, const void *residual,
                                          int64_t residual_stride, void *s, int64_t s_stride, int weight_dtype,
                                          const void *weight, const void *bias, void *y, int64_t y_stride, float *mean,
                                          float *rstd, int64_t rows, int64_t cols, float eps, void *stream);
LT_API int lt_cuda_layer_norm_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                       int weight_dtype, const void *weight, const float *mean, const float *rstd,
                                       const void *residual, int64_t residual_stride, void *dx, int64_t dx_stride,
                                       float *dweight, float *dbias, float *partials, int64_t rows, int64_t cols,
                                       void *stream);

/* ---- Rotary embedding ---------------------------------------------------------------------------------------------
 * In place, for every token and head of q and k: the pair (a, b) becomes (a c - b s, b c + a s) with c, s = cos,
 * sin[positions[token], i]; cos and sin are dense [table_rows, half]. Pair i < half is columns (i, i + half), or
 * (2 i, 2 i + 1) where `interleaved`; columns from 2 * half on stay as they are. `inverse` turns the other way (the
 * backward pass). k may be null with k_heads 0. A position outside [0, table_rows) is LT_INVALID; on a device the
 * token's pairs become NaN. */
LT_API int lt_rope(int dtype, void *q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, void *k,
                   int64_t k_token_stride, int64_t k_head_stride, int64_t k_heads, const float *cos, const float *sin,
                   int64_t table_rows, const int64_t *positions, int64_t tokens, int64_t half, int interleaved,
                   int inverse);
LT_API int lt_cuda_rope(int dtype, void *q, int64_t q_token_stride, int64_t q_head_stride, int64_t q_heads, void *k,
                        int64_t k_token_stride, int64_t k_head_stride, int64_t k_heads, const float *cos,
                        const float *sin, int64_t table_rows, const int64_t *positions, int64_t tokens, int64_t half,
                        int interleaved, int inverse, void *stream);

/* ---- Gated activations --------------------------------------------------------------------------------------------
 * h = act(gate) * up, with the activation that enum lt_activation numbers: silu(x) = x / (1 + e^-x) (SwiGLU), exact
 * gelu(x) = x Phi(x), or its approximation by tanh (GeGLU). h may be gate or up. Backward: d_gate = dh * up *
 * act'(gate), d_up = dh * act(gate), and h once more unless null. In place, (dh, gate, up) becomes (h, d_gate, d_up):
 * an output may be any of the inputs. */
LT_API int lt_glu_forward(int dtype, int activation, const void *gate, int64_t gate_stride, const void *up,
                          int64_t up_stride, void *h, int64_t h_stride, int64_t rows, int64_t cols);
LT_API int lt_glu_backward(int dtype, int activation, const void *dh, int64_t dh_stride, const void *gate,
                           int64_t gate_stride, const void *up, int64_t up_stride, void *h, int64_t h_stride,
                           void *d_gate, int64_t d_gate_stride, void *d_up, int64_t d_up_stride, int64_t rows,
                           int64_t cols);
LT_API int lt_cuda_glu_forward(int dtype, int activation, const void *gate, int64_t gate_stride, const void *up,
                               int64_t up_stride, void *h, int64_t h_stride, int64_t rows, int64_t cols, void *stream);
LT_API int lt_cuda_glu_backward(int dtype, int activation, const void *dh, int64_t dh_stride, const void *gate,
                                int64_t gate_stride, const void *up, int64_t up_stride, void *h, int64_t h_stride,
                                void *d_gate, int64_t d_gate_stride, void *d_up, int64_t d_up_stride, int64_t rows,
                                int64_t cols, void *stream);

/* ---- Activations --------------------------------------------------------------------------------------------------
 * y = act(x), act as above; y may be x. Backward: dx = dy * act'(x); dx may be dy or x. */
LT_API int lt_activation_forward(int dtype, int activation, const void *x, int64_t x_stride, void *y, int64_t y_stride,
                                 int64_t rows, int64_t cols);
LT_API int lt_activation_backward(int dtype, int activation, const void *dy, int64_t dy_stride, const void *x,
                                  int64_t x_stride, void *dx, int64_t dx_stride, int64_t rows, int64_t cols);
LT_API int lt_cuda_activation_forward(int dtype, int activation, const void *x, int64_t x_stride, void *y,
                                      int64_t y_stride, int64_t rows, int64_t cols, void *stream);
LT_API int lt_cuda_activation_backward(int dtype, int activation, const void *dy, int64_t dy_stride, const void *x,
                                       int64_t x_stride, void *dx, int64_t dx_stride, int64_t rows, int64_t cols,
                                       void *stream);

/* ---- Cross-entropy of rows of logits ------------------------------------------------------------------------------
 * losses[t] = lse - (1 - label_smoothing) * x[targets[t]] - label_smoothing * mean(x) + z_loss * lse^2,
 * x = logits[t], lse = log(sum(exp(x))). With need_gradient != 0 the logits are overwritten by the gradient of
 * scale * row_scale[t] * losses[t] (row_scale null: 1); without, they are left as they are. */
LT_API int lt_cross_entropy_rows(float *logits, int64_t stride, const int64_t *targets, const float *row_scale,
                                 float scale, float label_smoothing, float z_loss, int need_gradient, double *losses,
                                 int64_t rows, int64_t cols);
/* On a device a target outside [0, cols) makes the row NaN; elsewhere it is LT_INVALID. */
LT_API int lt_cuda_cross_entropy_rows(float *logits, int64_t stride, const int64_t *targets, const float *row_scale,
                                      float scale, float label_smoothing, float z_loss, int need_gradient,
                                      double *losses, int64_t rows, int64_t cols, void *stream);

/* Soft targets, for distillation: losses[t] = alpha T^2 KL(softmax(z / T) || softmax(x / T)) + (1 - alpha) (lse -
 * x[targets[t]]), x = logits[t], z = teacher[t], T = temperature; gradient as above. With alpha 1, targets are not read
 * and may be null. A teacher's logit of -infinity is a probability of 0. */
LT_API int lt_distillation_rows(float *logits, int64_t stride, int teacher_dtype, const void *teacher,
                                int64_t teacher_stride, const int64_t *targets, const float *row_scale, float scale,
                                float alpha, float temperature, int need_gradient, double *losses, int64_t rows,
                                int64_t cols);
LT_API int lt_cuda_distillation_rows(float *logits, int64_t stride, int teacher_dtype, const void *teacher,
                                     int64_t teacher_stride, const int64_t *targets, const float *row_scale,
                                     float scale, float alpha, float temperature, int need_gradient, double *losses,
                                     int64_t rows, int64_t cols, void *stream);

/* ---- Optimizers over lists of tensors -----------------------------------------------------------------------------
 * In place, at step `step` (from 1, below 2^32), with g = grad_scale * grad in fp32. A parameter in bf16 or f16 with a
 * master is the master, rounded to nearest even. One in bf16 without is rounded stochastically, up with the probability
 * that keeps the mean: the 16 bits below bf16's of the new value plus 16 random bits carry, or do not. The random bits
 * of element e of tensor number i are half e % 2 (the lower one first) of word e % 8 / 2 of Philox4x32-10 at counter
 * (e / 8 as 64 bits, i, step) under key `seed`. f16 needs a master. Infinity and NaN pass.
 *
 * On CUDA the list and the pieces that it is cut into lie on the device, as everything that they point to. Each tensor
 * is cut into pieces of LT_PIECE elements, the last one shorter; a list of sums has one double a piece. */
typedef struct lt_parameter {
    int64_t size;    /* elements, contiguous */
    void *data;      /* updated in place */
    float *master;   /* null, or the fp32 copy that is updated */
    void *grad;      /* null leaves the tensor as it is */
    void *states[4]; /* what the optimizer keeps, as said there */
    double lr, weight_decay;
    int64_t dtype, grad_dtype; /* enum lt_dtype */
} lt_parameter;

typedef struct lt_piece {
    int64_t tensor, begin;
} lt_piece;

enum { LT_PIECE = 16384 };

/* AdamW. states: m, v, fp32, of the parameter's size.
 *   m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
 *   p = (1 - lr weight_decay) p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps) */
LT_API int lt_adamw(const lt_parameter *list, int64_t tensors, double beta1, double beta2, double eps,
                    double grad_scale, int64_t step, uint64_t seed);

/* AdamW with its moments in 8 bits, block-wise: element e of m is book_m[codes[e]] * absmax[e / 256], and so is v.
 * states: m's codes (uint8), its absmax (fp32), v's codes, its absmax; all of it zeros at the start. After the update a
 * block's absmax is its largest magnitude and a code the entry that is nearest to value * (1 / absmax), the one nearer
 * to zero where two are as near; where absmax is below 2^-126 all are zero. tables: as made by formula in
 * leantune_kernels/dynamic_code_books.py, 256 floats book_m and 256 book_v, ascending, then LT_CELLS uint32 for |m| and
 * as many for v. A cell is a number's upper 16 bits, counted from those of 2^-23; its entry is, in the upper half, the
 * rank in the book of the cell's lowest number, counted from 0's, and in the lower half the lower 16 bits beyond which
 * the next rank is nearer. */
enum { LT_CODE_BLOCK = 256, LT_CELLS = 2945 };

LT_API int lt_adamw_8bit(const lt_parameter *list, int64_t tensors, const void *tables, double beta1, double beta2,
                         double eps, double grad_scale, int64_t step, uint64_t seed);

/* SGD, by torch.optim.SGD's formula. states: the momentum buffer b, fp32, not needed at momentum 0.
 *   g += weight_decay p;  b = step == 1 ? g : momentum b + (1 - dampening) g;  p -= lr (nesterov ? g + momentum b : b)
 */
LT_API int lt_sgd(const lt_parameter *list, int64_t tensors, double momentum, double dampening, int nesterov,
                  double grad_scale, int64_t step, uint64_t seed);

/* RMSprop, by torch.optim.RMSprop's formula. states: v; the momentum buffer b, null at momentum 0; the mean gradient a,
 * null unless centered, which it makes it; all fp32.
 *   g += weight_decay p;  v = alpha v + (1 - alpha) g^2;  a += (1 - alpha) (g - a);  d = g / (sqrt(v - a^2) + eps)
 *   b = momentum b + d;  p -= lr b */
LT_API int lt_rmsprop(const lt_parameter *list, int64_t tensors, double alpha, double eps, double momentum,
                      double grad_scale, int64_t step, uint64_t seed);

/* ---- Sum of squares over a list of tensors ------------------------------------------------------------------------
 * For the global gradient norm: of `grad`, whose types are grad_dtype; a null one counts nothing. */
LT_API int lt_sum_of_squares(const lt_parameter *list, int64_t tensors, double *result);

/* grad *= *factor, in place. */
LT_API int lt_scale(const lt_parameter *list, int64_t tensors, const float *factor);

/* On CUDA, with `count` pieces, sums holds as many doubles; list, pieces, tables, factor, result are on the device. */
LT_API int lt_cuda_adamw(const lt_parameter *list, const lt_piece *pieces, int64_t count, double beta1, double beta2,
                         double eps, double grad_scale, int64_t step, uint64_t seed, void *stream);
LT_API int lt_cuda_adamw_8bit(const lt_parameter *list, const lt_piece *pieces, int64_t count, const void *tables,
                              double beta1, double beta2, double eps, double grad_scale, int64_t step, uint64_t seed,
                              void *stream);
LT_API int lt_cuda_sgd(const lt_parameter *list, const lt_piece *pieces, int64_t count, double momentum,
                       double dampening, int nesterov, double grad_scale, int64_t step, uint64_t seed, void *stream);
LT_API int lt_cuda_rmsprop(const lt_parameter *list, const lt_piece *pieces, int64_t count, double alpha, double eps,
                           double momentum, double grad_scale, int64_t step, uint64_t seed, void *stream);
LT_API int lt_cuda_sum_of_squares(const lt_parameter *list, const lt_piece *pieces, int64_t count, double *sums,
                                  double *result, void *stream);
LT_API int lt_cuda_scale(const lt_parameter *list, const lt_piece *pieces, int64_t count, const float *factor,
                         void *stream);

/* ---- Embedding ----------------------------------------------------------------------------------------------------
 * forward:  y[t] = scale * weight[ids[t]]. An id outside [0, vocabulary) is LT_INVALID; on a device its row is NaN.
 * backward: dweight[v] = scale * the sum of dy[t] over the t with ids[t] = v, in the order of t in fp32, then stored
 *           (or added to what is there, if `accumulate`). `order` [tokens] sorts the ids and keeps the order of equal
 *           ones, sorted_ids[i] = ids[order[i]]. Row padding_idx gets no gradient, -1 for none; ids outside
 *           [0, vocabulary) are left out. */
LT_API int lt_embedding_forward(int dtype, const void *weight, int64_t weight_stride, const int64_t *ids, int y_dtype,
                                void *y, int64_t y_stride, int64_t tokens, int64_t vocabulary, int64_t cols,
                                float scale);
LT_API int lt_embedding_backward(int dtype, const void *dy, int64_t dy_stride, const int64_t *sorted_ids,
                                 const int64_t *order, int dweight_dtype, void *dweight, int64_t dweight_stride,
                                 int64_t tokens, int64_t vocabulary, int64_t cols, float scale, int64_t padding_idx,
                                 int accumulate);
/* `sums`: 2 * ceil(tokens / 64) * cols floats. */
LT_API int lt_cuda_embedding_forward(int dtype, const void *weight, int64_t weight_stride, const int64_t *ids,
                                     int y_dtype, void *y, int64_t y_stride, int64_t tokens, int64_t vocabulary,
                                     int64_t cols, float scale, void *stream);
LT_API int lt_cuda_embedding_backward(int dtype, const void *dy, int64_t dy_stride, const int64_t *sorted_ids,
                                      const int64_t *order, int dweight_dtype, void *dweight, int64_t dweight_stride,
                                      int64_t tokens, int64_t vocabulary, int64_t cols, float scale,
                                      int64_t padding_idx, int accumulate, float *sums, void *stream);

/* ---- Dropout ------------------------------------------------------------------------------------------------------
 * y[i] = x[i] * (u >= threshold ? scale : 0); u is word e % 4 of Philox4x32-10 at counter e / 4 with key `seed`,
 * e = offset + i. The backward pass is the same call on the gradient. y may be x. */
LT_API int lt_dropout(int dtype, const void *x, void *y, int64_t size, uint64_t seed, uint64_t offset,
                      uint32_t threshold, float scale);
LT_API int lt_cuda_dropout(int dtype, const void *x, void *y, int64_t size, uint64_t seed, uint64_t offset,
                           uint32_t threshold, float scale, void *stream);

/* ---- packed attention -----------------------------------------------------------------------------------------------
 * o[t, h] = sum_j softmax_j(scale * <q[t, h], k[j, h']>) * v[j, h'] over the tokens j of t's own sequence, j <= t where
 * causal, |t - j| < window where window > 0 (0: no window), with h' = h / (heads / kv_heads). Token t of head h is at
 * t * x_stride + h * x_head, head_dim contiguous elements. Sequence s holds tokens cu_seqlens[s] to
 * cu_seqlens[s + 1] - 1; cu_seqlens starts at 0 and never falls. lse [heads, tokens] is the logarithm of the softmax's
 * denominator, kept for backward. `grad` is the gradient of o. */
LT_API int lt_attention_forward(int dtype, const void *q, int64_t q_stride, int64_t q_head, const void *k,
                                int64_t k_stride, int64_t k_head, const void *v, int64_t v_stride, int64_t v_head,
                                void *o, int64_t o_stride, int64_t o_head, float *lse, const int32_t *cu_seqlens,
                                int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                int causal, int64_t window);
LT_API int lt_attention_backward(int dtype, const void *grad, int64_t grad_stride, int64_t grad_head, const void *q,
                                 int64_t q_stride, int64_t q_head, const void *k, int64_t k_stride, int64_t k_head,
                                 const void *v, int64_t v_stride, int64_t v_head, const void *o, int64_t o_stride,
                                 int64_t o_head, const float *lse, void *dq, int64_t dq_stride, int64_t dq_head,
                                 void *dk, int64_t dk_stride, int64_t dk_head, void *dv, int64_t dv_stride,
                                 int64_t dv_head, const int32_t *cu_seqlens, int64_t sequences, int64_t heads,
                                 int64_t kv_heads, int64_t head_dim, float scale, int causal, int64_t window);

/* head_dim <= 256. `tokens` is cu_seqlens[sequences], which lies on the device; `delta`: heads * tokens floats. */
LT_API int lt_cuda_attention_forward(int dtype, const void *q, int64_t q_stride, int64_t q_head, const void *k,
                                     int64_t k_stride, int64_t k_head, const void *v, int64_t v_stride, int64_t v_head,
                                     void *o, int64_t o_stride, int64_t o_head, float *lse, const int32_t *cu_seqlens,
                                     int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                     int causal, int64_t window, int64_t tokens, void *stream);
LT_API int lt_cuda_attention_backward(int dtype, const void *grad, int64_t grad_stride, int64_t grad_head,
                                      const void *q, int64_t q_stride, int64_t q_head, const void *k, int64_t k_stride,
                                      int64_t k_head, const void *v, int64_t v_stride, int64_t v_head, const void *o,
                                      int64_t o_stride, int64_t o_head, const float *lse, void *dq, int64_t dq_stride,
                                      int64_t dq_head, void *dk, int64_t dk_stride, int64_t dk_head, void *dv,
                                      int64_t dv_stride, int64_t dv_head, const int32_t *cu_seqlens, int64_t sequences,
                                      int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int causal,
                                      int64_t window, float *delta, int64_t tokens, void *stream);

/* ---- Low-rank products (LoRA) -------------------------------------------------------------------------------------
 * For a linear layer of K inputs and N outputs with fp32 factors A [r, K] and B [N, r].
 * merge:     out [N, K] fp32 = weight + scale * B A. rank 0 is a plain copy. out may be the weight.
 * gradients: with S = x A^T and dS = scale * dy B, da [r, K] = dS^T x and db [N, r] = scale * dy^T S, overwritten, or
 *            accumulated if `accumulate`; null skips one. Adapters of one call share x, which is read once; at most 16.
 * add:       y [rows, N] += scale * (x P) Q, accumulated, with P [K, r] and Q [r, N] of any two strides each: A^T and
 *            B^T for the forward pass, B and A for the gradient of the input. y must not be x. */
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

/* On CUDA the skinny products are functions of their own, so that S = x A^T and dS = dy B are formed once and kept:
 * project:        s [rows, rank] fp32 = x P, P [inputs, rank] with one of its steps 1.
 * linear:         y [rows, outputs] = x W^T + bias + scale * s B^T, in one pass; bias may be null.
 * input_gradient: dx [rows, inputs] = sum over at most 16 layers of dy W + scale * ds A, in one pass.
 * partials:       partials [ceil(rows / chunk_rows), rank, cols] = c^T x over each chunk of rows, c [rows, rank] fp32;
 *                 and the sums of x and c over the chunk, x_sums [.., cols] and c_sums [.., rank], where not null.
 * reduce:         out [rank, cols] (any steps) = scale * the sum of the chunks, added to out if `accumulate`.
 * add needs `s`: rows * rank floats. */
typedef struct lt_cuda_low_rank_layer {
    const void *dy, *weight; /* [rows, outputs], [outputs, inputs] */
    int64_t dy_stride, weight_stride;
    const float *ds, *a; /* [rows, rank], [rank, inputs] */
    int64_t ds_stride, a_stride;
    int64_t outputs, rank;
    float scale;
} lt_cuda_low_rank_layer;

LT_API int lt_cuda_low_rank_merge(int dtype, const void *weight, int64_t weight_stride, const float *a,
                                  int64_t a_stride, const float *b, int64_t b_stride, float *out, int64_t out_stride,
                                  int64_t outputs, int64_t inputs, int64_t rank, float scale, void *stream);
LT_API int lt_cuda_low_rank_project(int dtype, const void *x, int64_t x_stride, const float *p, int64_t p_input_step,
                                    int64_t p_rank_step, float *s, int64_t s_stride, int64_t rows, int64_t inputs,
                                    int64_t rank, void *stream);
LT_API int lt_cuda_low_rank_linear(int dtype, const void *x, int64_t x_stride, const void *weight,
                                   int64_t weight_stride, const void *bias, const float *s, int64_t s_stride,
                                   const float *b, int64_t b_stride, void *y, int64_t y_stride, int64_t rows,
                                   int64_t inputs, int64_t outputs, int64_t rank, float scale, void *stream);
LT_API int lt_cuda_low_rank_input_gradient(int dtype, const lt_cuda_low_rank_layer *layers, int64_t count, void *dx,
                                           int64_t dx_stride, int64_t rows, int64_t inputs, void *stream);
LT_API int lt_cuda_low_rank_add(int dtype, const void *x, int64_t x_stride, const float *p, int64_t p_input_step,
                                int64_t p_rank_step, const float *q, int64_t q_rank_step, int64_t q_output_step,
                                void *y, int64_t y_stride, int64_t rows, int64_t inputs, int64_t rank, int64_t outputs,
                                float scale, float *s, void *stream);
LT_API int lt_cuda_low_rank_partials(int dtype, const float *c, int64_t c_stride, const void *x, int64_t x_stride,
                                     float *partials, float *x_sums, float *c_sums, int64_t rows, int64_t chunk_rows,
                                     int64_t rank, int64_t cols, void *stream);
LT_API int lt_cuda_low_rank_reduce(const float *partials, int64_t chunks, int64_t chunk_stride, float *out,
                                   int64_t out_rank_step, int64_t out_col_step, int64_t rank, int64_t cols, float scale,
                                   int accumulate, void *stream);

/* ---- Bottleneck adapter -------------------------------------------------------------------------------------------
 * y = x + scale * (act(x D^T + down_bias) U^T + up_bias) with fp32 D = down [rank, hidden] and U = up [hidden, rank],
 * dense; biases may be null; `activation` is an enum lt_activation. Backward forms the activation again; null dx,
 * ddown, ddown_bias, dup or dup_bias (fp32, dense) skips it. y and dx must not be an input. */
LT_API int lt_bottleneck_forward(int dtype, const void *x, int64_t x_stride, const float *down, const float *down_bias,
                                 const float *up, const float *up_bias, float scale, int activation, void *y,
                                 int64_t y_stride, int64_t rows, int64_t hidden, int64_t rank);
LT_API int lt_bottleneck_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                  const float *down, const float *down_bias, const float *up, float scale,
                                  int activation, void *dx, int64_t dx_stride, float *ddown, float *ddown_bias,
                                  float *dup, float *dup_bias, int64_t rows, int64_t hidden, int64_t rank);

/* rank is 1 to 256. Scratch: h and dz, rows * rank floats each; with c = ceil(rows / chunk_rows) sets of partial sums,
 * `partials`, c * (rank * hidden + max(rank, hidden)) floats. */
LT_API int lt_cuda_bottleneck_forward(int dtype, const void *x, int64_t x_stride, const float *down,
                                      const float *down_bias, const float *up, const float *up_bias, float scale,
                                      int activation, void *y, int64_t y_stride, int64_t rows, int64_t hidden,
                                      int64_t rank, void *stream);
LT_API int lt_cuda_bottleneck_backward(int dtype, const void *dy, int64_t dy_stride, const void *x, int64_t x_stride,
                                       const float *down, const float *down_bias, const float *up, float scale,
                                       int activation, void *dx, int64_t dx_stride, float *ddown, float *ddown_bias,
                                       float *dup, float *dup_bias, int64_t rows, int64_t hidden, int64_t rank,
                                       float *h, float *dz, float *partials, int64_t chunk_rows, void *stream);

/* ---- NF4 weights --------------------------------------------------------------------------------------------------
 * 4-bit NormalFloat (QLoRA) of a dense array of `size` elements, in blocks of 64: absmax [ceil(size / 64)] is a block's
 * largest magnitude, codes [ceil(size / 2)] hold two elements a byte, the first in the high half: the number of
 * midpoints of the code book that element * (1 / absmax) exceeds. A block below 2^-126 becomes zeros, one with a NaN or
 * an infinity NaN.
 * quantise_absmax: absmax - offset in 8 bits of the signed dynamic code book, a scale for each 256 blocks. Readers take
 * absmax, or where it is null absmax_codes [ceil(size / 64)], absmax_scales [ceil(size / 16384)] and absmax_offset [1].
 * dequantise: `reused` says that out is memory written before; a large one is then stored past the caches, which is
 * faster, but slower for pages that the system hands out, and so clears, at the first touch.
 * linear: y [rows, outputs] = x [rows, inputs] W^T + bias (null: none) for few rows; inputs is a multiple of 64. */
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
 * linear: y [rows, outputs] = x [rows, inputs] W^T + bias (null: none) for few rows. */
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
 * see int8_quantise and int8_dequantise. */
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
