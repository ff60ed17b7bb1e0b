"""Settings of a training run, checked once, where they are read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

from leantune.errors import ConfigError
from leantune.nn.batch import POLICIES
from leantune.optim import SCHEDULES

DEFAULT_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TrainConfig:
    """How to train. All fields can be set from the CLI with --set name=value.

    lr: peak learning rate. batch_size: sequences in one micro-batch at most. batch_tokens: tokens in one micro-batch at
    most (default 2048 if neither is given). accumulation: micro-batches per optimizer step. schedule: constant, linear
    or cosine, after warmup (steps, or a fraction of all steps if below 1). max_grad_norm: gradients are scaled down to
    this norm; None or 0 never. eval_every, save_every: steps; without save_every a run with `out` is saved at the end
    of an epoch and every ten minutes. keep: checkpoints that stay in `out`. policy: what is kept for the backward pass
    (all, selective, full). out: directory for metrics, curve and checkpoints.
    """

    lr: float = 2e-4
    batch_size: int | None = None
    batch_tokens: int | None = None
    accumulation: int = 1
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    seed: int = 0
    shuffle: bool = True
    policy: str = "selective"
    out: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _positive(self.lr, "lr")
        _positive(self.eps, "eps")
        for name in ("batch_size", "batch_tokens", "accumulation", "eval_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number, at least 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is unknown; use {', '.join(SCHEDULES)}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r} is unknown; use {', '.join(POLICIES)}")
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise ConfigError(f"warmup={self.warmup} must be 0 or more: steps, or a fraction of all steps if below 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay={self.weight_decay} must be 0 or more")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas={self.betas} must be two numbers in [0, 1)")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise ConfigError(f"max_grad_norm={self.max_grad_norm} must be 0 or more (0: no clipping)")
        if self.save_every is not None and self.out is None:
            raise ConfigError(f"save_every={self.save_every} needs out=, the directory to save checkpoints in")
        if self.batch_size is None and self.batch_tokens is None:
            object.__setattr__(self, "batch_tokens", DEFAULT_BATCH_TOKENS)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> TrainConfig:
        """From keyword arguments; ConfigError names one that does not exist."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; settings are {', '.join(known)}")
        return cls(**settings)


def _positive(value: float, name: str) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be a positive number")
