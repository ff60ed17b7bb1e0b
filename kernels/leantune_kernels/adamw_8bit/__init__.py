"""AdamW with both moments in 8 bits, block-wise (Dettmers et al. 2022, arXiv:2110.02861), all tensors in one call.

The formula is leantune_kernels.adamw's. Element e of a moment is book[code[e]] * absmax[e // 256]; the books are in
leantune_kernels.dynamic_code_books. The update itself is fp32 and uses the new moments before they are quantised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leantune_kernels.adamw import check_numbers
from leantune_kernels.adamw_8bit.code_book import BLOCK
from leantune_kernels.dispatch import Op
from leantune_kernels.tensor_list import ParameterTable, PerTensor, State

OP = Op(__name__)


def zero_states(params: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
    """(codes of m, absmax of m, codes of v, absmax of v) of moments that are zero, each a list over `params`.

    Codes: uint8 of the parameter's shape; absmax: float32 [ceil(elements / 256)]. 2.03 bytes a parameter.
    """
    codes = [[torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for p in params] for _ in range(2)]
    absmax = [[torch.zeros(-(-p.numel() // BLOCK), device=p.device) for p in params] for _ in range(2)]
    return codes[0], absmax[0], codes[1], absmax[1]


def adamw_8bit_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_absmaxes: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    exp_avg_sq_absmaxes: Sequence[torch.Tensor],
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
    """One AdamW update of `params` in place, with 8-bit moments as `zero_states` makes them.

    Infinity or NaN in a gradient reaches all of its block of 256. Everything else is as in
    leantune_kernels.adamw.adamw_step. Raises ValueError that names the tensor.
    """
    AdamW8bitTable(params, exp_avgs, exp_avg_absmaxes, exp_avg_sqs, exp_avg_sq_absmaxes, masters).step(
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


class AdamW8bitTable(ParameterTable):
    """The tensors of `adamw_8bit_step`, checked once and reused every step; see ParameterTable."""

    op = OP

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_absmaxes: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
        exp_avg_sq_absmaxes: Sequence[torch.Tensor],
        masters: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        states = [
            State("exp_avgs", exp_avgs, torch.uint8),
            State("exp_avg_absmaxes", exp_avg_absmaxes, block=BLOCK),
            State("exp_avg_sqs", exp_avg_sqs, torch.uint8),
            State("exp_avg_sq_absmaxes", exp_avg_sq_absmaxes, block=BLOCK),
        ]
        super().__init__(params, states, masters)

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
        """One update; see adamw_8bit_step."""
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
