"""Gated MLP: y = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, act silu, gelu or gelu_tanh; backward by hand.

Shazeer 2020, arXiv:2002.05202. Shapes: T rows (tokens), H hidden size, I intermediate size. x, y [T, H]; gate_weight
Wg and up_weight Wu [I, H]; down_weight Wd [H, I]; gate = x Wg^T + bg, up = x Wu^T + bu, h = act(gate) * up [T, I]. All
tensors of a call have one dtype: float32, bfloat16 or float16. The dense products are the vendor library's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import as_rows, changed, expect, expect_dims, expect_rows
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"backward_": Effects((2, 3), returns=True)})
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Weights(NamedTuple):
    """gate and up [I, H], down [H, I]; biases [I], [I] and [H], or None."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


Gradients = tuple["torch.Tensor | None", ...]  # of x, then of each field of Weights


def gated_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """The gated MLP of `x` [..., H], differentiable in everything; the result has x's shape and dtype.

    gate_weight and up_weight [I, H], down_weight [H, I], gate_bias and up_bias [I], down_bias [H]; any strides, all in
    x's dtype: under torch.autocast, which does not reach in here, cast them. Kept for the backward pass are x, gate and
    up; h is computed again. Raises ValueError for what does not fit.
    """
    expect_rows("x", x)
    weights = Weights(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    _check(as_rows(x), weights, activation)
    return call(_GatedMLP, x, activation, *weights)


def forward(
    x: torch.Tensor, weights: Weights, activation: str = "silu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [T, H], gate [T, I], up [T, I]) for x [T, H]. Raises ValueError for what does not fit."""
    _check(x, weights, activation)
    return OP.pick(x).forward(x, weights, activation)


def backward_(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    weights: Weights,
    activation: str = "silu",
    needs: tuple[bool, ...] = (True, False, False, False, False, False, False),
) -> Gradients:
    """Gradients of x and of each field of `weights`, None where `needs` (in that order) says so.

    dy [T, H]; gate and up [T, I] are overwritten by their gradients. Raises ValueError for what does not fit.
    """
    _check(x, weights, activation)
    expect("dy", dy, x.shape, x.dtype, x.device)
    for name, value in (("gate", gate), ("up", up)):
        expect(name, value, (x.shape[0], weights.gate.shape[0]), x.dtype, x.device, written=True)
    gradients = OP.pick(x).backward_(dy, x, gate, up, weights, activation, needs)
    changed(gate, up)
    return gradients


def _check(x: torch.Tensor, weights: Weights, activation: str) -> None:
    expect_dims("x", x, "T", "H")
    expect_dims("gate_weight", weights.gate, "I", "H")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; use {', '.join(ACTIVATIONS)}")
    wide, size = weights.gate.shape[0], x.shape[1]
    shapes: dict[str, tuple[int, ...]] = {"gate": (wide, size), "up": (wide, size), "down": (size, wide)}
    shapes |= {"gate_bias": (wide,), "up_bias": (wide,), "down_bias": (size,)}
    for (name, shape), value in zip(shapes.items(), weights, strict=True):
        if value is not None:
            expect(name if name.endswith("bias") else f"{name}_weight", value, shape, x.dtype, x.device)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, *tensors):  # type: ignore[no-untyped-def]
        flat, weights = as_rows(x), Weights(*tensors)
        y, gate, up = forward(flat, weights, activation)
        save(ctx, flat, gate, up, *tensors, exact=tensors)
        ctx.activation, ctx.overwritten = activation, False
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, gate, up, *tensors = ctx.saved_tensors
        weights = Weights(*tensors)
        if ctx.overwritten:  # by the first backward pass; this is a second one
            gate, up = forward(x, weights, ctx.activation)[1:]
        ctx.overwritten = True
        gate, up = gate.data, up.data  # a second pass may still ask for what was saved: changes go uncounted
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        dx, *rest = backward_(dy.reshape(x.shape), x, gate, up, weights, ctx.activation, needs)
        return None if dx is None else dx.view(dy.shape), None, *rest
