"""The 2-norm over all gradients, as for clipping: one read of them, and the same bits on every run."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from leantune_kernels.checks import FLOATS, changed
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(__name__, effects={"scale": Effects((0,))})


def grad_norm(grads: Iterable[torch.Tensor | None]) -> float:
    """sqrt of the sum of squares of all elements of `grads`; 0.0 for none.

    grads: float32, bfloat16 or float16, mixed as they come, any strides (copied where not contiguous); None
    is skipped. Squares are fp32, sums of blocks fp64; infinity and NaN reach the result. Raises ValueError
    that names the tensor.
    """
    return float(grad_norm_tensor(grads))


def grad_norm_tensor(grads: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """grad_norm as a float64 tensor of no dimensions on the gradients' device; the host does not wait for it."""
    given = [g.contiguous() for g in _checked(grads)]
    if not given:
        return torch.zeros((), dtype=torch.float64)
    return OP.pick(given[0]).sum_of_squares(given).sqrt()


def clip_grad_norm_(grads: Iterable[torch.Tensor | None], max_norm: float) -> torch.Tensor:
    """Scales `grads` in place so that their norm is at most `max_norm`; returns the norm they had.

    As torch.nn.utils.clip_grad_norm_, on tensors of gradients: float32, bfloat16 or float16, contiguous; None is
    skipped. The norm is a float64 tensor of no dimensions on their device, and nothing waits for it. Gradients
    within the norm are read once and not written. A norm of infinity makes finite gradients 0, NaN makes all NaN.
    An optimizer's grad_scale clips without this pass. Raises ValueError that names the tensor or max_norm.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm} must be 0 or more")
    given = _checked(grads)
    if not given:
        return torch.zeros((), dtype=torch.float64)
    for i, g in enumerate(given):
        if not g.is_contiguous():
            raise ValueError(f"gradient {i} has strides {g.stride()}; it must be contiguous to be scaled in place")
    implementation = OP.pick(given[0])
    norm = implementation.sum_of_squares(given).sqrt()
    implementation.scale(given, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    changed(*given)
    return norm


def _checked(grads: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    given = [(i, g.detach()) for i, g in enumerate(grads) if g is not None]
    for i, g in given:
        if g.dtype not in FLOATS or g.device != given[0][1].device:
            raise ValueError(
                f"grads[{i}] is {g.dtype} on {g.device}; gradients must be float32, bfloat16 or float16, "
                "all on one device"
            )
    return [g for _, g in given]


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of norm `norm` by for at most `max_norm`: torch's clip_grad_norm_ rule."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # NaN stays NaN
