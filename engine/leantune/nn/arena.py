"""Buffers that are taken, given back and taken again, so that a steady step allocates nothing large.

A fresh large allocation costs one page fault per 4 KiB on its first use; on a CPU that rivals the arithmetic. All
buffers of the hot path are [tokens, width], so the pool is keyed by width and dtype, and one whose capacity covers the
longest batch serves every batch.
"""

from __future__ import annotations

import torch

_ROUND = 64  # tokens: capacities are multiples of it, so that nearly equal batches share buffers


class Buffer:
    """A [tokens, width] tensor on loan: `.tensor`. It returns to its arena when released or garbage-collected."""

    __slots__ = ("_arena", "_key", "_storage", "tensor")

    def __init__(self, arena: Arena, key: tuple[int, torch.dtype], storage: torch.Tensor, tokens: int) -> None:
        self._arena, self._key, self._storage = arena, key, storage
        self.tensor = storage[:tokens]

    def release(self) -> None:
        """Gives the memory back; the tensor must not be used any more. A second call does nothing."""
        if self._storage is not None:
            self._arena._give_back(self._key, self._storage)
            self._storage = self.tensor = None  # type: ignore[assignment]

    def __del__(self) -> None:
        self.release()


class Arena:
    """Pool of buffers on one device. `capacity` is the number of tokens to plan for; larger requests still work."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.capacity = 0
        self.allocated_bytes = 0
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def take(self, tokens: int, width: int, dtype: torch.dtype = torch.float32, planned: bool = True) -> Buffer:
        """A buffer [tokens, width] with undefined contents; not planned: made for so many rows and no batch."""
        key = (width, dtype)
        free = self._free.setdefault(key, [])
        for i in range(len(free) - 1, -1, -1):
            if free[i].shape[0] >= tokens:
                return Buffer(self, key, free.pop(i), tokens)
        if free:  # all too small: replace one rather than keep both
            self.allocated_bytes -= _nbytes(free.pop())
        rows = -(-max(tokens, self.capacity if planned else 0) // _ROUND) * _ROUND
        storage = torch.empty(rows, width, dtype=dtype, device=self.device)
        self.allocated_bytes += _nbytes(storage)
        return Buffer(self, key, storage, tokens)

    def clear(self) -> None:
        """Frees every buffer that is not on loan."""
        for free in self._free.values():
            self.allocated_bytes -= sum(_nbytes(t) for t in free)
            free.clear()

    def _give_back(self, key: tuple[int, torch.dtype], storage: torch.Tensor) -> None:
        self._free[key].append(storage)


def _nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()
