"""The emulated CUDA kernels under the ops' own dispatch: `with host.kernels("plain") as library: ...`."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import leantune_kernels
from cuda_host.budgets import KERNELS
from cuda_host.build import build
from leantune_kernels import cuda, testing
from leantune_kernels.dispatch import Op


def library(flavour: str) -> Path:
    """The emulator's library with all kernels of csrc, built where a source is newer."""
    return build(flavour)


def cuda_ops() -> list[str]:
    """The ops that have a CUDA implementation."""
    return [op for op in leantune_kernels.ops() if Op(f"leantune_kernels.{op}").implementation("cuda") is not None]


@contextmanager
def kernels(flavour: str) -> Iterator[ctypes.CDLL]:
    """Every op runs its CUDA kernels, on the memory of the cpu, inside the block. Yields the library.

    PyTorch keeps to one thread meanwhile: the tensors are small. A launch that asks for more dynamic shared memory than
    its kernel's budget fails.
    """
    path = library(flavour)
    emulator = ctypes.CDLL(str(path))
    for kernel in KERNELS:
        if kernel.dynamic is not None:
            emulator.lt_host_dynamic_budget(kernel.name.encode(), ctypes.c_size_t(kernel.dynamic))
    opened, forced, threads = cuda.library(), os.environ.get("LEANTUNE_IMPL"), torch.get_num_threads()
    cuda.use_library(path, device="cpu")
    os.environ["LEANTUNE_IMPL"] = "cuda"
    torch.set_num_threads(1)
    try:
        yield emulator
    finally:
        torch.set_num_threads(threads)
        if opened is not None:
            cuda.use_library(opened)
        else:
            cuda._opened, cuda._device = None, "cuda"
        if forced is None:
            del os.environ["LEANTUNE_IMPL"]
        else:
            os.environ["LEANTUNE_IMPL"] = forced


@contextmanager
def last_block_alone() -> Iterator[None]:
    """Of every launch of the plain kernels inside the block, the block with the largest index alone is run."""
    plain = ctypes.CDLL(str(library("plain")))
    plain.lt_host_last_block_alone(1)
    try:
        yield
    finally:
        plain.lt_host_last_block_alone(0)


@dataclass(frozen=True)
class Bytes:
    loaded: int
    stored: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory: every access; each byte once a block (L1 and L2 serve a block's second look); each byte
    once a launch (what memory sees if L2 also holds all that blocks share)."""

    requested: Bytes
    per_block: Bytes
    per_launch: Bytes


def read_traffic(traced: ctypes.CDLL) -> dict[str, Traffic]:
    """By kernel, since the library's last lt_host_traffic_reset(); kernels that did not run are left out."""
    traced.lt_host_kernels.restype = ctypes.c_char_p
    result = {}
    for name in traced.lt_host_kernels().decode().split():
        counts = (ctypes.c_uint64 * 6)()
        traced.lt_host_traffic(name.encode(), counts)
        if any(counts):
            result[name] = Traffic(*(Bytes(counts[i], counts[i + 1]) for i in (0, 2, 4)))
    return result


def traffic(op: str, case: str, dtype: torch.dtype = torch.float32) -> dict[str, Traffic]:
    """Traffic by kernel of one case of an op's cases.py, forward and backward."""
    module = importlib.import_module(f"leantune_kernels.{op}.cases")
    [chosen] = [c for c in module.CASES if c.name == case]
    with kernels("traced") as traced:
        inputs = chosen.make(torch.Generator().manual_seed(0), dtype)
        traced.lt_host_traffic_reset()
        testing.run(module.function, inputs, chosen)
        return read_traffic(traced)


def moved(op: str, case: str, dtype: torch.dtype = torch.float32) -> Bytes:
    """What memory sees of one case, forward and backward, all kernels together: each byte once a launch."""
    return _total(traffic(op, case, dtype))


def total(traced: ctypes.CDLL) -> Bytes:
    """The same of all kernels that ran since lt_host_traffic_reset()."""
    return _total(read_traffic(traced))


def _total(by_kernel: dict[str, Traffic]) -> Bytes:
    each = [found.per_launch for found in by_kernel.values()]
    return Bytes(sum(b.loaded for b in each), sum(b.stored for b in each))
