"""The emulator of tests/cuda_host itself: planted bugs are found, repairs pass, instructions do what PTX says.

What the emulator then says of the project's own kernels is in test_cuda_host.py.
"""

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cuda_host import host
from cuda_host.build import CSRC, FLAVOURS, HERE, build, sanitizer_environment

LAUNCH_FAILURE, INVALID_CONFIGURATION = 719, 9


@pytest.fixture(scope="module")
def paths() -> dict[str, Path]:
    """The library of planted kernels in each flavour."""
    sources = [*sorted((HERE / "planted").glob("*.cu")), CSRC / "common" / "cuda.cu"]
    with ThreadPoolExecutor() as workers:
        built = workers.map(lambda flavour: build(flavour, sources, "planted"), FLAVOURS)
        return dict(zip(FLAVOURS, built, strict=True))


def opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.lt_cuda_error_string.restype = ctypes.c_char_p
    assert library.lt_host_order(b"forward") == 0
    return library


@pytest.fixture
def plain(paths):
    return opened(paths["plain"])


@pytest.fixture
def traced(paths):
    return opened(paths["traced"])


def address(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def run(library: ctypes.CDLL, name: str, broken: bool) -> tuple[torch.Tensor, str]:
    """(what the kernel wrote, the words of its error or "")."""
    x, out = torch.arange(64.0), torch.zeros(256)
    status = getattr(library, f"planted_{name}")(int(broken), address(x), address(out))
    return out, library.lt_cuda_error_string(status).decode() if status else ""


# What the repaired kernel writes for 0, 1, ..., 63; and in which flavours the bug is an error, in which words.
X = torch.arange(64.0)
SWAPPED = X.view(-1, 2).flip(1).flatten()
EVERYWHERE, TRACED = ("plain", "traced"), ("traced",)
RACE = r"race: it (reads|writes) shared tile \+ \d+ bytes, which thread \(\d+, 0, 0\) (reads|writes) with no barrier"
BUGS = {
    "missing_barrier": (X.flip(0), TRACED, RACE),
    "missing_second_barrier": (2 * X.flip(0) + 1, TRACED, RACE),
    "missing_syncwarp": (SWAPPED, TRACED, RACE),
    "divergent_barrier": (X, EVERYWHERE, r"barrier divergence: it waits at .* barriers.cu:\d+, but .* exited"),
    "early_return": (X, EVERYWHERE, r"barrier divergence: .* thread number 5 has exited"),
    "two_barriers": (X, EVERYWHERE, r"barrier divergence: it waits at barriers.cu:(\d+), but .* at barriers.cu:(?!\1)"),
    "blocks_write_one_element": (torch.zeros(3), TRACED, r"block \(1, .* writes global memory .* of another block"),
    "blocks_read_each_other": (torch.zeros(3), TRACED, r"race: it reads global memory .* of another block writes"),
    "missing_wait": (X, TRACED, r"reads shared memory that a cp.async fills"),
    "wait_for_too_few": (X[:8], TRACED, r"reads shared memory that a cp.async fills"),
    "copy_at_the_end": (X, EVERYWHERE, r"thread \(0, 0, 0\): it ends with 1 cp.async"),
    "write_past_the_tile": (X, EVERYWHERE, r"bytes next to tile|writes 4 bytes of shared memory outside of"),
    "read_before_dynamic_memory": (X, TRACED, r"thread \(0, 0, 0\): reads 4 bytes of shared memory outside"),
    "misaligned_vector": (X[:16], EVERYWHERE, r"not aligned for an access of 16 bytes"),
    "too_much_static_memory": (X, EVERYWHERE, r"53248 bytes of static shared memory, with tile; at most 49152"),
    "absent_lane": (None, EVERYWHERE, r"__shfl_sync at warps.cu:\d+.* lane 7(, which| ) ?has exited"),
    "lane_at_a_barrier": (None, EVERYWHERE, r"is in __shfl_sync .* but lane 7 waits at the barrier"),
    "masks_differ": (SWAPPED, EVERYWHERE, r"__shfl_xor_sync at warps.cu:\d+.* 0xffffffff,? (but|names) lane \d+"),
    "source_outside_mask": (None, EVERYWHERE, r"reads from lane 16, which takes no part"),
    "caller_outside_mask": (SWAPPED, EVERYWHERE, r"mask 0x7fffffff.*(leaves out the lane that calls it|takes no part)"),
}


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_and_its_repair_passes(name, order, paths):
    expected, flavours, words = BUGS[name]
    for flavour in EVERYWHERE:
        library = opened(paths[flavour])
        assert library.lt_host_order(order.encode()) == 0
        out, error = run(library, name, broken=False)
        assert error == ""
        if expected is not None:
            assert torch.equal(out[: len(expected)], expected)
        _, error = run(library, name, broken=True)
        if flavour in flavours:
            assert re.search(words, error) and f"kernel {name}_kernel, block (" in error, error


@pytest.mark.parametrize("name", ["missing_barrier", "missing_second_barrier"])
def test_without_a_barrier_the_order_of_threads_shows(name, plain):
    results = []
    for order in (b"forward", b"reverse", b"random:1"):
        plain.lt_host_order(order)
        broken, repaired = run(plain, name, True)[0], run(plain, name, False)[0]
        assert torch.equal(repaired[:64], BUGS[name][0])
        results.append(broken[:64])
    assert not all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", ["missing_wait", "wait_for_too_few", "uninitialised_tile"])
def test_shared_memory_that_nothing_has_arrived_in_is_nan(name, plain):
    broken, repaired = run(plain, name, True)[0], run(plain, name, False)[0]
    assert broken.isnan().any() and not repaired.isnan().any()


def test_the_launch_after_a_failed_one_works(plain):
    for name in ("early_return", "masks_differ", "copy_at_the_end"):
        assert run(plain, name, True)[1] and run(plain, "missing_barrier", False)[1] == ""


def test_a_grid_beyond_the_limits_is_refused(plain):
    assert plain.planted_grid_too_large(1, address(X), address(X)) == INVALID_CONFIGURATION


def test_a_launch_beyond_its_budget_of_dynamic_memory_fails(plain):
    budget = plain.lt_host_dynamic_budget
    dynamic = "read_before_dynamic_memory"
    assert run(plain, dynamic, False)[1] == ""
    try:
        budget(f"{dynamic}_kernel".encode(), ctypes.c_size_t(1))
        words = rf"kernel {dynamic}_kernel: the launch asks for \d+ bytes of dynamic shared memory; its budget is 1"
        assert re.fullmatch(words, run(plain, dynamic, False)[1])
    finally:
        budget(f"{dynamic}_kernel".encode(), ctypes.c_size_t(1 << 20))
    assert run(plain, dynamic, False)[1] == ""


def test_a_wrong_order_is_refused(plain):
    assert plain.lt_host_order(b"sideways") == -1


# ---- AddressSanitizer and UndefinedBehaviorSanitizer end the process, so each bug gets one

PROGRAM = """
import ctypes, sys
library, name, broken = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x, out = (ctypes.c_void_p(libc.malloc(64 * 4)) for _ in range(2))
ctypes.memset(x, 0, 64 * 4)
sys.exit(getattr(library, 'planted_' + name)(broken, x, out) != 0)
"""
REPORTS = {
    "read_past_the_end": "heap-buffer-overflow.*READ of size 4",
    "write_past_the_end": "heap-buffer-overflow.*WRITE of size 4",
    "write_past_the_tile": "use-after-poison.*WRITE of size 4",
    "read_before_dynamic_memory": "use-after-poison.*READ of size 4",
    "misaligned_float4": "misaligned address",
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_sanitizers_report_a_planted_bug(name, paths):
    def sanitized(broken: bool) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", PROGRAM, str(paths["sanitized"]), name, str(int(broken))]
        environment = {**os.environ, **sanitizer_environment()}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    repaired, broken = sanitized(False), sanitized(True)
    assert repaired.returncode == 0, repaired.stderr
    assert broken.returncode != 0 and re.search(REPORTS[name], broken.stderr, re.DOTALL), broken.stderr


# ---- traffic


def test_traffic_is_counted_by_access_by_block_and_by_launch(traced):
    traced.lt_host_traffic_reset()
    run(traced, "read_twice", False)
    traffic = host.read_traffic(traced)["read_twice_kernel"]
    assert (traffic.requested.loaded, traffic.requested.stored) == (2 * 2 * 64 * 4, 2 * 64 * 4)
    assert (traffic.per_block.loaded, traffic.per_block.stored) == (2 * 64 * 4, 2 * 64 * 4)
    assert (traffic.per_launch.loaded, traffic.per_launch.stored) == (64 * 4, 2 * 64 * 4)


def test_a_vector_counts_its_bytes(traced):
    traced.lt_host_traffic_reset()
    run(traced, "misaligned_vector", False)
    traffic = host.read_traffic(traced)["misaligned_vector_kernel"].requested
    assert (traffic.loaded, traffic.stored) == (64, 64)


# ---- instructions


def test_shuffles_and_votes(plain):
    x, out = torch.randn(32), torch.zeros(13, 32)
    assert plain.planted_forms(0, address(x), address(out)) == 0
    lane = torch.arange(32)
    down, up = lane + 3, lane - 3
    expected = [
        x[5].expand(32),
        x[lane // 8 * 8 + (lane + 1) % 8],
        x[lane ^ 12],
        x[torch.where(down < lane // 16 * 16 + 16, down, lane)],
        x[torch.where(up >= lane // 16 * 16, up, lane)],
        x[31].expand(32),
        torch.cat([lane[1:], lane[31:]]).float(),
        torch.full((32,), 11.0),
        torch.ones(32),
    ]
    for row, want in zip(out, expected, strict=False):
        assert torch.equal(row, want)
    for row, want in ((9, x.sum()), (10, x.max()), (11, x.sum()), (12, x.max())):
        torch.testing.assert_close(out[row], want.expand(32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("code", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_products_of_16_bits(code, dtype, transposed, plain):
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.zeros(16, 8)
    given_a, given_b = (a.t().contiguous(), b.t().contiguous()) if transposed else (a, b)
    assert plain.planted_product(code, int(transposed), address(given_a), address(given_b), address(out)) == 0
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def tf32(x: torch.Tensor, rounded: bool) -> torch.Tensor:
    """The upper 19 bits, after rounding to nearest (ties away from zero) where asked."""
    return ((x.view(torch.int32) + (0x1000 if rounded else 0)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("rounded", [False, True])
def test_products_of_tf32(rounded, plain):
    a, b, out = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    assert plain.planted_product_tf32(int(rounded), address(a), address(b), address(out)) == 0
    want = (tf32(a, rounded).double() @ tf32(b, rounded).double()).float()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("code", "dtype"), [(1, torch.bfloat16), (2, torch.float16)])
def test_storage_types_round_to_nearest_even(code, dtype, plain):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    ties = (torch.randn(2000, generator=generator).view(torch.int32) & ~0x1FFFF) | 0x8000  # halfway in bf16
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x, torch.randn(2000, generator=generator) * 1e-6, torch.tensor([65504.0, 65519.0, 65520.0, -0.0])])
    out = torch.zeros(len(x), dtype=dtype)
    assert plain.planted_convert(code, address(x), address(out), len(x)) == 0
    want = x.to(dtype)
    number = ~x.isnan()
    assert torch.equal(out.view(torch.int16)[number], want.view(torch.int16)[number]) and out[~number].isnan().all()


def test_an_invalid_asynchronous_copy_gives_zeros(plain):
    x, out = torch.randn(128), torch.ones(128)
    assert plain.planted_zero_fill(address(x), address(out)) == 0
    assert torch.equal(out[:64], x[:64]) and not out[64:].any()
