"""What training adds to the layers, for leantune_kernels.native: low-rank layers, the loss and the optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from leantune_kernels import _native as lib
from leantune_kernels.arrays import FLOATS, View, copied, indices, result, take, within

Array = Any  # what has __dlpack__ or the buffer protocol
AdapterGradients = tuple[Array, Array]  # dA [r, K] and dB [N, r], float32
Arrays = Sequence[Array]

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
        rows = copied(logits_, gradient.source)
        labels = targets_
    else:  # rows with a label next to one another, for the ones without need no exponentials
        rows = result("rows", np.asarray(logits_)[chosen], (count, logits_.shape[1]), "float32")
        labels = indices("targets", np.asarray(targets_)[chosen], (count,))
    within("targets", labels, logits_.shape[1], f"the columns of logits, nor ignore_index={ignore_index}")
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


# ---- optimizers ------------------------------------------------------------------------------------------------------

# lt_parameter of leantune_kernels.h
_PARAMETER = np.dtype(
    [(name, "i8") for name in ("size", "data", "master", "grad", "state0", "state1", "state2", "state3")]
    + [("lr", "f8"), ("weight_decay", "f8"), ("dtype", "i8"), ("grad_dtype", "i8")]
)
Updated = tuple[list[Array], ...]  # the parameters and each kind of state, after a step


def adamw(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_sqs: Arrays,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    seed: int = 0,
    out: tuple[Arrays, Arrays, Arrays] | None = None,
) -> tuple[list[Array], list[Array], list[Array]]:
    """(params, exp_avgs, exp_avg_sqs) after AdamW's step number `step`, counted from 1; torch.optim.AdamW's formula.

    params: float32 of any shape, or bfloat16, rounded stochastically by noise of (seed, step); moments: float32; grads:
    any float dtype. `out=(params, exp_avgs, exp_avg_sqs)` updates NumPy arrays in place, which saves copying them.
    `grad_scale` multiplies every gradient, as for clipping. Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    update = _Update(params, grads, {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, out, step, lr, weight_decay)
    lib.adamw(*update.table, beta1, beta2, eps, grad_scale, step, seed)
    p, m, v = update.results
    return p, m, v


def sgd(
    params: Arrays,
    grads: Arrays,
    momentum_buffers: Arrays,
    *,
    step: int,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    seed: int = 0,
    out: tuple[Arrays, Arrays] | None = None,
) -> tuple[list[Array], list[Array]]:
    """(params, momentum_buffers) after a step of SGD by torch.optim.SGD's formula; arguments as those of `adamw`."""
    update = _Update(params, grads, {"momentum_buffers": momentum_buffers}, out, step, lr, weight_decay)
    lib.sgd(*update.table, momentum, 0.0, nesterov, grad_scale, step, seed)
    p, b = update.results
    return p, b


def rmsprop(
    params: Arrays,
    grads: Arrays,
    square_avgs: Arrays,
    *,
    step: int,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    seed: int = 0,
    out: tuple[Arrays, Arrays] | None = None,
) -> tuple[list[Array], list[Array]]:
    """(params, square_avgs) after a step of RMSprop by torch.optim.RMSprop's formula; arguments as those of `adamw`."""
    update = _Update(params, grads, {"square_avgs": square_avgs}, out, step, lr, weight_decay)
    lib.rmsprop(*update.table, alpha, eps, 0.0, grad_scale, step, seed)
    p, v = update.results
    return p, v


class _Update:
    """Arguments of a step: new arrays, or those of `out`, that hold the old values, and a list of lt_parameter."""

    def __init__(
        self,
        params: Arrays,
        grads: Arrays,
        states: dict[str, Arrays],
        out: Sequence[Arrays] | None,
        step: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        if step < 1:
            raise ValueError(f"step={step} must be 1 for the first update, then 2 and so on")
        written = {"params": params, **states}
        for name, arrays in [*written.items(), ("grads", grads)]:
            if len(arrays) != len(params):
                raise ValueError(f"{name} has {len(arrays)} arrays; params has {len(params)}")
        self.grads = self._views("grads", grads, params, FLOATS)
        self.written = []
        for k, (name, arrays) in enumerate(written.items()):
            views = self._views(name, arrays, params, ("float32", "bfloat16") if name == "params" else "float32")
            targets = [None] * len(params) if out is None else out[k]
            pairs = enumerate(zip(views, targets, strict=True))
            self.written.append([copied(x, to, f"out[{k}][{i}]", dense=True) for i, (x, to) in pairs])
        rows = np.zeros(len(params), _PARAMETER)
        for row, p, g, *mine in zip(rows, self.written[0], self.grads, *self.written[1:], strict=True):
            row["size"], row["data"], row["dtype"] = math.prod(p.shape), p.address, p.code
            row["grad"], row["grad_dtype"], row["lr"], row["weight_decay"] = g.address, g.code, lr, weight_decay
            for i, state in enumerate(mine):
                row[f"state{i}"] = state.address
        self.rows = rows

    @staticmethod
    def _views(name: str, arrays: Arrays, params: Arrays, dtypes: str | tuple[str, ...]) -> list[View]:
        pairs = enumerate(zip(arrays, params, strict=True))
        return [take(f"{name}[{i}]", x, np.shape(p), dtypes, dense=True) for i, (x, p) in pairs]

    @property
    def table(self) -> tuple[int, int]:
        return self.rows.ctypes.data, len(self.rows)

    @property
    def results(self) -> list[list[Array]]:
        return [[x.source for x in views] for views in self.written]


def grad_norm(grads: Arrays) -> float:
    """sqrt of the sum of squares of all elements of `grads`, float arrays of any shapes and dtypes; 0.0 for none."""
    views = [take(f"grads[{i}]", g, ("...",) * np.ndim(g), dense=True) for i, g in enumerate(grads)]
    rows, total = np.zeros(len(views), _PARAMETER), np.zeros(1)
    for row, g in zip(rows, views, strict=True):
        row["size"], row["grad"], row["grad_dtype"] = math.prod(g.shape), g.address, g.code
    lib.sum_of_squares(rows.ctypes.data, len(rows), total.ctypes.data)
    return math.sqrt(total[0])


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of norm `norm` by for at most `max_norm`: grad_scale of the optimizers."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # NaN stays NaN
