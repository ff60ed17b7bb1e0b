"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), pairs as in Hugging Face Llama (rotate-half).

Shapes: T tokens, n heads, D head size, R <= D rotated columns, P positions in the tables. x [T, n, D];
cos, sin [P, R/2] fp32; positions [T] int64. Column i < R/2 of a head pairs with column i + R/2.
"""

from __future__ import annotations

import torch

from leantune_kernels.checks import expect
from leantune_kernels.dispatch import Op

OP = Op(__name__)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`x` [T, n, D] with its first R columns rotated by the angles at `positions` [T], differentiable in x.

    x: float32, bfloat16 or float16, any strides; the result is contiguous. cos, sin: [P, R/2] float32.
    Raises ValueError for shapes that do not fit and for positions outside [0, P).
    """
    return _Rope.apply(x, cos, sin, positions)


def apply_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """Rotates `x` [T, n, D] in place and returns it; `inverse` rotates back, which is the backward pass.

    x may be a view with any token and head strides; its last dimension must be contiguous.
    """
    _check(x, cos, sin, positions)
    OP.pick(x).apply_(x, cos, sin, positions, inverse)
    return x


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    if x.dim() != 3 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}; it must be [tokens, heads, head_dim] "
            "with its last dimension contiguous"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; both must be "
            f"[positions, rotary_dim / 2] with rotary_dim <= head_dim={x.shape[2]}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        expect(name, table, cos.shape, torch.float32, x.device)
    expect("positions", positions, x.shape[:1], torch.int64, x.device)
    if positions.numel():
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"positions range over [{low}, {high}], cos and sin cover [0, {cos.shape[0]}); "
                "use shorter sequences or larger tables"
            )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin, positions)
        return apply_(x.clone(memory_format=torch.contiguous_format), cos, sin, positions)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin, positions = ctx.saved_tensors
        dx = dy.clone(memory_format=torch.contiguous_format)
        return apply_(dx, cos, sin, positions, inverse=True), None, None, None
