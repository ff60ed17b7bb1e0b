"""Lists of tensors as the optimizers' kernels see them: checked, and written down as rows of lt_parameter.

Parameters are float32; or bfloat16, rounded stochastically with noise keyed by (seed, step, tensor, element); or
bfloat16 or float16 beside a float32 master, which is updated and rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leantune_kernels.checks import FLOATS, changed
from leantune_kernels.cpu import DTYPE_CODES, address
from leantune_kernels.dispatch import Op
from leantune_kernels.ranges import expect_number

PIECE = 16384  # LT_PIECE: elements of one tensor that are one block's work
FIELDS = 12  # of lt_parameter, 8 bytes each
SIZE, DATA, MASTER, GRAD, STATES, LR, WEIGHT_DECAY, DTYPE, GRAD_DTYPE = 0, 1, 2, 3, 4, 8, 9, 10, 11
MOST_STEPS = 2**32 - 1

Tensors = Sequence[torch.Tensor]
Grads = Sequence[torch.Tensor | None]
PerTensor = float | Sequence[float]


@dataclass(frozen=True)
class State:
    """One of the tensors that an optimizer keeps beside each parameter."""

    name: str
    tensors: Tensors
    dtype: torch.dtype = torch.float32
    block: int = 1  # elements of the parameter for each element of the state; above 1 the state is flat

    def shape(self, p: torch.Tensor) -> tuple[int, ...]:
        return tuple(p.shape) if self.block == 1 else (-(-p.numel() // self.block),)


class ParameterTable:
    """Parameters with masters and states, checked once and reused every step.

    It keeps the memory that the tensors have now: after `p.data = ...` or `module.to(...)` make a new one.
    """

    op: Op

    def __init__(self, params: Tensors, states: Sequence[State | None], masters: Grads | None = None) -> None:
        self.params = [p.detach() for p in params]
        self.masters = [None] * len(self.params) if masters is None else list(masters)
        self.states = [None if state is None else list(state.tensors) for state in states]
        self._check_params()
        for state in filter(None, states):
            self._check_like(state.name, state.tensors, [(state.shape(p), state.dtype) for p in self.params])
        self._check_like("masters", self.masters, [(tuple(p.shape), torch.float32) for p in self.params])
        self._rows = torch.zeros(len(self.params), FIELDS, dtype=torch.int64)
        if self.params:
            columns = {SIZE: [p.numel() for p in self.params], DATA: [p.data_ptr() for p in self.params]}
            columns |= {MASTER: [address(m) for m in self.masters]}
            columns |= {DTYPE: [DTYPE_CODES[p.dtype] for p in self.params]}
            columns |= {STATES + i: [t.data_ptr() for t in ts] for i, ts in enumerate(self.states) if ts is not None}
            self._rows[:, list(columns)] = torch.tensor(list(columns.values()), dtype=torch.int64).t()
        self._pieces: torch.Tensor | None = None

    def _check_params(self) -> None:
        for i, (p, master) in enumerate(zip(self.params, self.masters, strict=False)):
            if p.dtype not in FLOATS or not p.is_contiguous() or p.device != self.params[0].device:
                raise ValueError(
                    f"params[{i}] is {p.dtype} with shape {tuple(p.shape)} and strides {p.stride()} on {p.device}; it "
                    "must be contiguous and float32, bfloat16 or float16, all on one device"
                )
            if p.dtype == torch.float16 and master is None:
                raise ValueError(
                    f"params[{i}] is torch.float16, which is too narrow to be trained alone; "
                    f"give masters[{i}], its float32 copy, or use bfloat16"
                )
            if p.dtype == torch.float32 and master is not None:
                raise ValueError(f"params[{i}] is torch.float32; masters[{i}] must be None")

    def _check_like(self, name: str, tensors: Grads, wanted: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        if len(tensors) != len(self.params):
            raise ValueError(f"{name} has {len(tensors)} tensors; params has {len(self.params)}")
        for i, (t, p, (shape, dtype)) in enumerate(zip(tensors, self.params, wanted, strict=True)):
            if t is None:
                continue
            if t.dtype != dtype or t.shape != shape or t.device != p.device or not t.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] is {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()} on "
                    f"{t.device}; it must be contiguous {str(dtype).removeprefix('torch.')} of shape {shape} on "
                    f"{p.device}"
                )

    def run(
        self,
        grads: Grads,
        *,
        step: int,
        lr: PerTensor,
        weight_decay: PerTensor,
        seed: int,
        **numbers: Any,
    ) -> None:
        """One update by the implementation that serves: its `update(table, grads, step=, lr=, seed=, ...)`.

        It works on addresses, so torch.compile breaks the graph around it.
        """
        if torch.compiler.is_compiling():
            numbers |= {"step": step, "lr": lr, "weight_decay": weight_decay, "seed": seed}
            torch.compiler.disable(self.run)(grads, **numbers)
            return
        if not 1 <= step <= MOST_STEPS:
            raise ValueError(f"step={step} must be 1 for the first update, then 2 and so on, below 2^32")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is outside [0, 2^64)")
        given = self._checked(grads)
        rates = {"lr": self._per_tensor(lr, "lr"), "weight_decay": self._per_tensor(weight_decay, "weight_decay")}
        if self.params:
            self.op.pick(self.params[0]).update(self, given, step=step, seed=seed, **rates, **numbers)
            for written in (self.params, self.masters):
                changed(*[t for t, g in zip(written, given, strict=True) if g is not None])

    def _checked(self, grads: Grads) -> list[torch.Tensor | None]:
        if len(grads) != len(self.params):
            raise ValueError(f"grads has {len(grads)} entries; params has {len(self.params)}")
        for i, (g, p) in enumerate(zip(grads, self.params, strict=True)):
            if g is not None and (g.shape != p.shape or g.dtype not in FLOATS or g.device != p.device):
                raise ValueError(
                    f"grads[{i}] is {g.dtype} of shape {tuple(g.shape)} on {g.device}; it must be float32, "
                    f"bfloat16 or float16 of shape {tuple(p.shape)} on {p.device}"
                )
        return [None if g is None else g.detach().contiguous() for g in grads]

    def _per_tensor(self, value: PerTensor, name: str) -> list[float]:
        if isinstance(value, (int, float)):
            expect_number(name, value)
            return [float(value)] * len(self.params)
        values = [float(v) for v in value]
        for i, v in enumerate(values):
            expect_number(f"{name}[{i}]", v)
        if len(values) != len(self.params):
            raise ValueError(
                f"{name} has {len(values)} numbers; give one for all or one for each of {len(self.params)}"
            )
        return values

    def rows(self, grads: Grads, lr: list[float], weight_decay: list[float]) -> torch.Tensor:
        """The list as lt_parameter [tensors], on the host: int64 [tensors, FIELDS]."""
        rows = self._rows.clone()
        rows[:, [GRAD, GRAD_DTYPE]] = grad_columns(grads)
        rows[:, [LR, WEIGHT_DECAY]] = torch.tensor([lr, weight_decay], dtype=torch.float64).view(torch.int64).t()
        return rows

    def pieces(self) -> torch.Tensor:
        """The pieces that the list is cut into, as lt_piece, on the parameters' device."""
        if self._pieces is None:
            self._pieces = pieces([p.numel() for p in self.params], self.params[0].device)
        return self._pieces


