"""Calls of autograd functions, without autograd where it has nothing to do."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad


class _NothingKept:
    """Stands for the context of a forward pass that no backward pass will follow."""

    def __init__(self, arguments: int) -> None:
        self.needs_input_grad = (False,) * arguments

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), or its forward pass alone where no argument asks for a gradient.

    What apply does beside costs as much as a small op: some 40 microseconds where caches are cold. It also refuses what
    these functions cannot do, which is to carry tangents forward; so inside a dual level it is asked in any case.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    if wanted or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    return function.forward(_NothingKept(len(arguments)), *arguments)
