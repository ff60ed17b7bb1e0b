// Cross-entropy of rows of logits: loss, and the gradient in the logits' own place. The products with the head's weight
// are the caller's; this is all that happens between them.
#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

// A row is read twice: per block (which then sits in the nearest cache) the maximum and the exponentials relative to
// the running maximum, then one sweep that brings all blocks to the row's maximum and turns them into the gradient.
constexpr int64_t kBlock = 1024; // a multiple of W for every level
constexpr int64_t kMaxBlocks = 256;
constexpr int64_t kElementsPerChunk = 16384;
constexpr float kLowest = -3.402823466e38f; // not -infinity: a block of masked (-infinity) logits must give 0, not NaN

struct row_statistics {
    float block_max[kMaxBlocks]; // the running maximum that a block's exponentials are relative to
    float max;
    double sum_exp, sum; // sum over the row of exp(x - max), and of x where asked for
};

float block_maximum(const float *x, int64_t n) {
    vf a = splat(kLowest), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a = vmax(load(x + i), a);
        b = vmax(load(x + i + W), b);
    }
    for (; i + W <= n; i += W)
        a = vmax(load(x + i), a);
    float best = largest(vmax(a, b));
    for (; i < n; ++i)
        best = x[i] > best ? x[i] : best;
    return best;
}

float sum_of(const float *x, int64_t n) {
    vf total = {};
    int64_t i = 0;
    for (; i + W <= n; i += W)
        total += load(x + i);
    return sum(total + load_part(x + i, n - i));
}

// The sum of exp(x - max); with STORE the exponentials take x's place.
template <bool STORE> float exponentials(float *x, int64_t n, float max) {
    vf a = {}, b = {};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vf u = vexp(load(x + i) - max), v = vexp(load(x + i + W) - max);
        a += u;
        b += v;
        if (STORE) {
            store(x + i, u);
            store(x + i + W, v);
        }
    }
    for (; i < n; i += W) {
        const int64_t lanes = n - i < W ? n - i : W;
        vf u = vexp(load_part(x + i, lanes) - max);
        if (STORE)
            store_part(x + i, u, lanes);
        for (int64_t lane = lanes; lane < W; ++lane)
            u[lane] = 0;
        a += u;
    }
    return sum(a + b);
}

template <bool STORE> void first_sweep(float *x, int64_t cols, int64_t block, bool need_sum, row_statistics *row) {
    row->max = kLowest;
    row->sum_exp = row->sum = 0;
    for (int64_t begin = 0, b = 0; begin < cols; begin += block, ++b) {
        const int64_t n = cols - begin < block ? cols - begin : block;
        if (need_sum)
            row->sum += sum_of(x + begin, n);
        const float best = block_maximum(x + begin, n);
        if (best > row->max) {
            row->sum_exp *= __builtin_exp((double)row->max - best);
            row->max = best;
        }
        row->block_max[b] = row->max;
        row->sum_exp += exponentials<STORE>(x + begin, n, row->max);
    }
}

// x holds exp(x - block_max): gradient = exponential * factor - uniform.
void second_sweep(float *x, int64_t cols, int64_t block, const row_statistics *row, double factor, float uniform) {
    for (int64_t begin = 0, b = 0; begin < cols; begin += block, ++b) {
        const int64_t end = cols - begin < block ? cols : begin + block;
        const float f = (float)(factor * __builtin_exp((double)row->block_max[b] - row->max));
        int64_t i = begin;
        for (; i + W <= end; i += W)
            store(x + i, load(x + i) * f - uniform);
        for (; i < end; ++i)
            x[i] = x[i] * f - uniform;
    }
}

// Sums of a row for distillation, relative to the maxima of the student's logits x and the teacher's z: of exp(x -
// max), exp((x - max) / T), e = exp((z - max) / T), and e (z - x) / T.
struct pair_statistics {
    float x_max, z_max;
    double hard, soft, teacher, gap;

