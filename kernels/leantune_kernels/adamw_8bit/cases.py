"""Inputs of adamw_8bit: moments that were quantised; the parameters and the blocks' maxima after a step are compared.

The codes are compared between implementations in tests/kernels/test_adamw_8bit.py: a number next to a boundary may fall
on either side, which no bound on an error describes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.adamw_8bit import AdamW8bitTable, adamw_8bit_step
from leantune_kernels.adamw_8bit.code_book import BLOCK, encode
from leantune_kernels.adamw_8bit.reference import plain as plain_step
from leantune_kernels.optimizer_cases import FACTOR, SIZES, bytes_of_parameters, cut, masters, torch_step
from leantune_kernels.testing import Case, Floor, normal

__all__ = [
    "BENCHMARKS",
    "CASES",
    "FACTOR",
    "MEMORY_BOUND",
    "TRAFFIC",
    "contenders",
    "floor",
    "function",
    "of_length",
    "plain",
]

MEMORY_BOUND = True
Tensor = torch.Tensor
States = tuple[list[Tensor], ...]  # codes of m, absmax of m, codes of v, absmax of v


def _cut(states: dict[str, Tensor], sizes: list[int]) -> States:
    blocks = [-(-n // BLOCK) for n in sizes]
    return tuple(cut(t, blocks if name.startswith("absmax") else sizes) for name, t in states.items())


def function(p: Tensor, g: Tensor, sizes: list[int], step: int, lr: float, **others: Any) -> tuple[Tensor, ...]:
    states, numbers = _apart(others)
    params, given = cut(p, sizes), _cut(states, sizes)
    adamw_8bit_step(params, cut(g, sizes), *given, step=step, lr=lr, masters=masters(params), **numbers)
    return tuple(torch.cat(tensors) for tensors in (params, given[1], given[3]))


def plain(p: Tensor, g: Tensor, sizes: list[int], **others: Any) -> tuple[Tensor, ...]:
    states, numbers = _apart(others)
    parts = zip(p.split(sizes), g.split(sizes), *_cut(states, sizes), strict=True)
    results = [plain_step(*part, **numbers) for part in parts]
    return tuple(torch.cat([result[k] for result in results]).to(t) for k, t in ((0, p), (2, p), (4, p)))


def _apart(others: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    states = {k: v for k, v in others.items() if isinstance(v, Tensor)}
    return states, {k: v for k, v in others.items() if k not in states}


def _case(sizes: list[int], **numbers: Any) -> Case:
    n = sum(sizes)

    def make(g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        m = [encode(t, signed=True) for t in normal(g, n, dtype=torch.float32, scale=0.1).split(sizes)]
        v = [encode(t.square(), signed=False) for t in normal(g, n, dtype=torch.float32, scale=0.1).split(sizes)]
        return {
            "p": normal(g, n, dtype=dtype),
            "g": normal(g, n, dtype=dtype, scale=0.1),
            "codes_m": torch.cat([codes for codes, _ in m]),
            "absmax_m": torch.cat([absmax for _, absmax in m]),
            "codes_v": torch.cat([codes for codes, _ in v]),
            "absmax_v": torch.cat([absmax for _, absmax in v]),
            "sizes": sizes,
            **numbers,
        }

    return Case(f"{len(sizes)} tensors, {n} elements, {numbers}", make, ())


CASES = [
    _case([1], step=1, lr=1e-3),
    _case([0], step=1, lr=1e-3),
    _case([3, 0, 17, 256, 257], step=7, lr=1e-2, weight_decay=0.1),
    _case([16640, 5, 1025], step=1000, lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-6, grad_scale=0.25),
]
TRAFFIC = _case([150000, 1000], step=2, lr=1e-3, weight_decay=0.1)
BENCHMARKS = {name: _case(sizes, step=2, lr=1e-3, weight_decay=0.1) for name, sizes in SIZES.items()}


def of_length(n: int) -> Case:
    return _case([n], step=n, lr=1e-3)


def floor(p: Tensor, g: Tensor, absmax_m: Tensor, **_: Any) -> Floor:
    """16 bytes a parameter in fp32 and 10 in bf16: 4 of them the codes; and 16 for the maxima of each block."""
    return Floor(forward_bytes=bytes_of_parameters(p, g) + 4 * p.numel() + 16 * absmax_m.numel())


def contenders(p: Tensor, g: Tensor, sizes: list[int], **others: Any) -> dict[str, Callable[[], Any]]:
    states, numbers = _apart(others)
    params, grads = cut(p, sizes), cut(g, sizes)
    table = AdamW8bitTable(params, *_cut(states, sizes))
    options = {"lr": numbers["lr"], "weight_decay": numbers["weight_decay"]}
    return {
        "leantune": lambda: table.step(grads, **numbers),
        "torch fused, fp32 states": torch_step(params, grads, lambda ts: torch.optim.AdamW(ts, fused=True, **options)),
    }
