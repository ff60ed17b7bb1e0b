// AdamW's update of fp32 elements, for moments that are kept in fp32 and for those that are kept in 8 bits.
#pragma once

#include "tensor_list.h"

namespace lt {
namespace LT_ISA {
namespace {

// What one tensor's update needs, from its learning rate and decay and the step's bias corrections.
struct adamw_numbers {
    float rest1, beta2, rest2, eps, grad_scale, decay, step_size, inverse_correction; // rest = 1 - beta, from doubles
};

LT_INLINE void update_lanes(vf *p, vf g, vf *m, vf *v, const adamw_numbers &u) {
    g *= u.grad_scale;
    *m += (g - *m) * u.rest1;
    *v = *v * u.beta2 + g * u.rest2 * g;
    *p = *p * u.decay - over_root(u.step_size * *m, *v, u.inverse_correction, u.eps);
}

LT_INLINE void update_chunk(float *p, const float *g, float *m, float *v, int64_t n, const adamw_numbers &u) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        prefetch(p + i);
        prefetch(g + i);
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

// beta1, beta2, eps, grad_scale and the bias corrections are the whole list's, lr and weight_decay the tensor's.
LT_INLINE adamw_numbers numbers_of(const lt_parameter &t, double beta1, double beta2, double eps, double grad_scale,
                                   int64_t step) {
    const double correction1 = 1.0 - __builtin_pow(beta1, (double)step);
    const double correction2 = 1.0 - __builtin_pow(beta2, (double)step);
    return {(float)(1.0 - beta1),        (float)beta2,
            (float)(1.0 - beta2),        (float)eps,
            (float)grad_scale,           (float)(1.0 - t.lr * t.weight_decay),
            (float)(t.lr / correction1), (float)(1.0 / __builtin_sqrt(correction2))};
}

} // namespace
} // namespace LT_ISA
} // namespace lt
