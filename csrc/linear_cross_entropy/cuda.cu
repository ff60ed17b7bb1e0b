// Cross-entropy and distillation of rows of logits on CUDA: a block has one row. It reads the row once, with a running
// maximum and sum for each thread, and keeps in shared memory what fits (57 thousand logits on sm_90, 40 thousand on
// sm_80; for distillation about half of that); what does not fit is read a second time, mostly from the second-level
// cache, when the gradient is written in its place.
#include "../common/cuda_kernel.cuh"

namespace lt_cuda {
namespace {

constexpr int kThreads = 1024;    // of cross-entropy, at most
constexpr int kPairThreads = 512; // of distillation, at most
constexpr int kAhead = 4;         // vectors that a thread loads together
constexpr int64_t kMaxGrid = 0x7fffffff;
constexpr float kLowest = -3.402823466e38f; // not -infinity: a thread with masked (-infinity) logits alone must give 0

// f(column, j) for the thread's vectors of a row: the numbers j < kAhead of one group first by `load`, then by `use`.
template <int N, class Load, class Use> __device__ void for_vectors(int64_t cols, Load load, Use use) {
    const int64_t step = (int64_t)blockDim.x * N;
    for (int64_t h = (int64_t)threadIdx.x * N; h < cols; h += kAhead * step) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
            if (h + j * step < cols)
                load(h + j * step, j);
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
            if (h + j * step < cols)
                use(h + j * step, j);
    }
}

// Part of a row in shared memory, each thread's own columns: no barrier is needed.
template <class T> struct Kept {
    T *columns;
    int64_t count;

    template <int N> __device__ void keep(int64_t h, const Vec<T, N> &v) {
        if (h < count)
            *(Vec<T, N> *)(columns + h) = v;
    }
    template <int N> __device__ void get(const T *row, int64_t h, Vec<T, N> &v) const {
        v = h < count ? *(const Vec<T, N> *)(columns + h) : load_vec<N>(row + h);
    }
};

// A running sum of exp((x - max) * inverse).
struct Exponentials {
    float max = kLowest, sum = 0;

    template <class T, int N> __device__ float raise(const Vec<T, N> &v) { // the new maximum's share of the old sums
        const float before = max;
#pragma unroll
        for (int i = 0; i < N; ++i)
            max = fmaxf(max, widen(v[i]));
        return before - max;
    }
};

__device__ inline float not_a_number() { return __uint_as_float(0x7fc00000u); }

// The gradient's scale for a row; NaN where its target is none.
__device__ inline float scale_of(const float *row_scale, float scale, int64_t row, bool known) {
    return !known ? not_a_number() : row_scale ? scale * row_scale[row] : scale;
}

// budget: 64 registers, 128 bytes shared, all dynamic
// claims: LDG.128 STG.128
template <int N>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_rows_kernel(float *logits, int64_t stride, const int64_t *targets, const float *row_scale,
                              float scale, float label_smoothing, float z_loss, int need_gradient, double *losses,
                              int64_t cols, int64_t held) {
    LT_DYNAMIC_SHARED(bytes);
    Kept<float> kept = {(float *)bytes, held};
    const int64_t row = blockIdx.x, target = targets[row];
    const bool known = target >= 0 && target < cols;
    float *x = logits + row * stride;
    const float target_logit = threadIdx.x == 0 && known ? x[target] : not_a_number();

    Exponentials of;
    float total = 0;
    Vec<float, N> v[kAhead];
    for_vectors<N>(
        cols, [&](int64_t h, int j) { v[j] = load_vec<N>((const float *)x + h); },
        [&](int64_t h, int j) {
            kept.keep(h, v[j]);
            of.sum *= expf(of.raise(v[j]));
#pragma unroll
            for (int i = 0; i < N; ++i) {
                of.sum += expf(v[j][i] - of.max);
                total += v[j][i];
            }
        });
    const float max = block_max<kThreads>(of.max), sum = block_sum<kThreads>(of.sum * expf(of.max - max));
    const float lse = max + logf(sum);
    if (label_smoothing != 0)
        total = block_sum<kThreads>(total);
    if (threadIdx.x == 0) {
        const float smoothing = label_smoothing != 0 ? label_smoothing * (total / (float)cols) : 0;
        losses[row] = lse - (1 - label_smoothing) * target_logit - smoothing + z_loss * lse * lse;
    }
    if (!need_gradient)
        return;
    const float mine = scale_of(row_scale, scale, row, known), factor = mine * (1 + 2 * z_loss * lse) / sum;
    const float uniform = mine * label_smoothing / (float)cols, at_target = mine * (1 - label_smoothing);
    for_vectors<N>(
        cols, [&](int64_t h, int j) { kept.get(x, h, v[j]); },
        [&](int64_t h, int j) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                v[j][i] = expf(v[j][i] - max) * factor - uniform - (h + i == target ? at_target : 0.0f);
            store_vec(x + h, v[j]);
        });
}

