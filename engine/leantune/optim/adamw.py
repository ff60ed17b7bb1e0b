"""AdamW over all trainable parameters in one kernel call, clipping included."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from leantune_kernels.adamw import AdamWTable
from leantune_kernels.grad_norm import clip_factor, grad_norm


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101), state in fp32.

    parameters: name -> tensor, the names under which the state is saved. weight_decay is applied to matrices only;
    biases and norm weights (one dimension) are spared, as is customary.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.betas, self.eps = betas, eps
        self.weight_decay = [weight_decay if p.dim() > 1 else 0.0 for p in self.parameters.values()]
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.steps = 0
        self._table: AdamWTable | None = None
        self._addresses: list[int] = []

    def gradients(self) -> list[torch.Tensor]:
        """The parameters' gradients, in order; a parameter without one counts as zero."""
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def gradient_norm(self) -> float:
        """Euclidean norm over all gradients; infinite or NaN if any element is."""
        return grad_norm(self.gradients())

    @torch.no_grad()
    def step(self, lr: float, norm: float, max_norm: float | None) -> None:
        """One update with gradients scaled down to `max_norm` where `norm` exceeds it; then gradients are dropped."""
        self.steps += 1
        self._current_table().step(
            self.gradients(),
            step=self.steps,
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_scale=1.0 if max_norm is None else clip_factor(norm, max_norm),
        )
        for p in self.parameters.values():
            p.grad = None

    def _current_table(self) -> AdamWTable:
        """The kernel's table of addresses; made anew where a parameter's data was replaced."""
        addresses = [p.data_ptr() for p in self.parameters.values()]
        if self._table is None or addresses != self._addresses:
            parameters = [p.detach() for p in self.parameters.values()]
            self._table = AdamWTable(parameters, list(self.exp_avg.values()), list(self.exp_avg_sq.values()))
            self._addresses = addresses
        return self._table

    def state(self) -> dict[str, torch.Tensor]:
        """Everything to go on from, by name; `steps` is kept apart."""
        tensors = {f"exp_avg.{name}": t for name, t in self.exp_avg.items()}
        return tensors | {f"exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Takes back what `state` gave, bit by bit."""
        for key, target in self.state().items():
            target.copy_(tensors[key])
        self.steps = steps
