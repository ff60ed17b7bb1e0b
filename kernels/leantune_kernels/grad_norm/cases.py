"""Inputs of grad_norm: one flat set of numbers, cut into tensors of the given sizes."""

from __future__ import annotations

import torch

from leantune_kernels.grad_norm import grad_norm
from leantune_kernels.grad_norm.reference import plain
from leantune_kernels.testing import Case, normal

__all__ = ["CASES", "function", "plain"]


def function(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.tensor(grad_norm(x.split(sizes)), dtype=torch.float64)


def _case(sizes: list[int], scale: float = 1.0) -> Case:
    return Case(
        f"{sizes} scale {scale}",
        lambda g, dtype: {"x": normal(g, sum(sizes), dtype=dtype, scale=scale), "sizes": sizes},
        (),
    )


CASES = [_case([1]), _case([3, 0, 17, 64]), _case([30000, 5, 8192, 8193], scale=1e-2), _case([0])]
