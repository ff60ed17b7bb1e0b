"""The C++ kernels on NumPy, JAX and other arrays, without PyTorch and without differentiation.

Arguments are arrays of any library that has `__dlpack__` or the buffer protocol, in the host's memory, and are read
where they lie (copied where the last dimension is not contiguous). Results are new NumPy arrays, or `out` where given,
which must be writable: a NumPy array, a PyTorch tensor, a writable buffer, but no JAX array, which cannot be changed.
A result in bfloat16 needs `out`, or an argument in ml_dtypes' bfloat16 as JAX has. Arithmetic and statistics are
float32 whatever the storage. Every function raises ValueError or TypeError that names the argument which does not fit.

Shapes: T rows (tokens), H columns (hidden size), I columns (intermediate size), K inputs, N outputs, r rank, V
vocabulary. Threads: as many as the process may use processors, or as OMP_NUM_THREADS says; see set_num_threads.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from leantune_kernels import _native as lib
from leantune_kernels.arrays import FLOATS, View, indices, result, take

Array = Any  # what has __dlpack__ or the buffer protocol
AdapterGradients = tuple[Array, Array]  # dA [r, K] and dB [N, r], float32


def _set_up_threads() -> None:
    """PyTorch's OpenMP runtime where the process has PyTorch, so that they share threads; else a pool of our own."""
    if "torch" in sys.modules:
        lib.adopt_openmp()
    elif os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        lib.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


_set_up_threads()


def set_num_threads(threads: int) -> None:
    """Threads of every later call; 0 for as many as there are processors."""
    lib.set_num_threads(threads)


