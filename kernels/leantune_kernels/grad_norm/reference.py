"""Gradient norm in plain PyTorch."""

from __future__ import annotations

import torch


def plain(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.linalg.vector_norm(x)


def refuses(x: torch.Tensor) -> str | None:
    return None


def sum_of_squares(grads: list[torch.Tensor]) -> float:
    return float(sum(g.float().square().sum(dtype=torch.float64) for g in grads))
