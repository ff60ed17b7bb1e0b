"""Forcing one implementation of an op in a test: C++ at a level, Triton interpreted, CUDA emulated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

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
    try:
        yield
    finally:
        lib.set_isa(before)


def each_of(*names: str, autouse: bool = False) -> Any:
    """A fixture for a test file, `implementation = each_of(...)`: tests run under each of these, seeded with 0."""

    @pytest.fixture(params=names, autouse=autouse)
    def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch, forced(request.param, patch):
            yield request.param

    return implementation


def by_reference(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns when every op runs by its reference."""
    with pytest.MonkeyPatch.context() as patch, forced("reference", patch):
        return function(*arguments)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal element by element, NaN like NaN."""
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, -1e30), torch.nan_to_num(b, -1e30))
