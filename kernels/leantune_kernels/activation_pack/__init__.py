"""Activations packed for the backward pass: bf16, or int8 with one scale a row; on CUDA also to pinned host memory.

pack(x, "bf16") rounds to the nearest bfloat16 (ties to even; NaN stays NaN): 2 bytes an element. pack(x, "int8")
stores each row, which is the last dimension, as the int8 op does: codes and absmax / 127, 1 byte an element and 4 a
row; a row with a NaN or an infinity comes back as NaN. ActNN (Chen et al. 2021, arXiv:2104.14129) studies what such
rounding does to the gradients; what is kept for an elementwise operation bears it well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from leantune_kernels.autograd import is_exact
from leantune_kernels.checks import FLOATS, as_rows, expect
from leantune_kernels.dispatch import Op
from leantune_kernels.graph import Effects

OP = Op(
    __name__,
    effects={
        "pack_bf16": Effects((1,)),
        "pack_int8": Effects((1, 2)),
        "unpack_bf16": Effects((1,)),
        "unpack_int8": Effects((2,)),
    },
)

MODES = ("bf16", "int8")


@dataclass(frozen=True)
class Packed:
    """A packed tensor of x's shape and `dtype`: data bfloat16, or int8 with scales, float32, one for each row."""

    data: torch.Tensor
    scales: torch.Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(x: torch.Tensor, mode: str) -> Packed:
    """`x` (float32, bfloat16 or float16; any shape and strides) packed as `mode`, "bf16" or "int8"; no autograd.

    Raises ValueError for another mode or dtype.
    """
    _check_mode(mode)
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    rows = as_rows(x.detach())
    if mode == "bf16":
        data = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        OP.pick(x).pack_bf16(rows, as_rows(data))
        return Packed(data, None, x.dtype)
    data = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    OP.pick(x).pack_int8(rows, as_rows(data), scales)
    return Packed(data, scales, x.dtype)


def unpack(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that was packed, in its dtype, rounded; into `out`, contiguous, where given. ValueError if unfit."""
    data = packed.data
    reused = out is not None
    if out is None:
        out = torch.empty(data.shape, dtype=packed.dtype, device=data.device)
    expect("out", out, data.shape, packed.dtype, data.device)
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()} for shape {tuple(out.shape)}; it must be contiguous")
    if packed.scales is None:
        OP.pick(out).unpack_bf16(as_rows(data), as_rows(out))
    else:
        OP.pick(out).unpack_int8(as_rows(data), packed.scales, as_rows(out), reused)
    return out


@contextmanager
def packed_saves(mode: str, minimum_size: int = 65536, to_host: bool = False) -> Iterator[None]:
    """Inside the block, whatever PyTorch's operations keep for the backward pass is kept packed.

        with packed_saves("int8"):
            loss = module(x).sum()
        loss.backward()

    Left as they are: tensors below `minimum_size` elements, parameters and their views, dtypes that packing would not
    make smaller, integers; and of this library's operations weights of any kind, statistics (attention's log-sum-exp),
    rotary tables, and the finished gradients of linear_cross_entropy. PyTorch's own operations do not say what must
    stay exact: give them a frozen weight as a Parameter, and choose minimum_size above the size of their statistics. A
    tensor that several operations keep is packed once for each. With `to_host` what is packed moves to pinned host
    memory on a stream of its own, and comes back when the backward pass asks for it; ValueError without CUDA.
    """
    _check_mode(mode)
    if to_host and not torch.cuda.is_available():
        raise ValueError("to_host=True needs a CUDA device; without one there is no other memory to move to")

    def keep(x: torch.Tensor) -> Any:
        if not _worthwhile(x, mode, minimum_size):
            return x
        packed = pack(x, mode)
        return _OnHost(packed) if to_host else packed

    def restore(kept: Any) -> torch.Tensor:
        if isinstance(kept, _OnHost):
            kept = kept.back()
        return unpack(kept) if isinstance(kept, Packed) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        yield


def _worthwhile(x: torch.Tensor, mode: str, minimum_size: int) -> bool:
    smaller = x.dtype in FLOATS and x.element_size() > {"bf16": 2, "int8": 1}[mode]
    weight = isinstance(x, torch.nn.Parameter) or isinstance(x._base, torch.nn.Parameter)
    return smaller and not weight and x.numel() >= max(1, minimum_size) and not is_exact(x)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to and from the host: in its order, a copy back follows the copy out."""
    return torch.cuda.Stream(device)


class _OnHost:
    """A packed tensor in pinned host memory; both copies run beside the computation."""

    def __init__(self, packed: Packed) -> None:
        self.device, self.dtype = packed.data.device, packed.dtype
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.tensors = [None if t is None else self._out(t, side) for t in (packed.data, packed.scales)]

    @staticmethod
    def _out(x: torch.Tensor, side: torch.cuda.Stream) -> torch.Tensor:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        x.record_stream(side)
        return host

    def back(self) -> Packed:
        """On the device again; the current stream waits for it, the host does not."""
        side, current = _side_stream(self.device), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(side):
            data, scales = (None if t is None else t.to(self.device, non_blocking=True) for t in self.tensors)
        current.wait_stream(side)
        for t in (data, scales):
            if t is not None:
                t.record_stream(current)
        assert data is not None
        return Packed(data, scales, self.dtype)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}")
