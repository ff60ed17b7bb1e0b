"""How a kernel is accepted: its error against fp64 is bounded by plain PyTorch's own error in the same dtype.

Used by this project's tests and usable on anybody's implementation: a case names the inputs of an op's public function,
`plain` is the same formula in ordinary PyTorch, run once in fp64 (the truth) and once in the dtype under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Inputs of one call. `make(generator, dtype)` returns keyword arguments for the op's public function."""

    name: str
    make: Callable[[torch.Generator, torch.dtype], Inputs]
    differentiable: tuple[str, ...]  # the arguments whose gradients are compared


@dataclass(frozen=True)
class Floor:
    """The compulsory work of one call (each input read once, each output written once) and its backward pass."""

    forward_bytes: int
    backward_bytes: int = 0
    forward_flop: int = 0
    backward_flop: int = 0


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Standard normal values times `scale`, drawn in fp32 so that every dtype sees the same numbers, rounded."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def run(
    function: Callable[..., Any], inputs: Inputs, case: Case, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Outputs of `function(**inputs)`, then the gradients of the case's arguments under a fixed upstream gradient.

    With `dtype`, floating inputs of the test's dtype are converted first (fp64 for the truth).
    """
    given = {k: _prepare(v, k in case.differentiable, dtype) for k, v in inputs.items()}
    outputs = function(**given)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    wanted = [given[k] for k in case.differentiable]
    grads = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True) if wanted else ()
    missing = [k for k, g in zip(case.differentiable, grads, strict=True) if g is None]
    if missing:
        raise AssertionError(f"{case.name}: no gradient for {missing}")
    return [o.detach() for o in outputs] + list(grads)


def _prepare(value: Any, needs_grad: bool, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    value = value.detach()
    if dtype is not None:
        value = value.to(dtype)
    return value.requires_grad_(needs_grad)


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Euclidean norm; NaN or infinity anywhere counts as infinite."""
    if value.numel() == 0:
        return 0.0
    difference = (value.double() - truth.double()).norm()
    scale = truth.double().norm()
    result = float(difference / scale) if scale > 0 else float(difference)
    return result if result == result else float("inf")


def accept(
    case: Case,
    dtype: torch.dtype,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    factor: float = 1.5,
    seed: int = 0,
) -> None:
    """AssertionError unless every output and gradient of `kernel` is within `factor` of plain PyTorch's own error.

    A floor of a few units in the last place keeps exact results of plain PyTorch from demanding the impossible.
    """
    inputs = case.make(torch.Generator().manual_seed(seed), dtype)
    truth = run(plain, inputs, case, torch.float64)
    yardstick = run(plain, inputs, case)
    values = run(kernel, inputs, case)
    floor = 4 * torch.finfo(dtype).eps
    for i, (value, own, exact) in enumerate(zip(values, yardstick, truth, strict=True)):
        if value.shape != exact.shape:
            raise AssertionError(f"{case.name}, result {i}: shape {tuple(value.shape)}, not {tuple(exact.shape)}")
        found, allowed = error(value, exact), factor * error(own, exact) + floor
        if not found <= allowed:
            raise AssertionError(f"{case.name}, {dtype}, result {i}: error {found:.3g}, allowed {allowed:.3g}")
