"""Fine-tuning kernels: one public function an op, behind it a reference, C++, Triton and CUDA implementations.

`leantune_kernels.<op>` is the op's package: its differentiable function, and the raw `forward` and `backward` that
write into buffers the caller owns. Importing this package imports nothing else; an op is loaded when it is first named.
"""

import importlib
import pkgutil
from types import ModuleType


def ops() -> list[str]:
    """Names of all ops: the sub-packages of this one. Adding a folder adds an op."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_") and name in ops():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'; ops are {', '.join(ops())}")
