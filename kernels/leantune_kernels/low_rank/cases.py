"""Inputs of lora_linear and lora_linear_group: one row, no rows, odd ranks and sizes, no bias, dropout, groups."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.low_rank import LoRALayer, lora_linear, lora_linear_group
from leantune_kernels.low_rank.reference import plain as plain_linear
from leantune_kernels.testing import Case, Floor, Inputs, normal

__all__ = [
    "BENCHMARKS",
    "BITS_BY_THREADS",
    "CASES",
    "MEMORY_BOUND",
    "PEERS",
    "TRAFFIC",
    "floor",
    "function",
    "of_length",
    "plain",
]

MEMORY_BOUND = False  # the dense product of the frozen weight is most of it
BITS_BY_THREADS = ("weight",)  # a product of PyTorch's over the rows


def function(x: torch.Tensor, **given: Any) -> torch.Tensor:
    """lora_linear, or lora_linear_group with its outputs side by side where `given` has weight0, A0, ..."""
    if "weight" in given:
        return lora_linear(x, **given)
    return torch.cat(lora_linear_group(x, [LoRALayer(**layer) for layer in _layers(given)]), -1)


def plain(x: torch.Tensor, **given: Any) -> torch.Tensor:
    if "weight" in given:
        return plain_linear(x, **given)
    return torch.cat([plain_linear(x, **layer) for layer in _layers(given)], -1)


def _layers(given: Inputs) -> list[Inputs]:
    members = sorted({name[-1] for name in given})
    return [{name[:-1]: value for name, value in given.items() if name[-1] == member} for member in members]


def _layer(
    g: torch.Generator, dtype: torch.dtype, inputs: int, outputs: int, rank: int, bias: bool, suffix: str = ""
) -> Inputs:
    return {
        "weight" + suffix: normal(g, outputs, inputs, dtype=dtype, scale=inputs**-0.5),
        "bias" + suffix: normal(g, outputs, dtype=dtype) if bias else None,
        "A" + suffix: normal(g, rank, inputs, dtype=torch.float32, scale=inputs**-0.5),
        "B" + suffix: normal(g, outputs, rank, dtype=torch.float32, scale=rank**-0.5),
        "scale" + suffix: 2.0,
    }


def _case(rows: int, inputs: int, outputs: int, rank: int, bias: bool = True, dropout: float = 0.0) -> Case:
    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        given = {"x": normal(g, rows, inputs, dtype=dtype), **_layer(g, dtype, inputs, outputs, rank, bias)}
        return {**given, "dropout_p": dropout, "seed": 5, "offset": 2**33 + 1} if dropout else given

    name = f"{rows}x{inputs}x{outputs} rank {rank}" + (f" dropout {dropout}" if dropout else "")
    return Case(name, make, ("x", "weight", *(("bias",) if bias else ()), "A", "B"))


def _group(rows: int, inputs: int, *members: tuple[int, int, bool]) -> Case:
    """Each member: outputs, rank, whether it has a bias."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        given: Inputs = {"x": normal(g, rows, inputs, dtype=dtype)}
        for i, (outputs, rank, bias) in enumerate(members):
            given |= _layer(g, dtype, inputs, outputs, rank, bias, str(i))
        return given

    names = [n + str(i) for i, m in enumerate(members) for n in ("weight", "A", "B", *(("bias",) if m[2] else ()))]
    sizes = ", ".join(f"{outputs} rank {rank}" for outputs, rank, _ in members)
    return Case(f"{rows}x{inputs} group of {sizes}", make, ("x", *names))


CASES = [
    _case(1, 5, 3, 1),
    _case(0, 8, 8, 4),
    _case(7, 33, 50, 5, dropout=0.25),
    _case(33, 48, 17, 8, bias=False),
    _case(130, 160, 192, 16, bias=False),
    _case(61, 100, 130, 65, bias=False),
    _case(1300, 16, 20, 3),  # several groups of 8 row tiles, several chunks of gradients
    _group(37, 64, (72, 16, True), (24, 3, False), (24, 8, True)),
]
TRAFFIC = _case(130, 160, 192, 16, bias=False)


def of_length(n: int) -> Case:
    return _case(n, 64, 48, 8)


BENCHMARKS = {
    "SmolLM2-135M, rank 16": _case(1600, 576, 576, 16, bias=False),
    "SmolLM2-135M, gate and up, rank 16": _group(1600, 576, (1536, 16, False), (1536, 16, False)),
    "Llama 7B, rank 64": _case(2048, 4096, 4096, 64, bias=False),
}
PEERS = {"torch": plain}


def floor(x: torch.Tensor, **given: Any) -> Floor:
    """x, weights and factors to y; x, dy and weights to dx and all gradients, once each."""
    layers, b = [given] if "weight" in given else _layers(given), x.element_size()
    rows, inputs = x.numel() // x.shape[-1], x.shape[-1]
    outputs = sum(layer["weight"].shape[0] for layer in layers)
    factors = sum(layer["A"].numel() + layer["B"].numel() for layer in layers)
    dense, low = 2 * rows * inputs * outputs, 2 * rows * factors
    matrices, weights = b * rows * (inputs + outputs), b * inputs * outputs
    return Floor(
        forward_bytes=matrices + weights + 4 * factors,
        backward_bytes=matrices + b * rows * inputs + 2 * weights + 8 * factors,
        forward_flop=dense + low,
        backward_flop=2 * (dense + low),
    )
