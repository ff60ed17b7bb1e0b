// Embedding: rows of a table by id. Backward sums the rows of each id in the order of the tokens: `order` brings equal
// ids together, and the sorted sequence is cut into pieces of fixed size, so that one frequent id (padding, say) is
// many pieces' work and the sum is the same for any number of threads.
#include "kernel.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kTokensPerChunk = 32;
constexpr int64_t kPiece = 64; // sorted ids whose rows one thread adds up
constexpr int64_t kTableRowsPerChunk = 256;

// The row that is needed next lies anywhere; from its beginning on the processor then goes on by itself.
template <class T> void prefetch_row(const T *row, int64_t cols) {
    const int64_t bytes = cols * (int64_t)sizeof(T) < 2048 ? cols * (int64_t)sizeof(T) : 2048;
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch((const char *)row + at);
}

template <class T, class U> void copy_scaled(const T *x, float scale, U *y, int64_t cols) {
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        store(y + h, load(x + h) * scale);
    for (; h < cols; ++h)
        narrow(widen(x[h]) * scale, y + h);
}

template <class T> void copy_scaled(const T *x, float scale, T *y, int64_t cols) {
    if (scale == 1)
        memcpy((void *)y, x, (size_t)cols * sizeof(T));
    else
        copy_scaled<T, T>(x, scale, y, cols);
}

template <class T, class U> void add_scaled(const T *x, float scale, U *y, int64_t cols) {
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        store(y + h, load(y + h) + load(x + h) * scale);
    for (; h < cols; ++h)
        narrow(widen(y[h]) + widen(x[h]) * scale, y + h);
}

// Zeros past the cache: a table's gradient is far larger, and nobody reads it soon.
void stream_zeros(char *p, int64_t bytes) {
#if defined(__SSE2__)
    const int64_t head = (int64_t)(-(uintptr_t)p % 16) < bytes ? (int64_t)(-(uintptr_t)p % 16) : bytes;
    memset(p, 0, (size_t)head);
    p += head;
    bytes -= head;
    for (; bytes >= 16; p += 16, bytes -= 16)
        _mm_stream_si128((__m128i *)p, _mm_setzero_si128());
#endif
    memset(p, 0, (size_t)bytes);
}

template <class T> void add_row(const T *x, float *sum, int64_t cols) {
    int64_t h = 0;
    for (; h + W <= cols; h += W)
        store(sum + h, load(sum + h) + load(x + h));
    for (; h < cols; ++h)
        sum[h] += widen(x[h]);
}

