// What the norms share: a row in passes, the residual that is added on the way in, partial sums of weight gradients.
#pragma once

#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

// Rows per partial sum of a weight's gradient: fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kRowsPerPartial = 64;
constexpr int64_t kRowsPerChunk = 16;

// Sum over a row of f, which gives a value (a vector's or a number's) for the element h on. f(h, float{}) is one
// element, f(h, vf{}) a whole vector: overloads of one function object, so that no lane is beyond the row.
template <class F> LT_INLINE float sum_over(int64_t cols, F f) {
    vf a = {}, b = {};
    int64_t h = 0;
    for (; h + 2 * W <= cols; h += 2 * W) {
        a += f(h, vf{});
        b += f(h + W, vf{});
    }
    float total = 0;
    for (; h + W <= cols; h += W)
        a += f(h, vf{});
    for (; h < cols; ++h)
        total += f(h, float{});
    return sum(a + b) + total;
}

// Two sums over a row in one pass: f(h, kind, a, b) adds to a and b, which have the kind's type.
struct two_sums {
    float a, b;
};
template <class F> LT_INLINE two_sums two_sums_over(int64_t cols, F f) {
    vf a = {}, b = {}, c = {}, d = {};
    int64_t h = 0;
    for (; h + 2 * W <= cols; h += 2 * W) {
        f(h, vf{}, a, b);
        f(h + W, vf{}, c, d);
    }
    for (; h + W <= cols; h += W)
        f(h, vf{}, a, b);
    float a_rest = 0, b_rest = 0;
    for (; h < cols; ++h)
        f(h, float{}, a_rest, b_rest);
    return {sum(a + c) + a_rest, sum(b + d) + b_rest};
}

// f(h, vf{}) for the whole vectors of a row, f(h, float{}) for the rest.
template <class F> LT_INLINE void for_row(int64_t cols, F f) {
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        f(h, vf{});
    for (; h < cols; ++h)
        f(h, float{});
}

// One vector or one element, by the type of the last argument.
template <class T> LT_INLINE vf get(const T *p, vf) { return load(p); }
template <class T> LT_INLINE float get(const T *p, float) { return widen(*p); }
template <class T> LT_INLINE void put(T *p, vf v) { store(p, v); }
template <class T> LT_INLINE void put(T *p, float v) { narrow(v, p); }

// s = x + residual, rounded to its storage type, which is what the norm is then taken of. s may be either of them.
template <class T> void add_rows(const T *x, const T *residual, T *s, int64_t cols) {
    for_row(cols, [=](int64_t h, auto kind) { put(s + h, get(x + h, kind) + get(residual + h, kind)); });
}

// total[h] = sum over the partial sums, in order.
inline void add_partials(const float *sums, int64_t partials, int64_t step, float *total, int64_t cols) {
    for_row(cols, [=](int64_t h, auto kind) {
        auto sum = kind; // zero
        for (int64_t p = 0; p < partials; ++p)
            sum += get(sums + p * step + h, kind);
        put(total + h, sum);
    });
}

} // namespace
} // namespace LT_ISA
} // namespace lt
