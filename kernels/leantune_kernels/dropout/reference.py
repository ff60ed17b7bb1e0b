"""Dropout in plain PyTorch, with Philox4x32-10 in int64 arithmetic, where products wrap modulo 2^64."""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def philox(counters: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """The four 32-bit words [n, 4] int64 of Philox4x32-10 at `counters` [n, 4] under `key`."""
    c0, c1, c2, c3 = counters.unbind(1)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & _LOW ^ c1 ^ k0, b & _LOW, (a >> 32) & _LOW ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), 1)


def words(n: int, seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """The word [n] int64 of every element."""
    counter = torch.arange(offset // 4, (offset + n + 3) // 4, device=device)
    zero = torch.zeros_like(counter)
    every = philox(torch.stack((counter & _LOW, counter >> 32, zero, zero), 1), (seed & _LOW, seed >> 32))
    return every.flatten()[offset % 4 :][:n]


def plain(x: torch.Tensor, p: float, seed: int, offset: int) -> torch.Tensor:
    keep = words(x.numel(), seed, offset, x.device) >= round(p * 2**32)
    return x * (keep.view(x.shape) / (1 - p)).to(x.dtype)


def refuses(x: torch.Tensor) -> str | None:
    return None


def forward(x, threshold, scale, seed, offset, out=None):  # type: ignore[no-untyped-def]
    keep = words(x.numel(), seed, offset, x.device).view(x.shape) >= threshold
    y = (x.float() * torch.where(keep, scale, 0.0)).to(x.dtype)
    return y if out is None else out.copy_(y)
