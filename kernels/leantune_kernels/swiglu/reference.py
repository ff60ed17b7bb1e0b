"""SwiGLU in plain PyTorch: `plain` is the formula in its inputs' dtype, the others are fp32 inside."""

from __future__ import annotations

import torch


def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(gate, up, out=None):  # type: ignore[no-untyped-def]
    h = plain(gate.float(), up.float()).to(gate.dtype)
    return h if out is None else out.copy_(h)


def backward_(dh, gate, up):  # type: ignore[no-untyped-def]
    d, g, u = dh.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    results = silu * u, d * u * (sigmoid + silu * (1 - sigmoid)), d * silu
    for place, result in zip((dh, gate, up), results, strict=True):  # places may be inputs
        place.copy_(result)