    void raise(float x, float z, double inverse) {
        if (x > x_max) {
            hard *= __builtin_exp((double)x_max - x);
            soft *= __builtin_exp(((double)x_max - x) * inverse);
            x_max = x;
        }
        if (z > z_max) {
            const double factor = __builtin_exp(((double)z_max - z) * inverse);
            teacher *= factor;
            gap *= factor;
            z_max = z;
        }
    }
};

template <class Z> float block_maximum_of(const Z *z, int64_t n) {
    vf best = splat(kLowest);
    int64_t i = 0;
    for (; i + W <= n; i += W)
        best = vmax(load(z + i), best);
    float result = largest(best);
    for (; i < n; ++i)
        result = widen(z[i]) > result ? widen(z[i]) : result;
    return result;
}

// A vector whose lanes from n on are -infinity, which counts for nothing in any of the sums.
template <class T> vf load_masked(const T *p, int64_t n) {
    vf v = load_part(p, n);
    for (int64_t lane = n; lane < W; ++lane)
        v[lane] = -__builtin_inff();
    return v;
}

template <class Z>
void pair_sweep(const float *x, const Z *z, int64_t cols, float inverse, bool hard, pair_statistics *row) {
    *row = {kLowest, kLowest, 0, 0, 0, 0};
    for (int64_t begin = 0; begin < cols; begin += kBlock) {
        const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
        row->raise(block_maximum(x + begin, n), block_maximum_of(z + begin, n), inverse);
        vf hard_sum = {}, soft_sum = {}, teacher_sum = {}, gap_sum = {};
        for (int64_t i = 0; i < n; i += W) {
            const bool whole = i + W <= n;
            const vf u = whole ? load(x + begin + i) : load_masked(x + begin + i, n - i);
            const vf v = whole ? load(z + begin + i) : load_masked(z + begin + i, n - i);
            if (hard)
                hard_sum += vexp(u - row->x_max);
            soft_sum += vexp((u - row->x_max) * inverse);
            const vf e = vexp((v - row->z_max) * inverse);
            teacher_sum += e;
            gap_sum += select(e == 0, vf{}, e * ((v - u) * inverse));
        }
        row->hard += sum(hard_sum);
        row->soft += sum(soft_sum);
        row->teacher += sum(teacher_sum);
        row->gap += sum(gap_sum);
    }
}

// x becomes hard exp(x - max) + soft exp((x - max) / T) - teacher exp((z - max) / T).
template <class Z>
void pair_gradient(float *x, const Z *z, int64_t cols, float inverse, const pair_statistics *row, float hard,
                   float soft, float teacher) {
    for (int64_t i = 0; i < cols; i += W) {
        const int64_t n = cols - i < W ? cols - i : W;
        const vf u = n == W ? load(x + i) : load_masked(x + i, n);
        const vf v = n == W ? load(z + i) : load_masked(z + i, n);
        vf g = vexp((u - row->x_max) * inverse) * soft - vexp((v - row->z_max) * inverse) * teacher;
        if (hard != 0)
            g += vexp(u - row->x_max) * hard;
        if (n == W)
            store(x + i, g);
        else
            store_part(x + i, g, n);
    }
}

int check_targets(const char *name, const int64_t *targets, int64_t rows, int64_t cols) {
    for (int64_t t = 0; t < rows; ++t)
        if (targets[t] < 0 || targets[t] >= cols)
            return lt::fail(LT_INVALID, "%s: targets[%lld] = %lld is outside [0, %lld)", name, (long long)t,
                            (long long)targets[t], (long long)cols);
    return LT_OK;
}

