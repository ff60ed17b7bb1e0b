"""The 8-bit states in PyTorch: the code books as tensors, and numbers to codes and back.

The books and their formula are leantune_kernels.dynamic_code_books.
"""

from __future__ import annotations

from functools import cache

import torch

from leantune_kernels import dynamic_code_books as books
from leantune_kernels.dynamic_code_books import BLOCK, CELLS

__all__ = ["BLOCK", "CELLS", "book", "boundaries", "cells", "decode", "encode", "tables"]


def book(signed: bool) -> torch.Tensor:
    """The 256 entries, ascending, float32."""
    return torch.from_numpy(books.book(signed))


def boundaries(signed: bool) -> torch.Tensor:
    """Beyond which magnitude the next entry is nearer, float32."""
    return torch.from_numpy(books.boundaries(signed))


def cells(signed: bool) -> torch.Tensor:
    """int32 [CELLS], as dynamic_code_books describes them."""
    return torch.from_numpy(books.cells(signed))


@cache
def tables(device: torch.device) -> torch.Tensor:
    """Both books and both lists of cells as the kernels take them: int32 [2 * 256 + 2 * CELLS]."""
    return torch.from_numpy(books.tables()).to(device)


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
