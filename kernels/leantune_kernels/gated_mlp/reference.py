"""The gated MLP in plain PyTorch: `plain` in its inputs' dtype, the others in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from leantune_kernels.gated_mlp import products
from leantune_kernels.glu import reference as glu


def plain(  # type: ignore[no-untyped-def]
    x, gate_weight, up_weight, down_weight, gate_bias=None, up_bias=None, down_bias=None, activation="silu"
):
    activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    }
    h = activations[activation](F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
    return F.linear(h, down_weight, down_bias)


def refuses(x: torch.Tensor) -> str | None:
    return None


def _float(weights):  # type: ignore[no-untyped-def]
    return type(weights)(*(None if w is None else w.float() for w in weights))


def forward(x, weights, activation):  # type: ignore[no-untyped-def]
    """gate and up are kept in x's dtype, as every implementation does."""
    y, gate, up = products.forward(glu, x.float(), _float(weights), activation)
    return y.to(x.dtype), gate.to(x.dtype), up.to(x.dtype)


def backward_(dy, x, gate, up, weights, activation, needs):  # type: ignore[no-untyped-def]
    wide_gate, wide_up = gate.float(), up.float()
    grads = products.backward_(glu, dy.float(), x.float(), wide_gate, wide_up, _float(weights), activation, needs)
    gate.copy_(wide_gate)
    up.copy_(wide_up)
    return tuple(None if g is None else g.to(x.dtype) for g in grads)
