"""Builds csrc/*/cuda.cu, unmodified, for the host: `python tests/cuda_host/build.py [flavour ...]`.

Flavours: `plain` is fast; `sanitized` runs under AddressSanitizer and UndefinedBehaviorSanitizer, for which libasan
must be loaded before Python (see host.py); `traced` reports every memory access to runtime/trace.cpp, which finds races
and counts traffic. The result is build/cuda_host/<flavour>/libleantune_cuda_host.so; only what has changed is compiled.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda_host"

# -march=native for fused multiply-add, which nvcc contracts to as well. Device code may look at one object through
# pointers of several types. Kernels are told apart by their addresses, so equal ones must not be merged.
COMMON = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-march=native", "-ffp-contract=fast"]
COMMON += ["-fno-math-errno", "-fno-strict-aliasing", "-fno-ipa-icf", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
COMMON += ["-DLT_CUDA_HOST", f"-I{HERE / 'include'}", f"-I{CSRC / 'include'}", f"-I{CSRC / 'common'}"]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
TRACE = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]  # the calls, not the library behind them

# flavour: (flags of the kernels, flags of the runtime, flags of the link)
FLAVOURS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], ["-Wl,-z,defs"]),
    "sanitized": (SANITIZE, ["-fsanitize=address"], SANITIZE),
    "traced": (["-DLT_HOST_TRACED", *TRACE], ["-DLT_HOST_TRACED"], ["-Wl,-z,defs"]),
}


def build(flavour: str, sources: Iterable[Path] | None = None, name: str = "leantune_cuda_host") -> Path:
    """Path of lib<name>.so with the kernels of `sources` (all of csrc by default) in one flavour, built if need be.

    RuntimeError with the compiler's words if a source does not compile.
    """
    kernel_flags, runtime_flags, link_flags = FLAVOURS[flavour]
    kernels = sorted(CSRC.glob("*/cuda.cu")) if sources is None else list(sources)
    folder = OUTPUT / flavour
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.rglob("*.h"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)
    compiler = os.environ.get("CXX", "g++")

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        target = folder / ("_".join(source.relative_to(ROOT).with_suffix("").parts) + ".o")
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            _run([compiler, *COMMON, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = [(path, kernel_flags) for path in kernels]
        runtime = sorted((HERE / "runtime").glob("*.cpp"))
        jobs += [(path, runtime_flags) for path in runtime if path.stem != "trace" or flavour == "traced"]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            objects = list(workers.map(compile_one, jobs))
        library = folder / f"lib{name}.so"
        linked_from = folder / f"{name}.objects"  # a source that is gone must vanish from the library too
        listing = "\n".join(map(str, objects))
        unchanged = library.exists() and linked_from.exists() and linked_from.read_text() == listing
        if not unchanged or library.stat().st_mtime < max(path.stat().st_mtime for path in objects):
            new = folder / f"lib{name}.{os.getpid()}.so"
            _run([compiler, "-shared", *link_flags, "-Wl,-Bsymbolic", *map(str, objects), "-o", str(new), "-ldl"])
            new.rename(library)  # a process that has the old one open keeps it
            linked_from.write_text(listing)
    return library


def sanitizer_environment() -> dict[str, str]:
    """What must be in the environment of a process, before it starts, that loads the sanitized flavour."""
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    sys.stderr.write(result.stderr)


if __name__ == "__main__":
    for each in sys.argv[1:] or FLAVOURS:
        print(build(each))
