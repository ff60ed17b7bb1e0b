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

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(cross_entropy_rows,
          (float *logits, int64_t stride, const int64_t *targets, const float *row_scale, float scale,
           float label_smoothing, float z_loss, int need_gradient, double *losses, int64_t rows, int64_t cols),
          (logits, stride, targets, row_scale, scale, label_smoothing, z_loss, need_gradient, losses, rows, cols)) {
    using namespace lt::LT_ISA;
    for (int64_t t = 0; t < rows; ++t)
        if (targets[t] < 0 || targets[t] >= cols)
            return lt::fail(LT_INVALID, "cross_entropy_rows: targets[%lld] = %lld is outside [0, %lld)", (long long)t,
                            (long long)targets[t], (long long)cols);
    const int64_t per_block = (cols + kMaxBlocks - 1) / kMaxBlocks;
    const int64_t block = (per_block + kBlock - 1) / kBlock * kBlock;
    const int64_t grain = cols > 0 && cols < kElementsPerChunk ? kElementsPerChunk / cols : 1;
    parallel_for(rows, grain, [&](int64_t begin, int64_t end, int) {
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
