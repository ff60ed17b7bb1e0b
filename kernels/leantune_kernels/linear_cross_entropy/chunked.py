"""The chunk loop of linear_cross_entropy: dense products around an implementation's elementwise part.

The loop is the same on every device and for every kind of target; implementations differ in what happens between
the products.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import FLOATS, can_read, expect, expect_dims, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.linear_cross_entropy.targets import Labels, SoftLabels

OP = Op(__name__.rpartition(".")[0])

VOCABULARY_BLOCK = 8192  # rows of a half-precision head that are in fp32 at a time


class LossAndGradients(NamedTuple):
    loss_sum: torch.Tensor
    label_count: int
    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


@dataclass(frozen=True)
class Settings:
    against: Labels | SoftLabels
    chunk_rows: int
    workspace: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows={self.chunk_rows} must be at least 1; 384 is the default")


def loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: Settings, reduction: str
) -> torch.Tensor:
    """The differentiable loss: a scalar for "mean" and "sum", [N] for "none"."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r} is none of "mean", "sum", "none"')
    function = _PerRow if reduction == "none" else _Reduced
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return call(function, hidden, weight, bias, settings, reduction == "mean")


def check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """ValueError that names the argument which does not fit."""
    expect_tensor("hidden", hidden)
    expect_tensor("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; it must be [N, H], use hidden.flatten(0, -2)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; hidden with shape {tuple(hidden.shape)} needs "
            f"[V, {hidden.shape[1]}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; weight {tuple(weight.shape)} needs [{weight.shape[0]}]")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None and value.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {value.dtype}; use float32, bfloat16 or float16")


def run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: Settings,
    grad_scale: float,
    row_scale: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[LossAndGradients, torch.Tensor]:
    """Loss, the gradients of sum_t(grad_scale * row_scale[t] * loss[t]) in `needs`, and losses [N] fp64."""
    check(hidden, weight, bias)
    settings.against.check(hidden, weight)
    kernels: ModuleType = OP.pick(hidden)
    need_dhidden, need_dweight, need_dbias = needs
    labelled = settings.against.counted(hidden.shape[0]).nonzero().squeeze(1)
    count = labelled.numel()
    zeros = partial(torch.zeros, device=hidden.device, dtype=torch.float32)
    head = Head(weight, bias)
    buffer = logits_buffer(settings, hidden, weight, count)
    losses = torch.zeros(hidden.shape[0], device=hidden.device, dtype=torch.float64)
    dhidden = torch.zeros(hidden.shape, dtype=gradient_dtype(hidden), device=hidden.device) if need_dhidden else None
    dweight = zeros(weight.shape) if need_dweight else None
    dbias = zeros(weight.shape[0]) if need_dbias else None
    for begin in range(0, count, settings.chunk_rows):
        rows = labelled[begin : begin + settings.chunk_rows]
        x = hidden.detach().index_select(0, rows).float()
        logits = head.logits(x, buffer[: rows.numel()])
        losses[rows] = settings.against.losses(
            kernels,
            logits,
            rows,
            row_scale=None if row_scale is None else row_scale.index_select(0, rows),
            scale=grad_scale,
            need_gradient=any(needs),
        )
        dlogits = logits  # the same memory: the kernel has put the gradient there
        if dweight is not None:  # summed over the chunks in fp32, whatever the weight is stored in
            dweight.addmm_(dlogits.t(), x)
        if dbias is not None:
            dbias += dlogits.sum(0)
        if dhidden is not None:
            dhidden.index_copy_(0, rows, head.input_gradient(dlogits, out=x).to(dhidden.dtype))
    return LossAndGradients(losses.sum().float(), count, dhidden, dweight, dbias), losses