int64_t rows_per_chunk(int64_t cols) { return cols > 0 && cols < kElementsPerChunk ? kElementsPerChunk / cols : 1; }

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(cross_entropy_rows,
          (float *logits, int64_t stride, const int64_t *targets, const float *row_scale, float scale,
           float label_smoothing, float z_loss, int need_gradient, double *losses, int64_t rows, int64_t cols),
          (logits, stride, targets, row_scale, scale, label_smoothing, z_loss, need_gradient, losses, rows, cols)) {
    using namespace lt::LT_ISA;
    if (int status = check_targets("cross_entropy_rows", targets, rows, cols))
        return status;
    const int64_t per_block = (cols + kMaxBlocks - 1) / kMaxBlocks;
    const int64_t block = (per_block + kBlock - 1) / kBlock * kBlock;
    parallel_for(rows, rows_per_chunk(cols), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            float *x = logits + t * stride;
            const double target_logit = x[targets[t]];
            row_statistics row;
            if (need_gradient)
                first_sweep<true>(x, cols, block, label_smoothing != 0, &row);
            else
                first_sweep<false>(x, cols, block, label_smoothing != 0, &row);
            const double log_sum = row.max + __builtin_log(row.sum_exp);
            double loss = log_sum - (1.0 - label_smoothing) * target_logit + z_loss * log_sum * log_sum;
            if (label_smoothing != 0)
                loss -= label_smoothing * row.sum / (double)cols;
            losses[t] = loss;
            if (!need_gradient)
                continue;
            const double mine = (double)scale * (row_scale ? row_scale[t] : 1.0f);
            const double factor = mine * (1.0 + 2.0 * z_loss * log_sum) / row.sum_exp;
            second_sweep(x, cols, block, &row, factor, (float)(mine * label_smoothing / (double)cols));
            x[targets[t]] -= (float)(mine * (1.0 - label_smoothing));
        }
    });
    return LT_OK;
}

LT_DEFINE(distillation_rows,
          (float *logits, int64_t stride, int teacher_dtype, const void *teacher, int64_t teacher_stride,
           const int64_t *targets, const float *row_scale, float scale, float alpha, float temperature,
           int need_gradient, double *losses, int64_t rows, int64_t cols),
          (logits, stride, teacher_dtype, teacher, teacher_stride, targets, row_scale, scale, alpha, temperature,
           need_gradient, losses, rows, cols)) {
    using namespace lt::LT_ISA;
    const double hard = 1.0 - alpha, soft = (double)alpha * temperature;
    if (hard != 0)
        if (int status = check_targets("distillation_rows", targets, rows, cols))
            return status;
    const bool alike = temperature == 1; // both losses have the same exponentials
    const double inverse = 1.0 / temperature;
    return with_dtype(teacher_dtype, "teacher", [&](auto z_type) {
        typedef decltype(z_type) Z;
        parallel_for(rows, rows_per_chunk(cols), [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t) {
                float *x = logits + t * stride;
                const Z *z = static_cast<const Z *>(teacher) + t * teacher_stride;
                pair_statistics row;
                pair_sweep(x, z, cols, (float)inverse, hard != 0 && !alike, &row);
                const double hard_sum = alike ? row.soft : row.hard;
                const double divergence = row.gap / row.teacher + (row.x_max - (double)row.z_max) * inverse +
                                          __builtin_log(row.soft) - __builtin_log(row.teacher);
                losses[t] = soft * temperature * divergence;
                if (hard != 0)
                    losses[t] += hard * (row.x_max + __builtin_log(hard_sum) - x[targets[t]]);
                if (!need_gradient)
                    continue;
                const double mine = (double)scale * (row_scale ? row_scale[t] : 1.0f);
                const double of_soft = mine * soft / row.soft, of_hard = hard != 0 ? mine * hard / hard_sum : 0;
                pair_gradient(x, z, cols, (float)inverse, &row, (float)(alike ? 0 : of_hard),
                              (float)(alike ? of_soft + of_hard : of_soft), (float)(mine * soft / row.teacher));
                if (hard != 0)
                    x[targets[t]] -= (float)(mine * hard);
            }
        });
        return (int)LT_OK;
    });
}
