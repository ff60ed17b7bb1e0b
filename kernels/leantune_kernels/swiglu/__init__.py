"""SwiGLU: h = silu(gate) * up with silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv:2002.05202).

Shapes: T rows (tokens), I columns (intermediate size). gate, up, h [T, I].
"""

from __future__ import annotations

import torch

from leantune_kernels.checks import expect, expect_dims
from leantune_kernels.dispatch import Op

OP = Op(__name__)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`, both [..., I], differentiable in both.

    float32, bfloat16 or float16, any strides; the result is alike. ValueError if they differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)} and up is {up.dtype} {tuple(up.shape)}; "
            "they must have the same shape and dtype"
        )
    return _SwiGLU.apply(gate, up)


def forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """h for gate and up [T, I]; it goes to `out` where given (which may be gate or up).

    Raises ValueError for an up or out unlike gate.
    """
    expect_dims("gate", gate, "T", "I")
    expect("up", up, gate.shape, gate.dtype, gate.device)
    if out is not None:
        expect("out", out, gate.shape, gate.dtype, gate.device, written=True)
    return OP.pick(gate).forward(gate, up, out)


def backward_(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place, all [T, I]: dh becomes h, gate becomes d_gate, up becomes d_up; returns the three.

    Rows may be any distance apart (gate and up may be halves of a buffer); the last dimension is contiguous.
    Raises ValueError otherwise.
    """
    expect_dims("gate", gate, "T", "I")
    for name, value in (("dh", dh), ("gate", gate), ("up", up)):
        expect(name, value, gate.shape, gate.dtype, gate.device, written=True)
    OP.pick(gate).backward_(dh, gate, up)
    return dh, gate, up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        size = gate.shape[-1]
        return forward(gate.reshape(-1, size), up.reshape(-1, size)).view(gate.shape)

    @staticmethod
    def backward(ctx, dh):  # type: ignore[no-untyped-def]
        # Copies: dh may be used elsewhere, and the caller may go backward again with gate and up.
        dense = (t.clone(memory_format=torch.contiguous_format) for t in (dh, *ctx.saved_tensors))
        _, d_gate, d_up = backward_(*(t.view(-1, dh.shape[-1]) for t in dense))
        return d_gate.view(dh.shape), d_up.view(dh.shape)