def num_threads() -> int:
    return lib.num_threads()


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float = 1e-6, out: Array | None = None) -> tuple[Array, Array]:
    """(y, rstd): y = x / sqrt(mean(x^2) + eps) * weight of `x` [T, H] by `weight` [H], in x's dtype.

    rstd [T] float32 is kept for the backward pass.
    """
    x_ = take("x", x, ("T", "H"))
    weight_ = take("weight", weight, x_.shape[1:], dense=True)
    y, rstd = result("out", out, x_.shape, x_.dtype, x_), result("rstd", None, x_.shape[:1], "float32")
    lib.rms_norm_forward(
        x_.code, x_.address, x_.row, weight_.code, weight_.address, y.address, y.row, rstd.address, *x_.shape, eps
    )
    return y.source, rstd.source


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

    `residual` [T, H], the gradient that reaches x past the norm, is added to dx. `out` takes dx and may be dy.
    """
    x_ = take("x", x, ("T", "H"))
    dy_ = take("dy", dy, x_.shape, x_.dtype)
    weight_ = take("weight", weight, x_.shape[1:], dense=True)
    rstd_ = take("rstd", rstd, x_.shape[:1], "float32", dense=True)
    residual_ = None if residual is None else take("residual", residual, x_.shape, x_.dtype)
    dx = result("out", out, x_.shape, x_.dtype, x_)
    dweight = result("dweight", None, x_.shape[1:], "float32") if need_dweight else None
    lib.rms_norm_backward(
        x_.code, dy_.address, dy_.row, x_.address, x_.row, weight_.code, weight_.address, rstd_.address,
        _address(residual_), residual_.row if residual_ else 0, dx.address, dx.row, _address(dweight), *x_.shape,
    )  # fmt: skip
    return dx.source, dweight.source if dweight else None


# ---- rotary embedding and dropout ------------------------------------------------------------------------------------


def rope(x: Array, cos: Array, sin: Array, positions: Array, inverse: bool = False, out: Array | None = None) -> Array:
    """`x` [T, heads, D] with its first R columns turned by the angles at `positions` [T]; cos, sin [P, R/2] float32.

    Column i < R/2 of a head pairs with column i + R/2, as in Hugging Face Llama. `inverse` turns back, which is the
    backward pass. `out` may be x itself.
    """
    x_ = take("x", x, ("T", "heads", "D"))
    cos_ = take("cos", cos, ("P", "R/2"), "float32", dense=True)
    sin_ = take("sin", sin, cos_.shape, "float32", dense=True)
    positions_ = indices("positions", positions, x_.shape[:1])
    if 2 * cos_.shape[1] > x_.shape[2]:
        raise ValueError(f"cos has {cos_.shape[1]} columns; at most half of x's {x_.shape[2]} can be turned")
    _within("positions", positions_, cos_.shape[0], "the rows of cos and sin")
    y = _copied(x_, out)
    lib.rope(
        y.code, y.address, y.strides[0], y.strides[1], cos_.address, sin_.address, positions_.address,
        x_.shape[0], x_.shape[1], cos_.shape[1], inverse,
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
    threshold = min(round(p * 2**32), 2**32 - 1)
    lib.dropout(x_.code, x_.address, y.address, math.prod(x_.shape), seed, offset, threshold, 1.0 / (1.0 - p))
    return y.source


# ---- low-rank linear -------------------------------------------------------------------------------------------------


def lora_linear(
    x: Array, weight: Array, bias: Array | None, A: Array, B: Array, scale: float, out: Array | None = None
) -> Array:
    """y [T, N] = x W^T + bias + scale * (x A^T) B^T, all float32: x [T, K], weight [N, K], A [r, K], B [N, r].

    The dense product is numpy.matmul. Hu et al. 2021, arXiv:2106.09685.
    """
    x_, weight_, A_, B_ = _lora(x, weight, A, B)
    y = result("out", out, (x_.shape[0], weight_.shape[0]), "float32")
    dense = np.asarray(y)
    np.matmul(np.asarray(x_), np.asarray(weight_).T, out=dense)
    if bias is not None:
        dense += np.asarray(take("bias", bias, weight_.shape[:1], "float32", dense=True))
    _low_rank_add(y, x_, A_, (1, A_.row), B_, (1, B_.row), scale)
    return y.source


def lora_linear_backward(
    dy: Array, x: Array, weight: Array, A: Array, B: Array, scale: float, out: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dx [T, K], dA [r, K], dB [N, r]) for the upstream gradient `dy` [T, N] of lora_linear; `out` takes dx.

    The bias's gradient is the sum of dy over its rows, a frozen weight's is not needed.
    """
    x_, weight_, A_, B_ = _lora(x, weight, A, B)
    dy_ = take("dy", dy, (x_.shape[0], weight_.shape[0]), "float32")
    dx = result("out", out, x_.shape, "float32")
    np.matmul(np.asarray(dy_), np.asarray(weight_), out=np.asarray(dx))
    _low_rank_add(dx, dy_, B_, (B_.row, 1), A_, (A_.row, 1), scale)
    dA, dB = low_rank_gradients(x, dy, A, B, scale)
    return dx.source, dA, dB


def low_rank_add(y: Array, x: Array, A: Array, B: Array, scale: float) -> Array:
    """y [T, N] += scale * (x A^T) B^T in place, for x [T, K] of y's dtype and float32 A [r, K], B [N, r]; returns y."""
    x_ = take("x", x, ("T", "K"))
    A_, B_ = _factors(A, B, x_.shape[1])
    y_ = result("y", y, (x_.shape[0], B_.shape[0]), x_.dtype)
    _low_rank_add(y_, x_, A_, (1, A_.row), B_, (1, B_.row), scale)
    return y


def low_rank_gradients(
    x: Array, dy: Array, A: Array, B: Array, scale: float, out: AdapterGradients | None = None, accumulate: bool = False
) -> AdapterGradients:
    """(dA, dB) = (scale * (dy B)^T x, scale * dy^T (x A^T)), float32, for x [T, K] and dy [T, N] of one dtype.

    `accumulate` adds to what `out`, the two arrays, hold.
    """
    x_ = take("x", x, ("T", "K"))
    A_, B_ = _factors(A, B, x_.shape[1])
    dy_ = take("dy", dy, (x_.shape[0], B_.shape[0]), x_.dtype)
    if accumulate and out is None:
        raise ValueError("accumulate=True needs `out`, the (dA, dB) to add to")
    dA = result("out[0]", out and out[0], A_.shape, "float32")
    dB = result("out[1]", out and out[1], B_.shape, "float32")
    group = np.zeros(1, _ADAPTER)
    for name, part in (("dy", dy_), ("a", A_), ("b", B_), ("da", dA), ("db", dB)):
        group[name], group[f"{name}_stride"] = part.address, part.row
    group["outputs"], group["rank"], group["scale"] = B_.shape[0], A_.shape[0], scale
    lib.low_rank_gradients(x_.code, x_.address, x_.row, *x_.shape, group.ctypes.data, 1, accumulate)
    return dA.source, dB.source


