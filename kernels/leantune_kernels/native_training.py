"""What training adds to the layers, for leantune_kernels.native: adapters and the losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from leantune_kernels import _native as lib
from leantune_kernels.arrays import View, address, apart, copied, indices, result, same_or_apart, take, within
from leantune_kernels.native_layers import ACTIVATIONS as GATED

Array = Any  # what has __dlpack__ or the buffer protocol
AdapterGradients = tuple[Array, Array]  # dA [r, K] and dB [N, r], float32

ACTIVATIONS = {**GATED, "relu": 3, "linear": 4}  # enum lt_activation
MOST_RANK = 256  # of a bottleneck adapter

# ---- low-rank linear -------------------------------------------------------------------------------------------------


def lora_linear(
    x: Array, weight: Array, bias: Array | None, A: Array, B: Array, scale: float, out: Array | None = None
) -> Array:
    """y [T, N] = x W^T + bias + scale * (x A^T) B^T, all float32: x [T, K], weight [N, K], A [r, K], B [N, r].

    The dense product is numpy.matmul. Hu et al. 2021, arXiv:2106.09685.
    """
    x_, weight_, A_, B_ = _lora(x, weight, A, B)
    y = result("out", out, (x_.shape[0], weight_.shape[0]), "float32")
    bias_ = None if bias is None else take("bias", bias, weight_.shape[:1], "float32", dense=True)
    apart(y, x_, weight_, bias_, A_, B_)
    dense = np.asarray(y)
    np.matmul(np.asarray(x_), np.asarray(weight_).T, out=dense)
    if bias_ is not None:
        dense += np.asarray(bias_)
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
    apart(dx, dy_, x_, weight_, A_, B_)
    np.matmul(np.asarray(dy_), np.asarray(weight_), out=np.asarray(dx))
    _low_rank_add(dx, dy_, B_, (B_.row, 1), A_, (A_.row, 1), scale)
    dA, dB = low_rank_gradients(x, dy, A, B, scale)
    return dx.source, dA, dB


def low_rank_add(y: Array, x: Array, A: Array, B: Array, scale: float) -> Array:
    """y [T, N] += scale * (x A^T) B^T in place, for x [T, K] of y's dtype and float32 A [r, K], B [N, r]; returns y."""
    x_ = take("x", x, ("T", "K"))
    A_, B_ = _factors(A, B, x_.shape[1])
    y_ = result("y", y, (x_.shape[0], B_.shape[0]), x_.dtype)
    apart(y_, x_, A_, B_)
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
    apart(dA, dB)
    for d in (dA, dB):
        apart(d, x_, dy_, A_, B_)
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
    same_or_apart(merged, weight_)
    apart(merged, A_, B_)
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


# ---- bottleneck adapter ----------------------------------------------------------------------------------------------


def bottleneck(
    x: Array,
    down: Array,
    up: Array,
    down_bias: Array | None = None,
    up_bias: Array | None = None,
    scale: float = 1.0,
    activation: str = "relu",
    out: Array | None = None,
) -> Array:
    """y = x + scale * (act(x down^T + down_bias) up^T + up_bias), [T, H] in x's dtype; `out` must not be x.

    x [T, H]; down [r, H], up [H, r], down_bias [r] and up_bias [H] float32, r at most 256. act: relu, silu, gelu,
    gelu_tanh or linear. Houlsby et al. 2019, arXiv:1902.00751.
    """
    x_, down_, up_, down_bias_, code = _bottleneck(x, down, up, down_bias, activation)
    up_bias_ = None if up_bias is None else take("up_bias", up_bias, x_.shape[1:], "float32", dense=True)
    y = result("out", out, x_.shape, x_.dtype, x_)
    apart(y, x_, down_, up_, down_bias_, up_bias_)
    lib.bottleneck_forward(
        x_.code, x_.address, x_.row, down_.address, address(down_bias_), up_.address, address(up_bias_), scale, code,
        y.address, y.row, *x_.shape, down_.shape[0],
    )  # fmt: skip
    return y.source


