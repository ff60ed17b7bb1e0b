"""The emulated CUDA kernels under the ops' own dispatch: `with host.kernels("plain") as library: ...`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cuda_host.build import build


def library(flavour: str) -> Path:
    """The emulator's library with all kernels of csrc, built where a source is newer."""
    return build(flavour)


@contextmanager
def kernels(flavour: str) -> Iterator[ctypes.CDLL]:
    """Every op runs its CUDA kernels, on the memory of the cpu, inside the block. Yields the library."""
    from leantune_kernels import cuda

    path = library(flavour)
    before = (cuda._opened, cuda._device, os.environ.get("LEANTUNE_IMPL"))
    cuda.use_library(path, device="cpu")
    os.environ["LEANTUNE_IMPL"] = "cuda"
    try:
        yield ctypes.CDLL(str(path))
    finally:
        cuda._opened, cuda._device = before[:2]
        if before[0] is not None:
            cuda.use_library(before[0], before[1])
        if before[2] is None:
            del os.environ["LEANTUNE_IMPL"]
        else:
            os.environ["LEANTUNE_IMPL"] = before[2]
