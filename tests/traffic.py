"""Bytes that kernels move over the compulsory ones; `python tests/traffic.py` writes the table of docs/kernels.md.

Each op's TRAFFIC case runs forward and backward, in Triton's interpreter (what a small cache lets through, see
triton_interpreter.Traffic) and on the CUDA emulator (each byte once a launch; and all that threads ask for).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    import triton_interpreter

    triton_interpreter.install()

import leantune_kernels
from leantune_kernels import testing

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
DTYPES = (torch.float32, torch.bfloat16)
START, END = "<!-- traffic -->", "<!-- /traffic -->"


@dataclass(frozen=True)
class Ratio:
    """Bytes moved over the floor, forward and backward (None where the op has no such pass)."""

    forward: float
    backward: float | None


def cases_of(op: str) -> Any:
    return importlib.import_module(f"leantune_kernels.{op}.cases")


def memory_bound(implementation: str) -> list[tuple[str, torch.dtype]]:
    """(op, dtype) of the ops whose traffic is limited."""
    found = []
    for op in leantune_kernels.ops():
        cases = cases_of(op)
        if find_spec(f"leantune_kernels.{op}.{implementation}") and cases.MEMORY_BOUND:
            found += [(op, dtype) for dtype in getattr(cases, "DTYPES", DTYPES) if dtype in DTYPES]
    return found


def measured(op: str, dtype: torch.dtype, count: Callable[[Callable[[], Any]], int]) -> Ratio:
    """The op's TRAFFIC case under the implementation that is forced; `count` runs a call and says what it moved."""
    cases = cases_of(op)
    case = cases.TRAFFIC
    inputs = case.make(torch.Generator().manual_seed(0), dtype)
    given = testing.prepare(inputs, case)
    floor, results = cases.floor(**inputs), []
    forward = count(lambda: results.append(cases.function(**given))) / floor.forward_bytes
    if not case.differentiable:
        return Ratio(forward, None)
    outputs = results[0] if isinstance(results[0], tuple) else (results[0],)
    wanted, upstream = [given[k] for k in case.differentiable], [torch.ones_like(o) for o in outputs]
    backward = count(lambda: torch.autograd.grad(outputs, wanted, upstream))
    # An op whose forward pass leaves finished gradients only scales them in backward.
    return Ratio(forward, backward / floor.backward_bytes if floor.backward_bytes else None)


def by_triton(call: Callable[[], Any]) -> int:
    import triton_interpreter

    with triton_interpreter.counted() as traffic:
        call()
    return traffic.loaded + traffic.stored


def by_cuda(traced: Any, level: str = "per_launch") -> Callable[[Callable[[], Any]], int]:
    """`level`: "per_launch" or "requested", see cuda_host.host.Traffic. Inside host.kernels("traced")."""
    from cuda_host import host

    def count(call: Callable[[], Any]) -> int:
        traced.lt_host_traffic_reset()
        call()
        each = [getattr(traffic, level) for traffic in host.read_traffic(traced).values()]
        return sum(b.loaded + b.stored for b in each)

    return count


def words(ratio: Ratio) -> str:
    return f"{ratio.forward:.2f}" + ("" if ratio.backward is None else f" / {ratio.backward:.2f}")


def table() -> str:
    import os

    from cuda_host import host

    lines = ["| op | dtype | Triton | CUDA | CUDA, all requests |", "| --- | --- | ---: | ---: | ---: |"]
    for op, dtype in memory_bound("triton_impl"):
        os.environ["LEANTUNE_IMPL"] = "triton"
        cells = [words(measured(op, dtype, by_triton))]
        with host.kernels("traced") as traced:
            cells += [words(measured(op, dtype, by_cuda(traced, level))) for level in ("per_launch", "requested")]
        lines.append(f"| {op} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.exit(main())
