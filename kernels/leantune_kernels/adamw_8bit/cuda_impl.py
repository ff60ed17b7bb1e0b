"""AdamW with 8-bit moments by csrc/adamw_8bit/cuda.cu."""

from __future__ import annotations

from leantune_kernels.adamw_8bit.code_book import tables
from leantune_kernels.cuda import lib, refuses, stream

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, beta1, beta2, eps, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    pieces = table.pieces()
    rows = table.rows(grads, lr, weight_decay).to(pieces.device, non_blocking=True)
    books = tables(pieces.device)
    with stream(pieces) as s:
        lib.adamw_8bit(
            rows.data_ptr(), pieces.data_ptr(), len(pieces), books.data_ptr(),
            beta1, beta2, eps, grad_scale, step, seed, s,
        )  # fmt: skip
