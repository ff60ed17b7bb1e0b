"""The low-rank products by csrc/low_rank/cpu.cpp."""

from __future__ import annotations

import ctypes

import torch

from leantune_kernels.cpu import DTYPE_CODES, lib, refuses, rows

__all__ = ["add_", "gradients_group", "input_gradient_group", "linear_group", "merge", "refuses"]


class _Adapter(ctypes.Structure):
    """lt_low_rank_adapter of leantune_kernels.h."""

    _fields_ = (
        *((name + part, ctypes.c_int64) for name in ("dy", "a", "b", "da", "db") for part in ("", "_stride")),
        ("outputs", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def merge(weight, A, B, scale, out):  # type: ignore[no-untyped-def]
    weight, A, B = rows(weight), rows(A), rows(B)
    lib.low_rank_merge(
        DTYPE_CODES[weight.dtype], weight.data_ptr(), weight.stride(0), A.data_ptr(), A.stride(0),
        B.data_ptr(), B.stride(0), out.data_ptr(), out.stride(0), *weight.shape, A.shape[0], scale,
    )  # fmt: skip


def linear_group(x, source, layers, outs):  # type: ignore[no-untyped-def]
    """The vendor's product, then the update. S is not kept: the pass over x for the gradients forms it on its way."""
    for (weight, bias, A, B, scale), out in zip(layers, outs, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        add_(out, source, A.t(), B.t(), scale)


def input_gradient_group(dx, dys, layers):  # type: ignore[no-untyped-def]
    for i, ((weight, _, A, B, scale), dy) in enumerate(zip(layers, dys, strict=True)):
        if i == 0:
            torch.mm(dy, weight, out=dx)
        else:
            dx.addmm_(dy, weight)
        add_(dx, dy, B, A, scale)


def gradients_group(x, adapters, out, accumulate, S=None, dS=None):  # type: ignore[no-untyped-def]
    assert S is None and dS is None, "this implementation forms S and dS itself, a block of rows at a time"
    x = rows(x)
    inputs = [tuple(rows(t) for t in a[:3]) for a in adapters]  # kept alive during the call
    group = (_Adapter * len(adapters))()
    for entry, tensors, targets, adapter in zip(group, inputs, out, adapters, strict=True):
        values = [v for t in (*tensors, *targets) for v in ((0, 0) if t is None else (t.data_ptr(), t.stride(0)))]
        values += [tensors[0].shape[1], tensors[1].shape[0], adapter.scale]
        for field, value in zip(_Adapter._fields_, values, strict=True):
            setattr(entry, field[0], value)
    lib.low_rank_gradients(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), *x.shape, ctypes.addressof(group), len(group),
        accumulate,
    )  # fmt: skip


def add_(y, x, P, Q, scale):  # type: ignore[no-untyped-def]
    x = rows(x)
    lib.low_rank_add(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), Q.data_ptr(), *Q.stride(),
        y.data_ptr(), y.stride(0), *x.shape, P.shape[1], Q.shape[1], scale,
    )  # fmt: skip
