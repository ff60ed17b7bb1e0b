"""The 2-norm over all gradients, as for clipping: one read of them, and the same bits on every run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from leantune_kernels.checks import FLOATS
from leantune_kernels.dispatch import Op

OP = Op(__name__)


def grad_norm(grads: Iterable[torch.Tensor | None]) -> float:
    """sqrt of the sum of squares of all elements of `grads`; 0.0 for none.

    grads: float32, bfloat16 or float16, mixed as they come, any strides (copied where not contiguous); None
    is skipped. Squares are fp32, sums of blocks fp64; infinity and NaN reach the result. Raises ValueError
    that names the tensor.
    """
    given = [(i, g.detach()) for i, g in enumerate(grads) if g is not None]
    for i, g in given:
        if g.dtype not in FLOATS or g.device != given[0][1].device:
            raise ValueError(
                f"grads[{i}] is {g.dtype} on {g.device}; gradients must be float32, bfloat16 or float16, "
                "all on one device"
            )
    if not given:
        return 0.0
    return math.sqrt(OP.pick(given[0][1]).sum_of_squares([g for _, g in given]))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of norm `norm` by for at most `max_norm`: torch's clip_grad_norm_ rule."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # NaN stays NaN
