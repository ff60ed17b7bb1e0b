"""AdamW by csrc/adamw/cuda.cu."""

from __future__ import annotations

from leantune_kernels.cuda import lib, refuses, stream

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, beta1, beta2, eps, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    pieces = table.pieces()
    rows = table.rows(grads, lr, weight_decay).to(pieces.device, non_blocking=True)
    with stream(pieces) as s:
        lib.adamw(
            rows.data_ptr(), pieces.data_ptr(), len(pieces), beta1, beta2, eps, grad_scale, step, seed, s
        )  # fmt: skip
