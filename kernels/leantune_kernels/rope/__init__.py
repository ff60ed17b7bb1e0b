"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): half or interleaved pairs, partial, q and k at once.

Shapes: T tokens, n heads, D head size, R <= D rotated columns, P positions in the tables. x [T, n, D];
cos, sin [P, R/2] fp32; positions [T] int64. Pair i < R/2 of a head is columns i and i + R/2 (rotate-half, as in
Hugging Face Llama), or 2i and 2i + 1 where interleaved (as in the paper and in GPT-J); columns from R on stay.
"""

from __future__ import annotations

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import can_read, changed, expect, expect_float, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"apply_": Effects((0, 1))})


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """`x` [T, n, D] with its first R columns rotated by the angles at `positions` [T], differentiable in x.

    x: float32, bfloat16 or float16, any strides; the result is contiguous. cos, sin: [P, R/2] float32.
    Raises ValueError for shapes that do not fit and, on the cpu, for positions outside [0, P); on a device, which
    would have to be waited for, such a token's rotated columns become NaN.
    """
    expect_float("x", x)
    return call(_Rope, cos, sin, positions, interleaved, x)[0]


def rope_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` of `q` [T, Hq, D] and `k` [T, Hk, D], each of its own strides, in one launch forward and one backward."""
    for name, heads in (("q", q), ("k", k)):
        expect_float(name, heads)
    rotated_q, rotated_k = call(_Rope, cos, sin, positions, interleaved, q, k)
    return rotated_q, rotated_k


def apply_(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool = False,
    interleaved: bool = False,
    k: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates `x` [T, n, D] in place, and `k` [T, Hk, D] with it where given; returns x.

    `inverse` rotates back, which is the backward pass. x and k may be views with any token and head strides; their
    last dimension must be contiguous. Errors are those of `rope`.
    """
    _check(x, k, cos, sin, positions)
    OP.pick(x).apply_(x, k, cos, sin, positions, inverse, interleaved)
    changed(x, k)
    return x


def _check(
    x: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    for name, heads in (("x", x), ("k", k)):
        if heads is not None and (heads.dim() != 3 or (heads.shape[-1] > 1 and heads.stride(-1) != 1)):
            raise ValueError(
                f"{name} has shape {tuple(heads.shape)} and strides {heads.stride()}; it must be "
                "[tokens, heads, head_dim] with its last dimension contiguous"
            )
    if k is not None:
        expect("k", k, (x.shape[0], k.shape[1], x.shape[2]), x.dtype, x.device)
    for name, value in (("cos", cos), ("sin", sin), ("positions", positions)):
        expect_tensor(name, value)
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; both must be "
            f"[positions, rotary_dim / 2] with rotary_dim <= head_dim={x.shape[2]}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        expect(name, table, cos.shape, torch.float32, x.device)
    expect("positions", positions, x.shape[:1], torch.int64, x.device)
    if positions.numel() and can_read(positions):
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"positions range over [{low}, {high}], cos and sin cover [0, {cos.shape[0]}); "
                "use shorter sequences or larger tables"
            )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, positions, interleaved, *heads):  # type: ignore[no-untyped-def]
        save(ctx, cos, sin, positions, exact=(cos, sin))
        ctx.interleaved = interleaved
        return _rotated(heads, cos, sin, positions, False, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        cos, sin, positions = ctx.saved_tensors
        return (None, None, None, None, *_rotated(grads, cos, sin, positions, True, ctx.interleaved))


def _rotated(heads, cos, sin, positions, inverse, interleaved):  # type: ignore[no-untyped-def]
    copies = tuple(x.clone(memory_format=torch.contiguous_format) for x in heads)
    k = copies[1] if len(copies) > 1 else None
    apply_(copies[0], cos, sin, positions, inverse, interleaved, k)
    return copies
