"""Activations: GELU (exact and by tanh; Hendrycks and Gimpel 2016, arXiv:1606.08415) and SiLU, y = act(x).

silu(x) = x / (1 + e^-x); gelu(x) = x Phi(x) with the normal distribution function Phi; gelu_tanh(x) approximates it by
x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). Shapes: T rows, I columns. x, y [T, I].
"""

from __future__ import annotations

import torch

from leantune_kernels.autograd import call, once_differentiable
from leantune_kernels.checks import as_rows, changed, expect, expect_dims, expect_float
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"forward": Effects((2,), returns=True), "backward": Effects((3,), returns=True)})

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # the codes of enum lt_activation


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU of `x` [...], exact (`approximate="none"`) or by tanh ("tanh"), differentiable.

    float32, bfloat16 or float16, any strides; the result is alike. ValueError for another `approximate`.
    """
    expect_float("x", x)
    return call(_Activation, x, gelu_name(approximate))


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of `x` [...], differentiable. float32, bfloat16 or float16, any strides; the result is alike."""
    expect_float("x", x)
    return call(_Activation, x, "silu")


def forward(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """y for x [T, I] and an activation of ACTIVATIONS; it goes to `out` where given (which may be x).

    Raises ValueError for another activation, or an out unlike x.
    """
    check_activation(activation)
    expect_dims("x", x, "T", "I")
    if out is not None:
        expect("out", out, x.shape, x.dtype, x.device, written=True)
    y = OP.pick(x).forward(x, activation, out)
    changed(out)
    return y


def backward(dy: torch.Tensor, x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """dx = dy * act'(x), all [T, I]; it goes to `out` where given (which may be dy or x).

    Raises ValueError for an activation that is not of ACTIVATIONS, or a dy or out unlike x.
    """
    check_activation(activation)
    expect_dims("x", x, "T", "I")
    expect("dy", dy, x.shape, x.dtype, x.device)
    if out is not None:
        expect("out", out, x.shape, x.dtype, x.device, written=True)
    dx = OP.pick(x).backward(dy, x, activation, out)
    changed(out)
    return dx


def check_activation(activation: str) -> None:
    """ValueError unless it is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")


def gelu_name(approximate: str) -> str:
    """The activation that PyTorch's argument `approximate` means. ValueError for one that PyTorch does not know."""
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in names:
        raise ValueError(f"approximate={approximate!r} must be 'none' (exact) or 'tanh'")
    return names[approximate]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.activation = activation
        return forward(as_rows(x), activation).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return backward(as_rows(dy), as_rows(x), ctx.activation).view(x.shape), None
