"""The implementations that an op's own tests run against."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch


@contextmanager
def forced(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call inside goes to implementation `name`; "cpu:avx2" names an instruction level too.

    Triton runs in its interpreter and CUDA on the emulator. Skips what cannot run here.
    """
    from leantune_kernels.cpu import lib

    name, _, level = name.partition(":")
    if name in ("triton", "cuda") and (torch.cuda.is_available() or not find_spec("triton")):
        pytest.skip("Triton's interpreter and the CUDA emulator are for machines without a GPU")
    if name == "cuda":
        from cuda_host import host

        with host.kernels("plain"):
            yield
        return
    monkeypatch.setenv("LEANTUNE_IMPL", name)
    before = lib.isa()
    if level:
        try:
            lib.set_isa(level)
        except ValueError as beyond:
            pytest.skip(str(beyond))
    yield
    lib.set_isa(before)
