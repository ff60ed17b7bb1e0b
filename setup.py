"""Builds `leantune_kernels._native` with the C++ compiler alone, and the CUDA library where nvcc is present.

Every csrc/<op>/cpu.cpp is compiled once per instruction level; the base build carries the entry points that choose
between them at run time, so that one wheel serves any x86-64 machine. Nothing links an OpenMP runtime (see
csrc/common/parallel.h). Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
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
CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildPython(build_py):
    """Ships the C interface inside the package; an editable install has it in csrc/include."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree(str(CSRC / "include"), str(Path(self.build_lib) / "leantune_kernels" / "include"))


class BuildKernels(build_ext):
    """One object per (source, instruction level), compiled side by side and only where something changed."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("_cuda"):
            self.build_cuda(output)
        else:
            self.build_native(output)

    def build_native(self, output: Path) -> None:
        import pybind11

        objects_dir = Path(self.build_temp) / "leantune"
        includes = [CSRC / "include", CSRC / "common"]
        python = [pybind11.get_include(), *self.compiler.include_dirs]
        jobs: list[tuple[Path, Path, list[str]]] = [
            (CSRC / "bindings.cpp", objects_dir / "bindings.o", [f"-I{d}" for d in python]),
            (CSRC / "common" / "runtime.cpp", objects_dir / "runtime.o", []),
        ]
        for source in sorted(CSRC.glob("*/cpu.cpp")):
            for level, flags in LEVELS.items():
                target = objects_dir / f"{source.parent.name}.{level}.o"
                jobs.append((source, target, [f"-DLT_ISA={level}", *flags]))
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise SystemExit(f"leantune needs a C++17 compiler and found no '{compiler}'; install g++ or set CXX")
        x86 = ["-DLT_X86"] if X86 else []
        common = [compiler, *COMMON, *x86, *(f"-I{d}" for d in includes)]
        objects_dir.mkdir(parents=True, exist_ok=True)
        headers = max(p.stat().st_mtime for p in [*CSRC.rglob("*.h"), Path(__file__)])

        def build(job: tuple[Path, Path, list[str]]) -> Path:
            source, target, flags = job
            if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, headers):
                self.run_compiler([*common, *flags, "-c", str(source), "-o", str(target)])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as workers:
            objects = [str(path) for path in workers.map(build, jobs)]
        self.run_compiler([compiler, "-shared", *objects, "-o", str(output), "-ldl", "-pthread", "-Wl,-s"])

    def build_cuda(self, output: Path) -> None:
        """Compiles csrc/*/cuda.cu into one shared library with a C interface, or says why it was left out."""
        sources = sorted(str(p) for p in CSRC.glob("*/cuda.cu"))
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        if nvcc is None or os.environ.get("LEANTUNE_CUDA") == "0":
            reason = "LEANTUNE_CUDA=0" if nvcc else "nvcc was not found"
            self.announce(f"leantune: CUDA kernels left out ({reason}); the C++ kernels are complete without them", 4)
            return
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        flags = [
            "-O3",
            "-std=c++17",
            "-shared",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "--cudart",
            "static",
        ]
        self.run_compiler([nvcc, *flags, *codes, f"-I{CSRC / 'include'}", *sources, "-o", str(output)])

    def run_compiler(self, command: list[str]) -> None:
        self.announce(" ".join(command), 2)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        if result.stderr:
            self.announce(result.stderr, 3)


setup(
    ext_modules=[
        Extension("leantune_kernels._native", sources=[]),
        Extension("leantune_kernels._cuda", sources=[], optional=True),  # not a Python module: loaded by address
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
