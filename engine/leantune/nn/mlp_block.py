"""The MLP half of a layer: x + down(act(gate(norm(x))) * up(norm(x))), forward and backward by hand.

Shapes: T tokens, H hidden size, I intermediate size. x [T, H]; gate_up [T, 2I] holds gate and up side by side.
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
from leantune_kernels import glu

# Hugging Face's names, and which activation of the glu kernels each means; relu, which is rare, is plain PyTorch.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class MLP(nn.Module):
    """The three projections, named as in Hugging Face's modules."""

    def __init__(self, config: DecoderConfig, path: str) -> None:
        super().__init__()
        H, I, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(f"{path}.gate_proj", H, I, bias)
        self.up_proj = Linear(f"{path}.up_proj", H, I, bias)
        self.down_proj = Linear(f"{path}.down_proj", I, H, bias)


class MLPBlock:
    """Computes with the modules of one layer; owns no parameter itself."""

    def __init__(self, config: DecoderConfig, norm: RMSNorm, mlp: MLP) -> None:
        self.norm = norm
        self.gate_up = LinearGroup(mlp, "gate_proj", "up_proj")
        self.down = LinearGroup(mlp, "down_proj")
        self.width = config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: torch.Tensor, batch: Packed) -> torch.Tensor:
        """x [T, H] -> [T, H], differentiable in x and in every parameter of the block that requires it."""
        return _MLPFunction.apply(x, self, batch, self.norm.weight, *self.gate_up.tensors(), *self.down.tensors())

    def expand(self, x: torch.Tensor, batch: Packed) -> tuple[Buffer, Buffer, torch.Tensor]:
        """(h, gate_up, rstd): the normed input, both projections of it, and the norm's statistic."""
        h, rstd = self.norm.entrance(x, batch)
        gate_up = batch.arena.take(x.shape[0], 2 * self.width, x.dtype)
        self.gate_up.forward(h.tensor, gate_up.tensor, batch)
        return h, gate_up, rstd

    def gated(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out [T, I] = act(gate) * up."""
        gate, up = gate_up.split(self.width, dim=1)
        if self.activation == "relu":
            return torch.mul(gate.relu(), up, out=out)
        return glu.forward(gate, up, out, self.activation)

    def gated_backward_(self, da: torch.Tensor, gate_up: torch.Tensor) -> None:
        """In place: da becomes act(gate) * up, gate_up becomes its own gradient."""
        gate, up = gate_up.split(self.width, dim=1)
        if self.activation != "relu":
            glu.backward_(da, gate, up, self.activation)
            return
        d_gate, d_up = da * up * (gate > 0), da * gate.relu()
        torch.mul(gate.relu(), up, out=da)
        gate.copy_(d_gate)
        up.copy_(d_up)


class _MLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: MLPBlock, batch: Packed, *tensors: Any) -> torch.Tensor:
        h, gate_up, rstd = block.expand(x, batch)
        if batch.policy != "all":
            h.release()
        a = batch.arena.take(x.shape[0], block.width, x.dtype)
        block.gated(gate_up.tensor, a.tensor)
        out = torch.empty_like(x)
        block.down.forward(a.tensor, out, batch, residual=x)
        ctx.block, ctx.batch = block, batch
        ctx.save_for_backward(x)
        if any(ctx.needs_input_grad):
            ctx.kept = None if batch.policy == "full" else (h, gate_up, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        block, batch = ctx.block, ctx.batch
        (x,) = ctx.saved_tensors
        h, gate_up, rstd = ctx.kept or block.expand(x, batch)
        ctx.kept = None
        need_x, need_norm = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        need_gate_up, need_down = ctx.needs_input_grad[4:12], ctx.needs_input_grad[12:16]
        dout = dout.contiguous()
        da = batch.arena.take(x.shape[0], block.width, x.dtype)
        if need_x or need_norm or any(need_gate_up):
            block.down.input_gradient(dout, da.tensor, batch)
            block.gated_backward_(da.tensor, gate_up.tensor)  # da is the gated activation now
        else:
            block.gated(gate_up.tensor, da.tensor)
        grads_down = block.down.parameter_gradients(da.tensor, dout, need_down, batch)
        da.release()

        needed = (need_x, need_norm, need_gate_up)
        dx, dnorm, grads_gate_up = block.norm.exit(x, rstd, h, block.gate_up, gate_up.tensor, dout, needed, batch)
        return (dx, None, None, dnorm, *grads_gate_up, *grads_down)
