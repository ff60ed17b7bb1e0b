"""SGD by csrc/sgd/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import lib, refuses

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, momentum, dampening, nesterov, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    rows = table.rows(grads, lr, weight_decay)
    lib.sgd(rows.data_ptr(), len(rows), momentum, dampening, nesterov, grad_scale, step, seed)