def low_rank_merge(weight: Array, A: Array, B: Array, scale: float, out: Array | None = None) -> Array:
    """weight + scale * B A in float32 [N, K]; weight in any float dtype. `out` may be a float32 weight itself."""
    weight_ = take("weight", weight, ("N", "K"))
    A_, B_ = _factors(A, B, weight_.shape[1], weight_.shape[0])
    merged = result("out", out, weight_.shape, "float32")
    lib.low_rank_merge(
        weight_.code, weight_.address, weight_.row, A_.address, A_.row, B_.address, B_.row,
        merged.address, merged.row, *weight_.shape, A_.shape[0], scale,
    )  # fmt: skip
    return merged.source


# lt_low_rank_adapter of leantune_kernels.h
_ADAPTER = np.dtype(
    [(part + end, "i8") for part in ("dy", "a", "b", "da", "db") for end in ("", "_stride")]
    + [("outputs", "i8"), ("rank", "i8"), ("scale", "f4")],
    align=True,
)


def _lora(x: Array, weight: Array, A: Array, B: Array) -> tuple[View, View, View, View]:
    weight_ = take("weight", weight, ("N", "K"), "float32")
    A_, B_ = _factors(A, B, weight_.shape[1], weight_.shape[0])
    return take("x", x, ("T", weight_.shape[1]), "float32"), weight_, A_, B_


def _factors(A: Array, B: Array, inputs: int, outputs: int | str = "N") -> tuple[View, View]:
    A_ = take("A", A, ("r", inputs), "float32")
    return A_, take("B", B, (outputs, A_.shape[0]), "float32")