def gradient_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What dhidden is kept in: float16 has no room for gradients that the upstream gradient has not lifted yet."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def logits_buffer(settings: Settings, hidden: torch.Tensor, weight: torch.Tensor, labelled: int) -> torch.Tensor:
    """Memory for the logits of a chunk: the caller's workspace, or new where there is none. Raises ValueError."""
    vocabulary, given = weight.shape[0], settings.workspace
    if given is None:
        rows, aligned = min(settings.chunk_rows, labelled), -(-vocabulary // 4) * 4  # rows begin at whole 16 bytes
        return torch.empty(rows, aligned, device=hidden.device, dtype=torch.float32)[:, :vocabulary]
    rows = min(settings.chunk_rows, hidden.shape[0])
    expect_dims("workspace", given, "chunk_rows", "V")
    expect("workspace", given, (max(rows, given.shape[0]), vocabulary), torch.float32, hidden.device, written=True)
    return given.detach()


class Head:
    """x @ weight^T + bias and its gradient in x, in fp32, from a weight of any storage type.

    A weight in half precision is brought to fp32 a block of the vocabulary at a time, in one small reused
    buffer. The conversion is repeated for every chunk of rows and costs a few percent of the products; a
    whole copy in fp32 would take twice the memory that storing the head in half precision saves.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach().float()
        whole = weight.dtype == torch.float32
        self.block = max(1, weight.shape[0]) if whole else VOCABULARY_BLOCK
        rows = 0 if whole else min(self.block, weight.shape[0])
        self.converted = torch.empty(rows, weight.shape[1], device=weight.device, dtype=torch.float32)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for begin in range(0, self.weight.shape[0], self.block):
            columns = slice(begin, min(begin + self.block, self.weight.shape[0]))
            weight = self.weight[columns]
            if weight.dtype != torch.float32:
                weight = self.converted[: weight.shape[0]].copy_(weight)
            yield columns, weight

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for columns, weight in self.blocks():
            if self.bias is None:
                torch.mm(x, weight.t(), out=out[:, columns])
            else:
                torch.addmm(self.bias[columns], x, weight.t(), out=out[:, columns])
        return out

    def input_gradient(self, dlogits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for columns, weight in self.blocks():
            out.addmm_(dlogits[:, columns], weight, beta=0 if columns.start == 0 else 1)
        return out


def reduced(  # type: ignore[no-untyped-def]
    hidden, weight, bias, settings, mean, needs
):
    """The sum or mean of the losses, and its gradients in `needs`."""
    scale = 1.0 / max(1, int(settings.against.counted(hidden.shape[0]).sum())) if mean else 1.0
    result, _ = run(hidden, weight, bias, settings, scale, None, needs)
    return result.loss_sum * scale, result.dhidden, result.dweight, result.dbias


def per_row(  # type: ignore[no-untyped-def]
    hidden, weight, bias, settings, row_scale, needs
):
    """The losses [N], and the gradients in `needs` of their sum weighted by `row_scale`."""
    result, losses = run(hidden, weight, bias, settings, 1.0, row_scale, needs)
    return losses.float(), result.dhidden, result.dweight, result.dbias


def _whole(hidden: torch.Tensor) -> Any:
    """The two functions above; in a graph, where the loop's number of rounds is not known, as one operator each."""
    return OP.pick(hidden) if torch.compiler.is_compiling() else sys.modules[__name__]


class _Reduced(torch.autograd.Function):
    """Sum or mean: the forward pass leaves finished gradients, the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, settings, mean):  # type: ignore[no-untyped-def]
        loss, *grads = _whole(hidden).reduced(hidden, weight, bias, settings, mean, ctx.needs_input_grad[:3])
        save(ctx, *grads, exact=grads)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        # The saved gradients stay as they are: a graph that is kept may ask for them again. On a device the upstream
        # gradient is not read back, which would wait for all that was launched before.
        one = can_read(upstream) and float(upstream) == 1.0
        grads = (g if g is None or one else g * upstream for g in ctx.saved_tensors)
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return (*cast, None, None)


class _PerRow(torch.autograd.Function):
    """One loss a row: each row has its own upstream gradient, so the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, settings, mean):  # type: ignore[no-untyped-def]
        save(ctx, hidden, weight, bias, exact=(weight, bias))
        ctx.settings = settings
        return _whole(hidden).per_row(hidden, weight, bias, settings, None, (False, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        hidden, weight, bias = ctx.saved_tensors
        scale, needs = upstream.float().contiguous(), ctx.needs_input_grad[:3]
        _, *grads = _whole(hidden).per_row(hidden, weight, bias, ctx.settings, scale, needs)
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(grads, (hidden, weight, bias), strict=True))
        return (*cast, None, None)
