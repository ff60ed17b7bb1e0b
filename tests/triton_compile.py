"""Compiles every Triton kernel, as the cases launch it, to machine code; needs no GPU.

    python tests/triton_compile.py [--op NAME] [--jobs 2] [--json FILE]

The cases run with launches recorded instead of made: their arguments give the signatures, constants and options that a
device would see, every autotune configuration included. Of the variants of a kernel that differ in block sizes alone,
two are compiled for sm_90 and one for sm_80 and sm_100, which keeps this within minutes. One line a kernel. Where
cases.py has `of_length(n)`, its launches at several lengths are compared: none may need a compilation of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ["LEANTUNE_IMPL"] = "triton"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import autotuner, jit

import leantune_kernels
from leantune_kernels import testing, triton_runtime

TARGETS = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = {80: 1, 90: 2, 100: 1}
LENGTHS = (64, 65, 1, 7, 130)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Launch:
    """What a launch would compile."""

    op: str
    kernel: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    fn: Any = field(repr=False)

    def family(self) -> tuple[Any, ...]:
        """Launches alike but for integer constants, which are block sizes."""
        fixed = {k: v for k, v in self.constants.items() if isinstance(v, bool) or not isinstance(v, int)}
        return self.op, self.kernel, str(self.signature), str(fixed)

    def key(self) -> str:
        return repr((self.family(), self.constants, self.attributes, self.options.get("num_warps")))


recorded: dict[str, Launch] = {}
current_op = ""


@cache
def backend() -> Any:
    return make_backend(GPUTarget("cuda", 90, 32))


def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of JITFunction.run: remembers what would be compiled, launches nothing."""
    binder = jit.create_function_from_signature(self.signature, self.params, backend())
    kwargs.setdefault("debug", False)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = self._pack_args(backend(), kwargs, bound, specialization, options)
    launch = Launch(current_op, self.__name__, signature, constants, attributes, options.__dict__, self)
    recorded.setdefault(launch.key(), launch)


def record_all_configurations(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of Autotuner.run: every configuration is launched, so recorded."""
    for config in self.configs:
        self.fn.run(*args, **{**kwargs, **config.all_kwargs()})


def launches(op: str) -> list[Launch]:
    """Runs the cases of `op` forward and backward, on memory that holds zeros where a kernel would have written."""
    global current_op
    current_op = op
    cases = importlib.import_module(f"leantune_kernels.{op}.cases")
    for dtype in getattr(cases, "DTYPES", DTYPES):
        if dtype not in DTYPES:
            continue
        for case in cases.CASES:
            testing.run(cases.function, case.make(torch.Generator().manual_seed(0), dtype), case)
    return [launch for launch in recorded.values() if launch.op == op]


def added_by_length(op: str) -> list[str]:
    """Kernels whose launches at some of LENGTHS would be compiled anew though they ran at the first."""
    cases = importlib.import_module(f"leantune_kernels.{op}.cases")
    if not hasattr(cases, "of_length"):
        return []
    before = dict(recorded)
    recorded.clear()
    first: set[str] = set()
    for length in LENGTHS:
        case = cases.of_length(length)
        dtype = getattr(cases, "DTYPES", DTYPES)[0]
        testing.run(cases.function, case.make(torch.Generator().manual_seed(0), dtype), case)
        first = first or set(recorded)
    added = sorted({recorded[key].kernel for key in set(recorded) - first})
    recorded.clear()
    recorded.update(before)
    return added


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory a thread uses, spilled registers among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", listing.stdout))


def chosen(found: list[Launch], target: int) -> list[Launch]:
    families: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in found:
        families.setdefault(launch.family(), []).append(launch)
    picked = []
    for group in families.values():
        group.sort(key=lambda launch: sum(v for v in launch.constants.values() if isinstance(v, int)))
        picked += group[-1:] + (group[:1] if VARIANTS[target] > 1 and len(group) > 1 else [])
    return picked


def compile_one(job: tuple[str, str, int]) -> dict[str, Any]:
    """In a worker: records the op's launches (once) and compiles one of them."""
    op, key, target = job
    prepare()
    if not any(launch.op == op for launch in recorded.values()):
        launches(op)
    launch = recorded[key]
    begin = time.perf_counter()
    source = ASTSource(launch.fn, launch.signature, launch.constants, launch.attributes)
    options = {k: v for k, v in launch.options.items() if k not in ("arch", "backend_name", "ptx_version")}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        failure, size, stack = None, len(compiled.asm["cubin"]), stack_bytes(compiled.asm["cubin"])
    except Exception as error:  # reported; it fails the test
        failure, size, stack = f"{type(error).__name__}: {error}"[-2000:], 0, 0
    seconds = time.perf_counter() - begin
    return {
        "op": op,
        "kernel": launch.kernel,
        "sm": target,
        "bytes": size,
        "stack": stack,
        "constants": str({launch.fn.arg_names[i]: v for (i, *_), v in launch.constants.items()}),
        "seconds": seconds,
        "error": failure,
    }


def prepare() -> None:
    """Takes the place of the device: launches are recorded, tensors of the cpu are accepted."""
    jit.JITFunction.run = record
    autotuner.Autotuner.run = record_all_configurations
    triton_runtime.refuses = lambda x: None  # before the kernels import it
    torch.use_deterministic_algorithms(False)
    torch.empty = torch.zeros  # type: ignore[assignment]
    torch.empty_like = torch.zeros_like


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json")
    arguments = parser.parse_args()
    prepare()
    jobs, added = [], {}
    for op in arguments.op or leantune_kernels.ops():
        if importlib.util.find_spec(f"leantune_kernels.{op}.triton_impl"):
            added[op] = added_by_length(op)
            found = launches(op)
            jobs += [(op, launch.key(), target) for target in TARGETS for launch in chosen(found, target)]
    with ProcessPoolExecutor(arguments.jobs) as workers:
        results = list(workers.map(compile_one, jobs))
    for r in results:
        outcome = r["error"] or f"{r['bytes']} bytes, stack {r['stack']}, {r['seconds']:.1f} s {r['constants']}"
        print(f"{r['op']}.{r['kernel']} sm_{r['sm']}: {outcome}")
    for op, kernels in added.items():
        if kernels:
            print(f"{op}: a new length compiles {', '.join(kernels)} again")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"compiled": results, "added_by_length": added}, file)
    return int(any(r["error"] for r in results) or any(added.values()))


if __name__ == "__main__":
    sys.exit(main())
