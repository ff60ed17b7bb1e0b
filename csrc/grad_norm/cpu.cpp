// Sum of squares over a list of tensors: pieces of fixed size in fp32 lanes, their sums added in order in fp64.
#include "tensor_list.h"

namespace lt {
namespace LT_ISA {
namespace {

template <class T> double sum_of_squares(const T *x, int64_t n) {
    vf a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        const vf x0 = load(x + i), x1 = load(x + i + W), x2 = load(x + i + 2 * W), x3 = load(x + i + 3 * W);
        a += x0 * x0;
        b += x1 * x1;
        c += x2 * x2;
        d += x3 * x3;
    }
    for (; i < n; i += W) {
        const vf tail = load_part(x + i, n - i < W ? n - i : W);
        a += tail * tail;
    }
    return sum((a + b) + (c + d));
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(sum_of_squares,
          (int64_t tensors, const int64_t *sizes, const void *const *data, const int64_t *dtypes, double *result),
          (tensors, sizes, data, dtypes, result)) {
    using namespace lt::LT_ISA;
    int64_t all = tensors + 1;
    for (int64_t i = 0; i < tensors; ++i) {
        if (dtypes[i] < LT_F32 || dtypes[i] > LT_F16)
            return lt::fail(LT_INVALID, "sum_of_squares: dtypes[%lld] = %lld is none of LT_F32, LT_BF16, LT_F16",
                            (long long)i, (long long)dtypes[i]);
        all += (sizes[i] + kPiece - 1) / kPiece;
    }
    int64_t *first_piece = static_cast<int64_t *>(lt::thread_scratch(all * 8));
    if (!first_piece)
        return lt::fail(LT_NO_MEMORY, "sum_of_squares: no memory for a list of %lld tensors", (long long)tensors);
    double *sums = reinterpret_cast<double *>(first_piece + tensors + 1);
    const int64_t pieces = count_pieces(sizes, tensors, first_piece);
    parallel_for(pieces, 1, [&](int64_t number, int64_t, int) {
        const piece at = find_piece(sizes, tensors, first_piece, number);
        with_dtype((int)dtypes[at.tensor], "data", [&](auto t) {
            const decltype(t) *x = static_cast<const decltype(t) *>(data[at.tensor]);
            sums[number] = sum_of_squares(x + at.begin, at.end - at.begin);
            return (int)LT_OK;
        });
    });
    double total = 0;
    for (int64_t number = 0; number < pieces; ++number)
        total += sums[number];
    *result = total;
    return LT_OK;
}
