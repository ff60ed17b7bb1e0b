"""AdamW by csrc/adamw/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.cpu import lib, refuses

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, beta1, beta2, eps, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    rows = table.rows(grads, lr, weight_decay)
    lib.adamw(rows.data_ptr(), len(rows), beta1, beta2, eps, grad_scale, step, seed)
