"""Bottleneck adapter: y = x + scale * (act(x D^T + bd) U^T + bu), act relu, silu, gelu, gelu_tanh or linear.

Houlsby et al. 2019, arXiv:1902.00751. Shapes: T rows (tokens), H hidden size, r rank (at most 256). x, y [T, H]
float32, bfloat16 or float16; down D [r, H], up U [H, r], down_bias bd [r] and up_bias bu [H] float32. The hidden
activations [T, r] are never stored by the forward pass; the backward pass forms them again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import as_rows, expect, expect_dims, expect_rows
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"forward": Effects((4,)), "backward": Effects((5, 6, 7, 8, 9))})
# With the codes of enum lt_activation in leantune_kernels.h.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "linear": 4}
MOST_RANK = 256


class Weights(NamedTuple):
    """down [r, H], up [H, r], down_bias [r] and up_bias [H] or None; all float32."""

    down: torch.Tensor
    up: torch.Tensor
    down_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None


Gradients = tuple["torch.Tensor | None", ...]  # of x, then of each field of Weights (float32)


def bottleneck(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: str = "relu",
) -> torch.Tensor:
    """The adapter on `x` [..., H], differentiable in x and all weights; the result has x's shape and dtype.

    down [r, H], up [H, r], down_bias [r], up_bias [H]: float32, any strides. x: float32, bfloat16 or float16. Raises
    ValueError for what does not fit, and for r outside [1, 256].
    """
    expect_rows("x", x)
    weights = Weights(down, up, down_bias, up_bias)
    _check(as_rows(x), weights, activation)
    return call(_Bottleneck, x, scale, activation, *weights)


def forward(
    x: torch.Tensor, weights: Weights, scale: float, activation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y [T, H] for x [T, H]; it goes to `out` (not x) where given. Raises ValueError for what does not fit."""
    _check(x, weights, activation)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    expect("out", out, x.shape, x.dtype, x.device, written=True)
    OP.pick(x).forward(x, _dense(weights), scale, activation, out)
    return out


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    scale: float,
    activation: str,
    needs: tuple[bool, ...] = (True, True, True, False, False),
) -> Gradients:
    """Gradients of x [T, H] and, in float32, of each field of `weights`; None where `needs` (in that order) says so.

    dy [T, H] has x's dtype. Raises ValueError for what does not fit.
    """
    _check(x, weights, activation)
    expect("dy", dy, x.shape, x.dtype, x.device)
    down, up = weights[:2]
    shapes = (down.shape, up.shape, down.shape[:1], up.shape[:1])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    grads = [torch.empty(s, device=x.device) if n else None for s, n in zip(shapes, needs[1:], strict=True)]
    OP.pick(x).backward(dy, x, _dense(weights), scale, activation, dx, *grads)
    return dx, *grads


def _dense(weights: Weights) -> Weights:
    return Weights(*(None if w is None else w.contiguous() for w in weights))  # type: ignore[arg-type]


def _check(x: torch.Tensor, weights: Weights, activation: str) -> None:
    expect_dims("x", x, "T", "H")
    expect_dims("down", weights.down, "r", "H")
    size, rank = x.shape[1], weights.down.shape[0]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; use {', '.join(ACTIVATIONS)}")
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(f"rank={rank} is outside [1, {MOST_RANK}]; a wider adapter is two linear layers, use those")
    for name, value, shape in zip(
        Weights._fields, weights, ((rank, size), (size, rank), (rank,), (size,)), strict=True
    ):
        if value is not None:
            expect(name, value, shape, torch.float32, x.device)


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, activation, *tensors):  # type: ignore[no-untyped-def]
        flat = as_rows(x)
        save(ctx, flat, *tensors, exact=tensors)
        ctx.scale, ctx.activation = scale, activation
        return forward(flat, Weights(*tensors), scale, activation).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, *tensors = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        dx, *grads = backward(dy.reshape(x.shape), x, Weights(*tensors), ctx.scale, ctx.activation, needs)
        return None if dx is None else dx.view(dy.shape), None, None, *grads
