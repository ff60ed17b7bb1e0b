"""Fine-tuning kernels: one public function an op, behind it a reference, C++, Triton and CUDA implementations.

`leantune_kernels.<op>` is the op's package: its differentiable function, and the raw `forward` and `backward` that
write into buffers the caller owns. Importing this package imports nothing else; an op is loaded when it is first named.
`leantune_kernels.native` takes NumPy, JAX and other arrays without PyTorch; `paths` is for programs in other languages.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Paths(NamedTuple):
    """Where the parts lie that programs in other languages use."""

    include: Path  # the folder of leantune_kernels.h
    library: Path  # libleantune_kernels.so: the kernels on the CPU, no Python
    cuda_library: Path | None  # libleantune_kernels_cuda.so; None where the package was built without nvcc


def paths() -> Paths:
    """The C header and libraries of this installation; for a Makefile `python -m leantune_kernels --cflags --libs`."""
    here = Path(__file__).parent
    include = here / "include"
    if not include.exists():  # an editable install
        include = here.parent.parent / "csrc" / "include"
    cuda = here / "libleantune_kernels_cuda.so"
    return Paths(include, here / "libleantune_kernels.so", cuda if cuda.exists() else None)


def ops() -> list[str]:
    """Names of all ops: the sub-packages of this one. Adding a folder adds an op."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_") and name in ops():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'; ops are {', '.join(ops())}")
