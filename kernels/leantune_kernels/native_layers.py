"""What a transformer's layers are made of, for leantune_kernels.native: norms, activations, attention and the like."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from leantune_kernels import _native as lib
from leantune_kernels.arrays import View, address, apart, copied, indices, result, same_or_apart, take, within
from leantune_kernels.ranges import expect_number

Array = Any  # what has __dlpack__ or the buffer protocol

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # enum lt_activation

# ---- norms -----------------------------------------------------------------------------------------------------------


def rms_norm(
    x: Array, weight: Array, eps: float = 1e-6, residual: Array | None = None, out: Array | None = None
) -> tuple[Array, ...]:
    """(y, rstd): y = x / sqrt(mean(x^2) + eps) * weight of `x` [T, H] by `weight` [H], in x's dtype.

    rstd [T] float32 is kept for the backward pass. With `residual` [T, H], (y, rstd, s): the norm of s = x + residual.
    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x_ = take("x", x, ("T", "H"))
    expect_number("eps", eps)
    weight_ = take("weight", weight, x_.shape[1:], dense=True)
    residual_ = None if residual is None else take("residual", residual, x_.shape, x_.dtype)
    y, rstd = result("out", out, x_.shape, x_.dtype, x_), result("rstd", None, x_.shape[:1], "float32")
    same_or_apart(y, x_, residual_)
    apart(y, weight_)
    of_rows = weight_.code, weight_.address, y.address, y.row, rstd.address, *x_.shape, eps
    if residual_ is None:
        lib.rms_norm_forward(x_.code, x_.address, x_.row, *of_rows)
        return y.source, rstd.source
    s = result("s", None, x_.shape, x_.dtype, x_)
    lib.add_rms_norm_forward(x_.code, x_.address, x_.row, residual_.address, residual_.row, s.address, s.row, *of_rows)
    return y.source, rstd.source, s.source


def rms_norm_backward(
    dy: Array,
    x: Array,
    weight: Array,
    rstd: Array,
    residual: Array | None = None,
    out: Array | None = None,
    need_dweight: bool = True,
) -> tuple[Array, Array | None]:
    """(dx [T, H], dweight [H] float32 or None) for the upstream gradient `dy` [T, H] in x's dtype.

    `residual` [T, H], the gradient that reaches x past the norm, is added to dx. `out` takes dx and may be dy. After a
    forward pass with a residual x is s, and dx the gradient of x and of the residual alike.
    """
    x_ = take("x", x, ("T", "H"))
    dy_ = take("dy", dy, x_.shape, x_.dtype)
    weight_ = take("weight", weight, x_.shape[1:], dense=True)
    rstd_ = take("rstd", rstd, x_.shape[:1], "float32", dense=True)
    residual_ = None if residual is None else take("residual", residual, x_.shape, x_.dtype)
    dx = result("out", out, x_.shape, x_.dtype, x_)
    same_or_apart(dx, dy_, x_, residual_)
    apart(dx, weight_, rstd_)
    dweight = result("dweight", None, x_.shape[1:], "float32") if need_dweight else None
    lib.rms_norm_backward(
        x_.code, dy_.address, dy_.row, x_.address, x_.row, weight_.code, weight_.address, rstd_.address,
        address(residual_), residual_.row if residual_ else 0, dx.address, dx.row, address(dweight), *x_.shape,
    )  # fmt: skip
    return dx.source, dweight.source if dweight else None


def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    residual: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """(y, mean, rstd): y = (x - mean) * rstd * weight + bias of `x` [T, H], in x's dtype; mean, rstd [T] float32.

    bias [H] has weight's dtype. With `residual` [T, H], (y, mean, rstd, s): the norm of s = x + residual. Ba et al.
    2016, arXiv:1607.06450.
    """
    x_ = take("x", x, ("T", "H"))
    expect_number("eps", eps)
    weight_ = take("weight", weight, x_.shape[1:], dense=True)
    bias_ = None if bias is None else take("bias", bias, x_.shape[1:], weight_.dtype, dense=True)
    residual_ = None if residual is None else take("residual", residual, x_.shape, x_.dtype)
    y = result("out", out, x_.shape, x_.dtype, x_)
    same_or_apart(y, x_, residual_)
    apart(y, weight_, bias_)
    mean, rstd = (result(name, None, x_.shape[:1], "float32") for name in ("mean", "rstd"))
    of_rows = (
        weight_.code, weight_.address, address(bias_), y.address, y.row, mean.address, rstd.address, *x_.shape, eps,
    )  # fmt: skip
    if residual_ is None:
        lib.layer_norm_forward(x_.code, x_.address, x_.row, *of_rows)
        return y.source, mean.source, rstd.source
    s = result("s", None, x_.shape, x_.dtype, x_)
    lib.add_layer_norm_forward(
        x_.code, x_.address, x_.row, residual_.address, residual_.row, s.address, s.row, *of_rows
    )
    return y.source, mean.source, rstd.source, s.source


def layer_norm_backward(
    dy: Array,
    x: Array,
    weight: Array,
    mean: Array,
    rstd: Array,
    residual: Array | None = None,
    out: Array | None = None,
    need_gradients: bool = True,
) -> tuple[Array, Array | None, Array | None]:
    """(dx [T, H], dweight [H], dbias [H]) for the upstream gradient `dy` [T, H] in x's dtype; the latter float32.

    They are None without `need_gradients`. `residual` [T, H], the gradient that reaches x past the norm, is added to
    dx. `out` takes dx and may be dy. After a forward pass with a residual x is s, as for rms_norm_backward.
    """
    x_ = take("x", x, ("T", "H"))
    dy_ = take("dy", dy, x_.shape, x_.dtype)
    weight_ = take("weight", weight, x_.shape[1:], dense=True)
    mean_, rstd_ = (take(n, s, x_.shape[:1], "float32", dense=True) for n, s in (("mean", mean), ("rstd", rstd)))
    residual_ = None if residual is None else take("residual", residual, x_.shape, x_.dtype)
    dx = result("out", out, x_.shape, x_.dtype, x_)
    same_or_apart(dx, dy_, x_, residual_)
    apart(dx, weight_, mean_, rstd_)
    grads = [result(n, None, x_.shape[1:], "float32") if need_gradients else None for n in ("dweight", "dbias")]
    lib.layer_norm_backward(
        x_.code, dy_.address, dy_.row, x_.address, x_.row, weight_.code, weight_.address, mean_.address,
        rstd_.address, address(residual_), residual_.row if residual_ else 0, dx.address, dx.row,
        address(grads[0]), address(grads[1]), *x_.shape,
    )  # fmt: skip
    dweight, dbias = (None if g is None else g.source for g in grads)
    return dx.source, dweight, dbias


# ---- activations -----------------------------------------------------------------------------------------------------


def activation(x: Array, name: str, out: Array | None = None) -> Array:
    """act(`x`) for x [T, I]: silu(x) = x / (1 + e^-x), gelu (exact) or gelu_tanh. `out` may be x."""
    code, x_ = _activation(name), take("x", x, ("T", "I"))
    y = result("out", out, x_.shape, x_.dtype, x_)
    same_or_apart(y, x_)
    lib.activation_forward(x_.code, code, x_.address, x_.row, y.address, y.row, *x_.shape)
    return y.source


def activation_backward(dy: Array, x: Array, name: str, out: Array | None = None) -> Array:
    """dx = dy * act'(x), all [T, I] of one dtype. `out` may be dy or x."""
    code, x_ = _activation(name), take("x", x, ("T", "I"))
    dy_ = take("dy", dy, x_.shape, x_.dtype)
    dx = result("out", out, x_.shape, x_.dtype, x_)
    same_or_apart(dx, dy_, x_)
    lib.activation_backward(x_.code, code, dy_.address, dy_.row, x_.address, x_.row, dx.address, dx.row, *x_.shape)
    return dx.source


def glu(gate: Array, up: Array, activation: str = "silu", out: Array | None = None) -> Array:
    """act(`gate`) * `up`, both [T, I] of one dtype: SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh".

    `out` may be gate or up. Shazeer 2020, arXiv:2002.05202.
    """
    code, gate_ = _activation(activation), take("gate", gate, ("T", "I"))
    up_ = take("up", up, gate_.shape, gate_.dtype)
    h = result("out", out, gate_.shape, gate_.dtype, gate_)
    same_or_apart(h, gate_, up_)
    lib.glu_forward(gate_.code, code, gate_.address, gate_.row, up_.address, up_.row, h.address, h.row, *gate_.shape)
    return h.source


def glu_backward(
    dh: Array, gate: Array, up: Array, activation: str = "silu", out: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """(d_gate, d_up) for the upstream gradient `dh` of glu, all [T, I]. `out` may be (gate, up) themselves."""
    code, gate_ = _activation(activation), take("gate", gate, ("T", "I"))
    dh_, up_ = (take(name, x, gate_.shape, gate_.dtype) for name, x in (("dh", dh), ("up", up)))
    d_gate, d_up = (result(f"out[{i}]", out and out[i], gate_.shape, gate_.dtype, gate_) for i in range(2))
    apart(d_gate, d_up)
    for d in (d_gate, d_up):
        same_or_apart(d, dh_, gate_, up_)
    lib.glu_backward(
        gate_.code, code, dh_.address, dh_.row, gate_.address, gate_.row, up_.address, up_.row, 0, 0,
        d_gate.address, d_gate.row, d_up.address, d_up.row, *gate_.shape,
    )  # fmt: skip
    return d_gate.source, d_up.source


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# ---- rotary embedding and dropout ------------------------------------------------------------------------------------


def rope(
    x: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    inverse: bool = False,
    interleaved: bool = False,
    out: Array | None = None,
) -> Array:
    """`x` [T, heads, D] with its first R columns turned by the angles at `positions` [T]; cos, sin [P, R/2] float32.

    Pair i < R/2 of a head is columns i and i + R/2 (as in Hugging Face Llama), or 2i and 2i + 1 where `interleaved`.
    `inverse` turns back, which is the backward pass. `out` may be x itself. Su et al. 2021, arXiv:2104.09864.
    """
    x_ = take("x", x, ("T", "heads", "D"))
    cos_ = take("cos", cos, ("P", "R/2"), "float32", dense=True)
    sin_ = take("sin", sin, cos_.shape, "float32", dense=True)
    positions_ = indices("positions", positions, x_.shape[:1])
    (tokens, heads, size), (table, half) = x_.shape, cos_.shape
    if 2 * half > size:
        raise ValueError(f"cos has {half} columns; at most half of x's {size} can be turned")
    within("positions", positions_, table, "the rows of cos and sin")
    y = copied(x_, out)
    apart(y, cos_, sin_, positions_)
    lib.rope(
        y.code, y.address, *y.strides[:2], heads, 0, 0, 0, 0, cos_.address, sin_.address, table,
        positions_.address, tokens, half, interleaved, inverse,
    )  # fmt: skip
    return y.source


def dropout(x: Array, p: float, seed: int, offset: int = 0, out: Array | None = None) -> Array:
    """Each element of `x` (any shape) set to 0 with probability `p`, the others times 1 / (1 - p).

    The mask is a function of (seed, offset + position): the backward pass is the same call on the gradient. `out` may
    be x itself.
    """
    if not 0.0 <= p < 1.0 or not 0 <= seed < 2**64 or not 0 <= offset < 2**63:
        raise ValueError(f"p={p}, seed={seed}, offset={offset}; they must be in [0, 1), [0, 2^64) and [0, 2^63)")
    x_ = take("x", x, ("...",) * np.ndim(x), dense=True)
    y = result("out", out, x_.shape, x_.dtype, x_, dense=True)
    same_or_apart(y, x_)
    threshold = min(round(p * 2**32), 2**32 - 1)
    lib.dropout(x_.code, x_.address, y.address, math.prod(x_.shape), seed, offset, threshold, 1.0 / (1.0 - p))
    return y.source


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(o [T, Hq, D], lse [Hq, T] float32): attention of packed sequences, q [T, Hq, D], k and v [T, Hk, D].

    Sequence i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1 (int32 or int64 [n + 1]); Hq is a multiple of Hk.
    scale: 1 / sqrt(D) where None. window: token i sees only the keys j with |i - j| < window. lse, the logarithm of the
    softmax's denominator, is kept for the backward pass. Dao et al. 2022, arXiv:2205.14135.
    """
    q_, k_, v_, bounds, numbers = _attention(q, k, v, cu_seqlens, scale, causal, window)
    o = result("out", out, q_.shape, q_.dtype, q_)
    lse = result("lse", None, (q_.shape[1], q_.shape[0]), "float32")
    apart(o, q_, k_, v_)
    lib.attention_forward(q_.code, *_heads(q_, k_, v_, o), lse.address, bounds.address, *numbers)
    return o.source, lse.source


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    cu_seqlens: Array,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) for the upstream gradient `do` [T, Hq, D]; o and lse are what `attention` returned."""
    q_, k_, v_, bounds, numbers = _attention(q, k, v, cu_seqlens, scale, causal, window)
    do_, o_ = (take(name, x, q_.shape, q_.dtype) for name, x in (("do", do), ("o", o)))
    lse_ = take("lse", lse, (q_.shape[1], q_.shape[0]), "float32", dense=True)
    grads = [result(f"the gradient of {x.name}", None, x.shape, x.dtype, x) for x in (q_, k_, v_)]
    lib.attention_backward(
        q_.code, *_heads(do_, q_, k_, v_, o_), lse_.address, *_heads(*grads), bounds.address, *numbers
    )
    dq, dk, dv = grads
    return dq.source, dk.source, dv.source


def _attention(
    q: Array, k: Array, v: Array, cu_seqlens: Array, scale: float | None, causal: bool, window: int | None
) -> tuple[View, View, View, View, tuple[Any, ...]]:
    q_ = take("q", q, ("T", "Hq", "D"))
    tokens, heads, size = q_.shape
    k_ = take("k", k, (tokens, "Hk", size), q_.dtype)
    v_ = take("v", v, k_.shape, q_.dtype)
    kv_heads = k_.shape[1]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} heads of k and v")
    if window is not None and window < 1:
        raise ValueError(f"window={window}; a token sees at least itself: use 1 or more, or None for no window")
    bounds = indices("cu_seqlens", cu_seqlens, ("n + 1",)).copy("int32")
    ends = np.asarray(bounds).tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cu_seqlens={ends} must start at 0, never fall and end at {tokens}, the tokens of q")
    factor = size**-0.5 if scale is None else scale
    return q_, k_, v_, bounds, (len(ends) - 1, heads, kv_heads, size, factor, causal, window or 0)


def _heads(*views: View) -> list[int]:
    return [number for x in views for number in (x.address, *x.strides[:2])]


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding(ids: Array, weight: Array, scale: float = 1.0, out: Array | None = None) -> Array:
    """`scale` * rows `ids` [T] of `weight` [V, H], as [T, H] in weight's dtype."""
    weight_, ids_ = take("weight", weight, ("V", "H")), indices("ids", ids, ("T",))
    within("ids", ids_, weight_.shape[0], "the rows of weight")
    y = result("out", out, (ids_.shape[0], weight_.shape[1]), weight_.dtype, weight_)
    apart(y, weight_, ids_)
    lib.embedding_forward(
        weight_.code, weight_.address, weight_.row, ids_.address, y.code, y.address, y.row, ids_.shape[0],
        *weight_.shape, scale,
    )  # fmt: skip
    return y.source


def embedding_backward(
    dy: Array, ids: Array, rows: int, scale: float = 1.0, padding_idx: int | None = None, out: Array | None = None
) -> Array:
    """The gradient of a weight [rows, H], float32, for the upstream gradient `dy` [T, H] of embedding.

    Rows are summed in float32 in the order of the tokens. Row `padding_idx` gets no gradient. `out` may have any float
    dtype.
    """
    dy_ = take("dy", dy, ("T", "H"))
    ids_ = indices("ids", ids, dy_.shape[:1])
    within("ids", ids_, rows, "the rows of the weight")
    shape = (rows, dy_.shape[1])
    dweight = result("out", out, shape, "float32" if out is None else take("out", out, shape).dtype)
    apart(dweight, dy_, ids_)
    order = np.argsort(np.asarray(ids_), kind="stable").astype(np.int64)
    in_order = np.asarray(ids_)[order]
    lib.embedding_backward(
        dy_.code, dy_.address, dy_.row, in_order.ctypes.data, order.ctypes.data, dweight.code, dweight.address,
        dweight.row, dy_.shape[0], *shape, scale, -1 if padding_idx is None else padding_idx, False,
    )  # fmt: skip
    return dweight.source