def _low_rank_add(
    y: View, x: View, P: View, P_steps: tuple[int, int], Q: View, Q_steps: tuple[int, int], scale: float
) -> None:
    """y += scale * (x P) Q, where P is [inputs, r] and Q [r, outputs] by these steps, whatever way they lie."""
    rank = P.shape[0] if P_steps[0] == 1 else P.shape[1]
    lib.low_rank_add(
        x.code, x.address, x.row, P.address, *P_steps, Q.address, *Q_steps,
        y.address, y.row, *x.shape, rank, y.shape[1], scale,
    )  # fmt: skip


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    scale: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(losses [T] float64, dlogits [T, V] float32), the latter the gradient of scale * sum(losses).

    losses = lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean(logits) + z_loss * lse^2 with
    lse = log(sum(exp(logits))); rows whose target is `ignore_index` have loss and gradient 0. logits [T, V] float32,
    targets [T] int64 or int32. `scale` is 1 / (number of other rows) where None, as for their mean. `out` takes
    dlogits and may be the logits themselves.
    """
    logits_ = take("logits", logits, ("T", "V"), "float32")
    targets_ = indices("targets", targets, logits_.shape[:1])
    chosen = np.asarray(targets_) != ignore_index
    count = int(chosen.sum())
    factor = 1.0 / max(1, count) if scale is None else scale
    whole = count == len(chosen)
    gradient = result("out", out, logits_.shape, "float32")
    if whole:
        rows = _copied(logits_, gradient.source)
        labels = targets_
    else:  # rows with a label next to one another, for the ones without need no exponentials
        rows = result("rows", np.asarray(logits_)[chosen], (count, logits_.shape[1]), "float32")
        labels = indices("targets", np.asarray(targets_)[chosen], (count,))
    _within("targets", labels, logits_.shape[1], f"the columns of logits, nor ignore_index={ignore_index}")
    found = np.empty(count, np.float64)
    lib.cross_entropy_rows(
        rows.address, rows.row, labels.address, 0, factor, label_smoothing, z_loss, True, found.ctypes.data, *rows.shape
    )
    losses = np.zeros(len(chosen), np.float64)
    losses[chosen] = found
    if not whole:
        np.asarray(gradient)[...] = 0.0
        np.asarray(gradient)[chosen] = np.asarray(rows)
    return losses, gradient.source


# ---- optimizer -------------------------------------------------------------------------------------------------------


def adamw(
    params: Sequence[Array],
    grads: Sequence[Array],
    exp_avgs: Sequence[Array],
    exp_avg_sqs: Sequence[Array],
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    out: tuple[Sequence[Array], Sequence[Array], Sequence[Array]] | None = None,
) -> tuple[list[Array], list[Array], list[Array]]:
    """(params, exp_avgs, exp_avg_sqs) after AdamW's step number `step`, counted from 1; torch.optim.AdamW's formula.

    params and moments: float32 of any shape; grads: any float dtype. `out=(params, exp_avgs, exp_avg_sqs)` updates
    NumPy arrays in place, which saves copying them. `grad_scale` multiplies every gradient, as for clipping.
    Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    if step < 1:
        raise ValueError(f"step={step} must be 1 for the first update, then 2 and so on")
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "grads": grads}
    for name, arrays in lists.items():
        if len(arrays) != len(params):
            raise ValueError(f"{name} has {len(arrays)} arrays; params has {len(params)}")
    views = [
        [
            take(f"{name}[{i}]", x, np.shape(p), FLOATS if name == "grads" else "float32", dense=True)
            for i, (x, p) in enumerate(zip(arrays, params, strict=True))
        ]
        for name, arrays in lists.items()
    ]
    given: Sequence[Sequence[Array | None]] = out or [[None] * len(params)] * 3
    p, m, v = (
        [
            _copied(x, target, name=f"out[{k}][{i}]", dense=True)
            for i, (x, target) in enumerate(zip(xs, ts, strict=True))
        ]
        for k, (xs, ts) in enumerate(zip(views, given, strict=False))
    )
    gradients = views[3]
    sizes = np.array([math.prod(x.shape) for x in p], np.int64)
    table = np.array([[x.address for x in xs] for xs in (p, gradients, m, v)], np.int64).reshape(4, -1)
    codes = np.array([x.code for x in gradients], np.int64)
    rates = np.repeat([[lr], [weight_decay]], len(p), axis=1).astype(np.float64)
    address = [row.ctypes.data for row in (sizes, table[0], table[1], codes, table[2], table[3], rates[0], rates[1])]
    lib.adamw(len(p), *address, beta1, beta2, eps, grad_scale, step)
    return [x.source for x in p], [x.source for x in m], [x.source for x in v]


def grad_norm(grads: Sequence[Array]) -> float:
    """sqrt of the sum of squares of all elements of `grads`, float arrays of any shapes and dtypes; 0.0 for none."""
    views = [take(f"grads[{i}]", g, ("...",) * np.ndim(g), dense=True) for i, g in enumerate(grads)]
    columns = [[math.prod(x.shape) for x in views], [x.address for x in views], [x.code for x in views]]
    table, total = np.array(columns, np.int64).reshape(3, -1), np.zeros(1)
    lib.sum_of_squares(len(views), *(row.ctypes.data for row in table), total.ctypes.data)
    return math.sqrt(total[0])


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of norm `norm` by for at most `max_norm`: grad_scale of the optimizers."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # NaN stays NaN


# ---- what they share -------------------------------------------------------------------------------------------------


def _address(x: View | None) -> int:
    return 0 if x is None else x.address


def _copied(x: View, out: Array | None, name: str = "out", dense: bool = False) -> View:
    """`out` or a new array, holding x's elements; nothing is copied where it is x itself."""
    y = result(name, out, x.shape, x.dtype, x, dense)
    if y.address != x.address or y.strides != x.strides:
        np.copyto(np.asarray(y), np.asarray(x))
    return y


def _within(name: str, numbers: View, end: int, what: str) -> None:
    """ValueError unless all of these are in [0, end)."""
    values = np.asarray(numbers)
    wrong = (values < 0) | (values >= end)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{name}[{at}]={values[at]} is outside [0, {end}), {what}")
