"""The CUDA library as PyTorch's client sees it: loaded when first asked for, on the stream that PyTorch uses.

setup.py builds it where nvcc is found. Its kernels are compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from leantune_kernels.native import DTYPE_CODES


@cache
def library() -> ctypes.CDLL | None:
    """The library, None where the package was built without nvcc."""
    built = sorted(Path(__file__).parent.glob("_cuda*.so"))
    if not built:
        return None
    loaded = ctypes.CDLL(str(built[0]))
    loaded.lt_cuda_error_string.restype = ctypes.c_char_p
    return loaded


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the CUDA kernels cannot take `x`, None if they can."""
    if library() is None:
        return "the package was built without nvcc"
    if x.device.type != "cuda":
        return f"device is {x.device.type}"
    if x.dtype not in DTYPE_CODES:
        return f"dtype is {x.dtype}, supported are float32, bfloat16, float16"
    return None


def call(name: str, *values: Any, device: torch.device) -> None:
    """Launches lt_cuda_<name> on PyTorch's current stream of `device`; RuntimeError carries CUDA's own words.

    Tensors are passed as pointers, None as null, ints as int64 (sizes, strides) unless wrapped in a ctypes type.
    """
    loaded = library()
    assert loaded is not None
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        status = getattr(loaded, f"lt_cuda_{name}")(*(_argument(v) for v in values), stream)
    if status:
        raise RuntimeError(f"{name} on {device}: {loaded.lt_cuda_error_string(status).decode()}")


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value
