// AdamW over a list of tensors in one launch: 28 bytes a parameter in fp32, 22 in bf16 with stochastic rounding.
#include "update.cuh"

namespace lt_cuda {
namespace {

// budget: 80 registers, 0 bytes shared
// claims: LDG.E.128 STG.E.128
__global__ void __launch_bounds__(kListThreads, 3)
    adamw_kernel(const lt_parameter *list, const lt_piece *pieces, AdamwNumbers u) {
    const lt_piece piece = pieces[blockIdx.x];
    const lt_parameter &t = list[piece.tensor];
    if (!t.grad)
        return;
    const Span span = span_of(t, piece);
    const AdamwRates rates = adamw_rates(t, u);
    float *const states_m = (float *)t.states[0], *const states_v = (float *)t.states[1];
    for_each_run(span, [&](int64_t i, int n) {
        float p[kRun], g[kRun], m[kRun], v[kRun];
        load_value(t, i, n, span.aligned, p);
        load_run_of(t.grad, t.grad_dtype, i, n, span.aligned, g);
        load_run(states_m, i, n, span.aligned, m);
        load_run(states_v, i, n, span.aligned, v);
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            adamw_update(p[k], g[k], m[k], v[k], u, rates);
        store_run(states_m, i, n, span.aligned, m);
        store_run(states_v, i, n, span.aligned, v);
        store_value(t, piece.tensor, i, n, span.aligned, u.step, u.seed, p);
    });
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_adamw(const lt_parameter *list, const lt_piece *pieces, int64_t count, double beta1,
                                    double beta2, double eps, double grad_scale, int64_t step, uint64_t seed,
                                    void *stream) {
    using namespace lt_cuda;
    if (count == 0)
        return 0;
    return launch(adamw_kernel, dim3((unsigned)count), dim3(kListThreads), 0, stream, list, pieces,
                  adamw_numbers(beta1, beta2, eps, grad_scale, step, seed));
}
