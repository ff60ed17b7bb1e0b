"""The attention half of a layer: x + O(attention(rope(QKV(norm(x))))), forward and backward by hand.

Shapes: T tokens, H hidden size, D head_dim, Hq and Hk query and key-value heads. x [T, H]; qkv [T, (Hq+2Hk)*D] holds
q, k and v side by side, so that one dense product forms them and one rotary call turns q and k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leantune.nn.arena import Buffer
from leantune.nn.batch import Packed
from leantune.nn.config import DecoderConfig
from leantune.nn.linear import Linear, LinearGroup
from leantune.nn.norm import RMSNorm
from leantune_kernels import attention, rope


class Attention(nn.Module):
    """The four projections, named as in Hugging Face's modules."""

    def __init__(self, config: DecoderConfig, path: str) -> None:
        super().__init__()
        H, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        q, k = config.num_attention_heads * D, config.num_key_value_heads * D
        self.q_proj = Linear(f"{path}.q_proj", H, q, bias)
        self.k_proj = Linear(f"{path}.k_proj", H, k, bias)
        self.v_proj = Linear(f"{path}.v_proj", H, k, bias)
        self.o_proj = Linear(f"{path}.o_proj", q, H, bias)


class AttentionBlock:
    """Computes with the modules of one layer; owns no parameter itself."""

    def __init__(self, config: DecoderConfig, norm: RMSNorm, attn: Attention) -> None:
        self.norm = norm
        self.qkv = LinearGroup(attn, "q_proj", "k_proj", "v_proj")
        self.o = LinearGroup(attn, "o_proj")
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.scale = config.head_dim**-0.5

    def __call__(self, x: torch.Tensor, batch: Packed) -> torch.Tensor:
        """x [T, H] -> [T, H], differentiable in x and in every parameter of the block that requires it."""
        return _AttentionFunction.apply(x, self, batch, self.norm.weight, *self.qkv.tensors(), *self.o.tensors())

    def rotated(self, qkv: torch.Tensor) -> torch.Tensor:
        """The q and k heads of qkv as [T, Hq+Hk, D], a view."""
        n = self.heads + self.kv_heads
        return qkv[:, : n * self.head_dim].unflatten(1, (n, self.head_dim))

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, Hq, D], k and v [T, Hk, D], views of qkv."""
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def project(self, x: torch.Tensor, batch: Packed) -> tuple[Buffer, Buffer, torch.Tensor]:
        """(h, qkv, rstd): the normed input, rotated q and k with v, and the norm's statistic."""
        h, rstd = self.norm.entrance(x, batch)
        qkv = batch.arena.take(x.shape[0], self.qkv.out_features, x.dtype)
        self.qkv.forward(h.tensor, qkv.tensor, batch)
        rope.apply_(self.rotated(qkv.tensor), batch.cos, batch.sin, batch.positions)
        return h, qkv, rstd

    def attend(self, qkv: torch.Tensor, batch: Packed) -> tuple[Buffer, torch.Tensor]:
        """(o [T, Hq*D], log-sum-exp) of causal attention within each sequence."""
        o = batch.arena.take(qkv.shape[0], self.heads * self.head_dim, qkv.dtype)
        q, k, v = self.split(qkv)
        heads = o.tensor.unflatten(1, (self.heads, self.head_dim))
        _, lse = attention.forward(q, k, v, batch.cu_seqlens, self.scale, True, heads)
        return o, lse


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: AttentionBlock, batch: Packed, *tensors: Any) -> torch.Tensor:
        h, qkv, rstd = block.project(x, batch)
        if batch.policy != "all":
            h.release()
        o, lse = block.attend(qkv.tensor, batch)
        out = torch.empty_like(x)
        block.o.forward(o.tensor, out, batch, residual=x)
        ctx.block, ctx.batch = block, batch
        ctx.save_for_backward(x)
        if any(ctx.needs_input_grad):
            ctx.kept = None if batch.policy == "full" else (h, qkv, rstd, o, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        block, batch = ctx.block, ctx.batch
        (x,) = ctx.saved_tensors
        h, qkv, rstd, o, lse = ctx.kept or _recompute(block, x, batch)
        ctx.kept = None
        need_x, need_norm = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        need_qkv, need_o = ctx.needs_input_grad[4:16], ctx.needs_input_grad[16:20]
        dout = dout.contiguous()
        grads_o = block.o.parameter_gradients(o.tensor, dout, need_o, batch)
        if not (need_x or need_norm or any(need_qkv)):
            return (None, None, None, None, *[None] * 12, *grads_o)

        do = batch.arena.take(*o.tensor.shape, o.tensor.dtype)
        block.o.input_gradient(dout, do.tensor, batch)
        dqkv = batch.arena.take(*qkv.tensor.shape, qkv.tensor.dtype)
        _attention_backward(block, do.tensor, qkv.tensor, o.tensor, lse, dqkv.tensor, batch)
        for buffer in (o, do, qkv):
            buffer.release()

        needed = (need_x, need_norm, need_qkv)
        dx, dnorm, grads_qkv = block.norm.exit(x, rstd, h, block.qkv, dqkv.tensor, dout, needed, batch)
        return (dx, None, None, dnorm, *grads_qkv, *grads_o)


def _recompute(block: AttentionBlock, x: torch.Tensor, batch: Packed) -> tuple[Any, ...]:
    h, qkv, rstd = block.project(x, batch)
    return h, qkv, rstd, *block.attend(qkv.tensor, batch)


def _attention_backward(
    block: AttentionBlock,
    do: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dqkv: torch.Tensor,
    batch: Packed,
) -> None:
    """Fills dqkv with the gradient of qkv as it was before the rotation."""
    heads = (block.heads, block.head_dim)
    attention.backward(
        do.unflatten(1, heads), *block.split(qkv), o.unflatten(1, heads), lse, batch.cu_seqlens, block.scale, True,
        *block.split(dqkv),
    )  # fmt: skip
    rope.apply_(block.rotated(dqkv), batch.cos, batch.sin, batch.positions, inverse=True)
