// SGD with momentum over a list of tensors in one call: 20 bytes a parameter in fp32, 12 without momentum.
#include "tensor_list.h"

namespace lt {
namespace LT_ISA {
namespace {

struct sgd_numbers {
    float grad_scale, weight_decay, lr, momentum, share; // the share of the gradient in the buffer
    bool has_buffer, first, nesterov;                    // first: what is in the buffer does not count
};

LT_INLINE void update_lanes(vf *p, vf g, vf *b, const sgd_numbers &u) {
    g = g * u.grad_scale + *p * u.weight_decay;
    *b = *b * u.momentum + g * u.share;
    *p -= u.lr * (u.nesterov ? g + *b * u.momentum : *b);
}

LT_INLINE void update_chunk(float *p, const float *g, float *b, int64_t n, const sgd_numbers &u) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf p_i = load(p + i), b_i = u.has_buffer && !u.first ? load(b + i) : vf{};
        update_lanes(&p_i, load(g + i), &b_i, u);
        store(p + i, p_i);
        if (u.has_buffer)
            store(b + i, b_i);
    }
    vf p_i = load_part(p + i, n - i), b_i = u.has_buffer && !u.first ? load_part(b + i, n - i) : vf{};
    update_lanes(&p_i, load_part(g + i, n - i), &b_i, u);
    store_part(p + i, p_i, n - i);
    if (u.has_buffer)
        store_part(b + i, b_i, n - i);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(sgd,
          (const lt_parameter *list, int64_t tensors, double momentum, double dampening, int nesterov,
           double grad_scale, int64_t step, uint64_t seed),
          (list, tensors, momentum, dampening, nesterov, grad_scale, step, seed)) {
    using namespace lt::LT_ISA;
    return update_parameters("sgd", list, tensors, step, seed,
                             [&](const lt_parameter &t, float *p, const float *g, int64_t begin, int64_t n) {
                                 const bool has_buffer = momentum != 0;
                                 const sgd_numbers u = {(float)grad_scale,
                                                        (float)t.weight_decay,
                                                        (float)t.lr,
                                                        (float)momentum,
                                                        has_buffer && step > 1 ? (float)(1.0 - dampening) : 1.0f,
                                                        has_buffer,
                                                        step == 1,
                                                        nesterov != 0};
                                 update_chunk(p, g, has_buffer ? static_cast<float *>(t.states[0]) + begin : nullptr, n,
                                              u);
                             });
}
