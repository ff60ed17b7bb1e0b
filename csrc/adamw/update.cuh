// AdamW's update of one element on CUDA, for moments that are kept in fp32 and for those that are kept in 8 bits.
#pragma once

#include "../common/tensor_list.cuh"

namespace lt_cuda {

struct AdamwNumbers { // the same for the whole list; rest = 1 - beta
    float rest1, beta2, rest2, eps, grad_scale, correction;
    double lr_factor;
    int64_t step;
    uint64_t seed;
};

inline AdamwNumbers adamw_numbers(double beta1, double beta2, double eps, double grad_scale, int64_t step,
                                  uint64_t seed) {
    return {(float)(1.0 - beta1),
            (float)beta2,
            (float)(1.0 - beta2),
            (float)eps,
            (float)grad_scale,
            (float)(1.0 / std::sqrt(1.0 - std::pow(beta2, (double)step))),
            1.0 / (1.0 - std::pow(beta1, (double)step)),
            step,
            seed};
}

struct AdamwRates { // of one tensor
    float decay, step_size;
};

__device__ inline AdamwRates adamw_rates(const lt_parameter &t, const AdamwNumbers &u) {
    return {(float)(1.0 - t.lr * t.weight_decay), (float)(t.lr * u.lr_factor)};
}

__device__ inline void adamw_update(float &p, float g, float &m, float &v, const AdamwNumbers &u,
                                    const AdamwRates &rates) {
    g *= u.grad_scale;
    m += (g - m) * u.rest1;
    v = v * u.beta2 + g * u.rest2 * g;
    p = p * rates.decay - rates.step_size * m / (sqrtf(v) * u.correction + u.eps);
}

} // namespace lt_cuda