// Sums over a row of exp(x - max), exp((x - max) / T), e = exp((z - max) / T), and e (z - x) / T.
struct PairSums {
    Exponentials student, teacher; // student.sum is of exp((x - max) / T)
    float hard = 0, gap = 0;

    template <int N, class Z> __device__ void add(const Vec<float, N> &x, const Vec<Z, N> &z, float inverse) {
        const float x_falls = student.raise(x), shrink = expf(teacher.raise(z) * inverse);
        hard *= expf(x_falls);
        student.sum *= expf(x_falls * inverse);
        teacher.sum *= shrink;
        gap *= shrink;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            hard += expf(x[i] - student.max);
            student.sum += expf((x[i] - student.max) * inverse);
            const float e = expf((widen(z[i]) - teacher.max) * inverse);
            teacher.sum += e;
            gap += e == 0 ? 0.0f : e * ((widen(z[i]) - x[i]) * inverse); // a teacher's -infinity counts for nothing
        }
    }

    __device__ void over_block(float inverse) {
        const float x_max = block_max<kPairThreads>(student.max), z_max = block_max<kPairThreads>(teacher.max);
        const float shrink = expf((teacher.max - z_max) * inverse);
        hard = block_sum<kPairThreads>(hard * expf(student.max - x_max));
        student.sum = block_sum<kPairThreads>(student.sum * expf((student.max - x_max) * inverse));
        teacher.sum = block_sum<kPairThreads>(teacher.sum * shrink);
        gap = block_sum<kPairThreads>(gap * shrink);
        student.max = x_max;
        teacher.max = z_max;
    }
};

// budget: 96 registers, 64 bytes shared, all dynamic
// claims: LDG.128 STG.128
template <class Z, int N>
__global__ void __launch_bounds__(kPairThreads)
    distillation_rows_kernel(float *logits, int64_t stride, const Z *teacher, int64_t teacher_stride,
                             const int64_t *targets, const float *row_scale, float scale, float alpha,
                             float temperature, int need_gradient, double *losses, int64_t cols, int64_t held) {
    LT_DYNAMIC_SHARED(bytes);
    Kept<float> kept_x = {(float *)bytes, held};
    Kept<Z> kept_z = {(Z *)(bytes + held * sizeof(float)), held};
    const float hard = 1 - alpha, inverse = 1 / temperature;
    const int64_t row = blockIdx.x, target = hard != 0 ? targets[row] : -1;
    const bool known = hard == 0 || (target >= 0 && target < cols);
    float *x = logits + row * stride;
    const Z *z = teacher + row * teacher_stride;
    const float target_logit = threadIdx.x == 0 && target >= 0 && target < cols ? x[target] : not_a_number();

    PairSums of;
    Vec<float, N> u[kAhead];
    Vec<Z, N> v[kAhead];
    for_vectors<N>(
        cols,
        [&](int64_t h, int j) {
            u[j] = load_vec<N>((const float *)x + h);
            v[j] = load_vec<N>(z + h);
        },
        [&](int64_t h, int j) {
            kept_x.keep(h, u[j]);
            kept_z.keep(h, v[j]);
            of.add(u[j], v[j], inverse);
        });
    of.over_block(inverse);
    if (threadIdx.x == 0) {
        const float divergence = of.gap / of.teacher.sum + (of.student.max - of.teacher.max) * inverse +
                                 logf(of.student.sum) - logf(of.teacher.sum);
        const float label = hard != 0 ? hard * (of.student.max + logf(of.hard) - target_logit) : 0;
        losses[row] = alpha * temperature * temperature * divergence + label;
    }
    if (!need_gradient)
        return;
    const float mine = scale_of(row_scale, scale, row, known), soft = mine * alpha * temperature;
    const float at_target = mine * hard, of_hard = at_target / of.hard, of_soft = soft / of.student.sum;
    const float of_teacher = soft / of.teacher.sum;
    for_vectors<N>(
        cols,
        [&](int64_t h, int j) {
            kept_x.get(x, h, u[j]);
            kept_z.get(z, h, v[j]);
        },
        [&](int64_t h, int j) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float above = u[j][i] - of.student.max, taught = widen(v[j][i]) - of.teacher.max;
                float g = expf(above * inverse) * of_soft - expf(taught * inverse) * of_teacher;
                if (hard != 0)
                    g += expf(above) * of_hard - (h + i == target ? at_target : 0.0f);
                u[j][i] = g;
            }
            store_vec(x + h, u[j]);
        });
}

