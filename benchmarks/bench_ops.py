"""Every op against PyTorch's own formulations, in one run.

    python benchmarks/bench_ops.py [--op rms_norm] [--markdown docs/benchmarks.md] [--json FILE]
    pytest benchmarks/bench_ops.py [--benchmark-json FILE]                             the same through pytest-benchmark

The shapes are the BENCHMARKS of each op's cases.py, the rivals its PEERS (on a GPU also `torch.compile` of the plain
formula, and what Liger Kernel has of the ops, where it is installed: device_peers.py). Contenders run in turns, so that
a machine that slows down slows all of them; a figure is the median. Bandwidth counts the op's compulsory bytes
(cases.floor), not what was moved, and is given beside what a plain copy reaches in the same run. Memory is the peak
above the inputs. On the CPU the process keeps the memory it frees while contenders race: else every large result of
either would first be page faults, which a training loop that reuses its buffers does not have, and which cost more than
most ops.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import device_peers
import pytest
import torch

import leantune_kernels
from leantune_kernels import testing
from leantune_kernels.dispatch import Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
SECONDS = float(os.environ.get("LEANTUNE_BENCH_SECONDS", "1.0"))  # for one group of contenders

MARKER = "<!-- table -->"  # of a page whose text above it is kept

Contenders = dict[str, Callable[[], Any]]
Group = tuple[str, str, torch.dtype, bool]  # op, shape, dtype, with backward


@dataclass
class Row:
    """One op at one shape: times in milliseconds, rates by the floor, memory in MB."""

    op: str
    shape: str
    direction: str  # "forward", "forward + backward" or "step"
    dtype: str
    implementation: str
    ours: float
    peers: dict[str, float]
    memory: float
    peer_memory: dict[str, float]
    gigabytes_per_second: float
    copy: float
    teraflops: float
    product: float

    @property
    def fastest(self) -> str:
        return min(self.peers, key=lambda name: self.peers[name])

    @property
    def ratio(self) -> float:
        """Time of the fastest peer over ours: above 1 where ours is faster."""
        return self.peers[self.fastest] / self.ours


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    synchronise()
    begin = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - begin


def race(contenders: Contenders, seconds: float = SECONDS) -> dict[str, float]:
    """Median seconds of each, run in turns for about `seconds` in all, at least five rounds and after a warm-up."""
    for function in contenders.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names, begin, rounds = list(contenders), time.perf_counter(), 0
    while rounds < 5 or (time.perf_counter() - begin < seconds and rounds < 200):
        for name in names if rounds % 2 == 0 else names[::-1]:
            times[name].append(timed(contenders[name]))
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc's malloc reuses freed blocks of any size or hands them back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc.mallopt(trim_threshold, -1 if keep else 128 << 10)
        libc.mallopt(mmap_max, 0 if keep else 65536)
        libc.malloc_trim(0)


def peak_memory(function: Callable[[], Any]) -> float:
    """MB that a call needs at its peak beyond what is held before it; not the first call, which also loads code."""
    function()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    keep_freed_memory(False)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """A line of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def yardsticks(bytes_moved: int, flop: int, dtype: torch.dtype) -> dict[str, tuple[float, Callable[[], Any]]]:
    """{name: (work of a call, thunk)}: a copy that moves as many bytes, a dense square product of as many operations.

    They race along, so that they see the same machine as the op. On a GPU they are large, for the card's own rates.
    """
    found: dict[str, tuple[float, Callable[[], Any]]] = {}
    if bytes_moved:
        numbers = max(bytes_moved // 8, 64 << 20 if DEVICE == "cuda" else 1)  # float32, read and written
        source, target = torch.ones(numbers, device=DEVICE), torch.empty(numbers, device=DEVICE)
        found["copy"] = 8.0 * numbers, lambda: target.copy_(source)
    if flop:
        n = 8192 if DEVICE == "cuda" else min(2048, max(64, round((flop / 2) ** (1 / 3))))
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        found["product"] = 2.0 * n**3, lambda: torch.mm(a, b, out=out)
    return found


def contenders(cases: Any, case: testing.Case, inputs: dict[str, Any], backward: bool) -> Contenders:
    """Thunks for ours and each peer on the same inputs; cases.py may make its own where a call changes its inputs."""
    op = cases.__name__.split(".")[1]
    if hasattr(cases, "contenders"):
        found: Contenders = cases.contenders(**inputs)
        if DEVICE == "cuda":
            found = found | device_peers.compiled(found) | device_peers.thunks(op, inputs)
        return found
    functions = {"leantune": cases.function, **cases.PEERS}
    if DEVICE == "cuda":
        functions["torch.compile"] = torch.compile(cases.plain, dynamic=False)
    found = {name: _thunk(function, case, inputs, backward) for name, function in functions.items()}
    if DEVICE == "cuda":
        for name, function in device_peers.functions(op, inputs).items():
            own = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            found[name] = _thunk(function, case, own, backward)
    return found


def _thunk(
    function: Callable[..., Any], case: testing.Case, inputs: dict[str, Any], backward: bool
) -> Callable[[], Any]:
    """A call, with its gradients where `backward` asks for them."""
    wanted = [inputs[name].requires_grad_(backward) for name in case.differentiable]
    if not backward:
        return lambda: function(**inputs)
    output = function(**inputs)
    upstream = [torch.randn_like(o) for o in (output if isinstance(output, tuple) else (output,))]
    return lambda: torch.autograd.grad(function(**inputs), wanted, upstream)


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def groups(only: list[str] | None = None) -> Iterator[Group]:
    """Everything to measure."""
    for op in only or leantune_kernels.ops():
        cases = importlib.import_module(f"leantune_kernels.{op}.cases")
        for shape, case in getattr(cases, "BENCHMARKS", {}).items():
            for dtype in DTYPES:
                for backward in (False, True) if case.differentiable else (False,):
                    yield op, shape, dtype, backward


def prepared(group: Group) -> tuple[testing.Case, testing.Floor, Contenders]:
    op, shape, dtype, backward = group
    cases = importlib.import_module(f"leantune_kernels.{op}.cases")
    case = cases.BENCHMARKS[shape]
    inputs = on_device(case.make(torch.Generator().manual_seed(0), dtype))
    return case, cases.floor(**inputs), contenders(cases, case, inputs, backward)


def memory_of(group: Group) -> dict[str, float]:
    """Peak MB of each contender. All groups' before any race: what a race leaves in the heap would blur them."""
    return {name: peak_memory(function) for name, function in prepared(group)[2].items()}


def measure(group: Group, memory: dict[str, float]) -> Row:
    op, shape, dtype, backward = group
    case, floor, racing = prepared(group)
    moved = floor.forward_bytes + (floor.backward_bytes if backward else 0)
    flop = floor.forward_flop + (floor.backward_flop if backward else 0)
    measures = yardsticks(moved, flop, dtype)
    keep_freed_memory(True)
    times = race(racing | {name: thunk for name, (_, thunk) in measures.items()})
    rates = {name: work / times.pop(name) for name, (work, _) in measures.items()}
    picked = Op(f"leantune_kernels.{op}").pick(torch.empty(0, device=DEVICE, dtype=dtype))
    ours = times.pop("leantune")
    return Row(
        op=op,
        shape=shape,
        direction="forward + backward" if backward else "forward" if case.differentiable else "step",
        dtype=str(dtype).removeprefix("torch."),
        implementation=picked.__name__.rpartition(".")[2],
        ours=1e3 * ours,
        peers={name: 1e3 * seconds for name, seconds in times.items()},
        memory=memory["leantune"],
        peer_memory={name: memory[name] for name in times},
        gigabytes_per_second=moved / ours / 1e9,
        copy=rates.get("copy", 0.0) / 1e9,
        teraflops=flop / ours / 1e12,
        product=rates.get("product", 0.0) / 1e12,
    )


def markdown(rows: list[Row]) -> str:
    """The table of docs/benchmarks.md; the peer is the fastest one."""
    lines = [
        "| op | shape | | ms | fastest peer | ms | speed-up | of copy | of product | MB | peer's MB |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        bandwidth = f"{r.gigabytes_per_second / r.copy:.2f}" if r.gigabytes_per_second else ""
        product = f"{r.teraflops / r.product:.2f}" if r.teraflops else ""
        peer = r.fastest
        lines.append(
            f"| {r.op} | {r.shape} {r.dtype} | {r.direction} | {r.ours:.2f} | {peer} | {r.peers[peer]:.2f} "
            f"| {r.ratio:.2f} | {bandwidth} | {product} | {r.memory:.0f} | {r.peer_memory[peer]:.0f} |"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("group", list(groups()), ids=str)
def test_op(benchmark: Any, group: Group) -> None:
    row = measure(group, memory_of(group))
    benchmark.extra_info.update(asdict(row), ratio=row.ratio)
    ours = prepared(group)[2]["leantune"]
    benchmark.pedantic(lambda: (ours(), synchronise()), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", help="only this op; may be given again")
    parser.add_argument("--markdown", type=Path, help="write the table here, below the page's marker")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    rows, memories = [], {group: memory_of(group) for group in groups(arguments.op)}
    for group, memory in memories.items():
        rows.append(measure(group, memory))
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.markdown:
        text = arguments.markdown.read_text() if arguments.markdown.exists() else MARKER
        arguments.markdown.write_text(text.partition(MARKER)[0] + MARKER + "\n" + markdown(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) | {"ratio": r.ratio} for r in rows], indent=1))


if __name__ == "__main__":
    sys.exit(main())
