"""Inputs of activation_pack: one row, odd sizes, rows longer than a block, both ways of packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.activation_pack import pack, unpack
from leantune_kernels.activation_pack.reference import plain
from leantune_kernels.testing import Case, Floor, normal

__all__ = ["BENCHMARKS", "CASES", "MEMORY_BOUND", "TRAFFIC", "contenders", "floor", "function", "of_length", "plain"]

MEMORY_BOUND = True


def function(x: torch.Tensor, mode: str) -> torch.Tensor:
    """`x` packed and unpacked."""
    return unpack(pack(x, mode))


def _case(mode: str, *shape: int) -> Case:
    return Case(
        f"{mode} {'x'.join(map(str, shape))}",
        lambda g, dtype: {"x": normal(g, *shape, dtype=dtype), "mode": mode},
        (),
    )


CASES = [
    _case("bf16", 1, 5),
    _case("bf16", 0, 8),
    _case("bf16", 3, 7, 65),
    _case("int8", 1, 5),
    _case("int8", 0, 8),
    _case("int8", 3, 17),
    _case("int8", 2, 9, 128),
    _case("int8", 2, 4133),
]
TRAFFIC = _case("int8", 64, 1024)


def of_length(rows: int) -> Case:
    return _case("int8", rows, 64)


BENCHMARKS = {f"{mode}, SmolLM2-135M MLP": _case(mode, 1600, 1536) for mode in ("bf16", "int8")}


def contenders(x: torch.Tensor, mode: str) -> dict[str, Callable[[], Any]]:
    """PyTorch has no operation for int8: the formula, operation by operation."""

    def torch_pack() -> torch.Tensor:
        if mode == "bf16":
            return x.to(torch.bfloat16).to(x.dtype)
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round_().to(torch.int8).to(x.dtype).mul_(scale)

    return {"leantune": lambda: function(x, mode), "torch": torch_pack}


def floor(x: torch.Tensor, mode: str) -> Floor:
    """x to what is packed, and back."""
    rows = x.numel() // max(1, x.shape[-1])
    packed = 2 * x.numel() if mode == "bf16" else x.numel() + 4 * rows
    return Floor(forward_bytes=2 * (x.nbytes + packed))
