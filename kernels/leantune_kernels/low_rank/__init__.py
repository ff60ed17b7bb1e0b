"""Linear layers with LoRA: y = x W^T + bias + scale * (x A^T) B^T, alone and in groups that share x, input dropout.

Hu et al. 2021, arXiv:2106.09685. Shapes: T rows (tokens), K inputs, N outputs, r rank. x [T, K]; dy, y [T, N];
weight [N, K]; A [r, K] and B [N, r], both float32. x, dy and y are float32, bfloat16 or float16, alike within a call,
rows any distance apart. S = x A^T and dS = dy B, [T, r] float32, are formed once where an implementation keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from leantune_kernels import dropout as _dropout
from leantune_kernels.autograd import call, once_differentiable, save
from leantune_kernels.checks import changed, expect, expect_dims, expect_rows, expect_tensor
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(
    __name__,
    effects={
        "merge": Effects((4,)),
        "gradients_group": Effects((2,)),
        "add_": Effects((0,)),
        "linear_group": Effects((3,)),
        "input_gradient_group": Effects((0,)),
    },
)
MOST_LAYERS = 16


class Adapter(NamedTuple):
    """One adapter of a group whose layers share their input: its upstream gradient and its factors."""

    dy: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scale: float


class LoRALayer(NamedTuple):
    """A linear layer and its adapter: weight [N, K] and bias [N] in x's dtype, A [r, K] and B [N, r] float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    scale: float


# dA [r, K] and dB [N, r], float32; None is not computed.
Gradients = tuple["torch.Tensor | None", "torch.Tensor | None"]


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """x W^T + bias + scale * (d(x) A^T) B^T for `x` [..., K], differentiable in x, weight, bias, A and B.

    weight [N, K] and bias [N] have x's dtype (under torch.autocast, which does not reach in here, cast them); A [r, K]
    and B [N, r] are float32. d is dropout with probability
    `dropout_p`; its mask is leantune_kernels.dropout's for (seed, offset), made again in the backward pass. Raises
    ValueError for what does not fit.
    """
    return lora_linear_group(x, [LoRALayer(weight, bias, A, B, scale)], dropout_p, seed, offset)[0]


