"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), all tensors in one call.

At step t, counted from 1, with torch.optim.AdamW's formula:
g = grad_scale * grad; p *= 1 - lr * weight_decay; m += (1 - beta1) * (g - m);
v = beta2 * v + (1 - beta2) * g^2; p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leantune_kernels.checks import FLOATS
from leantune_kernels.dispatch import Op

OP = Op(__name__)


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float | Sequence[float],
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW update of `params` in place, with their moments `exp_avgs` (m) and `exp_avg_sqs` (v).

    params, m, v: contiguous float32 of equal shapes. grads: float32, bfloat16 or float16, any strides (copied
    where not contiguous); a tensor whose gradient is None is left as it is. step: 1 for the first update. lr,
    weight_decay: one number for all or one for each tensor. grad_scale multiplies every gradient, as for
    clipping. Raises ValueError that names the tensor. Who steps the same tensors again and again keeps an
    AdamWTable instead.
    """
    AdamWTable(params, exp_avgs, exp_avg_sqs).step(
        grads,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )


class AdamWTable:
    """The tensors of `adamw_step`, checked once and reused every step.

    It keeps the memory that the tensors have now: after `p.data = ...` or `module.to(...)` make a new one.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
    ) -> None:
        self.params = [p.detach() for p in params]
        self.exp_avgs, self.exp_avg_sqs = list(exp_avgs), list(exp_avg_sqs)
        for name, tensors in (
            ("params", self.params),
            ("exp_avgs", self.exp_avgs),
            ("exp_avg_sqs", self.exp_avg_sqs),
        ):
            if len(tensors) != len(self.params):
                raise ValueError(f"{name} has {len(tensors)} tensors; params has {len(self.params)}")
            for i, (t, p) in enumerate(zip(tensors, self.params, strict=True)):
                if t.dtype != torch.float32 or t.shape != p.shape or t.device != p.device or not t.is_contiguous():
                    raise ValueError(
                        f"{name}[{i}] is {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()} on "
                        f"{t.device}; it must be contiguous float32 of shape {tuple(p.shape)} on {p.device}"
                    )
        columns = ([t.numel() for t in self.params], *([t.data_ptr() for t in ts] for ts in self._tensors()))
        self.addresses = torch.tensor(columns, dtype=torch.int64)  # [4, tensors]: sizes, params, m, v

    def _tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        return self.params, self.exp_avgs, self.exp_avg_sqs

    def step(
        self,
        grads: Sequence[torch.Tensor | None],
        *,
        step: int,
        lr: float | Sequence[float],
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float | Sequence[float] = 0.0,
        grad_scale: float = 1.0,
    ) -> None:
        """One update; see adamw_step."""
        if step < 1:
            raise ValueError(f"step={step} must be 1 for the first update, then 2 and so on")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}={beta} is outside [0, 1)")
        given = self._checked(grads)
        if not self.params:
            return
        OP.pick(self.params[0]).update(
            self,
            given,
            step=step,
            lr=self._per_tensor(lr, "lr"),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=self._per_tensor(weight_decay, "weight_decay"),
            grad_scale=grad_scale,
        )

    def _checked(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        if len(grads) != len(self.params):
            raise ValueError(f"grads has {len(grads)} entries; params has {len(self.params)}")
        for i, (g, p) in enumerate(zip(grads, self.params, strict=True)):
            if g is not None and (g.shape != p.shape or g.dtype not in FLOATS or g.device != p.device):
                raise ValueError(
                    f"grads[{i}] is {g.dtype} of shape {tuple(g.shape)} on {g.device}; it must be float32, "
                    f"bfloat16 or float16 of shape {tuple(p.shape)} on {p.device}"
                )
        return [None if g is None else g.detach().contiguous() for g in grads]

    def _per_tensor(self, value: float | Sequence[float], name: str) -> list[float]:
        values = [float(value)] * len(self.params) if isinstance(value, (int, float)) else [float(v) for v in value]
        if len(values) != len(self.params):
            raise ValueError(
                f"{name} has {len(values)} numbers; give one for all or one for each of {len(self.params)}"
            )
        return values
