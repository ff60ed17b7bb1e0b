"""Triton as the kernels see it: whether it can serve, and configurations that are timed on a device only.

Rules for a triton_impl.py: raw functions are `on_device`; launch arguments by keyword; `do_not_specialize` for lengths,
so that no length compiles anew; offsets of rows in int64; loads widened to fp32 at once, narrowed where stored; no
atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
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


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A raw function during which its tensors' device is the current one: that is where Triton launches."""

    @wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        device = _device_of([*args, *options.values()])
        if device is None or device.type != "cuda":
            return function(*args, **options)
        with torch.cuda.device(device):
            return function(*args, **options)

    return guarded


def _device_of(values: Iterable[Any]) -> torch.device | None:
    """Of the first tensor among the values, in lists of them, or among the parameters of an optimizer's table."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        found = _device_of(value if isinstance(value, (list, tuple)) else getattr(value, "params", ()))
        if found is not None:
            return found
    return None


def autotune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """triton.autotune over a few configurations, keyed by argument names; interpreted, the first one alone."""
    return triton.autotune(configs=list(configs[:1] if INTERPRETING else configs), key=list(key))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, at_least: int = 16, at_most: int = 1 << 20) -> int:
    """The smallest power of two that is >= n, within the limits: a block that covers n columns."""
    return max(at_least, min(at_most, triton.next_power_of_2(max(1, n))))
