// Passes over a matrix whose elements are independent: cut into spans of at most kSpan elements of one row, so that one
// row of millions spreads over the threads as well as millions of short rows do.
#pragma once

#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kSpan = 4096;

// f(row, begin, end) for spans that cover every element once. A matrix that lies in one piece is passed as one row.
template <class F> void for_spans(int64_t rows, int64_t cols, bool in_one_piece, F f) {
    if (in_one_piece) {
        cols *= rows;
        rows = rows > 0;
    }
    const int64_t spans = (cols + kSpan - 1) / kSpan; // in a row
    const int64_t grain = spans > 1 ? 4 : cols > 0 ? (4 * kSpan + cols - 1) / cols : 1;
    parallel_for(rows * spans, grain, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = i / spans, begin = i % spans * kSpan;
            f(row, begin, begin + kSpan < cols ? begin + kSpan : cols);
        }
    });
}

} // namespace
} // namespace LT_ISA
} // namespace lt