def bottleneck_backward(
    dy: Array,
    x: Array,
    down: Array,
    up: Array,
    down_bias: Array | None = None,
    scale: float = 1.0,
    activation: str = "relu",
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """(dx [T, H], ddown [r, H], dup [H, r], ddown_bias [r], dup_bias [H]) for the upstream gradient `dy` [T, H].

    dy and dx have x's dtype, the others are float32; `out` takes dx and must be neither dy nor x. The activations are
    formed again from x.
    """
    x_, down_, up_, down_bias_, code = _bottleneck(x, down, up, down_bias, activation)
    dy_ = take("dy", dy, x_.shape, x_.dtype)
    dx = result("out", out, x_.shape, x_.dtype, x_)
    apart(dx, dy_, x_, down_, up_, down_bias_)
    shapes = {"ddown": down_.shape, "dup": up_.shape, "ddown_bias": down_.shape[:1], "dup_bias": up_.shape[:1]}
    ddown, dup, ddown_bias, dup_bias = (result(name, None, shape, "float32") for name, shape in shapes.items())
    lib.bottleneck_backward(
        x_.code, dy_.address, dy_.row, x_.address, x_.row, down_.address, address(down_bias_), up_.address, scale, code,
        dx.address, dx.row, ddown.address, ddown_bias.address, dup.address, dup_bias.address,
        *x_.shape, down_.shape[0],
    )  # fmt: skip
    return dx.source, ddown.source, dup.source, ddown_bias.source, dup_bias.source


def _bottleneck(
    x: Array, down: Array, up: Array, down_bias: Array | None, activation: str
) -> tuple[View, View, View, View | None, int]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}")
    x_ = take("x", x, ("T", "H"))
    down_ = take("down", down, ("r", x_.shape[1]), "float32", dense=True)
    rank = down_.shape[0]
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(f"down has {rank} rows, the rank; it must be in [1, {MOST_RANK}]")
    up_ = take("up", up, (x_.shape[1], rank), "float32", dense=True)
    bias = None if down_bias is None else take("down_bias", down_bias, (rank,), "float32", dense=True)
    return x_, down_, up_, bias, ACTIVATIONS[activation]


# ---- losses ----------------------------------------------------------------------------------------------------------


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
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1]")
    loss = _Loss(logits, targets, ignore_index, scale, out)
    lib.cross_entropy_rows(
        loss.rows.address, loss.rows.row, address(loss.labels), 0, loss.scale, label_smoothing, z_loss, True,
        loss.found.ctypes.data, *loss.rows.shape,
    )  # fmt: skip
    return loss.results()


def distillation(
    logits: Array,
    teacher: Array,
    targets: Array | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    scale: float | None = None,
    ignore_index: int = -100,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """(losses [T] float64, dlogits [T, V] float32), the latter the gradient of scale * sum(losses).

    losses = alpha * t^2 * KL(softmax(teacher / t) || softmax(logits / t)) + (1 - alpha) * (lse - logits[target]) with
    the temperature t. `teacher` [T, V], of any float dtype, are logits; of probabilities p at that temperature pass
    t * log(p). Without `targets` all rows count and alpha must be 1. The other arguments are those of `cross_entropy`.
    Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is outside [0, 1]; it is the weight of the teacher's part")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    if alpha < 1 and targets is None:
        raise ValueError(f"alpha={alpha} needs targets; without them use alpha=1.0")
    loss = _Loss(logits, targets, ignore_index, scale, out, teacher)
    (z,) = loss.beside
    lib.distillation_rows(
        loss.rows.address, loss.rows.row, z.code, z.address, z.row, address(loss.labels), 0, loss.scale,
        alpha, temperature, True, loss.found.ctypes.data, *loss.rows.shape,
    )  # fmt: skip
    return loss.results()


class _Loss:
    """The rows that count, next to one another, which the kernel overwrites by their gradient; and where that goes.

    Rows without a label need no exponentials.
    """

    def __init__(
        self,
        logits: Array,
        targets: Array | None,
        ignore_index: int,
        scale: float | None,
        out: Array | None,
        *teacher: Array,
    ) -> None:
        logits_ = take("logits", logits, ("T", "V"), "float32")
        self.labels = None if targets is None else indices("targets", targets, logits_.shape[:1])
        self.beside = [take("teacher", z, logits_.shape) for z in teacher]
        self.gradient = result("out", out, logits_.shape, "float32")
        apart(self.gradient, self.labels, *self.beside)
        self.chosen: np.ndarray | None = None  # where some rows do not count: which do
        if self.labels is not None:
            chosen = np.asarray(self.labels) != ignore_index
            columns = f"the columns of logits, nor ignore_index={ignore_index}"
            within("targets", self.labels, logits_.shape[1], columns, chosen)
            if not chosen.all():
                self.chosen, self.labels = chosen, self.labels.only(chosen)
        if self.chosen is None:
            self.rows = copied(logits_, self.gradient.source)
        else:
            self.rows = logits_.only(self.chosen)
            self.beside = [z.only(self.chosen) for z in self.beside]
        count = self.rows.shape[0]
        self.scale = 1.0 / max(1, count) if scale is None else scale
        self.found = np.empty(count, np.float64)

    def results(self) -> tuple[Array, Array]:
        if self.chosen is None:
            return self.found, self.gradient.source
        losses, gradient = np.zeros(len(self.chosen), np.float64), np.asarray(self.gradient)
        losses[self.chosen] = self.found
        gradient[...] = 0.0
        gradient[self.chosen] = np.asarray(self.rows)
        return losses, self.gradient.source
