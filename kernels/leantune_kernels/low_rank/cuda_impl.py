"""The low-rank products by csrc/low_rank/cuda.cu."""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from leantune_kernels.cuda import DTYPE_CODES, address, lib, refuses, rows, stream
from leantune_kernels.low_rank import device

__all__ = ["add_", "gradients_group", "input_gradient_group", "linear_group", "merge", "refuses"]


class _Layer(ctypes.Structure):
    """lt_cuda_low_rank_layer of leantune_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dy", "weight", "dy_stride", "weight_stride")),
        *((name, ctypes.c_int64) for name in ("ds", "a", "ds_stride", "a_stride", "outputs", "rank")),
        ("scale", ctypes.c_float),
    )


def project(x: torch.Tensor, P: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] P [K, R] in float32; P as it lies if one of its strides is 1."""
    x, P = rows(x), P if 1 in P.stride() else P.contiguous()
    s = torch.empty(x.shape[0], P.shape[1], device=x.device) if out is None else out
    with stream(x) as on:
        lib.low_rank_project(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), s.data_ptr(), s.stride(0),
            x.shape[0], *P.shape, on,
        )  # fmt: skip
    return s


def linear(x, layer, S, out):  # type: ignore[no-untyped-def]
    x, weight, B = rows(x), rows(layer.weight), rows(layer.B)
    bias = None if layer.bias is None else layer.bias.contiguous()
    with stream(x) as on:
        lib.low_rank_linear(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), address(bias),
            S.data_ptr(), S.stride(0), B.data_ptr(), B.stride(0), out.data_ptr(), out.stride(0),
            x.shape[0], x.shape[1], *B.shape, layer.scale, on,
        )  # fmt: skip


def input_gradient(dx, dys, layers, dS):  # type: ignore[no-untyped-def]
    tensors = [
        (rows(dy), rows(layer.weight), rows(part), rows(layer.A))
        for dy, layer, part in zip(dys, layers, dS, strict=True)
    ]  # kept alive during the call
    group = (_Layer * len(layers))()
    for entry, (dy, weight, part, A), layer in zip(group, tensors, layers, strict=True):
        values = [t.data_ptr() for t in (dy, weight)] + [t.stride(0) for t in (dy, weight)]
        values += [t.data_ptr() for t in (part, A)] + [t.stride(0) for t in (part, A)]
        values += [dy.shape[1], A.shape[0], layer.scale]
        for field, value in zip(_Layer._fields_, values, strict=True):
            setattr(entry, field[0], value)
    with stream(dx) as on:
        lib.low_rank_input_gradient(
            DTYPE_CODES[dx.dtype], ctypes.addressof(group), len(group), dx.data_ptr(), dx.stride(0), *dx.shape, on
        )


def partial_gradients(
    C: torch.Tensor, x: torch.Tensor, x_sums: torch.Tensor | None = None, c_sums: torch.Tensor | None = None
) -> torch.Tensor:
    """[chunks, R, K] float32, whose sum over the chunks is C^T x; C [T, R] float32, x [T, K].

    `x_sums` [chunks, K] and `c_sums` [chunks, R] take the sums of x's and C's rows, a chunk each.
    """
    x, C, in_chunk = rows(x), rows(C), device.chunk_rows(x.shape[0])
    partials = torch.empty(-(-x.shape[0] // in_chunk), C.shape[1], x.shape[1], device=x.device)
    with stream(x) as on:
        lib.low_rank_partials(
            DTYPE_CODES[x.dtype], C.data_ptr(), C.stride(0), x.data_ptr(), x.stride(0), partials.data_ptr(),
            address(x_sums), address(c_sums), x.shape[0], in_chunk, C.shape[1], x.shape[1], on,
        )  # fmt: skip
    return partials


def reduce_partials(partials: torch.Tensor, scale: float, out: torch.Tensor, accumulate: bool = False) -> None:
    """out [R, K], of any strides, (+)= scale * partials [chunks, R, K] summed over the chunks."""
    with stream(out) as on:
        lib.low_rank_reduce(
            partials.data_ptr(), partials.shape[0], partials.stride(0), out.data_ptr(), *out.stride(), *out.shape,
            scale, accumulate, on,
        )  # fmt: skip


def merge(weight, A, B, scale, out):  # type: ignore[no-untyped-def]
    weight, A, B = rows(weight), rows(A), rows(B)
    with stream(weight) as on:
        lib.low_rank_merge(
            DTYPE_CODES[weight.dtype], weight.data_ptr(), weight.stride(0), A.data_ptr(), A.stride(0),
            B.data_ptr(), B.stride(0), out.data_ptr(), out.stride(0), *weight.shape, A.shape[0], scale, on,
        )  # fmt: skip


def add_(y, x, P, Q, scale):  # type: ignore[no-untyped-def]
    x = rows(x)
    P, Q = (factor if 1 in factor.stride() else factor.contiguous() for factor in (P, Q))
    s = torch.empty(x.shape[0], P.shape[1], device=x.device)
    with stream(x) as on:
        lib.low_rank_add(
            DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), P.data_ptr(), *P.stride(), Q.data_ptr(), *Q.stride(),
            y.data_ptr(), y.stride(0), *x.shape, P.shape[1], Q.shape[1], scale, s.data_ptr(), on,
        )  # fmt: skip


_products = device.Products(project, linear, input_gradient, partial_gradients, reduce_partials)
linear_group = partial(device.linear_group, _products)
input_gradient_group = partial(device.input_gradient_group, _products)
gradients_group = partial(device.gradients_group, _products)
