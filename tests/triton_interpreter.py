"""Triton's interpreter made strict, and made to count: what the tests of the Triton kernels run under.

Importing this sets TRITON_INTERPRET, which Triton reads when kernels are defined, so it comes before them. `install`
turns on the checks for integer overflow, and corrects two things in which the interpreter is not the device: fp32 is
narrowed to bf16 by rounding to nearest even (it truncates), and a condition on scalars stays a condition when it is
broadcast (it becomes an integer and is refused as a mask). `counted` says how many bytes kernels move;
`last_program_alone` runs as much of a launch that would take hours.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

SECTOR = 32  # bytes that a GPU's memory delivers at least
CACHE = 256 * 1024  # bytes: about one multiprocessor's share of an A100's second-level cache


@dataclass
class Traffic:
    """Bytes between kernels and memory: sectors that a small cache (least recently used) does not hold, and stores.

    What a program reads twice in a row (a row in two passes, the weights beside every row) counts once, as on a device;
    what a second pass over the whole tensor reads counts again.
    """

    loaded: int = 0
    stored: int = 0
    cache: dict[int, None] = field(default_factory=dict)

    def load(self, addresses: np.ndarray) -> None:
        for sector in np.unique(addresses // SECTOR).tolist():
            if sector not in self.cache:
                self.loaded += SECTOR
            self._touch(sector)

    def store(self, addresses: np.ndarray, size: int) -> None:
        self.stored += addresses.size * size
        for sector in np.unique(addresses // SECTOR).tolist():
            self._touch(sector)

    def _touch(self, sector: int) -> None:
        self.cache.pop(sector, None)
        self.cache[sector] = None
        if len(self.cache) > CACHE // SECTOR:
            del self.cache[next(iter(self.cache))]


_counter: Traffic | None = None


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the bytes that Triton kernels load and store inside the block."""
    global _counter
    _counter = Traffic()
    try:
        yield _counter
    finally:
        _counter = None


@contextmanager
def last_program_alone() -> Iterator[None]:
    """Of every launch inside the block, the program with the largest number in each dimension alone is run."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    kind, call = type(builder), executor.__call__

    def call_last(self: Any, *args: Any, **kwargs: Any) -> None:
        grid = (*self.grid, 1, 1)[:3]
        self.grid = (1,)
        builder.set_grid_dim = lambda *_: kind.set_grid_dim(builder, *grid)
        builder.set_grid_idx = lambda *_: kind.set_grid_idx(builder, *(n - 1 for n in grid))
        try:
            call(self, *args, **kwargs)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx

    executor.__call__ = call_last
    try:
        yield
    finally:
        executor.__call__ = call


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Replaces the interpreter's builder methods in question; once per process."""
    builder = interpreter.interpreter_builder
    if getattr(builder, "strict", False):
        return
    builder.strict = True
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
    kind = type(builder)
    load, store, splat, cast = (
        kind.create_masked_load,
        kind.create_masked_store,
        kind.create_splat,
        kind.cast_impl,
    )

    def as_condition(handle: Any) -> Any:
        return interpreter.TensorHandle(handle.data.astype(bool), tl.int1)

    def counting_load(self, ptrs, mask, other, *policy):  # type: ignore[no-untyped-def]
        mask = as_condition(mask)
        if _counter is not None:
            _counter.load(ptrs.data[mask.data])
        return load(self, ptrs, mask, other, *policy)

    def counting_store(self, ptrs, value, mask, *policy):  # type: ignore[no-untyped-def]
        mask = as_condition(mask)
        if _counter is not None:
            _counter.store(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *policy)

    def splat_keeping_conditions(self, ret_ty, arg):  # type: ignore[no-untyped-def]
        return splat(self, ret_ty, as_condition(arg) if arg.data.dtype == np.bool_ else arg)

    def rounding_cast(self, src, dst_type):  # type: ignore[no-untyped-def]
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(bf16_bits(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def rounding_fp_to_fp(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(bf16_bits(src.data), tl.bfloat16)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    fp_to_fp = kind.create_fp_to_fp
    kind.create_masked_load = counting_load
    kind.create_masked_store = counting_store
    kind.create_splat = splat_keeping_conditions
    kind.cast_impl = rounding_cast
    kind.create_fp_to_fp = rounding_fp_to_fp