// Threads for a row: 16 columns each, 128 threads at least.
unsigned threads_for(int64_t cols, int most) {
    int64_t threads = 128;
    while (threads < most && threads * 16 < cols)
        threads *= 2;
    return (unsigned)threads;
}

// Columns of a row that shared memory can keep, in whole vectors; without a gradient, none need be.
int64_t columns_held(int64_t cols, int64_t bytes_each) {
    const int64_t all = ceil_div(cols, (int64_t)8) * 8, most = (max_shared_bytes() - 1024) / bytes_each / 8 * 8;
    return std::min(all, most);
}

} // namespace
} // namespace lt_cuda

extern "C" LT_API int lt_cuda_cross_entropy_rows(float *logits, int64_t stride, const int64_t *targets,
                                                 const float *row_scale, float scale, float label_smoothing,
                                                 float z_loss, int need_gradient, double *losses, int64_t rows,
                                                 int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (rows == 0)
        return 0;
    if (rows > kMaxGrid)
        return (int)cudaErrorInvalidValue;
    const bool whole = cols % 4 == 0 && aligned16(logits, stride * sizeof(float));
    const int64_t held = columns_held(need_gradient ? cols : 1, sizeof(float));
    return launch(whole ? cross_entropy_rows_kernel<4> : cross_entropy_rows_kernel<1>, dim3((unsigned)rows),
                  dim3(threads_for(cols, kThreads)), held * sizeof(float), stream, logits, stride, targets, row_scale,
                  scale, label_smoothing, z_loss, need_gradient, losses, cols, held);
}

extern "C" LT_API int lt_cuda_distillation_rows(float *logits, int64_t stride, int teacher_dtype, const void *teacher,
                                                int64_t teacher_stride, const int64_t *targets, const float *row_scale,
                                                float scale, float alpha, float temperature, int need_gradient,
                                                double *losses, int64_t rows, int64_t cols, void *stream) {
    using namespace lt_cuda;
    if (rows == 0)
        return 0;
    if (rows > kMaxGrid)
        return (int)cudaErrorInvalidValue;
    return with_dtype(teacher_dtype, [&](auto z) {
        using Z = decltype(z);
        constexpr int64_t kEach = sizeof(float) + sizeof(Z);
        const bool whole = cols % 4 == 0 && aligned16(logits, stride * sizeof(float)) &&
                           aligned16(teacher, teacher_stride * sizeof(Z));
        const int64_t held = columns_held(need_gradient ? cols : 1, kEach);
        return launch(whole ? distillation_rows_kernel<Z, 4> : distillation_rows_kernel<Z, 1>, dim3((unsigned)rows),
                      dim3(threads_for(cols, kPairThreads)), held * kEach, stream, logits, stride, (const Z *)teacher,
                      teacher_stride, targets, row_scale, scale, alpha, temperature, need_gradient, losses, cols, held);
    });
}
