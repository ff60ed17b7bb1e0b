"""The low-rank products in Triton.

S = x A^T is one skinny product for all adapters that read x. The linear layer itself folds the rank-r product into its
accumulator, [x, S] . [W, s B]^T, so that y is written once and never read; the gradient of the input is the same kernel
on the weight's other side, and the layers of a group in one sum. Gradients of the factors are sums over fixed chunks
of rows, reduced in order. Products of half-precision x take S and the factors rounded to x's dtype, those of float32
are IEEE float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from leantune_kernels.checks import rows
from leantune_kernels.low_rank import device
from leantune_kernels.triton_runtime import INTERPRETING, autotune, ceil_div, on_device, power_of_two, refuses

__all__ = ["add_", "gradients_group", "input_gradient_group", "linear_group", "merge", "refuses"]

# The interpreter holds bfloat16 as raw bits, which its dot would multiply as integers: there, products are float32.
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_type(dtype: torch.dtype) -> tl.dtype:
    """What tensors of this dtype are multiplied in."""
    return tl.float32 if INTERPRETING else _TYPES[dtype]


@triton.jit(do_not_specialize=["rows"])
def _project_kernel(
    x_ptr, p_ptr, s_ptr, rows, x_stride, p_k, p_r, s_stride, K, R,
    DOT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s [rows, R] float32 = x [rows, K] P [K, R]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    t_in, r_in = (t < rows)[:, None], (r < R)[None, :]
    x_at = x_ptr + t.to(tl.int64)[:, None] * x_stride + k[None, :]
    p_at = p_ptr + k.to(tl.int64)[:, None] * p_k + r.to(tl.int64)[None, :] * p_r
    p_step = tl.to_tensor(p_k).to(tl.int64) * BLOCK_K
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for begin in range(0, K, BLOCK_K):
        left = K - begin
        x = tl.load(x_at, mask=t_in & (k < left)[None, :], other=0.0).to(DOT)
        p = tl.load(p_at, mask=(k < left)[:, None] & r_in, other=0.0).to(DOT)
        total = tl.dot(x, p, total, input_precision="ieee")
        x_at += BLOCK_K
        p_at += p_step
    tl.store(s_ptr + t.to(tl.int64)[:, None] * s_stride + r[None, :], total, mask=t_in & r_in)


@triton.jit
def _add_dense(total, part, t, t_in, n, n_in, DOT: tl.constexpr, BLOCK_K: tl.constexpr):
    """total + x M of a part of _product_kernel."""
    x_ptr, m_ptr, _, _, x_stride, m_k, m_n, _, _, _, _, K, _ = part
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + t[:, None] * x_stride + k[None, :]
    m_at = m_ptr + k.to(tl.int64)[:, None] * m_k + n[None, :] * m_n
    m_step = tl.to_tensor(m_k).to(tl.int64) * BLOCK_K
    for begin in range(0, K, BLOCK_K):
        left = K - begin
        x = tl.load(x_at, mask=t_in & (k < left)[None, :], other=0.0).to(DOT)
        m = tl.load(m_at, mask=(k < left)[:, None] & n_in, other=0.0).to(DOT)
        total = tl.dot(x, m, total, input_precision="ieee")
        x_at += BLOCK_K
        m_at += m_step
    return total


@triton.jit
def _add_low_rank(total, part, t, t_in, n, n_in, DOT: tl.constexpr, BLOCK_R: tl.constexpr):
    """total + scale * s Q of a part of _product_kernel."""
    _, _, s_ptr, q_ptr, _, _, _, s_stride, q_r, q_n, scale, _, R = part
    for begin in range(0, R, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        r_in = r < R
        s = tl.load(s_ptr + t[:, None] * s_stride + r[None, :], mask=t_in & r_in[None, :], other=0.0)
        q = tl.load(q_ptr + r.to(tl.int64)[:, None] * q_r + n[None, :] * q_n, mask=r_in[:, None] & n_in, other=0.0)
        total = tl.dot(s.to(DOT), (q * scale).to(DOT), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    parts, bias_ptr, y_ptr, rows, y_stride, N, K, R, ACCUMULATE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [rows, N] = bias + the sum over the parts of x M + scale * s Q, added to y if ACCUMULATE.

    x [rows, K_i], M [K_i, N], s [rows, R_i] and Q [R_i, N] are a part's own; M and Q of any strides. K and R are the
    sums of all parts' K_i and R_i, by which the kernel is tuned.
    """
    # Programs go through 8 blocks of rows before the next block of columns, so that M and x are met again in the cache.
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_T), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (8 * column_blocks) * 8
    group = tl.minimum(row_blocks - first, 8)
    inside = tl.program_id(0) % (8 * column_blocks)
    t = (first + inside % group) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (inside // group) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_in, n_in = (t < rows)[:, None], (n < N)[None, :]
    t_wide, n_wide = t.to(tl.int64), n.to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in tl.static_range(len(parts)):
        total = _add_dense(total, parts[i], t_wide, t_in, n_wide, n_in, DOT, BLOCK_K)
        total = _add_low_rank(total, parts[i], t_wide, t_in, n_wide, n_in, DOT, BLOCK_R)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + t_wide[:, None] * y_stride + n[None, :]
    if ACCUMULATE:
        total += tl.load(y_at, mask=t_in & n_in, other=0.0).to(tl.float32)
    tl.store(y_at, total, mask=t_in & n_in)


def _tile(t: int, n: int, k: int, warps: int) -> triton.Config:
    """maxnreg: left to itself the assembler prefers spilling to fewer blocks on a multiprocessor."""
    blocks = {"BLOCK_T": t, "BLOCK_N": n, "BLOCK_K": k}
    return triton.Config(blocks, num_warps=warps, num_stages=3, maxnreg=255)


# By bytes of an element. Products of float32 do not run on tensor cores: their operands take registers, too.
_TILES = {
    2: [_tile(64, 64, 32, 4), _tile(64, 128, 32, 8)],
    4: [_tile(32, 32, 16, 8), _tile(32, 64, 16, 8)],
}
_tuned_product = {size: autotune(tiles, key=["N", "K", "R"])(_product_kernel) for size, tiles in _TILES.items()}


@triton.jit
def _merge_kernel(
    w_ptr, a_ptr, b_ptr, out_ptr, w_stride, a_stride, b_stride, out_stride, scale, N, K, R,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [N, K] = weight + scale * B A, float32."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in, k_in = (n < N)[:, None], (k < K)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in range(0, R, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        b = tl.load(b_ptr + n[:, None] * b_stride + r[None, :], mask=n_in & (r < R)[None, :], other=0.0)
        a = tl.load(a_ptr + r.to(tl.int64)[:, None] * a_stride + k[None, :], mask=(r < R)[:, None] & k_in, other=0.0)
        total = tl.dot(b, a, total, input_precision="ieee")
    w = tl.load(w_ptr + n[:, None] * w_stride + k[None, :], mask=n_in & k_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + n[:, None] * out_stride + k[None, :], w + scale * total, mask=n_in & k_in)


@triton.jit(do_not_specialize=["rows", "chunk_rows"])
def _gradient_kernel(
    c_ptr, x_ptr, partial_ptr, rows, chunk_rows, c_stride, x_stride, R, K,
    DOT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [chunk, R, K] = c^T x over the rows of the chunk; c [rows, R] float32, x [rows, K]."""
    chunk = tl.program_id(2)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k_in, r_in = (k < K)[None, :], (r < R)[None, :]
    end = tl.minimum(rows, (chunk + 1) * chunk_rows)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for begin in range(chunk * chunk_rows, end, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        t_in, t_wide = (t < end)[:, None], t.to(tl.int64)
        c = tl.load(c_ptr + t_wide[:, None] * c_stride + r[None, :], mask=t_in & r_in, other=0.0).to(DOT)
        x = tl.load(x_ptr + t_wide[:, None] * x_stride + k[None, :], mask=t_in & k_in, other=0.0).to(DOT)
        total = tl.dot(tl.trans(c), x, total, input_precision="ieee")
    at = partial_ptr + (chunk.to(tl.int64) * R + r[:, None]) * K + k[None, :]
    tl.store(at, total, mask=(r < R)[:, None] & k_in)


@triton.jit(do_not_specialize=["chunks"])
def _reduce_kernel(
    partial_ptr, out_ptr, chunks, chunk_stride, out_r, out_k, scale, R, K, ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [R, K], of any two strides, (+)= scale times the sum over the chunks in their order."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (r < R)[:, None] & (k < K)[None, :]
    at = partial_ptr + r.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for _ in range(chunks):
        total += tl.load(at, mask=inside, other=0.0)
        at += chunk_stride
    out_at = out_ptr + r.to(tl.int64)[:, None] * out_r + k.to(tl.int64)[None, :] * out_k
    total *= scale
    if ACCUMULATE:
        total += tl.load(out_at, mask=inside, other=0.0)
    tl.store(out_at, total, mask=inside)


def project(x: torch.Tensor, P: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] P [K, R] in float32; P of any strides."""
    x, (K, R) = rows(x), P.shape
    s = torch.empty(x.shape[0], R, device=x.device) if out is None else out
    half = x.element_size() == 2
    block_t, block_r = 64 if half else 32, power_of_two(R, at_most=64 if half else 32)
    grid = (ceil_div(x.shape[0], block_t), ceil_div(R, block_r))
    if s.numel():
        _project_kernel[grid](
            x_ptr=x, p_ptr=P, s_ptr=s, rows=x.shape[0], x_stride=x.stride(0), p_k=P.stride(0), p_r=P.stride(1),
            s_stride=s.stride(0), K=K, R=R, DOT=product_type(x.dtype), BLOCK_T=block_t, BLOCK_R=block_r,
            BLOCK_K=32 if half else 16, maxnreg=255,
        )  # fmt: skip
    return s


class Part(NamedTuple):
    """One part of the sum that `product` forms: x M + scale * S Q; without x and M, the low-rank part alone."""

    x: torch.Tensor | None
    M: torch.Tensor | None
    S: torch.Tensor
    Q: torch.Tensor
    scale: float


def product(parts: Sequence[Part], bias: torch.Tensor | None, y: torch.Tensor, accumulate: bool) -> None:
    """y (+)= bias + the sum over the parts, formed in float32 and rounded to y's dtype once."""
    if not y.numel():
        return
    T, N = y.shape
    K, R = sum(part.x.shape[1] for part in parts if part.x is not None), sum(part.Q.shape[0] for part in parts)
    widest = max(part.Q.shape[0] for part in parts)
    arguments = {
        "parts": tuple(_arguments(part, y) for part in parts), "bias_ptr": bias, "y_ptr": y, "rows": T,
        "y_stride": y.stride(0), "N": N, "K": K, "R": R, "ACCUMULATE": accumulate, "DOT": product_type(y.dtype),
        "BLOCK_R": power_of_two(widest, at_most=32 if y.element_size() == 2 else 16),
    }  # fmt: skip
    if accumulate:  # timing configurations would add to y again and again
        tile = _TILES[y.element_size()][0].all_kwargs()
        grid = (ceil_div(T, tile["BLOCK_T"]) * ceil_div(N, tile["BLOCK_N"]),)
        _product_kernel[grid](**arguments, **tile)
    else:
        _tuned_product[y.element_size()][lambda meta: (ceil_div(T, meta["BLOCK_T"]) * ceil_div(N, meta["BLOCK_N"]),)](
            **arguments
        )


def _arguments(part: Part, unused: torch.Tensor) -> tuple[torch.Tensor | int | float, ...]:
    """A part as _product_kernel takes it: addresses, strides, scale, K and R; `unused` for the tensors it lacks."""
    _, _, S, Q, scale = part
    lacking = part.x is None or part.M is None
    x, M = (unused, unused) if part.x is None or part.M is None else (rows(part.x), part.M)
    strides = (0, 0, 0) if lacking else (x.stride(0), *M.stride())
    return x, M, S, Q, *strides, S.stride(0), *Q.stride(), scale, 0 if lacking else M.shape[0], Q.shape[0]


def partial_gradients(C: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[chunks, R, K] float32, whose sum over the chunks is C^T x; C [T, R] float32, x [T, K]."""
    x, (T, R) = rows(x), C.shape
    chunk_rows = device.chunk_rows(T)
    chunks = ceil_div(T, chunk_rows)
    partials = torch.empty(chunks, R, x.shape[1], device=x.device)
    block_r = power_of_two(R, at_most=64 if x.element_size() == 2 else 32)
    if partials.numel():
        _gradient_kernel[(ceil_div(x.shape[1], 64), ceil_div(R, block_r), chunks)](
            c_ptr=C, x_ptr=x, partial_ptr=partials, rows=T, chunk_rows=chunk_rows, c_stride=C.stride(0),
            x_stride=x.stride(0), R=R, K=x.shape[1], DOT=product_type(x.dtype),
            BLOCK_T=32 if x.element_size() == 2 else 16, BLOCK_R=block_r, BLOCK_K=64, maxnreg=255,
        )  # fmt: skip
    return partials


def reduce_partials(partials: torch.Tensor, scale: float, out: torch.Tensor, accumulate: bool = False) -> None:
    """out [R, K], of any strides, (+)= scale * partials [chunks, R, K] summed over the chunks."""
    chunks, R, K = partials.shape
    if out.numel():
        _reduce_kernel[(ceil_div(K, 128), ceil_div(R, 8))](
            partial_ptr=partials, out_ptr=out, chunks=chunks, chunk_stride=partials.stride(0), out_r=out.stride(0),
            out_k=out.stride(1), scale=scale, R=R, K=K, ACCUMULATE=accumulate, BLOCK_R=8, BLOCK_K=128,
        )  # fmt: skip


@on_device
def merge(weight, A, B, scale, out):
    weight, A, B = rows(weight), rows(A), rows(B)
    (N, K), R = weight.shape, A.shape[0]
    if out.numel():
        _merge_kernel[(ceil_div(K, 64), ceil_div(N, 64))](
            w_ptr=weight, a_ptr=A, b_ptr=B, out_ptr=out, w_stride=weight.stride(0), a_stride=A.stride(0),
            b_stride=B.stride(0), out_stride=out.stride(0), scale=scale, N=N, K=K, R=R,
            BLOCK_N=64, BLOCK_K=64, BLOCK_R=power_of_two(R, at_most=32),
            maxnreg=255,
        )  # fmt: skip


def linear(x, layer, S, out):
    bias = None if layer.bias is None else layer.bias.contiguous()
    product([Part(x, layer.weight.t(), S, layer.B.t(), layer.scale)], bias, out, accumulate=False)


def input_gradient(dx, dys, layers, dS):
    of_layer = zip(dys, layers, dS, strict=True)
    parts = [Part(dy, layer.weight, part, layer.A, layer.scale) for dy, layer, part in of_layer]
    product(parts, None, dx, accumulate=False)


@on_device
def add_(y, x, P, Q, scale):
    product([Part(None, None, project(x, P), Q, scale)], None, y, accumulate=True)


_products = device.Products(project, linear, input_gradient, partial_gradients, reduce_partials)
linear_group = on_device(partial(device.linear_group, _products))
input_gradient_group = on_device(partial(device.input_gradient_group, _products))
gradients_group = on_device(partial(device.gradients_group, _products))
