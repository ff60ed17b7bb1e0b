"""int8 weights, one scale a row: weight-only quantisation by each output row's largest magnitude.

W [N, K] becomes codes int8 [N, K] and scales float32 [N], W about codes * scales: one byte a weight. The scheme is the
"vector-wise" one of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), for the weight alone; activations stay float.
bitsandbytes stores the same codes beside absmax = 127 * scale.

Every implementation gives the same codes: element * (127 / absmax) in float32, rounded to the nearest, ties to even. A
row of zeros, or one whose absmax is below 2^-119, becomes zeros; a row with a NaN or an infinity becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leantune_kernels.autograd import call, once_differentiable
from leantune_kernels.checks import FLOATS, expect, expect_dims, expect_float, kind
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"quantise": Effects((1, 2)), "dequantise": Effects((2,)), "linear": Effects((4,))})

# Up to so many rows of x the product reads the codes itself; for more, dequantising pays. Measured on the C++
# implementation for 4096 x 4096 weights with AVX-512: even at 16 rows in bfloat16, beyond 32 in float32.
FUSED_ROWS = 16


@dataclass(frozen=True)
class Int8Weight:
    """A quantised weight [N, K] that was of `dtype`: codes int8 [N, K], contiguous, and scales float32 [N]."""

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.scales.nbytes


def quantise(weight: torch.Tensor) -> Int8Weight:
    """`weight` [N, K] (float32, bfloat16 or float16, any strides) in int8. Raises ValueError for what it cannot be."""
    expect_dims("weight", weight, "N", "K")
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight is {weight.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    OP.pick(weight).quantise(weight.detach(), codes, scales)
    return Int8Weight(codes, scales, weight.dtype)


def dequantise(w: Int8Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values of `w` in `dtype` (None: that of out, else w.dtype), computed in float32 and rounded once.

    `out` [N, K] takes them where given; its rows may lie any distance apart. Raises ValueError for what does not fit.
    """
    _check(w)
    if dtype is None:
        dtype = w.dtype if out is None else out.dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    reused = out is not None
    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=w.codes.device)
    expect("out", out, w.shape, dtype, w.codes.device, written=True)
    OP.pick(out).dequantise(w.codes, w.scales, out, reused)
    return out


def linear(
    x: torch.Tensor, w: Int8Weight, bias: torch.Tensor | None = None, buffer: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias for `x` [..., K], W [N, K] the values of `w`; differentiable in x and bias, w is frozen.

    x: float32, bfloat16 or float16, any strides; bias [N] has its dtype, as has the result [..., N]. At most FUSED_ROWS
    rows read the codes directly, in float32. Otherwise, and in the backward pass, W is dequantised to x's dtype into
    `buffer` ([N, K]; a fresh one where None) for a dense product; layers may share the buffer. Raises ValueError for
    what does not fit.
    """
    expect_float("x", x)
    _check(w)
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and w {w.shape}; they must be [..., K] and [N, K]")
    expect("x", x, x.shape, x.dtype, w.codes.device)
    if bias is not None:
        expect("bias", bias, w.shape[:1], x.dtype, x.device)
    if buffer is not None:
        expect("buffer", buffer, w.shape, x.dtype, x.device, written=True)
    return call(_Linear, x, w, bias, buffer)


def fused_linear(x: torch.Tensor, w: Int8Weight, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """`linear` of x [T, K] by the product that reads the codes, into out [T, N]; no autograd."""
    expect_dims("x", x, "T", "K")
    expect("out", out, (x.shape[0], w.shape[0]), x.dtype, x.device, written=True)
    OP.pick(x).linear(x, w.codes, w.scales, bias, out)
    return out


def _check(w: Int8Weight) -> None:
    if not isinstance(w, Int8Weight):
        raise TypeError(f"w is {kind(w)}; pass int8.quantise(weight)")
    expect_dims("w.codes", w.codes, "N", "K")
    expect("w.codes", w.codes, w.shape, torch.int8, w.codes.device)
    expect("w.scales", w.scales, w.shape[:1], torch.float32, w.codes.device)
    for name, value in (("codes", w.codes), ("scales", w.scales)):
        if not value.is_contiguous():
            raise ValueError(f"w.{name} has strides {value.stride()}; it must be contiguous")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, buffer):  # type: ignore[no-untyped-def]
        ctx.w, ctx.buffer = w, buffer
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] <= FUSED_ROWS:
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
