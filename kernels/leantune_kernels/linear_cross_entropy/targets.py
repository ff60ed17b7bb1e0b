"""What linear_cross_entropy's rows are compared with: a label each, or a teacher's distribution, or both."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from leantune_kernels.checks import FLOATS, conversion, expect_tensor

Teacher = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Labels:
    """Rows with one label each; `ignore_index` marks those without."""

    targets: torch.Tensor  # [N] int64
    ignore_index: int
    label_smoothing: float
    z_loss: float

    def __post_init__(self) -> None:
        expect_tensor("targets", self.targets)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} is outside [0, 1]")

    def check(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        check_labels(self.targets, self.ignore_index, hidden, weight)

    def counted(self, rows: int) -> torch.Tensor:
        """[N] bool: the rows that have a loss."""
        return self.targets != self.ignore_index

    def losses(self, kernels: ModuleType, logits: torch.Tensor, rows: torch.Tensor, **scales: Any) -> torch.Tensor:
        """Losses [R] fp64 of the logits of `rows`, where their gradient is left if it is needed."""
        return kernels.cross_entropy_rows(
            logits=logits,
            targets=self.targets.index_select(0, rows),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            **scales,
        )


@dataclass(frozen=True)
class SoftLabels:
    """Rows with a teacher's distribution each, mixed with labels where alpha < 1."""

    teacher: Teacher
    probabilities: bool
    targets: torch.Tensor | None
    ignore_index: int
    alpha: float
    temperature: float

    def __post_init__(self) -> None:
        if self.targets is not None:
            expect_tensor("targets", self.targets)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]; it is the weight of the teacher's part")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if self.alpha < 1 and self.targets is None:
            raise ValueError(f"alpha={self.alpha} needs targets; without them use alpha=1.0")
        if self.probabilities and isinstance(self.teacher, tuple):
            raise ValueError("probabilities=True needs teacher as one tensor; a pair gives logits")

    def check(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        if self.targets is not None:
            check_labels(self.targets, self.ignore_index, hidden, weight)
        shape, dtypes = teacher_shape(self.teacher)
        wanted = (hidden.shape[0], weight.shape[0])
        if shape != wanted or any(d not in FLOATS for d in dtypes):
            raise ValueError(
                f"teacher is {' and '.join(map(str, dtypes))} for {list(shape)} logits; it must be float32, bfloat16 "
                f"or float16 and give {list(wanted)}: that tensor, or a pair (hidden [N, K], weight [V, K])"
            )

    def counted(self, rows: int) -> torch.Tensor:
        if self.targets is not None:
            return self.targets != self.ignore_index
        tensor = self.teacher[0] if isinstance(self.teacher, tuple) else self.teacher
        return torch.ones(rows, dtype=torch.bool, device=tensor.device)

    def losses(self, kernels: ModuleType, logits: torch.Tensor, rows: torch.Tensor, **scales: Any) -> torch.Tensor:
        """As for Labels."""
        return kernels.distillation_rows(
            logits=logits,
            teacher=self.teacher_logits(rows),
            targets=None if self.targets is None else self.targets.index_select(0, rows),
            alpha=self.alpha,
            temperature=self.temperature,
            **scales,
        )

    def teacher_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, V] of these rows alone; probabilities become the logits that give them at this temperature."""
        if isinstance(self.teacher, tuple):
            hidden, weight = self.teacher
            chosen = hidden.detach().index_select(0, rows)
            return torch.mm(chosen, weight.detach().t().to(chosen.dtype))
        chosen = self.teacher.detach().index_select(0, rows)
        return chosen.float().log_().mul_(self.temperature) if self.probabilities else chosen


def teacher_shape(teacher: Teacher) -> tuple[tuple[int, ...], list[torch.dtype]]:
    """Shape of the teacher's logits (empty where a pair does not fit together) and the dtypes behind them."""
    if isinstance(teacher, torch.Tensor):
        return tuple(teacher.shape), [teacher.dtype]
    hidden, weight = teacher
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    return ((hidden.shape[0], weight.shape[0]) if fits else ()), [hidden.dtype, weight.dtype]


def check_labels(targets: torch.Tensor, ignore_index: int, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError for targets that do not fit, or for the first one without a meaning."""
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}; hidden {tuple(hidden.shape)} "
            f"needs torch.int64 of shape [{hidden.shape[0]}]{conversion('targets', targets, torch.int64)}"
        )
    wrong = ((targets < 0) | (targets >= weight.shape[0])) & (targets != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}]={int(targets[row])} is neither ignore_index={ignore_index} nor a row of weight, "
            f"[0, {weight.shape[0]})"
        )
