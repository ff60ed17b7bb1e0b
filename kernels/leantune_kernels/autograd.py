"""What autograd sees of the ops: nothing where it has nothing to do, and one derivative, not two."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad


class _Exact(threading.local):
    """Memory of tensors that the running forward pass saves and that must come back bit for bit."""

    def __init__(self) -> None:
        self.memory: frozenset[int] = frozenset()


_exact = _Exact()


class _NothingKept:
    """Stands for the context of a forward pass that no backward pass will follow."""

    def __init__(self, arguments: int) -> None:
        self.needs_input_grad = (False,) * arguments

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def save(ctx: Any, *tensors: torch.Tensor | None, exact: Iterable[torch.Tensor | None]) -> None:
    """ctx.save_for_backward(*tensors); those of `exact` among them are left as they are by packed_saves.

    Exact are weights, statistics, tables and finished gradients: few beside the activations, and their rounding would
    show. In a graph of torch.compile it is the compiler that decides what is saved.
    """
    ctx.save_for_backward(*tensors)
    if not torch.compiler.is_compiling() and not isinstance(ctx, _NothingKept):
        _exact.memory = frozenset(t.untyped_storage()._cdata for t in exact if t is not None)


def is_exact(x: torch.Tensor) -> bool:
    """Whether `x`, which is just being saved, has been given to `save` as exact. For hooks on saved tensors."""
    return x.untyped_storage()._cdata in _exact.memory


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), or its forward pass alone where no argument asks for a gradient.

    What apply does beside costs as much as a small op: some 40 microseconds where caches are cold. It also refuses what
    these functions cannot do, which is to carry tangents forward; so inside a dual level it is asked in any case.
    RuntimeError inside the transforms of torch.func, whose tensors have no memory that a kernel could read.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function.__module__} was called inside a transform of torch.func (vmap, grad, jvp, ...), where tensors "
            "have no memory that a kernel could read; call it with vmap's dimension as one more dimension of the rows, "
            "and use torch.autograd.grad for gradients"
        )
    wanted = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    if wanted or forward_ad._current_level >= 0:
        try:
            return function.apply(*arguments)
        finally:
            _exact.memory = frozenset()
    return function.forward(_NothingKept(len(arguments)), *arguments)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of an autograd function whose results cannot be differentiated again.

    PyTorch's decorator of this name lets a second derivative pass, and be wrong, where the upstream gradient is a
    constant: what was saved depends on the inputs as well.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled: by create_graph=True
            return found
        if not isinstance(found, tuple):
            return _refusing(found)
        return tuple(_refusing(g) for g in found)

    return once


def _refusing(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """`gradient` with a node behind it that refuses."""
    return None if gradient is None else _Refusal.apply(torch.empty(0, requires_grad=True), gradient)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        raise RuntimeError(
            "leantune_kernels' functions can be differentiated once only; where a second derivative is needed, use "
            "PyTorch's own operations in their place"
        )
