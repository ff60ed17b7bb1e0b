"""Dropout whose mask is a function of (seed, position), made again in the backward pass and never stored.

Element i, counted through x in row-major order, is kept where word e % 4 of Philox4x32-10 (Salmon et al., SC
2011) at counter e / 4 under key `seed`, e = offset + i, is at least round(p * 2^32). Every implementation
gives the same mask.
"""

from __future__ import annotations

import torch

from leantune_kernels.autograd import call, once_differentiable
from leantune_kernels.checks import changed, expect, expect_float
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"forward": Effects((5,), returns=True)})


def dropout(x: torch.Tensor, p: float, seed: int, offset: int) -> torch.Tensor:
    """`x` with each element set to 0 with probability `p`, the others times 1 / (1 - p); differentiable.

    x: float32, bfloat16 or float16, any shape and strides (copied where not contiguous); p = 0 returns x
    itself. Calls that must differ take different seeds, or offsets at least x.numel() apart. NaN and infinity
    are not hidden by a dropped position: they become NaN, as in PyTorch. Raises ValueError for p outside [0,
    1), a seed outside [0, 2^64) or an offset outside [0, 2^63).
    """
    check(p, seed, offset)
    expect_float("x", x)
    return x if p == 0 else call(_Dropout, x, p, seed, offset)


def forward(x: torch.Tensor, p: float, seed: int, offset: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Dropout of `x` into `out` (contiguous, of x's shape and dtype; may be x) where given.

    The backward pass is this same call on the upstream gradient.
    """
    check(p, seed, offset)
    if out is not None:
        expect("out", out, x.shape, x.dtype, x.device)
        if not out.is_contiguous():
            raise ValueError(f"out has strides {out.stride()} for shape {tuple(out.shape)}; it must be contiguous")
    y = OP.pick(x).forward(x, threshold(p), 1.0 / (1.0 - p), seed, offset, out)
    changed(out)
    return y


def threshold(p: float) -> int:
    """The smallest 32-bit word that keeps its element."""
    return min(round(p * 2**32), 2**32 - 1)


def check(p: float, seed: int, offset: int) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p={p} is outside [0, 1); it is the share of elements that are dropped")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside [0, 2^64)")
    if not 0 <= offset < 2**63:
        raise ValueError(f"offset={offset} is outside [0, 2^63)")


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed, offset):  # type: ignore[no-untyped-def]
        ctx.key = (p, seed, offset)
        return forward(x, p, seed, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dropout(dy, *ctx.key), None, None, None
