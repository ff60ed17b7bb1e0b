// A list of tensors as one run of work: tensor after tensor is cut into pieces of at most kPiece elements, none of them
// across a boundary, so that many small tensors cost one parallel region and the pieces never depend on the threads.
#pragma once

#include "kernel.h"

namespace lt {
namespace LT_ISA {
namespace {

constexpr int64_t kPiece = 16384;

struct piece {
    int64_t tensor, begin, end; // elements [begin, end) of tensor number `tensor`
};

// Fills first_piece[0 .. tensors]: the number of the tensor's first piece; the last entry is the number of all pieces.
LT_INLINE int64_t count_pieces(const int64_t *sizes, int64_t tensors, int64_t *first_piece) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < tensors; ++i) {
        first_piece[i] = pieces;
        pieces += (sizes[i] + kPiece - 1) / kPiece;
    }
    first_piece[tensors] = pieces;
    return pieces;
}

LT_INLINE piece find_piece(const int64_t *sizes, int64_t tensors, const int64_t *first_piece, int64_t number) {
    int64_t low = 0, high = tensors; // the last tensor whose first piece is not beyond `number` is in [low, high)
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (first_piece[middle] <= number)
            low = middle;
        else
            high = middle;
    }
    const int64_t begin = (number - first_piece[low]) * kPiece;
    return {low, begin, sizes[low] - begin < kPiece ? sizes[low] : begin + kPiece};
}

} // namespace
} // namespace LT_ISA
} // namespace lt
