"""Linear layers, their low-rank updates, and groups of them that read the same input.

A group knows its own forward product, input gradient and parameter gradients; the blocks call these by hand, so that
nothing is formed twice. With many tokens the low-rank update is folded into the weight, W + s*B*A, in a reused buffer:
one dense product then does the work of three. With few tokens, or with dropout before A, it is added to the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from leantune.errors import ConfigError
from leantune.nn.arena import Arena, Buffer
from leantune.nn.batch import Packed
from leantune_kernels import dropout, low_rank

Gradients = list[torch.Tensor | None]


class LowRank(nn.Module):
    """The update s*B*A of a linear layer: A [r, in_features], B [out_features, r], both fp32 and trainable."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.scale = scale
        self.dropout = dropout

    def initialise(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(in_features), as the paper's code draws it (arXiv:2106.09685), B zero."""
        bound = 1.0 / math.sqrt(self.A.shape[1])
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()


class Linear(nn.Module):
    """y = x W^T + b, plus the low-rank update where a method has put one.

    weight [out_features, in_features], bias [out_features] or None. `path` is the module's path in the Hugging Face
    model, the name that methods and adapter files know it by.
    """

    def __init__(self, path: str, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.path, self.in_features, self.out_features = path, in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.lora: LowRank | None = None
        # The weight from before a merge; while it is set, the update is folded into `weight`.
        self.base: torch.Tensor | None = None
        self.index = 0  # number of the layer within the model: part of the dropout key

    @property
    def update(self) -> LowRank | None:
        """The low-rank update that is still to be added to the weight's product."""
        return self.lora if self.base is None else None

    def tensors(self) -> list[torch.Tensor | None]:
        """What gradients may be asked for, in the order of LinearGroup.parameter_gradients."""
        lora = self.update
        return [self.weight, self.bias, lora.A if lora else None, lora.B if lora else None]

    def extra_repr(self) -> str:
        rank = f", rank={self.lora.A.shape[0]}" if self.lora else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{rank}"


def _masked(lora: LowRank | None, batch: Packed) -> bool:
    return lora is not None and lora.dropout > 0 and batch.dropout_key is not None


def _dropped(x: torch.Tensor, linear: Linear, batch: Packed) -> torch.Tensor:
    """x [T, K] under the dropout mask of this layer and step (the same call masks a gradient on its way back)."""
    assert linear.lora is not None and batch.dropout_key is not None
    seed, step, first_token = batch.dropout_key
    key = (seed * 1_000_003 + step) * 4099 + linear.index
    return dropout.forward(x, linear.lora.dropout, key & 0x7FFFFFFFFFFFFFFF, first_token * x.shape[1])


class LinearGroup:
    """Linear layers that read the same input; their outputs lie side by side, [T, sum of out_features]."""

    def __init__(self, owner: nn.Module, *names: str) -> None:
        """The sub-modules `names` of `owner`; they are looked up at every use, so replacing one takes effect."""
        self._owner, self._names = owner, names

    @property
    def linears(self) -> list[Linear]:
        """The layers, in the order of their outputs. Raises ConfigError where one is not a Linear any more."""
        found = [getattr(self._owner, name) for name in self._names]
        for name, linear in zip(self._names, found, strict=True):
            if not isinstance(linear, Linear):
                raise ConfigError(f"{name} was replaced by a {type(linear).__name__}; it must be a leantune.nn.Linear")
        return found

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features

    @property
    def out_features(self) -> int:
        return sum(linear.out_features for linear in self.linears)

    def tensors(self) -> list[torch.Tensor | None]:
        return [t for linear in self.linears for t in linear.tensors()]

    def columns(self, y: torch.Tensor) -> Iterator[tuple[Linear, torch.Tensor]]:
        """Each layer with its columns of y [T, out_features]."""
        begin = 0
        for linear in self.linears:
            yield linear, y[:, begin : begin + linear.out_features]
            begin += linear.out_features

    def forward(
        self, x: torch.Tensor, out: torch.Tensor, batch: Packed, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """out [T, out_features] = x [T, in_features] times the weights, plus biases, updates and `residual`."""
        held, weight, added = self._weight(x, batch)
        if weight is not None:
            _product(x, weight, out, residual)
        else:
            for linear, y in self.columns(out):
                _product(x, linear.weight, y, residual)
        for linear, y in self.columns(out):
            if linear.bias is not None:
                y += linear.bias
            lora = linear.update
            if lora is not None and linear in added:
                source = _dropped(x, linear, batch) if _masked(lora, batch) else x
                low_rank.add_(y, source, lora.A, lora.B, lora.scale)
        del held
        return out

    def input_gradient(self, dy: torch.Tensor, out: torch.Tensor, batch: Packed) -> torch.Tensor:
        """out [T, in_features] = gradient of the input, from dy [T, out_features]."""
        held, weight, added = self._weight(dy, batch)
        if weight is not None:
            torch.mm(dy, weight, out=out)
        else:
            for i, (linear, columns) in enumerate(self.columns(dy)):
                if i == 0:
                    torch.mm(columns, linear.weight, out=out)
                else:
                    out.addmm_(columns, linear.weight)
        for linear, columns in self.columns(dy):
            lora = linear.update
            if lora is None or linear not in added:
                continue
            if _masked(lora, batch):
                through = torch.zeros_like(out)
                low_rank.input_gradient_(through, columns, lora.A, lora.B, lora.scale)
                out += _dropped(through, linear, batch)
            else:
                low_rank.input_gradient_(out, columns, lora.A, lora.B, lora.scale)
        del held
        return out

    def parameter_gradients(
        self, x: torch.Tensor, dy: torch.Tensor, needed: Sequence[bool], batch: Packed
    ) -> Gradients:
        """Gradients of `tensors()`, None where `needed` says so. x [T, in_features], dy [T, out_features]."""
        gradients: Gradients = [None] * len(needed)
        sharing: list[tuple[int, low_rank.Adapter]] = []  # updates that read x itself: one pass over it serves all
        for i, (linear, columns) in enumerate(self.columns(dy)):
            weight, bias, *factors = needed[4 * i : 4 * i + 4]
            gradients[4 * i] = torch.mm(columns.t(), x) if weight else None
            gradients[4 * i + 1] = columns.sum(0) if bias else None
            lora = linear.update
            if lora is None or not any(factors):
                continue
            if _masked(lora, batch):
                dropped = _dropped(x, linear, batch)
                pair = low_rank.gradients(dropped, columns, lora.A, lora.B, lora.scale)
                gradients[4 * i + 2 : 4 * i + 4] = pair
            else:
                sharing.append((4 * i + 2, low_rank.Adapter(columns, lora.A, lora.B, lora.scale)))
        if sharing:
            pairs = low_rank.gradients_group(x, [adapter for _, adapter in sharing])
            for (at, _), of_factors in zip(sharing, pairs, strict=True):
                gradients[at : at + 2] = of_factors
        return [g if wanted else None for g, wanted in zip(gradients, needed, strict=True)]

    def _weight(self, x: torch.Tensor, batch: Packed) -> tuple[Buffer | None, torch.Tensor | None, Sequence[Linear]]:
        """(loan, one weight for the whole group or None, layers whose update is still to be added).

        A single weight is formed where updates are folded in, or where the stored dtype is not the one computed in.
        """
        updated = [linear for linear in self.linears if linear.update is not None]
        convert = any(linear.weight.dtype != x.dtype for linear in self.linears)
        foldable = x.dtype == torch.float32 and x.shape[0] >= fold_from(self.in_features, self.out_features)
        fold = [linear for linear in updated if foldable and not _masked(linear.update, batch)]
        if not fold and not convert:
            only = self.linears[0].weight if len(self.linears) == 1 else None
            return None, only, updated
        held = merged_weight(self.linears, fold, batch.arena)
        return held, held.tensor, [linear for linear in updated if linear not in fold]


def fold_from(in_features: int, out_features: int) -> int:
    """Tokens from which forming W + s*B*A costs less than two skinny products: 2rKN against 2Tr(K + N) operations."""
    return in_features * out_features // (in_features + out_features)


def merged_weight(linears: Sequence[Linear], fold: Sequence[Linear], arena: Arena) -> Buffer:
    """The stacked fp32 weight [sum of out_features, in_features], with the updates of the layers in `fold` added."""
    held = arena.take(sum(linear.out_features for linear in linears), linears[0].in_features)
    begin = 0
    for linear in linears:
        rows = held.tensor[begin : begin + linear.out_features]
        lora = linear.update if linear in fold else None
        if lora is not None:
            low_rank.merge(linear.weight, lora.A, lora.B, lora.scale, rows)
        else:
            rows.copy_(linear.weight)
        begin += linear.out_features
    return held


def _product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None) -> None:
    if residual is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(residual, x, weight.t(), out=out)