def lora_linear_group(
    x: torch.Tensor, layers: Sequence[LoRALayer], dropout_p: float = 0.0, seed: int = 0, offset: int = 0
) -> list[torch.Tensor]:
    """[x W^T + bias + scale * (d(x) A^T) B^T for each of `layers`], which share the input `x` [..., K].

    What `lora_linear` gives for each, but d(x) A^T and the gradients' products with d(x) are formed for all layers
    together (query, key and value; gate and up). They share one dropout mask. At most 16 layers. Raises ValueError for
    what does not fit.
    """
    _dropout.check(dropout_p, seed, offset)
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise ValueError(f"{len(layers)} layers in a group; it takes 1 to {MOST_LAYERS}")
    for layer in layers:
        _check_layer(layer, x)
    tensors = [t for layer in layers for t in layer[:4]]
    key = (dropout_p, seed, offset) if dropout_p else None
    return list(call(_LoRALinear, x, tuple(layer.scale for layer in layers), key, *tensors))


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
    changed(out)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dA, dB) = (scale * (dy B)^T x, scale * dy^T (x A^T)), reading x [T, K] and dy [T, N] once.

    They go to `dA` and `dB` where given; `accumulate` adds to what these hold.
    """
    if (dA is None) != (dB is None):
        raise ValueError("only one of dA and dB is given; give both or neither")
    out = None if dA is None else [(dA, dB)]
    found = gradients_group(x, [Adapter(dy, A, B, scale)], out, accumulate)[0]
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def gradients_group(
    x: torch.Tensor,
    adapters: list[Adapter],
    out: Sequence[Gradients] | None = None,
    accumulate: bool = False,
) -> Sequence[Gradients]:
    """[(dA, dB)] of `adapters` that share the input `x` [T, K], which is read once; see `gradients`.

    A None in `out` leaves that gradient out. At most 16 adapters.
    """
    if len(adapters) > MOST_LAYERS:
        raise ValueError(f"{len(adapters)} adapters share a call; at most {MOST_LAYERS} can")
    expect_dims("x", x, "T", "K")
    for dy, A, B, _ in adapters:
        _check_factors(A, B, dy.shape[-1], x.shape[1], x.device)
        expect("dy", dy, (x.shape[0], B.shape[0]), x.dtype, x.device)
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs dA and dB (or `out`) to add to")
        out = [(torch.empty_like(a.A), torch.empty_like(a.B)) for a in adapters]
    for (dA, dB), (_, A, B, _) in zip(out, adapters, strict=True):
        if dA is not None:
            expect("dA", dA, A.shape, torch.float32, x.device, written=True)
        if dB is not None:
            expect("dB", dB, B.shape, torch.float32, x.device, written=True)
    OP.pick(x).gradients_group(x, adapters, out, accumulate)
    return out


def add_(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """y [T, N] += scale * (x A^T) B^T in place; returns y. For few tokens, and for an x after dropout."""
    expect_dims("x", x, "T", "K")
    _check_factors(A, B, y.shape[-1], x.shape[1], x.device)
    expect("y", y, (x.shape[0], B.shape[0]), x.dtype, x.device, written=True)
    OP.pick(x).add_(y, x, A.t(), B.t(), scale)
    changed(y)
    return y


def input_gradient_(dx: torch.Tensor, dy: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """dx [T, K] += scale * (dy B) A in place; returns dx."""
    expect_dims("dy", dy, "T", "N")
    _check_factors(A, B, dy.shape[1], dx.shape[-1], dy.device)
    expect("dx", dx, (dy.shape[0], A.shape[1]), dy.dtype, dy.device, written=True)
    OP.pick(dy).add_(dx, dy, B, A, scale)
    changed(dx)
    return dx


def _check_layer(layer: LoRALayer, x: torch.Tensor) -> None:
    weight, bias, A, B, _ = layer
    expect_rows("x", x, "K")
    expect_dims("weight", weight, "N", "K")
    _check_factors(A, B, weight.shape[0], x.shape[-1], x.device)
    expect("weight", weight, (weight.shape[0], x.shape[-1]), x.dtype, x.device)
    if bias is not None:
        expect("bias", bias, weight.shape[:1], x.dtype, x.device)


def _check_factors(A: torch.Tensor, B: torch.Tensor, outputs: int, inputs: int, device: torch.device) -> None:
    expect_tensor("A", A)
    expect_tensor("B", B)
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
    """A group of layers that share x. `tensors` holds weight, bias, A and B of each; `key` is dropout's or None."""

    @staticmethod
    def forward(ctx, x, scales, key, *tensors):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        flat = x.reshape(-1, x.shape[-1])
        of_layer = zip(tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4], scales, strict=True)
        layers = [LoRALayer(*parts) for parts in of_layer]
        outs = [flat.new_empty(flat.shape[0], layer.weight.shape[0]) for layer in layers]
        source = flat if key is None else _dropout.forward(flat, *key)
        projected = OP.pick(x).linear_group(flat, source, layers, outs)
        factors = [t for layer in layers for t in (layer.weight, layer.A, layer.B)]
        save(ctx, flat, *factors, *(projected or ()), exact=factors)
        ctx.scales, ctx.key = scales, key
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):  # type: ignore[no-untyped-def]
        x, *saved = ctx.saved_tensors
        count, needs = len(dys), ctx.needs_input_grad
        grads: list[torch.Tensor | None] = [None] * len(needs)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        if not used:
            return tuple(grads)
        shape = (*dys[used[0]].shape[:-1], x.shape[1])
        dys = tuple(dys[i].reshape(-1, dys[i].shape[-1]) for i in used)
        layers = [LoRALayer(saved[3 * i], None, saved[3 * i + 1], saved[3 * i + 2], ctx.scales[i]) for i in used]
        S = [saved[3 * count + i] for i in used] if len(saved) > 3 * count else None
        dS = None
        if needs[0]:
            dx, dS = _input_gradient(dys, layers, ctx.key)
            grads[0] = dx.view(shape)
        for at, dy, layer in zip(used, dys, layers, strict=True):
            _, _, need_A, need_B = needs[4 * at + 3 : 4 * at + 7]
            dA = torch.empty_like(layer.A, memory_format=torch.contiguous_format) if need_A else None
            dB = torch.empty_like(layer.B, memory_format=torch.contiguous_format) if need_B else None
            weight = dy.t() @ x if needs[4 * at + 3] else None
            grads[4 * at + 3 : 4 * at + 7] = weight, dy.sum(0) if needs[4 * at + 4] else None, dA, dB
        trained = [i for i, at in enumerate(used) if needs[4 * at + 5] or needs[4 * at + 6]]
        if trained:
            source = x if ctx.key is None else _dropout.forward(x, *ctx.key)
            OP.pick(x).gradients_group(
                source,
                [Adapter(dys[i], *layers[i][2:]) for i in trained],
                [tuple(grads[4 * used[i] + 5 : 4 * used[i] + 7]) for i in trained],
                False,
                S and [S[i] for i in trained],
                dS and [dS[i] for i in trained],
            )
        return tuple(grads)


def _input_gradient(dys, layers, key):  # type: ignore[no-untyped-def]
    """(dx, dS of each layer or None)."""
    dx = dys[0].new_empty(dys[0].shape[0], layers[0].weight.shape[1])
    if key is None:
        return dx, OP.pick(dx).input_gradient_group(dx, dys, layers)
    dx.zero_()
    for dy, layer in zip(dys, layers, strict=True):
        input_gradient_(dx, dy, layer.A, layer.B, layer.scale)
    p, seed, offset = key
    _dropout.forward(dx, p, seed, offset, out=dx)
    for dy, layer in zip(dys, layers, strict=True):
        dx.addmm_(dy, layer.weight)
    return dx, None
