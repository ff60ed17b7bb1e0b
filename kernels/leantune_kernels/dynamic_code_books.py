"""The two code books of block-wise 8-bit states, and the table by which kernels find the nearest entry at once.

Dynamic quantisation (Dettmers et al. 2022, arXiv:2110.02861, section 2; Dettmers 2016, arXiv:1511.04561): the numbers
from 10^-7 to 1 in seven decades, of which decade 10^(i - 7) to 10^(i - 6) is cut into 2^i equal parts, each stood for
by its middle, so that large numbers are exact to two digits and small ones still have a place. With 0, 1 and both signs
these are 256. Without signs each decade has twice as many parts, the sign's bit being free. Nothing here needs PyTorch.
"""

from __future__ import annotations

from functools import cache

import numpy as np

BLOCK = 256  # LT_CODE_BLOCK: elements that share one absolute maximum
CELLS = 2945  # LT_CELLS: numbers from 2^-23 to 1, and a little above, that share their upper 16 bits
_LOWEST_CELL = (127 - 23) << 7  # the upper 16 bits of 2^-23


def magnitudes(signed: bool) -> np.ndarray:
    """What stands for positive numbers, ascending, 0 and 1 included, float64: [129] of the signed book, else [256]."""
    parts = [2**i if signed else 2 ** (i + 1) for i in range(7)]
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(n) + 0.5) / n) for i, n in enumerate(parts)]
    return np.concatenate(([0.0], *middles, [1.0]))


def book(signed: bool) -> np.ndarray:
    """The 256 entries, ascending, float32."""
    positive = magnitudes(signed)
    return (np.concatenate((-positive[-2:0:-1], positive)) if signed else positive).astype(np.float32)


def boundaries(signed: bool) -> np.ndarray:
    """Beyond which magnitude the next entry is nearer, float32: one number less than `magnitudes`."""
    positive = magnitudes(signed)
    return ((positive[1:] + positive[:-1]) / 2).astype(np.float32)


def cells(signed: bool) -> np.ndarray:
    """int32 [CELLS]: rank of the cell's lowest number, and the lower 16 bits of the boundary inside, 2^16 - 1 if none.

    No cell holds two boundaries: a decade has at most 128 parts, and the cells are 2^-7 of a number.
    """
    edges = boundaries(signed)
    low = ((np.arange(CELLS + 1) + _LOWEST_CELL) << 16).astype(np.int32).view(np.float32)
    rank = np.searchsorted(edges, low)  # how many boundaries are below; a number on one belongs to the lower entry
    assert (rank[1:] - rank[:-1]).max() <= 1 and rank[0] == 0
    inside = rank[1:] > rank[:-1]
    offset = edges.view(np.int32)[np.minimum(rank[:-1], len(edges) - 1)] & 0xFFFF
    return (rank[:-1] << 16 | np.where(inside, offset, 0xFFFF)).astype(np.int32)


@cache
def tables() -> np.ndarray:
    """Both books and both lists of cells as the kernels take them: int32 [2 * 256 + 2 * CELLS]; not to be changed."""
    books = [book(signed).view(np.int32) for signed in (True, False)]
    return np.concatenate((*books, cells(True), cells(False)))
