"""The native library as it was built: levels kept apart, no OpenMP of its own, forcing, threads, errors."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import leantune_kernels
from leantune_kernels import _native

ROOT = Path(__file__).parent.parent.parent
OBJECTS = sorted(ROOT.glob("build/temp*/leantune/*.o"))


# Rows of RMSNorm through the raw interface, 20 times, in a process that need not load torch; r() returns a hash.
RMS_NORM = """
import array, hashlib, os, sys
from leantune_kernels import _native as lib
rows, cols = 500, 48
x = array.array('f', [(i * 37 % 101) / 50 - 1 for i in range(rows * cols)])
w = array.array('f', [1 + i / cols for i in range(cols)])
y, s = array.array('f', bytes(4 * rows * cols)), array.array('f', bytes(4 * rows))
a = lambda v: v.buffer_info()[0]
def r():
    for _ in range(20):
        lib.rms_norm_forward(0, a(x), cols, 0, a(w), a(y), cols, a(s), rows, cols, 1e-5)
    return hashlib.sha256(y.tobytes() + s.tobytes()).hexdigest()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    """Objects of the kernels, <op>.<level>.o: the build's, or where its folder is gone those of the smallest op."""
    if shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    built = [p for p in OBJECTS if p.stem.count(".")]
    if built:
        return built
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the build folder is gone and there is no {compiler}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: None)
        build = runpy.run_path(str(ROOT / "setup.py"))
    folder, csrc = tmp_path_factory.mktemp("objects"), build["CSRC"]
    source = min(csrc.glob("*/cpu.cpp"), key=lambda path: path.stat().st_size)
    flags = [*build["COMMON"], f"-I{csrc / 'include'}", f"-I{csrc / 'common'}", *(["-DLT_X86"] if build["X86"] else [])]
    compiled = []
    for level, own in build["LEVELS"].items():
        compiled.append(folder / f"{source.parent.name}.{level}.o")
        subprocess.run([compiler, *flags, f"-DLT_ISA={level}", *own, "-c", source, "-o", compiled[-1]], check=True)
    return compiled


def test_no_symbol_is_shared_between_instruction_levels(objects):
    """A symbol that two levels define is merged by the linker, perhaps into code the processor cannot run."""
    for path in objects:
        level = path.stem.rpartition(".")[2]
        listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
        assert f"lt::{level}::" in listing.stdout
        for line in listing.stdout.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind.islower() and kind not in "vwu":
                continue  # local to the object
            entry_point = level == "base" and name.startswith("lt_")
            assert f"lt::{level}::" in name or entry_point, f"{path.name}: {kind} {name}"


def dynamic(path: Path | str) -> list[str]:
    """Names of the libraries that `path` needs."""
    if shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")
    listing = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return [line.split("[")[1].rstrip("]") for line in listing.splitlines() if "NEEDED" in line]


def test_the_library_links_no_openmp_runtime_and_no_python():
    needed = dynamic(leantune_kernels.paths().library)
    assert needed and not [name for name in needed if "omp" in name or "python" in name]


def test_the_module_uses_the_library_beside_it():
    assert "libleantune_kernels.so" in dynamic(_native.__file__)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libleantune_k" in line}
    assert {path for path in loaded if not path.endswith("_cuda.so")} == {str(leantune_kernels.paths().library)}


def libraries() -> list[Path]:
    here = leantune_kernels.paths()
    return [path for path in (here.library, here.cuda_library) if path is not None]


@pytest.mark.parametrize("path", libraries(), ids=lambda path: path.name)
def test_the_libraries_export_the_functions_of_the_header_alone(path):
    if shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    listing = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in listing.splitlines()}
    header = (leantune_kernels.paths().include / "leantune_kernels.h").read_text()
    declared = set(re.findall(r"^LT_API .*?\b(lt_\w+)\(", header, re.MULTILINE))
    on_cuda = {name for name in declared if name.startswith("lt_cuda_")}
    assert exported == (on_cuda if path.stem.endswith("_cuda") else declared - on_cuda)


