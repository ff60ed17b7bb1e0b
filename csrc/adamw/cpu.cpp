// AdamW over a list of tensors in one call: each tensor is read and written once, 28 bytes a parameter in fp32.
#include "update.h"

LT_DEFINE(adamw,
          (const lt_parameter *list, int64_t tensors, double beta1, double beta2, double eps, double grad_scale,
           int64_t step, uint64_t seed),
          (list, tensors, beta1, beta2, eps, grad_scale, step, seed)) {
    using namespace lt::LT_ISA;
    return update_parameters("adamw", list, tensors, step, seed,
                             [&](const lt_parameter &t, float *p, const float *g, int64_t begin, int64_t n) {
                                 float *m = static_cast<float *>(t.states[0]) + begin,
                                       *v = static_cast<float *>(t.states[1]) + begin;
                                 update_chunk(p, g, m, v, n, numbers_of(t, beta1, beta2, eps, grad_scale, step));
                             });
}
