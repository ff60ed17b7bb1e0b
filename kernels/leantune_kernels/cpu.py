"""The C++ library as PyTorch's client sees it: the loaded module, and how tensors become pointers.

PyTorch is imported first, so that the kernels borrow its OpenMP runtime and its number of threads.
"""

from __future__ import annotations

import torch

from leantune_kernels import _native
from leantune_kernels.checks import rows

__all__ = ["DTYPE_CODES", "OPENMP_RUNTIME", "address", "lib", "refuses", "rows"]

lib = _native

OPENMP_RUNTIME = lib.adopt_openmp()

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the C++ kernels cannot take `x`, None if they can."""
    if x.device.type != "cpu":
        return f"device is {x.device.type}, the C++ kernels run on cpu"
    if x.dtype not in DTYPE_CODES:
        return f"dtype is {x.dtype}, supported are float32, bfloat16, float16"
    return None


def address(x: torch.Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()
