"""Forcing one implementation of an op in a test: C++ at a level, Triton interpreted, CUDA emulated."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from cuda_host import host
from leantune_kernels.cpu import lib

LEVELS = ["base", "avx2", "avx512"]
IMPLEMENTATIONS = [*(f"cpu:{level}" for level in LEVELS), "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def forced(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op runs by `name`, one of IMPLEMENTATIONS or "reference", on the memory of the cpu; skips what cannot."""
    implementation, _, level = name.partition(":")
    if implementation in ("cuda", "triton") and torch.cuda.is_available():
        pytest.skip("tensors of the cpu run on neither where there is a device")
    if implementation == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if implementation == "cuda":
        with host.kernels("plain"):
            yield
        return
    before = lib.isa()
    if level and LEVELS.index(level) > LEVELS.index(before):
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("LEANTUNE_IMPL", implementation)
    lib.set_isa(level or before)
    yield
    lib.set_isa(before)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal element by element, NaN like NaN."""
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, -1e30), torch.nan_to_num(b, -1e30))
