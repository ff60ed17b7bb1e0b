"""Numbers that a kernel would compute nonsense with, refused by name; without PyTorch."""

from __future__ import annotations

import math


def expect_number(name: str, value: float, below: float = math.inf) -> None:
    """ValueError that names the number unless it is in [0, below); NaN is not."""
    if not 0.0 <= value < below:
        raise ValueError(f"{name}={value} is outside [0, {below:g})")
