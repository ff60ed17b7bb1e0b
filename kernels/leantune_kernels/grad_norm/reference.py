"""Gradient norm in plain PyTorch."""

from __future__ import annotations

import torch


def plain(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.linalg.vector_norm(x)


def refuses(x: torch.Tensor) -> str | None:
    return None


def sum_of_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.float().square().sum(dtype=torch.float64) for g in grads]).sum()


def scale(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    for g in grads:
        g.copy_(g.float() * factor)
