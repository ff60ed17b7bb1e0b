"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), all tensors in one call.

At step t, counted from 1, with torch.optim.AdamW's formula:
g = grad_scale * grad; p *= 1 - lr * weight_decay; m += (1 - beta1) * (g - m);
v = beta2 * v + (1 - beta2) * g^2; p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leantune_kernels.dispatch import Op
from leantune_kernels.ranges import expect_number
from leantune_kernels.tensor_list import ParameterTable, PerTensor, State

OP = Op(__name__)


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: PerTensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: PerTensor = 0.0,
    grad_scale: float = 1.0,
    masters: Sequence[torch.Tensor | None] | None = None,
    seed: int = 0,
) -> None:
    """One AdamW update of `params` in place, with their moments `exp_avgs` (m) and `exp_avg_sqs` (v).

    params: contiguous, float32, bfloat16 or float16, each its own. m, v: contiguous float32 of equal shapes.
    masters: None, or for each parameter None or its contiguous float32 copy, which is updated in its stead and
    rounded to nearest into it; a bfloat16 parameter without one is rounded stochastically, with noise keyed by
    (seed, step, tensor, element), and float16 needs one. grads: float32, bfloat16 or float16, any strides
    (copied where not contiguous); a tensor whose gradient is None is left as it is. step: 1 for the first
    update. lr, weight_decay: one number for all or one for each tensor. grad_scale multiplies every gradient,
    as for clipping. Raises ValueError that names the tensor. Who steps the same tensors again and again keeps
    an AdamWTable instead.
    """
    AdamWTable(params, exp_avgs, exp_avg_sqs, masters).step(
        grads,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        seed=seed,
    )


class AdamWTable(ParameterTable):
    """The tensors of `adamw_step`, checked once and reused every step.

    It keeps the memory that the tensors have now: after `p.data = ...` or `module.to(...)` make a new one.
    """

    op = OP

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
        masters: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        super().__init__(params, [State("exp_avgs", exp_avgs), State("exp_avg_sqs", exp_avg_sqs)], masters)

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        *,
        step: int,
        lr: PerTensor,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: PerTensor = 0.0,
        grad_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        """One update; see adamw_step."""
        check_numbers(beta1, beta2, eps)
        self.run(
            grads,
            step=step,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            grad_scale=grad_scale,
        )


def check_numbers(beta1: float, beta2: float, eps: float) -> None:
    """ValueError that names the decay rate outside [0, 1), or an eps that is negative."""
    expect_number("beta1", beta1, 1.0)
    expect_number("beta2", beta2, 1.0)
    expect_number("eps", eps)
