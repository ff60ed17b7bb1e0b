"""Embedding: rows of a table by id, scaled where asked; the gradient is summed in a fixed order, without atomics.

y[t] = scale * weight[ids[t]]. Backward: ids are sorted once, keeping the order of equal ones; each table row's gradient
is then the fp32 sum of a segment, in the order of the tokens, and long segments are summed in pieces of fixed size.

Shapes: T tokens, V rows of the table (vocabulary), H columns. ids [T] int64, weight [V, H], y and dy [T, H].
"""

from __future__ import annotations

import torch

from leantune_kernels.autograd import call, once_differentiable
from leantune_kernels.checks import FLOATS, can_read, expect, expect_dims, expect_float, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"forward": Effects((3,)), "backward": Effects((2,))})


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    scale: float = 1.0,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`scale` * rows `ids` [...] (int64) of `weight` [V, H], as [..., H]; differentiable once in weight.

    weight: float32, bfloat16 or float16, any strides. dtype: the result's, weight's own by default; scale (sqrt(H) in
    Gemma) applies in fp32 before the result is rounded. Row `padding_idx` is looked up like any other and gets no
    gradient. The same bits on every run. Raises ValueError for the first id outside [0, V) on the cpu; on a device,
    which would have to be waited for, such a token's row is NaN and its gradient goes nowhere.
    """
    expect_tensor("ids", ids)
    expect_float("weight", weight)
    return call(_Embedding, weight, ids, scale, padding_idx, dtype or weight.dtype)


def forward(
    ids: torch.Tensor, weight: torch.Tensor, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y [T, H] for ids [T]; goes to `out` where given, of any of the three dtypes. Errors are those of embedding."""
    expect_dims("weight", weight, "V", "H")
    expect("ids", ids, (ids.numel(),), torch.int64, weight.device)
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight has dtype {weight.dtype}; use float32, bfloat16 or float16")
    shape = (ids.shape[0], weight.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    else:
        expect("out", out, shape, out.dtype if out.dtype in FLOATS else weight.dtype, weight.device, written=True)
    OP.pick(weight).forward(ids, weight, scale, out)
    return out


def backward(
    dy: torch.Tensor,
    ids: torch.Tensor,
    dweight: torch.Tensor,
    scale: float = 1.0,
    padding_idx: int | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """The gradient of weight from dy [T, H] and ids [T], in the caller's `dweight` [V, H], which is returned.

    dweight is overwritten, or with `accumulate` added to, which touches only the rows that ids name. dy, dweight:
    float32, bfloat16 or float16, each its own; sums are fp32, rounded once. Errors are those of embedding.
    """
    expect_dims("dweight", dweight, "V", "H")
    expect("dweight", dweight, dweight.shape, dweight.dtype if dweight.dtype in FLOATS else torch.float32, dy.device,
           written=True)  # fmt: skip
    expect("ids", ids, (ids.numel(),), torch.int64, dy.device)
    expect("dy", dy, (ids.shape[0], dweight.shape[1]), dy.dtype if dy.dtype in FLOATS else torch.float32, dy.device)
    _check_padding(padding_idx, dweight.shape[0])
    check_ids(ids, dweight.shape[0])
    OP.pick(dy).backward(dy, ids, dweight, scale, padding_idx, accumulate)
    return dweight


def check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    """ValueError that names the first id outside the table; ids on a device are not read back.

    The reference calls it, and the C++ implementation where its kernel, which looks at every id, has complained.
    """
    if not can_read(ids) or ids.numel() == 0:
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= vocabulary:
        index = int(((ids < 0) | (ids >= vocabulary)).nonzero()[0])
        raise ValueError(f"ids[{index}]={int(ids[index])} is not a row of weight, [0, {vocabulary})")


def _check_padding(padding_idx: int | None, vocabulary: int) -> None:
    if padding_idx is not None and not 0 <= padding_idx < vocabulary:
        raise ValueError(f"padding_idx={padding_idx} is not a row of weight, [0, {vocabulary}); None for no padding")


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, scale, padding_idx, dtype):  # type: ignore[no-untyped-def]
        expect_dims("weight", weight, "V", "H")
        _check_padding(padding_idx, weight.shape[0])
        flat = ids.reshape(-1)
        ctx.save_for_backward(flat)
        ctx.options, ctx.table = (scale, padding_idx), (weight.shape, weight.dtype)
        out = torch.empty((flat.shape[0], weight.shape[1]), dtype=dtype, device=weight.device)
        return forward(flat, weight, scale, out).view(*ids.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        shape, dtype = ctx.table
        dweight = torch.empty(shape, dtype=dtype, device=dy.device)
        backward(dy.reshape(ids.shape[0], shape[1]), ids, dweight, *ctx.options)
        return dweight, None, None, None, None
