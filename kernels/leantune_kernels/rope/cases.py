"""Inputs of rope: one token, partial rotation, halves that are no multiple of a vector, both pairings, q with k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.rope import apply_, rope, rope_qk
from leantune_kernels.rope.reference import plain as plain_x
from leantune_kernels.rope.reference import plain_qk
from leantune_kernels.testing import Case, Floor, Inputs, normal

__all__ = [
    "BENCHMARKS", "CASES", "MEMORY_BOUND", "TRAFFIC", "contenders", "floor", "function", "of_length", "plain", "tables",
]  # fmt: skip

MEMORY_BOUND = True


def function(**inputs):  # type: ignore[no-untyped-def]
    return rope_qk(**inputs) if "k" in inputs else rope(**inputs)


def plain(**inputs):  # type: ignore[no-untyped-def]
    return plain_qk(**inputs) if "k" in inputs else plain_x(**inputs)


def tables(positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [positions, half] fp32 for the usual base of 10000."""
    inverse_frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse_frequency
    return angles.cos().float(), angles.sin().float()


def _case(
    tokens: int,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool = False,
    kv_heads: int = 0,
    gradients: bool = True,
) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        cos, sin = tables(50, rotary_dim // 2)
        x = normal(g, tokens, heads, head_dim, dtype=dtype)
        k = {"k": normal(g, tokens, kv_heads, head_dim, dtype=dtype)} if kv_heads else {}
        positions = torch.randint(50, (tokens,), generator=g)
        return {"q" if k else "x": x, **k, "cos": cos, "sin": sin, "positions": positions, "interleaved": interleaved}

    heads_named = f"{heads}+{kv_heads}" if kv_heads else f"{heads}"
    name = f"{tokens}x{heads_named}x{head_dim} rotary {rotary_dim}{' interleaved' if interleaved else ''}"
    return Case(name, make, (("q", "k") if kv_heads else ("x",)) if gradients else ())


CASES = [
    _case(1, 1, 2, 2),
    _case(0, 2, 8, 8),
    _case(7, 3, 10, 6),
    _case(33, 2, 80, 32),
    _case(70, 9, 64, 64, kv_heads=3),
    _case(1, 1, 2, 2, interleaved=True),
    _case(7, 3, 11, 6, interleaved=True, kv_heads=1),
    _case(33, 2, 80, 48, interleaved=True),
    _case(3, 1, 1100, 1080, kv_heads=2),  # more pairs than a block of a device holds at once
]
TRAFFIC = _case(70, 9, 64, 64, kv_heads=3)


def of_length(tokens: int) -> Case:
    return _case(tokens, 3, 16, 16, kv_heads=1)


BENCHMARKS = {
    f"{name}{', interleaved' if interleaved else ''}": _case(*shape, interleaved, kv_heads, gradients=False)
    for name, shape, kv_heads in (("SmolLM2-135M", (1600, 9, 64, 64), 3), ("Llama 7B", (2048, 32, 128, 128), 32))
    for interleaved in (False, True)
}


def contenders(**inputs: Any) -> dict[str, Callable[[], Any]]:
    """In place, as the engine turns q and k in the buffer of their product; PyTorch's formula makes new tensors."""
    q, k, cos, sin, positions, interleaved = inputs.values()

    def ours() -> None:
        apply_(q, cos, sin, positions, interleaved=interleaved, k=k)

    full = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)]

    def torchs() -> list[torch.Tensor]:
        c, s = (t[positions][:, None].to(q.dtype) for t in full)
        return [x * c + _partner(x, interleaved) * s for x in (q, k)]

    return {"leantune": ours, "torch": torchs}


def _partner(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The other column of each one's pair, negated for the first of the two."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def floor(cos: torch.Tensor, **inputs: Any) -> Floor:
    """q and k, read and written."""
    size = sum(inputs[x].numel() * inputs[x].element_size() for x in ("x", "q", "k") if x in inputs)
    return Floor(forward_bytes=2 * size, backward_bytes=2 * size)
