// Over a list of tensors: the sum of squares, by pieces of fixed size in fp32 lanes whose sums are added in order in
// fp64; and scaling in place.
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

template <class T> void scale(T *x, int64_t n, float by) {
    int64_t i = 0;
    for (; i + W <= n; i += W)
        store(x + i, load(x + i) * by);
    store_part(x + i, load_part(x + i, n - i) * by, n - i);
}

} // namespace
} // namespace LT_ISA
} // namespace lt

LT_DEFINE(sum_of_squares, (const lt_parameter *list, int64_t tensors, double *result), (list, tensors, result)) {
    using namespace lt::LT_ISA;
    if (const int status = check_grads("sum_of_squares", list, tensors))
        return status;
    int64_t all = tensors + 1;
    for (int64_t i = 0; i < tensors; ++i)
        all += (list[i].size + LT_PIECE - 1) / LT_PIECE;
    int64_t *first_piece = static_cast<int64_t *>(lt::thread_scratch(all * 8));
    if (!first_piece)
        return lt::fail(LT_NO_MEMORY, "sum_of_squares: no memory for a list of %lld tensors", (long long)tensors);
    double *sums = reinterpret_cast<double *>(first_piece + tensors + 1);
    const int64_t pieces = count_pieces(list, tensors, first_piece);
    parallel_for(pieces, 1, [&](int64_t number, int64_t, int) {
        const piece at = find_piece(list, tensors, first_piece, number);
        const lt_parameter &tensor = list[at.tensor];
        sums[number] = 0;
        if (tensor.grad)
            with_dtype((int)tensor.grad_dtype, "list", [&](auto t) {
                const decltype(t) *x = static_cast<const decltype(t) *>(tensor.grad);
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

// In place; a factor of exactly 1 changes nothing and costs nothing.
LT_DEFINE(scale, (const lt_parameter *list, int64_t tensors, const float *factor), (list, tensors, factor)) {
    using namespace lt::LT_ISA;
    if (const int status = check_grads("scale", list, tensors))
        return status;
    const float by = *factor;
    if (by == 1.0f)
        return LT_OK;
    int64_t *first_piece = static_cast<int64_t *>(lt::thread_scratch((tensors + 1) * 8));
    if (!first_piece)
        return lt::fail(LT_NO_MEMORY, "scale: no memory for a list of %lld tensors", (long long)tensors);
    const int64_t pieces = count_pieces(list, tensors, first_piece);
    parallel_for(pieces, 1, [&](int64_t number, int64_t, int) {
        const piece at = find_piece(list, tensors, first_piece, number);
        const lt_parameter &tensor = list[at.tensor];
        if (tensor.grad)
            with_dtype((int)tensor.grad_dtype, "list", [&](auto t) {
                scale(static_cast<decltype(t) *>(tensor.grad) + at.begin, at.end - at.begin, by);
                return (int)LT_OK;
            });
    });
    return LT_OK;
}
