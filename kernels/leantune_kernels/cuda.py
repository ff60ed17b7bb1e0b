"""The CUDA library as PyTorch's client sees it: loaded when first asked for, on the stream that PyTorch uses.

setup.py builds it where nvcc is found. Its kernels are compiled for sm_80, sm_90 and sm_100; newer cards compile the
PTX that comes with them when they first meet it. `lib` has its functions, which take addresses and numbers and end with
the stream: `with cuda.stream(x) as s: lib.rope(..., s)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import leantune_kernels
from leantune_kernels import cpu
from leantune_kernels.checks import rows
from leantune_kernels.cpu import DTYPE_CODES, address

__all__ = ["DTYPE_CODES", "address", "lacks_shared", "lib", "library", "refuses", "rows", "stream", "use_library"]

lib = cpu.lib.cuda

OLDEST = (8, 0)  # compute capability that the library has code for

_opened: Path | None = None
_device = "cuda"  # the type of device whose memory the library works on


def library() -> Path | None:
    """The library's file, opened; None where the package was built without nvcc."""
    if _opened is None:
        built = leantune_kernels.paths().cuda_library
        if built is not None:
            use_library(built)
    return _opened


def use_library(path: Path, device: str = "cuda") -> None:
    """Takes the kernels from another build of csrc/*/cuda.cu, such as one that runs on the host's memory ("cpu").

    Raises RuntimeError with the loader's words if it cannot be opened.
    """
    global _opened, _device
    lib.open_library(str(path))
    _opened, _device = path, device


def refuses(x: torch.Tensor) -> str | None:
    """The reason why the CUDA kernels cannot take `x`, None if they can."""
    if library() is None:
        return "the package was built without nvcc"
    if x.device.type != _device:
        return f"device is {x.device.type}"
    if x.dtype not in DTYPE_CODES:
        return f"dtype is {x.dtype}, supported are float32, bfloat16, float16"
    if x.device.type == "cuda":
        capability = torch.cuda.get_device_capability(x.device)
        if capability < OLDEST:
            return "compute capability is {}.{}, the kernels need {}.{} or newer".format(*capability, *OLDEST)
    return None


def lacks_shared(x: torch.Tensor, needed: int) -> str | None:
    """The reason why a kernel whose blocks use so many bytes of shared memory cannot run on x's device, None if it can.

    By compute capability, as CUDA's programming guide has it: 99 KiB on 8.6, 8.9 and 12.x, 163 KiB or more on others.
    """
    if x.device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    most = (99 if major == 12 or (major, minor) in ((8, 6), (8, 9)) else 163) << 10
    if needed <= most:
        return None
    return f"a block needs {needed} bytes of shared memory, compute capability {major}.{minor} has {most}"


@contextmanager
def stream(x: torch.Tensor) -> Iterator[int]:
    """Handle of the stream that PyTorch uses on x's device, which is the current device meanwhile."""
    if x.device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream
