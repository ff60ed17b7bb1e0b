"""Learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Factor of the base rate at a fraction (0 to 1) of the steps after warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Schedule:
    """`kind` over `total` steps after a linear warm-up; the same values as Hugging Face's schedules.

    warmup: number of steps if 1 or more, a fraction of `total` below that (rounded up). Warm-up step i of w has rate
    base * i / w, counted from 0.
    """

    kind: str
    base: float
    total: int
    warmup: float = 0.0

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup * self.total) if self.warmup < 1 else int(self.warmup)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        w = self.warmup_steps
        if step < w:
            return self.base * step / w
        done = (step - w) / max(1, self.total - w)
        return self.base * SCHEDULES[self.kind](min(1.0, done))
