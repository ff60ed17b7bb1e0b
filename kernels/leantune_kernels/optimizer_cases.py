"""What the cases of all optimizers share: flat tensors cut into lists, masters, sizes of real models, rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Times plain's error. A bfloat16 parameter without a master is rounded stochastically, which errs by up to one unit in
# the last place; plain rounds it to nearest, which errs by up to half a unit.
FACTOR = {torch.bfloat16: 2.0}

# Rank 16 on every linear layer of SmolLM2-135M: A [16, inputs] and B [outputs, 16] of q, k, v, o, gate, up, down.
_LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
SIZES = {
    "SmolLM2-135M, LoRA": [16 * n for pair in _LAYER for n in pair] * 30,
    "32 million parameters": [1 << 22] * 8,
}


def cut(t: torch.Tensor | None, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Copies of a flat tensor's parts; none of None."""
    return [] if t is None else [part.clone() for part in t.split(list(sizes))]


def masters(params: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """float32 copies where the parameters are float16, which cannot do without."""
    return [p.float() for p in params] if params[0].dtype == torch.float16 else None


def bytes_of_parameters(p: torch.Tensor, g: torch.Tensor) -> int:
    """Read and written parameters, read gradients."""
    master = 8 if p.dtype == torch.float16 else 0  # then the parameter itself is only written
    parameter = p.element_size() if master else 2 * p.element_size()
    return p.numel() * (parameter + master + g.element_size())


def torch_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
) -> Callable[[], Any]:
    """A step of one of PyTorch's optimizers on copies of `params`."""
    copies = [p.clone().requires_grad_() for p in params]
    for p, g in zip(copies, grads, strict=True):
        p.grad = g
    return make(copies).step
