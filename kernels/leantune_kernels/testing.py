"""How a kernel is accepted: its error against fp64 is bounded by plain PyTorch's own error in the same dtype.

Used by this project's tests and usable on anybody's implementation: a case names the inputs of an op's public function,
`plain` is the same formula in ordinary PyTorch, run once in fp64 (the truth) and once in the dtype under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
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


def dense(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An upstream gradient for `output`: standard normal, contiguous."""
    return torch.randn(output.shape, generator=generator).to(output)


def expanded(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An upstream gradient that is one number, every stride 0, as a sum's."""
    return torch.randn((), generator=generator).to(output).expand(output.shape)


def strided(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An upstream gradient whose first dimension is the densest, and no dimension contiguous."""
    backwards = tuple(range(output.dim()))[::-1]
    both = torch.randn(*output.shape[::-1], 2, generator=generator).to(output)
    return both[..., 0].permute(backwards)


Upstream = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def run(
    function: Callable[..., Any],
    inputs: Inputs,
    case: Case,
    dtype: torch.dtype | None = None,
    upstream: Upstream = dense,
    device: torch.device | str | None = None,
) -> list[torch.Tensor]:
    """Outputs of `function(**inputs)`, then the gradients of the case's arguments under a fixed upstream gradient.

    With `dtype`, floating inputs of the test's dtype are converted first (fp64 for the truth). With `device`, the
    function runs there; the results are on the CPU in any case.
    """
    given = prepare(inputs, case, dtype, device)
    outputs = function(**given)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    gradients = [upstream(o, generator) for o in outputs]
    wanted = [given[k] for k in case.differentiable]
    grads = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True) if wanted else ()
    missing = [k for k, g in zip(case.differentiable, grads, strict=True) if g is None]
    if missing:
        raise AssertionError(f"{case.name}: no gradient for {missing}")
    return [t.detach().cpu() for t in (*outputs, *grads)]


def prepare(
    inputs: Inputs, case: Case, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Inputs:
    """The arguments of a call: floating tensors in `dtype`, tensors on `device`, with gradients where the case asks."""
    on_device = {k: v.to(device) if device and isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return {k: _prepare(v, k in case.differentiable, dtype) for k, v in on_device.items()}


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


@dataclass(frozen=True)
class Measured:
    """One output or gradient: its error against fp64, and the error it may have."""

    name: str  # "output 0" or "gradient of x"
    error: float
    allowed: float


FACTOR = 1.5  # times plain PyTorch's error, where an op's cases.py says nothing else for the dtype
FEW = 16


def factor_of(cases: ModuleType, dtype: torch.dtype) -> float:
    """How many times plain PyTorch's error a kernel may have: FACTOR of the op's cases.py, by dtype, or 1.5."""
    factors: dict[torch.dtype, float] = getattr(cases, "FACTOR", {})
    return factors.get(dtype, FACTOR)


def _floor(result: torch.Tensor, dtype: torch.dtype) -> float:
    rounding = torch.finfo(dtype).eps / 2 if result.numel() < FEW else 0.0
    return rounding + 4 * torch.finfo(torch.float32).eps


class Expected:
    """What a case's results must be: fp64 for the truth, plain PyTorch in `dtype` for the error that is allowed.

    Four units in the last place of fp32 keep exact results of plain PyTorch from demanding the impossible. A result of
    fewer than FEW elements may be exact in plain PyTorch by luck: it may err by half a unit in the last place of
    `dtype` on top, which is what rounding once can cost.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        plain: Callable[..., Any],
        factor: float = FACTOR,
        seed: int = 0,
        upstream: Upstream = dense,
    ) -> None:
        self.case, self.dtype, self.upstream = case, dtype, upstream
        self.inputs = case.make(torch.Generator().manual_seed(seed), dtype)
        self.truth = run(plain, self.inputs, case, torch.float64, upstream)
        yardstick = run(plain, self.inputs, case, None, upstream)
        self.allowed = [
            factor * error(own, exact) + _floor(own, dtype) for own, exact in zip(yardstick, self.truth, strict=True)
        ]

    def measure(self, kernel: Callable[..., Any], device: torch.device | str | None = None) -> list[Measured]:
        """Errors of what `kernel` makes of the case. AssertionError for a gradient or a shape that is not there."""
        values = run(kernel, self.inputs, self.case, None, self.upstream, device)
        names = [f"gradient of {k}" for k in self.case.differentiable]
        names = [f"output {i}" for i in range(len(self.truth) - len(names))] + names
        if len(values) != len(names):
            raise AssertionError(f"{self.case.name}: {len(values)} results instead of {len(names)}: {', '.join(names)}")
        for name, value, exact in zip(names, values, self.truth, strict=True):
            if value.shape != exact.shape:
                raise AssertionError(f"{self.case.name}, {name}: shape {tuple(value.shape)}, not {tuple(exact.shape)}")
        errors = (error(value, exact) for value, exact in zip(values, self.truth, strict=True))
        return [Measured(*row) for row in zip(names, errors, self.allowed, strict=True)]


def accept(
    case: Case,
    dtype: torch.dtype,
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    factor: float = FACTOR,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> None:
    """AssertionError unless every output and gradient of `kernel` is within `factor` of plain PyTorch's own error."""
    for m in Expected(case, dtype, plain, factor, seed).measure(kernel, device):
        if not m.error <= m.allowed:
            raise AssertionError(f"{case.name}, {dtype}, {m.name}: error {m.error:.3g}, allowed {m.allowed:.3g}")