def test_paths_are_printed_for_makefiles():
    command = [sys.executable, "-m", "leantune_kernels", "--cflags", "--libs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    flags = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    include, folder, rpath, library = flags
    assert (Path(include.removeprefix("-I")) / "leantune_kernels.h").exists()
    assert (Path(folder.removeprefix("-L")) / "libleantune_kernels.so").exists()
    assert rpath == f"-Wl,-rpath,{folder.removeprefix('-L')}" and library == "-lleantune_kernels"


def test_with_pytorch_its_openmp_runtime_is_used():
    from leantune_kernels.cpu import OPENMP_RUNTIME

    assert "omp" in Path(OPENMP_RUNTIME).name
    loaded = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    runtimes = {name for name in loaded if name.startswith(("libgomp", "libiomp5", "libomp."))}
    assert len(runtimes) == 1, runtimes


def test_without_pytorch_a_pool_of_its_own_gives_the_same_bits():
    code = "runtime = lib.adopt_openmp()\nlib.set_num_threads(3)\nprint(bool(runtime), 'torch' in sys.modules, r())\n"
    alone, beside = run(RMS_NORM + code), run("import torch\n" + RMS_NORM + code)
    assert alone.returncode == 0 and beside.returncode == 0, alone.stderr + beside.stderr
    assert alone.stdout.split()[:2] == ["False", "False"]
    assert beside.stdout.split()[:2] == ["True", "True"]
    assert alone.stdout.split()[2] == beside.stdout.split()[2]


def test_a_forked_child_makes_a_pool_of_its_own():
    """fork leaves the pool's threads behind; the child must not wait for them."""
    code = (
        "import signal\n"
        "lib.set_num_threads(3)\n"
        "first = r()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    os._exit(0 if r() == first and len(os.listdir('/proc/self/task')) == 3 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), r() == first)\n"
    )
    result = run(RMS_NORM + code)
    assert result.stdout.split() == ["0", "True"], result.stderr


def test_where_no_thread_can_be_started_the_kernel_runs_without():
    """There is no address space left for a thread's stack."""
    code = (
        "import resource\n"
        "lib.set_num_threads(1)\n"
        "alone = r()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)\n"
        "lib.set_num_threads(3)\n"
        "print(r() == alone, len(os.listdir('/proc/self/task')))\n"
    )
    result = run(RMS_NORM + code)
    assert result.stdout.split() == ["True", "1"], result.stderr


def test_pytorchs_own_openmp_runtime_is_used_where_another_was_loaded_first(tmp_path):
    """As with scikit-learn's wheel, which brings a renamed libgomp."""
    import torch

    own = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not own.exists():
        pytest.skip("this build of PyTorch brings no libgomp.so.1")
    other = tmp_path / "libgomp-abc.so.1"
    other.write_bytes(own.read_bytes().replace(b"libgomp.so.1\0", b"libgomp-a.so\0"))  # its soname, too
    code = (
        f"import ctypes\nctypes.CDLL({str(other)!r})\n"
        "from leantune_kernels import _native\n"
        "{first}\n"
        "import leantune_kernels.cpu as native\n"
        "print(native.OPENMP_RUNTIME)\n"
    )
    result = run(code.format(first=""))
    assert result.stdout.strip() and Path(result.stdout.strip()).samefile(own), result.stdout + result.stderr
    alone = run(code.partition("{first}")[0] + "print(_native.adopt_openmp())")
    assert alone.stdout.strip() == str(other), alone.stderr


def test_an_instruction_level_can_be_forced():
    code = "import leantune_kernels.cpu as n; print(n.lib.isa())"
    assert run(code, LEANTUNE_ISA="base").stdout.strip() == "base"
    assert run(code, LEANTUNE_ISA=" base ").stdout.strip() == "base"
    refused = run(code, LEANTUNE_ISA="sse9")
    assert refused.returncode and "LEANTUNE_ISA=sse9: instruction level 'sse9' is none of base, avx2" in refused.stderr


def test_errors_carry_a_message():
    with pytest.raises(RuntimeError, match="dtype code 9 is none of LT_F32"):
        _native.rms_norm_forward(9, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1e-5)
    with pytest.raises(RuntimeError, match="threads=-1 is negative"):
        _native.set_num_threads(-1)


def test_forcing_an_implementation(monkeypatch):
    import torch

    from leantune_kernels.dispatch import CannotServe, Op, forced, table

    assert forced("rms_norm:cpu,reference", "rms_norm") == "cpu"  # the entry of the op, in any order
    assert forced("reference,rms_norm:cpu", "rms_norm") == "cpu"
    assert forced("rms_norm:cpu", "rope") is None
    with pytest.raises(CannotServe, match="'gpu' is no implementation; use cuda, triton, cpu, reference"):
        forced("gpu", "rope")
    monkeypatch.setenv("LEANTUNE_IMPL", "rms_norm:cuda")
    with pytest.raises(CannotServe, match=r"rms_norm \(LEANTUNE_IMPL=rms_norm:cuda\) cannot run on cpu.*: cuda: "):
        Op("leantune_kernels.rms_norm").pick(torch.empty(0))
    assert table()["rms_norm"]["cpu"] is None and table()["rms_norm"]["cuda"]
