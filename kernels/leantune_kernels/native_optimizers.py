"""Optimizers over lists of arrays, and the norm of their gradients, for leantune_kernels.native.

What all optimizers share. params: float32 of any shape; or bfloat16, rounded stochastically by noise of (seed, step);
or bfloat16 or float16 beside a float32 copy in `masters` (None for the others), which is updated and rounded to
nearest. grads: any float dtype; `grad_scale` multiplies each, as for clipping. `step` counts from 1. Results are lists
of the parameters, of each kind of state and, where given, of the masters: new arrays, or with `out`, a tuple of such
lists, writable arrays that are updated in place where they are the arguments themselves, which saves copying them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leantune_kernels import _native as lib
from leantune_kernels.arrays import FLOATS, View, address, copied, take
from leantune_kernels.dynamic_code_books import BLOCK, tables
from leantune_kernels.ranges import expect_number

Array = Any  # what has __dlpack__ or the buffer protocol
Arrays = Sequence[Array]
Updated = tuple[list[Array], ...]  # the parameters, each kind of state and, where given, the masters


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
    masters: Arrays | None = None,
    seed: int = 0,
    out: Sequence[Arrays] | None = None,
) -> Updated:
    """(params, exp_avgs, exp_avg_sqs[, masters]) after a step of AdamW by torch.optim.AdamW's formula.

    params: float32, or bfloat16 rounded stochastically, or bfloat16 or float16 with `masters`; moments: float32 of the
    same shapes; grads: any float dtype. `out=(params, exp_avgs, exp_avg_sqs[, masters])` updates in place. More on
    these, on `grad_scale` and `seed` in leantune_kernels.native_optimizers. Loshchilov and Hutter 2019,
    arXiv:1711.05101.
    """
    _check_numbers(beta1, beta2, eps)
    states = [_List("exp_avgs", exp_avgs), _List("exp_avg_sqs", exp_avg_sqs)]
    update = _Update(params, grads, states, masters, out, step, lr, weight_decay, seed)
    lib.adamw(*update.table, beta1, beta2, eps, grad_scale, step, seed)
    return update.results


def adamw_8bit(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_absmaxes: Arrays,
    exp_avg_sqs: Arrays,
    exp_avg_sq_absmaxes: Arrays,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    masters: Arrays | None = None,
    seed: int = 0,
    out: Sequence[Arrays] | None = None,
) -> Updated:
    """(params, exp_avgs, exp_avg_absmaxes, exp_avg_sqs, exp_avg_sq_absmaxes[, masters]) after a step of AdamW.

    Its moments take a byte an element: exp_avgs and exp_avg_sqs are codes, uint8 of the parameters' shapes, and the
    absmaxes float32 [ceil(elements / 256)], all zeros before the first step. Element e is book[code[e]] * absmax[e //
    256], with the books of leantune_kernels.dynamic_code_books. Infinity or NaN in a gradient reaches all of its block
    of 256. Otherwise as `adamw`. Dettmers et al. 2022, arXiv:2110.02861.
    """
    _check_numbers(beta1, beta2, eps)
    states = [
        _List("exp_avgs", exp_avgs, "uint8"),
        _List("exp_avg_absmaxes", exp_avg_absmaxes, block=BLOCK),
        _List("exp_avg_sqs", exp_avg_sqs, "uint8"),
        _List("exp_avg_sq_absmaxes", exp_avg_sq_absmaxes, block=BLOCK),
    ]
    update = _Update(params, grads, states, masters, out, step, lr, weight_decay, seed)
    lib.adamw_8bit(*update.table, tables().ctypes.data, beta1, beta2, eps, grad_scale, step, seed)
    return update.results


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
    masters: Arrays | None = None,
    seed: int = 0,
    out: Sequence[Arrays] | None = None,
) -> Updated:
    """(params, momentum_buffers[, masters]) after a step of SGD by torch.optim.SGD's formula.

    Arguments as those of `adamw`. Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13.html.
    """
    expect_number("momentum", momentum)
    states = [_List("momentum_buffers", momentum_buffers)]
    update = _Update(params, grads, states, masters, out, step, lr, weight_decay, seed)
    lib.sgd(*update.table, momentum, 0.0, nesterov, grad_scale, step, seed)
    return update.results


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
    masters: Arrays | None = None,
    seed: int = 0,
    out: Sequence[Arrays] | None = None,
) -> Updated:
    """(params, square_avgs[, masters]) after a step of RMSprop by torch.optim.RMSprop's formula.

    Arguments as those of `adamw`. Tieleman and Hinton 2012, Neural Networks for Machine Learning, lecture 6.5.
    """
    expect_number("alpha", alpha, 1.0)
    expect_number("eps", eps)
    states = [_List("square_avgs", square_avgs)]
    update = _Update(params, grads, states, masters, out, step, lr, weight_decay, seed)
    lib.rmsprop(*update.table, alpha, eps, 0.0, grad_scale, step, seed)
    return update.results


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


def _check_numbers(beta1: float, beta2: float, eps: float) -> None:
    expect_number("beta1", beta1, 1.0)
    expect_number("beta2", beta2, 1.0)
    expect_number("eps", eps)


# lt_parameter of leantune_kernels.h
_PARAMETER = np.dtype(
    [(name, "i8") for name in ("size", "data", "master", "grad", "state0", "state1", "state2", "state3")]
    + [("lr", "f8"), ("weight_decay", "f8"), ("dtype", "i8"), ("grad_dtype", "i8")]
)


@dataclass(frozen=True)
class _List:
    """One array for each parameter, of its shape; masters may be None."""

    name: str
    arrays: Arrays
    dtype: str | tuple[str, ...] = "float32"
    block: int = 1  # elements of the parameter for each element of the array; above 1 the array is flat

    def views(self, shapes: list[tuple[int, ...]]) -> list[View | None]:
        _check_length(self.name, self.arrays, len(shapes))
        return [self._view(i, x, shape) for i, (x, shape) in enumerate(zip(self.arrays, shapes, strict=True))]

    def _view(self, i: int, x: Array, shape: tuple[int, ...]) -> View | None:
        if x is None and self.name == "masters":
            return None
        own = shape if self.block == 1 else (-(-math.prod(shape) // self.block),)
        return take(f"{self.name}[{i}]", x, own, self.dtype, dense=True)


class _Update:
    """Arguments of a step: new arrays, or those of `out`, that hold the old values, and a list of lt_parameter."""

    def __init__(
        self,
        params: Arrays,
        grads: Arrays,
        states: list[_List],
        masters: Arrays | None,
        out: Sequence[Arrays] | None,
        step: int,
        lr: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        if not 1 <= step < 2**32:
            raise ValueError(f"step={step} must be 1 for the first update, then 2 and so on, below 2^32")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is outside [0, 2^64)")
        expect_number("lr", lr)
        expect_number("weight_decay", weight_decay)
        shapes = [np.shape(p) for p in params]
        lists = {"data": _List("params", params, FLOATS), **{f"state{i}": state for i, state in enumerate(states)}}
        if masters is not None:
            lists["master"] = _List("masters", masters)
        old = {field: each.views(shapes) for field, each in lists.items()}
        self.grads = _List("grads", grads, FLOATS).views(shapes)
        _check_masters(old["data"], old.get("master", [None] * len(shapes)))
        if out is None:
            out = [[None] * len(shapes)] * len(lists)
        if len(out) != len(lists):
            raise ValueError(f"out has {len(out)} lists; it takes {', '.join(each.name for each in lists.values())}")
        self.written = [_hold(views, out[k], f"out[{k}]") for k, views in enumerate(old.values())]
        self.rows = np.zeros(len(shapes), _PARAMETER)
        self.rows["lr"], self.rows["weight_decay"] = lr, weight_decay
        self.rows["size"] = [math.prod(shape) for shape in shapes]
        for field, views in [*zip(lists, self.written, strict=True), ("grad", self.grads)]:
            self.rows[field] = [address(x) for x in views]
        for field, views in (("dtype", self.written[0]), ("grad_dtype", self.grads)):
            self.rows[field] = [x.code for x in views if x is not None]

    @property
    def table(self) -> tuple[int, int]:
        return self.rows.ctypes.data, len(self.rows)

    @property
    def results(self) -> Updated:
        return tuple([None if x is None else x.source for x in views] for views in self.written)


def _hold(views: list[View | None], out: Arrays, name: str) -> list[View | None]:
    """New arrays, or those of `out`, that hold what `views` do."""
    _check_length(name, out, len(views))
    pairs = enumerate(zip(views, out, strict=True))
    return [None if x is None else copied(x, to, f"{name}[{i}]", dense=True) for i, (x, to) in pairs]


def _check_length(name: str, arrays: Arrays, count: int) -> None:
    if len(arrays) != count:
        raise ValueError(f"{name} has {len(arrays)} arrays; params has {count}")


def _check_masters(params: list[View | None], masters: list[View | None]) -> None:
    for i, (p, master) in enumerate(zip(params, masters, strict=True)):
        if p is not None and p.dtype == "float16" and master is None:
            raise ValueError(
                f"params[{i}] is float16, which is too narrow to be trained alone; give masters[{i}], its float32 "
                "copy, or use bfloat16"
            )
        if p is not None and p.dtype == "float32" and master is not None:
            raise ValueError(f"params[{i}] is float32; masters[{i}] must be None")
