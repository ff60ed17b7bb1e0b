"""AdamW by csrc/adamw/cpu.cpp."""

from __future__ import annotations

import torch

from leantune_kernels.cpu import DTYPE_CODES, address, lib, refuses

__all__ = ["refuses", "update"]


def update(table, grads, *, step, lr, beta1, beta2, eps, weight_decay, grad_scale):  # type: ignore[no-untyped-def]
    codes = [0 if g is None else DTYPE_CODES[g.dtype] for g in grads]
    grad_table = torch.tensor([[address(g) for g in grads], codes], dtype=torch.int64)
    rates = torch.tensor([lr, weight_decay], dtype=torch.float64)
    sizes, params, exp_avgs, exp_avg_sqs = table.addresses
    lib.adamw(
        len(grads), sizes.data_ptr(), params.data_ptr(), grad_table[0].data_ptr(), grad_table[1].data_ptr(),
        exp_avgs.data_ptr(), exp_avg_sqs.data_ptr(), rates[0].data_ptr(), rates[1].data_ptr(),
        beta1, beta2, eps, grad_scale, step,
    )  # fmt: skip
