"""RMSprop by csrc/rmsprop/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import lib, refuses

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, alpha, eps, momentum, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    rows = table.rows(grads, lr, weight_decay)
    lib.rmsprop(rows.data_ptr(), len(rows), alpha, eps, momentum, grad_scale, step, seed)
