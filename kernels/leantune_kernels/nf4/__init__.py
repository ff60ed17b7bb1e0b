"""NF4 weights: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A weight of n elements is cut, in row-major order, into blocks of 64. Each block is divided by its largest magnitude
(absmax, float32) and each element becomes the number of the nearest of 16 values, two numbers a byte, the first in the
high half: 0.5625 bytes a weight. Double quantisation stores the absmax values, less their mean, in 8 bits with one
float32 scale for each 256 of them: 0.5159 bytes a weight.

Codes, absmax and the 8-bit absmax are laid out as bitsandbytes stores them (its `QuantState`: codes, `absmax`,
`state2.absmax` = scales, `offset`), so that its checkpoints and these share their bytes. Only rounding differs: a value
within an ulp of the middle between two codes may get the other one there, and here an 8-bit absmax is widened with one
rounding instead of two.

Exactly the same codes come from every implementation: element * (1 / absmax) in float32 gets the number of midpoints
(float32 means of neighbouring values) that it exceeds, so that of a tie the lower code is taken. A block of zeros, or
one whose absmax is below 2^-126, becomes zeros. A NaN or an infinity makes its whole block NaN; with double
quantisation the mean, and so the whole weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from leantune_kernels.autograd import call, once_differentiable
from leantune_kernels.checks import FLOATS, expect, expect_dims, expect_float, kind
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects
from leantune_kernels.nf4.reference import BLOCK, GROUP

OP = Op(
    __name__,
    effects={
        "quantise": Effects((1, 2)),
        "quantise_absmax": Effects((2, 3)),
        "dequantise": Effects((1,)),
        "linear": Effects((3,)),
    },
)

# Up to so many rows of x the product reads the codes itself; for more, dequantising pays. Measured on the C++
# implementation for 4096 x 4096 weights with AVX-512: even at 16 rows in bfloat16, beyond 32 in float32.
FUSED_ROWS = 16


@dataclass(frozen=True)
class NF4Weight:
    """A quantised weight of `shape`, whose values were of `dtype`; n elements, B = ceil(n / 64) blocks.

    codes: uint8 [ceil(n / 2)]. absmax: float32 [B], or uint8 [B] together with scales, float32 [ceil(B / 256)], and
    offset, float32 [].
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    scales: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in (self.codes, self.absmax, self.scales, self.offset) if t is not None)


def quantise(weight: torch.Tensor, double_quant: bool = True) -> NF4Weight:
    """`weight` (float32, bfloat16 or float16, any shape and strides) in NF4. Raises ValueError for other dtypes."""
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight is {weight.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    flat = weight.detach().reshape(-1)
    blocks = -(-flat.numel() // BLOCK)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    OP.pick(flat).quantise(flat, codes, absmax)
    scales = offset = None
    if double_quant:
        offset = absmax.double().mean().float() if blocks else absmax.new_zeros(())
        small, scales = torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(-(-blocks // GROUP))
        OP.pick(absmax).quantise_absmax(absmax, offset, small, scales)
        absmax = small
    return NF4Weight(codes, absmax, scales, offset, tuple(weight.shape), weight.dtype)


def dequantise(w: NF4Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values of `w` in `dtype` (None: that of out, else w.dtype), computed in float32 and rounded once.

    `out`, contiguous and of w.shape, takes them where given. Raises ValueError for what does not fit.
    """
    _check(w)
    if dtype is None:
        dtype = w.dtype if out is None else out.dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    reused = out is not None
    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=w.codes.device)
    expect("out", out, w.shape, dtype, w.codes.device)
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()} for shape {tuple(out.shape)}; it must be contiguous")
    OP.pick(out).dequantise(w, out, reused)
    return out


def linear(
    x: torch.Tensor, w: NF4Weight, bias: torch.Tensor | None = None, buffer: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias for `x` [..., K], W [N, K] the values of `w`; differentiable in x and bias, w is frozen.

    x: float32, bfloat16 or float16, any strides; bias [N] has its dtype, as has the result [..., N]. At most FUSED_ROWS
    rows, where K is a multiple of 64: read the codes directly, in float32. Otherwise, and in the backward pass, W is
    dequantised to x's dtype into `buffer` ([N, K], contiguous; a fresh one where None) for a dense product; layers may
    share the buffer. Raises ValueError for what does not fit.
    """
    expect_float("x", x)
    _check(w)
    if len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and w {w.shape}; they must be [..., K] and [N, K]")
    expect("x", x, x.shape, x.dtype, w.codes.device)
    if bias is not None:
        expect("bias", bias, w.shape[:1], x.dtype, x.device)
    if buffer is not None:
        expect("buffer", buffer, w.shape, x.dtype, x.device)
    return call(_Linear, x, w, bias, buffer)


def fused_linear(x: torch.Tensor, w: NF4Weight, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """`linear` of x [T, K], K a multiple of 64, by the product that reads the codes, into out [T, N]; no autograd."""
    expect_dims("x", x, "T", "K")
    if w.shape[1] % BLOCK:
        raise ValueError(f"w has {w.shape[1]} columns; reading its codes directly needs a multiple of {BLOCK}")
    expect("out", out, (x.shape[0], w.shape[0]), x.dtype, x.device, written=True)
    OP.pick(x).linear(x, w, bias, out)
    return out


def _check(w: NF4Weight) -> None:
    """The kernels take w's sizes from its shape, so its tensors must hold as much."""
    if not isinstance(w, NF4Weight):
        raise TypeError(f"w is {kind(w)}; pass nf4.quantise(weight)")
    blocks = -(-w.numel // BLOCK)
    device = w.codes.device
    expect("w.codes", w.codes, (-(-w.numel // 2),), torch.uint8, device)
    expect("w.absmax", w.absmax, (blocks,), torch.float32 if w.scales is None else torch.uint8, device)
    if w.scales is not None:
        expect("w.scales", w.scales, (-(-blocks // GROUP),), torch.float32, device)
        if w.offset is None:
            raise ValueError("w.offset is None; with w.scales it is the mean of the absmax values, float32 []")
        expect("w.offset", w.offset, (), torch.float32, device)
    for name, value in (("codes", w.codes), ("absmax", w.absmax), ("scales", w.scales)):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"w.{name} has strides {value.stride()}; it must be contiguous")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, buffer):  # type: ignore[no-untyped-def]
        ctx.w, ctx.buffer = w, buffer
        flat = x.reshape(-1, x.shape[-1])
        if 0 < flat.shape[0] <= FUSED_ROWS and w.shape[1] % BLOCK == 0:
            y = fused_linear(flat, w, bias, x.new_empty(flat.shape[0], w.shape[0]))
        else:
            y = torch.nn.functional.linear(flat, dequantise(w, x.dtype, buffer), bias)
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, dequantise(ctx.w, dy.dtype, ctx.buffer))
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(tuple(range(dy.dim() - 1)))
        return dx, None, dbias, None
