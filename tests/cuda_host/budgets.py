"""The two comments above each CUDA kernel in csrc/<op>/cuda.cu: what it may use, and what its machine code must have.

    // budget: 64 registers, 4 KiB shared, 72 KiB dynamic
    // claims: LDG.128 HMMA

At most so many registers and so much static shared memory; test_cuda_build.py compares them with the machine code.
Dynamic shared memory, none where the comment names none, is not in it: the emulator fails a launch that asks for more.
"all dynamic" is of a kernel that keeps as much there as the device allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cuda_host.build import CSRC

SIZE = r"([\d.]+) ?(KiB|bytes|)"
BUDGET = re.compile(rf"(\d+) registers, {SIZE} shared(?:, (?:(all)|{SIZE}) dynamic)?")


def _bytes(size: str, unit: str) -> int:
    return int(float(size) * (1024 if unit == "KiB" else 1))


@dataclass(frozen=True)
class Kernel:
    name: str
    budget: str  # empty where there is none
    claims: tuple[str, ...]

    @property
    def registers(self) -> int:
        return int(self._found()[1])

    @property
    def shared(self) -> int:
        return _bytes(self._found()[2], self._found()[3])

    @property
    def dynamic(self) -> int | None:
        """Bytes; None where the device is the limit."""
        found = self._found()
        return None if found[4] else _bytes(found[5] or "0", found[6] or "")

    def _found(self) -> re.Match[str]:
        found = BUDGET.fullmatch(self.budget)
        if found is None:
            raise ValueError(
                f"{self.name} needs a comment '// budget: 64 registers, 4 KiB shared' above it, not {self.budget!r}"
            )
        return found


def kernels_of(source: str) -> Iterator[Kernel]:
    """Each __global__ function, with the comments between it and what stands before."""
    for found in re.finditer(r"__global__", source):
        before = re.split(r"[;}]\s*\n", source[: found.start()])[-1]
        budget = re.search(r"// budget: (.*\S)", before)
        claims = re.search(r"// claims: (.*\S)", before)
        name = re.search(r"(\w+) ?\(", re.sub(r"__launch_bounds__\([^)]*\)", "", source[found.end() :]))
        assert name is not None
        yield Kernel(name[1], budget[1] if budget else "", tuple(claims[1].split()) if claims else ())


KERNELS = [kernel for path in sorted(CSRC.glob("*/cuda.cu")) for kernel in kernels_of(path.read_text())]
