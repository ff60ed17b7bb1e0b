// AdamW over a list of tensors in one call: 28 bytes of memory traffic a parameter, each tensor read and written once.
#include "tensor_list.h"

namespace lt {
namespace LT_ISA {
namespace {

// What one tensor's update needs, from its learning rate and decay and the step's bias corrections.
struct update {
    float rest1, beta2, rest2, eps, grad_scale, decay, step_size, inverse_correction; // rest = 1 - beta, from doubles
};

LT_INLINE vf vsqrt(vf x) {
    for (int i = 0; i < W; ++i)
        x[i] = __builtin_sqrtf(x[i]);
    return x;
}

LT_INLINE void update_lanes(vf *p, vf g, vf *m, vf *v, const update &u) {
    g *= u.grad_scale;
    *m += (g - *m) * u.rest1;
    *v = *v * u.beta2 + g * g * u.rest2;
    *p = *p * u.decay - u.step_size * *m / (vsqrt(*v) * u.inverse_correction + u.eps);
}

template <class G> void update_piece(float *p, const G *g, float *m, float *v, int64_t n, const update &u) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf p_i = load(p + i), m_i = load(m + i), v_i = load(v + i);
        update_lanes(&p_i, load(g + i), &m_i, &v_i, u);
        store(p + i, p_i);
        store(m + i, m_i);
        store(v + i, v_i);
    }
    vf p_i = load_part(p + i, n - i), m_i = load_part(m + i, n - i), v_i = load_part(v + i, n - i);
    update_lanes(&p_i, load_part(g + i, n - i), &m_i, &v_i, u);
    store_part(p + i, p_i, n - i);
    store_part(m + i, m_i, n - i);
    store_part(v + i, v_i, n - i);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(adamw,
          (int64_t tensors, const int64_t *sizes, float *const *params, const void *const *grads,
           const int64_t *grad_dtypes, float *const *exp_avgs, float *const *exp_avg_sqs, const double *lr,
           const double *weight_decay, double beta1, double beta2, double eps, double grad_scale, int64_t step),
          (tensors, sizes, params, grads, grad_dtypes, exp_avgs, exp_avg_sqs, lr, weight_decay, beta1, beta2, eps,
           grad_scale, step)) {
    using namespace lt::LT_ISA;
    for (int64_t i = 0; i < tensors; ++i)
        if (grads[i] && (grad_dtypes[i] < LT_F32 || grad_dtypes[i] > LT_F16))
            return lt::fail(LT_INVALID, "adamw: grad_dtypes[%lld] = %lld is none of LT_F32, LT_BF16, LT_F16",
                            (long long)i, (long long)grad_dtypes[i]);
    int64_t *first_piece = static_cast<int64_t *>(lt::thread_scratch((tensors + 1) * 8));
    if (!first_piece)
        return lt::fail(LT_NO_MEMORY, "adamw: no memory for a list of %lld tensors", (long long)tensors);
    const double correction1 = 1.0 - __builtin_pow(beta1, (double)step);
    const double correction2 = 1.0 - __builtin_pow(beta2, (double)step);
    const int64_t pieces = count_pieces(sizes, tensors, first_piece);
    parallel_for(pieces, 1, [&](int64_t number, int64_t, int) {
        const piece at = find_piece(sizes, tensors, first_piece, number);
        const int64_t i = at.tensor;
        if (!grads[i])
            return;
        const update u = {(float)(1.0 - beta1),
                          (float)beta2,
                          (float)(1.0 - beta2),
                          (float)eps,
                          (float)grad_scale,
                          (float)(1.0 - lr[i] * weight_decay[i]),
                          (float)(lr[i] / correction1),
                          (float)(1.0 / __builtin_sqrt(correction2))};
        with_dtype((int)grad_dtypes[i], "grad", [&](auto t) {
            const decltype(t) *g = static_cast<const decltype(t) *>(grads[i]);
            update_piece(params[i] + at.begin, g + at.begin, exp_avgs[i] + at.begin, exp_avg_sqs[i] + at.begin,
                         at.end - at.begin, u);
            return (int)LT_OK;
        });
    });
    return LT_OK;
}
