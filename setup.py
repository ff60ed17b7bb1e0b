"""Builds the native parts of `leantune_kernels`: g++ is enough, the CUDA library is built where nvcc is present.

- libleantune_kernels.so: the kernels behind the C interface of csrc/include/leantune_kernels.h, without Python. Every
  csrc/<op>/cpu.cpp is compiled once per instruction level; the base build carries the entry points that choose
  between them at run time, so that one library serves any x86-64 machine. Nothing links an OpenMP runtime (see
  csrc/common/parallel.h).
- _native: Python's view of it (csrc/bindings.cpp), linked to the library beside it, so that a process has one copy.
- libleantune_kernels_cuda.so: csrc/*/cuda.cu for sm_80, sm_90 and sm_100, and PTX for what comes after; opened at run
  time, left out without nvcc.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")

# fp-contract lets a*b+c become one fused operation; none of the flags reorders sums or assumes away NaN.
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
COMMON += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-semantic-interposition"]
LEVELS = {"base": ["-march=x86-64", "-DLT_ENTRY_POINTS"] if X86 else ["-DLT_ENTRY_POINTS"]}
if X86:
    LEVELS["avx2"] = ["-march=x86-64-v3"]
    LEVELS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
EXPORTS = CSRC / "common" / "exports.map"

CUDA_ARCHITECTURES = ("80", "90", "100")
CUDA = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--cudart", "static"]
CUDA += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
NEWEST = f"compute_{CUDA_ARCHITECTURES[-1]}"
CUDA += [f"-gencode=arch={NEWEST},code={NEWEST}"]  # PTX, which newer cards compile for themselves
CUDA_JOBS = 2  # nvcc takes up to 2 GB for a source


class BuildPython(build_py):
    """Ships the C interface inside the package; an editable install has it in csrc/include."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree(str(CSRC / "include"), str(Path(self.build_lib) / "leantune_kernels" / "include"))


class BuildKernels(build_ext):
    """One object per (source, instruction level), compiled side by side and only where something changed."""

    def get_ext_filename(self, fullname: str) -> str:
        folder, _, name = fullname.rpartition(".")
        if name.startswith("lib"):  # a library for any program, not a module of this version of Python
            return str(Path(*folder.split("."), f"{name}.so"))
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self.objects = Path(self.build_temp) / "leantune"
        (self.objects / "cuda").mkdir(parents=True, exist_ok=True)
        build = {"libleantune_kernels": self.build_library, "_native": self.build_bindings}
        build.get(ext.name.rpartition(".")[2], self.build_cuda)(output)

    def build_library(self, output: Path) -> None:
        jobs = [(CSRC / "common" / "runtime.cpp", self.objects / "runtime.o", self.cpp())]
        for source in sorted(CSRC.glob("*/cpu.cpp")):
            for level, flags in LEVELS.items():
                target = self.objects / f"{source.parent.name}.{level}.o"
                jobs.append((source, target, self.cpp(f"-DLT_ISA={level}", *flags)))
        objects = self.compile(jobs, CSRC.rglob("*.h"), os.cpu_count())
        options = ["-ldl", "-pthread", "-Wl,-s", f"-Wl,--version-script={EXPORTS}", f"-Wl,-soname,{output.name}"]
        self.run_compiler([self.compiler_name(), "-shared", *objects, "-o", str(output), *options])

    def build_bindings(self, output: Path) -> None:
        import pybind11

        python = [f"-I{folder}" for folder in (pybind11.get_include(), *self.compiler.include_dirs)]
        jobs = [(CSRC / "bindings.cpp", self.objects / "bindings.o", self.cpp(*python))]
        objects = self.compile(jobs, CSRC.rglob("*.h"), 1)
        beside = [f"-L{output.parent}", "-lleantune_kernels", "-Wl,-rpath,$ORIGIN"]
        self.run_compiler([self.compiler_name(), "-shared", *objects, "-o", str(output), *beside, "-ldl", "-Wl,-s"])

    def build_cuda(self, output: Path) -> None:
        """Compiles csrc/*/cuda.cu into one shared library with a C interface, or says why it was left out."""
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        if nvcc is None or os.environ.get("LEANTUNE_CUDA") == "0":
            reason = "LEANTUNE_CUDA=0" if nvcc else "nvcc was not found; set NVCC or PATH to build them"
            self.announce(f"leantune: CUDA kernels left out ({reason}); the C++ kernels are complete without them", 4)
            for stale in (output, ROOT / "kernels" / "leantune_kernels" / output.name):
                stale.unlink(missing_ok=True)  # an earlier build's: its functions may not be those of the header
            return
        jobs = []
        for source in sorted(CSRC.glob("*/cuda.cu")):
            command = [nvcc, *CUDA, f"-I{CSRC / 'include'}"]
            jobs.append((source, self.objects / "cuda" / f"{source.parent.name}.o", command))
        headers = [*CSRC.rglob("*.cuh"), *(CSRC / "common").glob("*.h"), *(CSRC / "include").glob("*.h")]
        objects = self.compile(jobs, headers, CUDA_JOBS)
        options = ["-Xlinker", f"--version-script={EXPORTS}", "-Xlinker", f"-soname={output.name}"]
        self.run_compiler([nvcc, "-shared", *CUDA, *objects, "-o", str(output), *options])

    def cpp(self, *flags: str) -> list[str]:
        """The command that compiles a C++ source."""
        x86 = ["-DLT_X86"] if X86 else []
        return [self.compiler_name(), *COMMON, *x86, f"-I{CSRC / 'include'}", f"-I{CSRC / 'common'}", *flags]

    def compiler_name(self) -> str:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise SystemExit(f"leantune needs a C++17 compiler and found no '{compiler}'; install g++ or set CXX")
        return compiler

    def compile(
        self, jobs: list[tuple[Path, Path, list[str]]], headers: Iterable[Path], workers: int | None
    ) -> list[str]:
        """Objects of (source, object, command), made anew where older than source, headers or this file."""
        newest = max(p.stat().st_mtime for p in [*headers, Path(__file__)])

        def build(job: tuple[Path, Path, list[str]]) -> str:
            source, target, command = job
            if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest):
                self.run_compiler([*command, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(build, jobs))

    def run_compiler(self, command: list[str]) -> None:
        self.announce(" ".join(command), 2)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        if result.stderr:
            self.announce(result.stderr, 3)


setup(
    # In this order: _native links the library.
    ext_modules=[
        Extension("leantune_kernels.libleantune_kernels", sources=[]),
        Extension("leantune_kernels._native", sources=[]),
        Extension("leantune_kernels.libleantune_kernels_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
