// SGD with momentum over a list of tensors in one launch: 20 bytes a parameter in fp32, 12 without momentum.
#include "../common/tensor_list.cuh"

namespace lt_cuda {
namespace {

struct SgdNumbers {
    float momentum, share, grad_scale; // the share of the gradient in the buffer
    bool has_buffer, first, nesterov;  // first: what is in the buffer does not count
    int64_t step;
    uint64_t seed;
};

// budget: 80 registers, 0 bytes shared
// claims: LDG.E.128 STG.E.128
__global__ void __launch_bounds__(kListThreads)
    sgd_kernel(const lt_parameter *list, const lt_piece *pieces, SgdNumbers u) {
    const lt_piece piece = pieces[blockIdx.x];
    const lt_parameter &t = list[piece.tensor];
    if (!t.grad)
        return;
    const Span span = span_of(t, piece);
    const float lr = (float)t.lr, weight_decay = (float)t.weight_decay;
    float *const buffer = (float *)t.states[0];
    for_each_run(span, [&](int64_t i, int n) {
        float p[kRun], g[kRun], b[kRun] = {};
        load_value(t, i, n, span.aligned, p);
        load_run_of(t.grad, t.grad_dtype, i, n, span.aligned, g);
        if (u.has_buffer && !u.first)
            load_run(buffer, i, n, span.aligned, b);
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
            const float d = g[k] * u.grad_scale + p[k] * weight_decay;
            b[k] = b[k] * u.momentum + d * u.share;
            p[k] -= lr * (u.nesterov ? d + b[k] * u.momentum : b[k]);
        }
        if (u.has_buffer)
            store_run(buffer, i, n, span.aligned, b);
        store_value(t, piece.tensor, i, n, span.aligned, u.step, u.seed, p);
    });
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_sgd(const lt_parameter *list, const lt_piece *pieces, int64_t count, double momentum,
                                  double dampening, int nesterov, double grad_scale, int64_t step, uint64_t seed,
                                  void *stream) {
    using namespace lt_cuda;
    if (count == 0)
        return 0;
    const bool has_buffer = momentum != 0;
    const float share = has_buffer && step > 1 ? (float)(1.0 - dampening) : 1.0f;
    const SgdNumbers u = {(float)momentum, share, (float)grad_scale, has_buffer, step == 1, nesterov != 0, step, seed};
    return launch(sgd_kernel, dim3((unsigned)count), dim3(kListThreads), 0, stream, list, pieces, u);
}
