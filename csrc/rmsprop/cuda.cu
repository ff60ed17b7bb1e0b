// RMSprop over a list of tensors in one launch: 20 bytes a parameter in fp32, and 8 for each of momentum and centering.
#include "../common/tensor_list.cuh"

namespace lt_cuda {
namespace {

struct RmspropNumbers {
    float alpha, rest, eps, momentum, grad_scale; // rest = 1 - alpha
    int64_t step;
    uint64_t seed;
};

// budget: 96 registers, 0 bytes shared
// claims: LDG.E.128 STG.E.128
__global__ void __launch_bounds__(kListThreads)
    rmsprop_kernel(const lt_parameter *list, const lt_piece *pieces, RmspropNumbers u) {
    const lt_piece piece = pieces[blockIdx.x];
    const lt_parameter &t = list[piece.tensor];
    if (!t.grad)
        return;
    const Span span = span_of(t, piece);
    const float lr = (float)t.lr, weight_decay = (float)t.weight_decay;
    float *const squares = (float *)t.states[0], *const buffer = (float *)t.states[1];
    float *const mean = (float *)t.states[2];
    for_each_run(span, [&](int64_t i, int n) {
        float p[kRun], g[kRun], v[kRun], b[kRun] = {}, a[kRun] = {};
        load_value(t, i, n, span.aligned, p);
        load_run_of(t.grad, t.grad_dtype, i, n, span.aligned, g);
        load_run(squares, i, n, span.aligned, v);
        if (buffer)
            load_run(buffer, i, n, span.aligned, b);
        if (mean)
            load_run(mean, i, n, span.aligned, a);
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
            const float d = g[k] * u.grad_scale + p[k] * weight_decay;
            v[k] = v[k] * u.alpha + d * u.rest * d;
            a[k] = mean ? a[k] + (d - a[k]) * u.rest : 0.0f;
            b[k] = b[k] * u.momentum + d / (sqrtf(v[k] - a[k] * a[k]) + u.eps);
            p[k] -= lr * b[k];
        }
        store_run(squares, i, n, span.aligned, v);
        if (buffer)
            store_run(buffer, i, n, span.aligned, b);
        if (mean)
            store_run(mean, i, n, span.aligned, a);
        store_value(t, piece.tensor, i, n, span.aligned, u.step, u.seed, p);
    });
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_rmsprop(const lt_parameter *list, const lt_piece *pieces, int64_t count, double alpha,
                                      double eps, double momentum, double grad_scale, int64_t step, uint64_t seed,
                                      void *stream) {
    using namespace lt_cuda;
    if (count == 0)
        return 0;
    const RmspropNumbers u = {(float)alpha, (float)(1.0 - alpha), (float)eps, (float)momentum, (float)grad_scale, step,
                              seed};
    return launch(rmsprop_kernel, dim3((unsigned)count), dim3(kListThreads), 0, stream, list, pieces, u);
}