// What the steps of the backward pass share. Sorted positions [begin, end) with one id are a run.
template <class T, class U> struct gradient {
    const T *dy;
    int64_t dy_stride;
    const int64_t *ids, *order;
    U *dweight;
    int64_t dweight_stride, tokens, vocabulary, cols;
    float scale;
    int64_t padding;
    bool accumulate;

    bool kept(int64_t id) const { return id >= 0 && id < vocabulary && id != padding; }

    int64_t run_end(int64_t begin, int64_t limit) const {
        int64_t end = begin + 1;
        while (end < limit && ids[end] == ids[begin])
            ++end;
        return end;
    }

    void sum_run(int64_t begin, int64_t end, float *sum) const {
        copy_scaled(dy + order[begin] * dy_stride, 1.0f, sum, cols);
        for (int64_t i = begin + 1; i < end; ++i)
            add_row(dy + order[i] * dy_stride, sum, cols);
    }

    template <class S> void write(int64_t id, const S *sum) const {
        U *row = dweight + id * dweight_stride;
        if (accumulate)
            add_scaled(sum, scale, row, cols);
        else
            copy_scaled(sum, scale, row, cols);
    }

    // A piece writes the runs that lie within it; of one that reaches beyond, its part goes to `first` where the run
    // began in an earlier piece, to `last` where it goes on in the next alone.
    void piece(int64_t number, float *first, float *last) const {
        const int64_t from = number * kPiece, to = from + kPiece < tokens ? from + kPiece : tokens;
        for (int64_t begin = from, end; begin < to; begin = end) {
            end = run_end(begin, to);
            if (!kept(ids[begin]))
                continue;
            if (begin == from && from > 0 && ids[from - 1] == ids[from]) {
                sum_run(begin, end, first);
            } else if (end == to && to < tokens && ids[to] == ids[begin]) {
                sum_run(begin, end, last);
            } else if (end == begin + 1) {
                write(ids[begin], dy + order[begin] * dy_stride);
            } else {
                sum_run(begin, end, last); // `last` is free until the piece's last run
                write(ids[begin], last);
            }
        }
    }

    // The run that begins in piece `number` and goes on: its parts, in order.
    void join(int64_t number, int64_t pieces, float *sums) const {
        const int64_t to = (number + 1) * kPiece;
        if (to >= tokens || ids[to - 1] != ids[to] || !kept(ids[to]))
            return;
        if (number > 0 && ids[number * kPiece - 1] == ids[to])
            return; // it began in an earlier piece
        float *sum = sums + (2 * number + 1) * cols;
        for (int64_t p = number + 1; p < pieces && ids[p * kPiece] == ids[to]; ++p)
            add_row(sums + 2 * p * cols, sum, cols);
        write(ids[to], sum);
    }

    // Zeros in the rows [begin, end) of the table that no id names.
    void clear(int64_t begin, int64_t end) const {
        int64_t low = 0, high = tokens; // the first sorted id that is >= begin
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (ids[middle] < begin)
                low = middle + 1;
            else
                high = middle;
        }
        for (int64_t row = begin; row < end; ++row) {
            const bool named = low < tokens && ids[low] == row;
            while (low < tokens && ids[low] == row)
                ++low;
            if (!named || row == padding)
                stream_zeros((char *)(dweight + row * dweight_stride), cols * (int64_t)sizeof(U));
        }
#if defined(__SSE2__)
        _mm_sfence(); // before another thread adds to the rows beside
#endif
    }
};

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(embedding_forward,
          (int dtype, const void *weight_, int64_t weight_stride, const int64_t *ids, int y_dtype, void *y_,
           int64_t y_stride, int64_t tokens, int64_t vocabulary, int64_t cols, float scale),
          (dtype, weight_, weight_stride, ids, y_dtype, y_, y_stride, tokens, vocabulary, cols, scale)) {
    using namespace lt::LT_ISA;
    for (int64_t t = 0; t < tokens; ++t)
        if (ids[t] < 0 || ids[t] >= vocabulary)
            return lt::fail(LT_INVALID, "embedding_forward: ids[%lld] = %lld is outside [0, %lld)", (long long)t,
                            (long long)ids[t], (long long)vocabulary);
    return with_dtype(dtype, "weight", [&](auto t) {
        return with_dtype(y_dtype, "y", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const T *weight = static_cast<const T *>(weight_);
            U *y = static_cast<U *>(y_);
            parallel_for(tokens, kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    if (t + 1 < tokens)
                        prefetch_row(weight + ids[t + 1] * weight_stride, cols);
                    copy_scaled(weight + ids[t] * weight_stride, scale, y + t * y_stride, cols);
                }
            });
            return (int)LT_OK;
        });
    });
}

LT_DEFINE(embedding_backward,
          (int dtype, const void *dy_, int64_t dy_stride, const int64_t *sorted_ids, const int64_t *order,
           int dweight_dtype, void *dweight_, int64_t dweight_stride, int64_t tokens, int64_t vocabulary, int64_t cols,
           float scale, int64_t padding_idx, int accumulate),
          (dtype, dy_, dy_stride, sorted_ids, order, dweight_dtype, dweight_, dweight_stride, tokens, vocabulary, cols,
           scale, padding_idx, accumulate)) {
    using namespace lt::LT_ISA;
    const int64_t pieces = (tokens + kPiece - 1) / kPiece;
    float *sums = static_cast<float *>(lt::thread_scratch((2 * pieces + 1) * cols * 4));
    if (!sums)
        return lt::fail(LT_NO_MEMORY, "embedding_backward: no memory for %lld partial sums", (long long)(2 * pieces));
    return with_dtype(dtype, "dy", [&](auto t) {
        return with_dtype(dweight_dtype, "dweight", [&](auto u) {
            typedef decltype(t) T;
            typedef decltype(u) U;
            const gradient<T, U> g = {static_cast<const T *>(dy_),
                                      dy_stride,
                                      sorted_ids,
                                      order,
                                      static_cast<U *>(dweight_),
                                      dweight_stride,
                                      tokens,
                                      vocabulary,
                                      cols,
                                      scale,
                                      padding_idx,
                                      accumulate != 0};
            if (!accumulate)
                parallel_for(vocabulary, kTableRowsPerChunk,
                             [&](int64_t begin, int64_t end, int) { g.clear(begin, end); });
            parallel_for(pieces, 1, [&](int64_t begin, int64_t, int) {
                g.piece(begin, sums + 2 * begin * cols, sums + (2 * begin + 1) * cols);
            });
            parallel_for(pieces, 16, [&](int64_t begin, int64_t end, int) {
                for (int64_t p = begin; p < end; ++p)
                    g.join(p, pieces, sums);
            });
            return (int)LT_OK;
        });
    });
}
