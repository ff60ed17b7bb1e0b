"""Triton as the kernels see it: whether it can serve, and configurations that are timed on a device only.

Rules for a triton_impl.py: launch arguments by keyword; `do_not_specialize` for lengths, so that no length compiles
anew; offsets of rows in int64; loads widened to fp32 at once, narrowed where they are stored; no atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from leantune_kernels.checks import FLOATS

INTERPRETING = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when the kernels were imported


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the Triton kernels cannot take `x`, None if they can."""
    if x.device.type == "cpu" and not INTERPRETING:
        return "device is cpu, where Triton runs only interpreted (TRITON_INTERPRET=1)"
    if x.device.type not in ("cuda", "cpu"):
        return f"device is {x.device.type}"
    if x.dtype not in FLOATS:
        return f"dtype is {x.dtype}, supported are float32, bfloat16, float16"
    return None


def autotune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """triton.autotune over a few configurations, keyed by argument names; interpreted, the first one alone."""
    return triton.autotune(configs=list(configs[:1] if INTERPRETING else configs), key=list(key))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, at_least: int = 16, at_most: int = 1 << 20) -> int:
    """The smallest power of two that is >= n, within the limits: a block that covers n columns."""
    return max(at_least, min(at_most, triton.next_power_of_2(max(1, n))))
