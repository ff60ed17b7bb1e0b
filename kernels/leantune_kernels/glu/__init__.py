"""Gated activations: h = act(gate) * up, SwiGLU and GeGLU exact and by tanh (Shazeer 2020, arXiv:2002.05202).

Shapes: T rows (tokens), I columns (intermediate size). gate, up, h [T, I]. act is silu, gelu or gelu_tanh, as in
`leantune_kernels.activation`.
"""

from __future__ import annotations

import torch

from leantune_kernels.activation import check_activation, gelu_name
from leantune_kernels.autograd import call, once_differentiable
from leantune_kernels.checks import as_rows, changed, expect, expect_dims, expect_float, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"forward": Effects((2,), returns=True), "backward_": Effects((0, 1, 2))})


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`, both [..., I], differentiable in both.

    float32, bfloat16 or float16, any strides; the result is alike. ValueError if they differ.
    """
    return _gated(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """gelu(`gate`) * `up`, both [..., I], exact (`approximate="none"`) or by tanh ("tanh"), differentiable in both.

    float32, bfloat16 or float16, any strides; the result is alike. ValueError if they differ, or for another
    `approximate`.
    """
    return _gated(gate, up, gelu_name(approximate))


def forward(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None, activation: str = "silu"
) -> torch.Tensor:
    """h for gate and up [T, I]; it goes to `out` where given (which may be gate or up).

    Raises ValueError for an up or out unlike gate, or an activation other than silu, gelu, gelu_tanh.
    """
    check_activation(activation)
    expect_dims("gate", gate, "T", "I")
    expect("up", up, gate.shape, gate.dtype, gate.device)
    if out is not None:
        expect("out", out, gate.shape, gate.dtype, gate.device, written=True)
    h = OP.pick(gate).forward(gate, up, out, activation)
    changed(out)
    return h


def backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_gate, d_up) in new memory, all [T, I]. ValueError for a dh or up unlike gate, or another activation."""
    check_activation(activation)
    expect_dims("gate", gate, "T", "I")
    for name, value in (("dh", dh), ("up", up)):
        expect(name, value, gate.shape, gate.dtype, gate.device)
    return OP.pick(gate).backward(dh, gate, up, activation)


def backward_(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place, all [T, I]: dh becomes h, gate becomes d_gate, up becomes d_up; returns the three.

    Rows may be any distance apart (gate and up may be halves of a buffer); the last dimension is contiguous.
    Raises ValueError otherwise, or for an activation other than silu, gelu, gelu_tanh.
    """
    check_activation(activation)
    expect_dims("gate", gate, "T", "I")
    for name, value in (("dh", dh), ("gate", gate), ("up", up)):
        expect(name, value, gate.shape, gate.dtype, gate.device, written=True)
    OP.pick(gate).backward_(dh, gate, up, activation)
    changed(dh, gate, up)
    return dh, gate, up


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    expect_float("gate", gate)
    expect_tensor("up", up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)} and up is {up.dtype} {tuple(up.shape)}; "
            "they must have the same shape and dtype"
        )
    return call(_GLU, gate, up, activation)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return forward(as_rows(gate), as_rows(up), activation=activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        d_gate, d_up = backward(as_rows(dh), as_rows(gate), as_rows(up), ctx.activation)
        return d_gate.view(dh.shape), d_up.view(dh.shape), None
