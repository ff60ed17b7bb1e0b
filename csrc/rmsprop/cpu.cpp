// RMSprop over a list of tensors in one call: 20 bytes a parameter in fp32, and 8 for each of momentum and centering.
#include "tensor_list.h"

namespace lt {
namespace LT_ISA {
namespace {

struct rmsprop_numbers {
    float grad_scale, weight_decay, lr, alpha, rest, eps, momentum; // rest = 1 - alpha
};

LT_INLINE void update_lanes(vf *p, vf g, vf *v, vf *b, vf *a, bool centered, const rmsprop_numbers &u) {
    g = g * u.grad_scale + *p * u.weight_decay;
    *v = *v * u.alpha + g * u.rest * g;
    vf variance = *v;
    if (centered) {
        *a += (g - *a) * u.rest;
        variance -= *a * *a;
    }
    *b = *b * u.momentum + over_root(g, variance, 1.0f, u.eps);
    *p -= u.lr * *b;
}

// A null buffer: no momentum, and so 0 before the step; a null mean: not centered.
LT_INLINE void update_chunk(float *p, const float *g, float *v, float *b, float *a, int64_t n,
                            const rmsprop_numbers &u) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf p_i = load(p + i), v_i = load(v + i), b_i = b ? load(b + i) : vf{}, a_i = a ? load(a + i) : vf{};
        update_lanes(&p_i, load(g + i), &v_i, &b_i, &a_i, a != nullptr, u);
        store(p + i, p_i);
        store(v + i, v_i);
        if (b)
            store(b + i, b_i);
        if (a)
            store(a + i, a_i);
    }
    const int64_t left = n - i;
    vf p_i = load_part(p + i, left), v_i = load_part(v + i, left);
    vf b_i = b ? load_part(b + i, left) : vf{}, a_i = a ? load_part(a + i, left) : vf{};
    update_lanes(&p_i, load_part(g + i, left), &v_i, &b_i, &a_i, a != nullptr, u);
    store_part(p + i, p_i, left);
    store_part(v + i, v_i, left);
    if (b)
        store_part(b + i, b_i, left);
    if (a)
        store_part(a + i, a_i, left);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(rmsprop,
          (const lt_parameter *list, int64_t tensors, double alpha, double eps, double momentum, double grad_scale,
           int64_t step, uint64_t seed),
          (list, tensors, alpha, eps, momentum, grad_scale, step, seed)) {
    using namespace lt::LT_ISA;
    return update_parameters("rmsprop", list, tensors, step, seed,
                             [&](const lt_parameter &t, float *p, const float *g, int64_t begin, int64_t n) {
                                 const rmsprop_numbers u = {(float)grad_scale, (float)t.weight_decay, (float)t.lr,
                                                            (float)alpha,      (float)(1 - alpha),    (float)eps,
                                                            (float)momentum};
                                 float *states[3];
                                 for (int k = 0; k < 3; ++k)
                                     states[k] = t.states[k] ? static_cast<float *>(t.states[k]) + begin : nullptr;
                                 update_chunk(p, g, states[0], states[1], states[2], n, u);
                             });
}
