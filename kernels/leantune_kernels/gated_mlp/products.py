"""The gated MLP around one implementation of the gated activation; the dense products are torch.mm's."""

from __future__ import annotations

from types import ModuleType

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def forward(glu: ModuleType, x, weights, activation):  # type: ignore[no-untyped-def]
    gate, up = linear(x, weights.gate, weights.gate_bias), linear(x, weights.up, weights.up_bias)
    h = glu.forward(gate, up, None, activation)
    return linear(h, weights.down, weights.down_bias), gate, up


def backward_(glu: ModuleType, dy, x, gate, up, weights, activation, needs):  # type: ignore[no-untyped-def]
    """The three widest tensors exist once: (dh, gate, up) becomes (h, d_gate, d_up) in place."""
    need_x, need_gate, need_up, need_down, *need_biases = needs
    h: torch.Tensor | None
    if need_x or need_gate or need_up or need_biases[0] or need_biases[1]:
        h = torch.mm(dy, weights.down)
        glu.backward_(h, gate, up, activation)
    else:
        h = glu.forward(gate, up, None, activation) if need_down else None
    dx = torch.mm(gate, weights.gate).addmm_(up, weights.up) if need_x else None
    return (
        dx,
        torch.mm(gate.t(), x) if need_gate else None,
        torch.mm(up.t(), x) if need_up else None,
        torch.mm(dy.t(), h) if need_down and h is not None else None,
        *(value.sum(0) if needed else None for value, needed in zip((gate, up, dy), need_biases, strict=True)),
    )
