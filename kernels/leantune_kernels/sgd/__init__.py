"""SGD with momentum, plain or Nesterov's, and weight decay (torch.optim.SGD's formula), all tensors in one call.

At step t, counted from 1: g = grad_scale * grad + weight_decay * p; b = g at t = 1, else momentum * b + (1 - dampening)
* g; p -= lr * b, or with nesterov p -= lr * (g + momentum * b). Sutskever et al., ICML 2013.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leantune_kernels.dispatch import Op
from leantune_kernels.ranges import expect_number
from leantune_kernels.tensor_list import ParameterTable, PerTensor, State

OP = Op(__name__)


def sgd_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    momentum_buffers: Sequence[torch.Tensor] | None = None,
    *,
    step: int,
    lr: PerTensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: PerTensor = 0.0,
    grad_scale: float = 1.0,
    masters: Sequence[torch.Tensor | None] | None = None,
    seed: int = 0,
) -> None:
    """One SGD update of `params` in place, with their `momentum_buffers`, which momentum 0 does without.

    momentum_buffers: contiguous float32 of the parameters' shapes; zeros before the first step. A tensor whose first
    gradient comes after step 1 starts from these zeros. params, grads, step, lr, weight_decay, grad_scale, masters
    and seed: see leantune_kernels.adamw.adamw_step. Raises ValueError that names the tensor or number.
    """
    SGDTable(params, momentum_buffers, masters).step(
        grads,
        step=step,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        seed=seed,
    )


class SGDTable(ParameterTable):
    """The tensors of `sgd_step`, checked once and reused every step; see ParameterTable."""

    op = OP

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        momentum_buffers: Sequence[torch.Tensor] | None = None,
        masters: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        buffers = None if momentum_buffers is None else State("momentum_buffers", momentum_buffers)
        super().__init__(params, [buffers], masters)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        *,
        step: int,
        lr: PerTensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: PerTensor = 0.0,
        grad_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        """One update; see sgd_step."""
        expect_number("momentum", momentum)
        if momentum > 0 and self.states[0] is None:
            raise ValueError(f"momentum={momentum} needs momentum_buffers, one for each parameter")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum above 0 and dampening 0; they are {momentum} and {dampening}")
        self.run(
            grads,
            step=step,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            grad_scale=grad_scale,
        )
