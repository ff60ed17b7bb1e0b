"""The machine code of every CUDA kernel against the two comments that stand above it in csrc/<op>/cuda.cu.

    // budget: 64 registers, 4 KiB shared     at most, on each architecture; and nothing on the stack (no spills)
    // claims: LDG.128 HMMA                   opcodes found in the machine code of some instantiation, by their parts

How they are read, and who checks dynamic shared memory: tests/cuda_host/budgets.py.
"""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda_host.budgets import BUDGET, KERNELS
from cuda_host.build import CSRC
from leantune_kernels import cuda

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
RESERVED_SHARED = {"sm_80": 0, "sm_90": 1024, "sm_100": 1024}  # of each block, by the driver


def cuobjdump() -> str | None:
    """NVIDIA's tool, of the CUDA toolkit or as Triton ships it."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is of the CUDA toolkit, and Triton ships it")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found if Path(found).exists() else None


def dump(option: str) -> Iterator[str]:
    """Lines of cuobjdump's output on the library of all kernels."""
    if cuda.library() is None:
        pytest.skip("built without nvcc")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump")
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    command = [tool, option, str(cuda.library())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        yield from run.stdout
        errors = run.stderr.read()
    assert run.returncode == 0, errors


def name_in(mangled: str) -> str:
    """The kernel's own name: one of KERNELS after its length, before template arguments or parameters."""
    found = [k.name for k in KERNELS if re.search(rf"{len(k.name)}{k.name}[IE]", mangled)]
    return found[0] if found else mangled


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Resources by (kernel, architecture), one entry an instantiation."""
    result = defaultdict(list)
    architecture = name = ""
    for line in dump("-res-usage"):
        if found := re.match(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = name_in(found[1])
        elif "REG:" in line:
            fields = {field: int(value) for field, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            result[name, architecture].append(fields)
    return result


@pytest.fixture(scope="module")
def opcodes() -> dict[tuple[str, str], set[str]]:
    """Opcodes by (kernel, architecture), of all instantiations together."""
    result = defaultdict(set)
    architecture = name = ""
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)")
    for line in dump("-sass"):
        if found := instruction.match(line):
            result[name, architecture].add(found[1])
        elif found := re.match(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            name = name_in(found[1])
    return result


def has(opcode: str, claim: str) -> bool:
    """LDG.128 is in LDG.E.128.CONSTANT; wider is as good."""
    parts = opcode.split(".")
    wider = {"64": ("64", "128", "256"), "128": ("128", "256")}
    first, *rest = claim.split(".")
    return parts[0] == first and all(set(wider.get(part, (part,))) & set(parts) for part in rest)


def test_kernels_are_named_once_and_have_a_budget():
    names = [kernel.name for kernel in KERNELS]
    assert names and len(names) == len(set(names))
    for kernel in KERNELS:
        assert kernel.name.endswith("_kernel"), kernel
        assert BUDGET.fullmatch(kernel.budget), f"{kernel.name}: {kernel.budget!r} is no budget"


@pytest.mark.parametrize(
    "path", [*CSRC.glob("*/cuda.cu"), *CSRC.glob("*/*.cuh")], ids=lambda p: str(p.relative_to(CSRC))
)
def test_sources_keep_to_what_the_emulator_understands_and_to_a_fixed_order(path):
    code = re.sub(r"//.*", "", path.read_text())
    assert "<<<" not in code, "launch() checks the launch and runs on the emulator"
    assert not re.search(r"\batomic\w*\(", code), "atomics make results differ from run to run"
    if path.name != "cuda_kernel.cuh":
        assert "__shared__" not in code, "LT_SHARED and LT_DYNAMIC_SHARED are what the emulator guards"


def test_each_kernel_is_in_the_library_for_each_architecture(usage):
    expected = {(kernel.name, architecture) for kernel in KERNELS for architecture in ARCHITECTURES}
    assert set(usage) == expected


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_kernel_keeps_to_its_budget_and_spills_nothing(kernel, usage):
    for architecture in ARCHITECTURES:
        for found in usage[kernel.name, architecture]:
            where = f"{kernel.name} on {architecture}: {found}"
            assert found["STACK"] == 0 and found["LOCAL"] == 0, where
            assert found["REG"] <= kernel.registers, where
            assert max(0, found["SHARED"] - RESERVED_SHARED[architecture]) <= kernel.shared, where


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.claims], ids=lambda k: k.name)
def test_a_kernel_has_the_instructions_that_it_claims(kernel, opcodes):
    for architecture in ARCHITECTURES:
        found = opcodes[kernel.name, architecture]
        missing = [claim for claim in kernel.claims if not any(has(opcode, claim) for opcode in found)]
        assert not missing, f"{kernel.name} on {architecture} has no {missing} among {sorted(found)}"
