"""Runs the cases of ops on the emulator: `python tests/cuda_host/run_cases.py traced rms_norm`.

The flavour is plain, sanitized or traced, which also prints the bytes that each kernel moved; without names of ops, all
that have a cuda_impl.py are run. LT_HOST_ORDER is the order of threads: forward, reverse or random:SEED.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("engine", "kernels", "tests")]


def main(flavour: str, *ops: str) -> None:
    import torch

    from cuda_host import host
    from leantune_kernels import testing

    with host.kernels(flavour) as library:
        for op in ops or host.cuda_ops():
            module = importlib.import_module(f"leantune_kernels.{op}.cases")
            dtypes = getattr(module, "DTYPES", [torch.float32, torch.bfloat16, torch.float16])
            for case, dtype in ((case, dtype) for case in module.CASES for dtype in dtypes):
                print(f"{op} {case.name} {dtype}", end=" ", flush=True)  # a sanitizer may end the process here
                if flavour == "traced":
                    library.lt_host_traffic_reset()
                began = time.perf_counter()
                testing.accept(case, dtype, module.function, module.plain, testing.factor_of(module, dtype))
                print(f"ok, {time.perf_counter() - began:.3f} s")
                if flavour == "traced":
                    for kernel, traffic in host.read_traffic(library).items():
                        print(f"    {kernel} {traffic}")


if __name__ == "__main__":
    from cuda_host.build import sanitizer_environment

    if sys.argv[1] == "sanitized" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **sanitizer_environment()})
    main(*sys.argv[1:])
