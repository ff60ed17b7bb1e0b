"""RMSprop, plain or centered, with momentum and weight decay (torch.optim.RMSprop's formula), all tensors in one call.

g = grad_scale * grad + weight_decay * p; v = alpha * v + (1 - alpha) * g^2; centered: a += (1 - alpha) * (g - a), else
a = 0; b = momentum * b + g / (sqrt(v - a^2) + eps); p -= lr * b. Tieleman and Hinton 2012; centered: Graves 2013,
arXiv:1308.0850.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leantune_kernels.dispatch import Op
from leantune_kernels.ranges import expect_number
from leantune_kernels.tensor_list import ParameterTable, PerTensor, State

OP = Op(__name__)


def rmsprop_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    square_avgs: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor] | None = None,
    grad_avgs: Sequence[torch.Tensor] | None = None,
    *,
    step: int,
    lr: PerTensor,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: PerTensor = 0.0,
    grad_scale: float = 1.0,
    masters: Sequence[torch.Tensor | None] | None = None,
    seed: int = 0,
) -> None:
    """One RMSprop update of `params` in place, with their `square_avgs` (v), `momentum_buffers` (b), `grad_avgs` (a).

    square_avgs, momentum_buffers, grad_avgs: contiguous float32 of the parameters' shapes; zeros before the first step.
    momentum above 0 needs momentum_buffers and 0 takes none; grad_avgs makes it centered. step: only the key of the
    noise, from 1. params, grads, lr, weight_decay, grad_scale, masters and seed: see
    leantune_kernels.adamw.adamw_step. Raises ValueError that names the tensor or number.
    """
    RMSpropTable(params, square_avgs, momentum_buffers, grad_avgs, masters).step(
        grads,
        step=step,
        lr=lr,
        alpha=alpha,
        eps=eps,
        momentum=momentum,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        seed=seed,
    )


class RMSpropTable(ParameterTable):
    """The tensors of `rmsprop_step`, checked once and reused every step; see ParameterTable."""

    op = OP

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        square_avgs: Sequence[torch.Tensor],
        momentum_buffers: Sequence[torch.Tensor] | None = None,
        grad_avgs: Sequence[torch.Tensor] | None = None,
        masters: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        buffers = None if momentum_buffers is None else State("momentum_buffers", momentum_buffers)
        means = None if grad_avgs is None else State("grad_avgs", grad_avgs)
        super().__init__(params, [State("square_avgs", square_avgs), buffers, means], masters)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        *,
        step: int,
        lr: PerTensor,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: PerTensor = 0.0,
        grad_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        """One update; see rmsprop_step."""
        expect_number("alpha", alpha, 1.0)
        expect_number("eps", eps)
        expect_number("momentum", momentum)
        if (momentum > 0) != (self.states[1] is not None):
            raise ValueError(f"momentum={momentum}: momentum_buffers are for momentum above 0, which needs them")
        self.run(
            grads,
            step=step,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            alpha=alpha,
            eps=eps,
            momentum=momentum,
            grad_scale=grad_scale,
        )
