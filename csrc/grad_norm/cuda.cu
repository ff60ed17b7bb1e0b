// Over a list of tensors: the sum of squares, a sum for each piece and then one block that adds them in order in fp64;
// and scaling in place by a factor that lies on the device, so that clipping never waits for the host.
#include "../common/tensor_list.cuh"

namespace lt_cuda {
namespace {

// budget: 48 registers, 32 bytes shared
// claims: LDG.E.128
__global__ void __launch_bounds__(kListThreads)
    grad_norm_sums_kernel(const lt_parameter *list, const lt_piece *pieces, double *sums) {
    const lt_piece piece = pieces[blockIdx.x];
    const lt_parameter &t = list[piece.tensor];
    const Span span = span_of(t, piece);
    float total = 0;
    if (t.grad)
        for_each_run(span, [&](int64_t i, int n) {
            float x[kRun];
            load_run_of(t.grad, t.grad_dtype, i, n, span.aligned, x);
#pragma unroll
            for (int k = 0; k < kRun; ++k)
                total += x[k] * x[k];
        });
    total = block_sum<kListThreads>(total);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = total;
}

// budget: 32 registers, 2 KiB shared
__global__ void __launch_bounds__(kListThreads)
    grad_norm_total_kernel(const double *sums, int64_t count, double *result) {
    LT_SHARED(double[kListThreads], of_thread);
    double total = 0;
    for (int64_t i = threadIdx.x; i < count; i += kListThreads)
        total += sums[i];
    of_thread[threadIdx.x] = total;
    for (int width = kListThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < width)
            of_thread[threadIdx.x] += of_thread[threadIdx.x + width];
    }
    if (threadIdx.x == 0)
        *result = of_thread[0];
}

// budget: 48 registers, 0 bytes shared
// claims: LDG.E.128 STG.E.128
__global__ void __launch_bounds__(kListThreads)
    grad_norm_scale_kernel(const lt_parameter *list, const lt_piece *pieces, const float *factor) {
    const float by = *factor;
    if (by == 1.0f)
        return;
    const lt_piece piece = pieces[blockIdx.x];
    const lt_parameter &t = list[piece.tensor];
    if (!t.grad)
        return;
    const Span span = span_of(t, piece);
    with_storage_type(t.grad_dtype, [&](auto type) {
        decltype(type) *const x = (decltype(type) *)t.grad;
        for_each_run(span, [&](int64_t i, int n) {
            float values[kRun];
            load_run(x, i, n, span.aligned, values);
#pragma unroll
            for (int k = 0; k < kRun; ++k)
                values[k] *= by;
            store_run(x, i, n, span.aligned, values);
        });
    });
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_sum_of_squares(const lt_parameter *list, const lt_piece *pieces, int64_t count,
                                             double *sums, double *result, void *stream) {
    using namespace lt_cuda;
    const dim3 threads(kListThreads);
    if (count > 0)
        if (int status = launch(grad_norm_sums_kernel, dim3((unsigned)count), threads, 0, stream, list, pieces, sums))
            return status;
    return launch(grad_norm_total_kernel, dim3(1), threads, 0, stream, sums, count, result);
}

extern "C" LT_API int lt_cuda_scale(const lt_parameter *list, const lt_piece *pieces, int64_t count,
                                    const float *factor, void *stream) {
    using namespace lt_cuda;
    if (count == 0)
        return 0;
    return launch(grad_norm_scale_kernel, dim3((unsigned)count), dim3(kListThreads), 0, stream, list, pieces, factor);
}
