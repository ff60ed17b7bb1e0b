"""The two code books of block-wise 8-bit states, and the table by which kernels find the nearest entry at once.

Dynamic quantisation (Dettmers et al. 2022, arXiv:2110.02861, section 2; Dettmers 2016, arXiv:1511.04561): the numbers
from 10^-7 to 1 in seven decades, of which decade 10^(i - 7) to 10^(i - 6) is cut into 2^i equal parts, each stood for
by its middle, so that large numbers are exact to two digits and small ones still have a place. With 0, 1 and both signs
these are 256. Without signs each decade has twice as many parts, the sign's bit being free.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCK = 256  # LT_CODE_BLOCK: elements that share one absolute maximum
CELLS = 2945  # LT_CELLS: numbers from 2^-23 to 1, and a little above, that share their upper 16 bits
_LOWEST_CELL = (127 - 23) << 7  # the upper 16 bits of 2^-23


def magnitudes(signed: bool) -> torch.Tensor:
    """What stands for positive numbers, ascending, 0 and 1 included, float64: [129] of the signed book, else [256]."""
    parts = [2**i if signed else 2 ** (i + 1) for i in range(7)]
    middles = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (torch.arange(n, dtype=torch.float64) + 0.5) / n) for i, n in enumerate(parts)
    ]
    one = torch.ones(1, dtype=torch.float64)
    return torch.cat((0 * one, *middles, one))


def book(signed: bool) -> torch.Tensor:
    """The 256 entries, ascending, float32."""
    positive = magnitudes(signed)
    return (torch.cat((-positive[1:-1].flip(0), positive)) if signed else positive).float()


def boundaries(signed: bool) -> torch.Tensor:
    """Beyond which magnitude the next entry is nearer, float32: one number less than `magnitudes`."""
    positive = magnitudes(signed)
    return ((positive[1:] + positive[:-1]) / 2).float()


def cells(signed: bool) -> torch.Tensor:
    """int32 [CELLS]: rank of the cell's lowest number, and the lower 16 bits of the boundary inside, 2^16 - 1 if none.

    No cell holds two boundaries: a decade has at most 128 parts, and the cells are 2^-7 of a number.
    """
    edges = boundaries(signed)
    low = ((torch.arange(CELLS + 1) + _LOWEST_CELL) << 16).to(torch.int32).view(torch.float32)
    rank = torch.searchsorted(edges, low)  # how many boundaries are below; a number on one belongs to the lower entry
    assert int((rank[1:] - rank[:-1]).max()) <= 1 and int(rank[0]) == 0
    inside = rank[1:] > rank[:-1]
    offset = edges.view(torch.int32)[rank[:-1].clamp(max=len(edges) - 1)] & 0xFFFF
    return (rank[:-1] << 16 | torch.where(inside, offset, 0xFFFF)).to(torch.int32)


@cache
def tables(device: torch.device) -> torch.Tensor:
    """Both books and both lists of cells as the kernels take them: int32 [2 * 256 + 2 * CELLS]."""
    books = [book(signed).view(torch.int32) for signed in (True, False)]
    return torch.cat((*books, cells(True), cells(False))).to(device)


def decode(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """The numbers behind uint8 `codes`, flat, in absmax's dtype; absmax has one entry for each block of 256."""
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return book(signed).to(absmax)[codes.flatten().long()] * scale


def encode(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [n], absmax [blocks]) of `x`, flat: the nearest entry, towards zero where two are as near."""
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    inverse = torch.where(absmax >= 2.0**-126, 1 / absmax, 0.0)
    rank = torch.searchsorted(boundaries(signed).to(x), (blocks * inverse[:, None]).abs())
    if signed:
        rank = torch.where(blocks < 0, 127 - rank.clamp(max=127), 127 + rank)
    return rank.flatten()[: x.numel()].to(torch.uint8), absmax