def grad_columns(grads: Grads) -> torch.Tensor:
    """int64 [tensors, 2]: the fields GRAD and GRAD_DTYPE."""
    codes = [0 if g is None else DTYPE_CODES[g.dtype] for g in grads]
    return torch.tensor([[address(g) for g in grads], codes], dtype=torch.int64).t()


def grad_rows(grads: Tensors) -> torch.Tensor:
    """Contiguous gradients alone as lt_parameter [tensors], on the host: int64 [tensors, FIELDS]."""
    rows = torch.zeros(len(grads), FIELDS, dtype=torch.int64)
    rows[:, SIZE] = torch.tensor([g.numel() for g in grads], dtype=torch.int64)
    rows[:, [GRAD, GRAD_DTYPE]] = grad_columns(grads)
    return rows


def pieces(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [pieces, 2]: each piece's tensor and its first element there; lt_piece in C."""
    counts = torch.tensor([-(-n // PIECE) for n in sizes], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.cumsum(counts, 0) - counts
    begin = (torch.arange(len(owner)) - first[owner]) * PIECE
    return torch.stack((owner, begin), 1).to(device)


def write_back(table: ParameterTable, tensor: int, value: torch.Tensor, *, seed: int, step: int) -> None:
    """The reference's last step: the fp32 `value` becomes parameter number `tensor`, as its storage asks."""
    p, master = table.params[tensor], table.masters[tensor]
    if master is not None:
        p.copy_(master.copy_(value))
    elif p.dtype == torch.bfloat16:
        p.copy_(round_stochastically(value, tensor, seed=seed, step=step))
    else:
        p.copy_(value)


def round_stochastically(x: torch.Tensor, tensor: int, *, seed: int, step: int) -> torch.Tensor:
    """`x` float32 in bfloat16: one of the two neighbours, by the noise of tensor number `tensor` at `step`."""
    noise = halves(x.numel(), tensor, seed=seed, step=step, device=x.device).view(x.shape)
    up = ((x.contiguous().view(torch.int32).long() & 0xFFFFFFFF) + noise) >> 16
    rounded = torch.where(up >= 2**15, up - 2**16, up).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), rounded)


def halves(n: int, tensor: int, *, seed: int, step: int, device: torch.device) -> torch.Tensor:
    """int64 [n]: 16 random bits for every element, two from each word of Philox, the lower half first."""
    from leantune_kernels.dropout.reference import philox  # the generator's plain form

    counter = torch.arange((n + 7) // 8, device=device)
    rest = [torch.full_like(counter, tensor), torch.full_like(counter, step)]
    words = philox(torch.stack((counter & 0xFFFFFFFF, counter >> 32, *rest), 1), (seed & 0xFFFFFFFF, seed >> 32))
    return torch.stack((words & 0xFFFF, words >> 16), 2).flatten()[:n]
