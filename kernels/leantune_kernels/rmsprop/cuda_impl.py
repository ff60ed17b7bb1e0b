"""RMSprop by csrc/rmsprop/cuda.cu."""

from __future__ import annotations

from leantune_kernels.cuda import lib, refuses, stream

__all__ = ["refuses", "update"]


def update(table, grads, *, lr, weight_decay, alpha, eps, momentum, grad_scale, step, seed):  # type: ignore[no-untyped-def]
    pieces = table.pieces()
    rows = table.rows(grads, lr, weight_decay).to(pieces.device, non_blocking=True)
    with stream(pieces) as s:
        lib.rmsprop(
            rows.data_ptr(), pieces.data_ptr(), len(pieces), alpha, eps, momentum, grad_scale, step, seed, s
        )  # fmt: skip
