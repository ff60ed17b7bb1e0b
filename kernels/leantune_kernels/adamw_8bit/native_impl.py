"""AdamW with 8-bit moments by csrc/adamw_8bit/cpu.cpp."""

from __future__ import annotations

from leantune_kernels.adamw_8bit.code_book import tables
from leantune_kernels.cpu import lib, refuses

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, beta1, beta2, eps, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    rows = table.rows(grads, lr, weight_decay)
    books = tables(table.params[0].device)
    lib.adamw_8bit(rows.data_ptr(), len(rows), books.data_ptr(), beta1, beta2, eps, grad_scale, step, seed)
