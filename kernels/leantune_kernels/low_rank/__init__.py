"""LoRA's low-rank products: y = x W^T + bias + scale * (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685).

Shapes: T rows (tokens), K inputs, N outputs, r rank. x [T, K]; dy, y [T, N]; weight [N, K]; A [r, K] and
B [N, r], both float32. x, dy and y are float32, bfloat16 or float16, alike within a call, rows any distance
apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from leantune_kernels.checks import expect, expect_dims
from leantune_kernels.dispatch import Op

OP = Op(__name__)


class Adapter(NamedTuple):
    """One adapter of a group whose layers share their input: its upstream gradient and its factors."""

    dy: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scale: float


Gradients = tuple[torch.Tensor, torch.Tensor]  # dA [r, K] and dB [N, r], float32


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """x W^T + bias + scale * (x A^T) B^T for `x` [..., K], differentiable in x, weight, bias, A and B.

    weight [N, K] and bias [N] have x's dtype; A [r, K] and B [N, r] are float32. Raises ValueError otherwise.
    """
    inputs = x.shape[-1]
    expect_dims("weight", weight, "N", "K")
    _check_factors(A, B, weight.shape[0], inputs, x.device)
    expect("weight", weight, (weight.shape[0], inputs), x.dtype, x.device)
    if bias is not None:
        expect("bias", bias, weight.shape[:1], x.dtype, x.device)
    return _LoRALinear.apply(x, weight, bias, A, B, scale)


def merge(
    weight: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight + scale * B A in float32 [N, K], one pass over `weight`; just the weight if A or B is None.

    weight: float32, bfloat16 or float16. `out` may be a slice of a larger buffer, or a float32 weight itself.
    """
    expect_dims("weight", weight, "N", "K")
    if A is None or B is None:
        outputs, inputs = weight.shape
        A = torch.empty((0, inputs), dtype=torch.float32, device=weight.device)
        B = torch.empty((outputs, 0), dtype=torch.float32, device=weight.device)
    _check_factors(A, B, weight.shape[0], weight.shape[1], weight.device)
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    expect("out", out, weight.shape, torch.float32, weight.device, written=True)
    OP.pick(weight).merge(weight, A, B, scale, out)
    return out


def gradients(
    x: torch.Tensor,
    dy: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    dA: torch.Tensor | None = None,
    dB: torch.Tensor | None = None,
    accumulate: bool = False,
) -> Gradients:
    """(dA, dB) = (scale * (dy B)^T x, scale * dy^T (x A^T)), reading x [T, K] and dy [T, N] once.

    They go to `dA` and `dB` where given; `accumulate` adds to what these hold.
    """
    if (dA is None) != (dB is None):
        raise ValueError("only one of dA and dB is given; give both or neither")
    out = None if dA is None or dB is None else [(dA, dB)]
    return gradients_group(x, [Adapter(dy, A, B, scale)], out, accumulate)[0]


def gradients_group(
    x: torch.Tensor,
    adapters: list[Adapter],
    out: list[Gradients] | None = None,
    accumulate: bool = False,
) -> list[Gradients]:
    """[(dA, dB)] of `adapters` that share the input `x` [T, K], which is read once; see `gradients`."""
    expect_dims("x", x, "T", "K")
    for dy, A, B, _ in adapters:
        _check_factors(A, B, dy.shape[-1], x.shape[1], x.device)
        expect("dy", dy, (x.shape[0], B.shape[0]), x.dtype, x.device)
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs dA and dB (or `out`) to add to")
        out = [(torch.empty_like(a.A), torch.empty_like(a.B)) for a in adapters]
    for (dA, dB), (_, A, B, _) in zip(out, adapters, strict=True):
        expect("dA", dA, A.shape, torch.float32, x.device, written=True)
        expect("dB", dB, B.shape, torch.float32, x.device, written=True)
    OP.pick(x).gradients_group(x, adapters, out, accumulate)
    return out


def add_(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """y [T, N] += scale * (x A^T) B^T in place; returns y. For few tokens, and for an x after dropout."""
    expect_dims("x", x, "T", "K")
    _check_factors(A, B, y.shape[-1], x.shape[1], x.device)
    expect("y", y, (x.shape[0], B.shape[0]), x.dtype, x.device, written=True)
    OP.pick(x).add_(y, x, A.t(), B.t(), scale)
    return y


def input_gradient_(dx: torch.Tensor, dy: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """dx [T, K] += scale * (dy B) A in place; returns dx."""
    expect_dims("dy", dy, "T", "N")
    _check_factors(A, B, dy.shape[1], dx.shape[-1], dy.device)
    expect("dx", dx, (dy.shape[0], A.shape[1]), dy.dtype, dy.device, written=True)
    OP.pick(dy).add_(dx, dy, B, A, scale)
    return dx


def _check_factors(A: torch.Tensor, B: torch.Tensor, outputs: int, inputs: int, device: torch.device) -> None:
    if A.dim() != 2 or A.shape[1] != inputs or B.shape != (outputs, A.shape[0]):
        raise ValueError(
            f"A and B have shapes {tuple(A.shape)} and {tuple(B.shape)}; a layer of {inputs} inputs and "
            f"{outputs} outputs needs [rank, {inputs}] and [{outputs}, rank]"
        )
    if A.dtype != torch.float32 or B.dtype != torch.float32:
        raise ValueError(f"A and B are {A.dtype} and {B.dtype}; use float32, in which adapters are trained")
    if A.device != device or B.device != device:
        raise ValueError(f"A and B are on {A.device} and {B.device}; the layer they adapt is on {device}")


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):  # type: ignore[no-untyped-def]
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, weight, A, B)
        ctx.scale = scale
        y = torch.nn.functional.linear(flat, weight, bias)
        return add_(y, flat, A, B, scale).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        shape, dy = (*dy.shape[:-1], x.shape[1]), dy.reshape(-1, dy.shape[-1])
        dx = dA = dB = None
        if need_x:
            dx = input_gradient_(torch.mm(dy, weight), dy, A, B, ctx.scale).view(shape)
        if need_A or need_B:
            dA, dB = gradients(x, dy, A, B, ctx.scale)
        return dx, dy.t() @ x if need_weight else None, dy.sum(0) if need_bias else None, dA, dB, None
