"""Calls of autograd functions, without autograd where it has nothing to do."""

from __future__ import annotations

import threading
from collections.abc import Iterable
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
