"""Which implementation serves a call: the first that can, or the one that LEANTUNE_IMPL forces.

`LEANTUNE_IMPL=reference` forces every op, `LEANTUNE_IMPL=rms_norm:cpu,attention:reference` names ops one by one; of
both together, the entry for an op goes before the one for all. A forced implementation that cannot serve fails with its
reason; nothing falls back silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass, field
from types import ModuleType

import torch

from leantune_kernels.checks import FLOATS
from leantune_kernels.graph import Effects, Traced

log = logging.getLogger("leantune_kernels")

# In order of preference. A file that is absent means the op has no such implementation (yet).
IMPLEMENTATIONS = {
    "cuda": "cuda_impl",
    "triton": "triton_impl",
    "cpu": "native_impl",
    "reference": "reference",
}

SERVED = "float32, bfloat16 and float16 are served"
EMULATED = ("cuda", "triton")  # on the memory of the cpu they run for tests alone, and slowly


class CannotServe(RuntimeError, ValueError):
    """No implementation, or not the forced one, can take the call; the message lists the reasons."""


@dataclass
class Op:
    """One op and its implementations, found as files in the op's package.

    Each implementation module defines `refuses(x) -> str | None`, the reason why it cannot take a call whose main
    tensor is `x`, and the op's raw functions under the same names. `refuses` looks at x's device, its dtype and the
    sizes that `dims` names (0 where only device and dtype are asked about); the choice is kept for all x alike in it.
    """

    package: str  # such as "leantune_kernels.rms_norm"
    effects: dict[str, Effects] = field(default_factory=dict)  # of raw functions that overwrite arguments
    dims: tuple[int, ...] = ()  # dimensions of the main tensor by whose sizes an implementation may refuse
    _picked: dict[tuple[str | None, str, torch.dtype, tuple[int, ...]], ModuleType] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.package.rpartition(".")[2]

    @property
    def about(self) -> str:
        """What the op covers: the first line of its package's docstring."""
        return (importlib.import_module(self.package).__doc__ or "").partition("\n")[0]

    def implementation(self, name: str) -> ModuleType | None:
        """The module behind `name` ("reference", "cpu", "triton", "cuda"), None where the op has none."""
        if name not in IMPLEMENTATIONS:
            raise CannotServe(f"{name!r} is no implementation; known are {', '.join(IMPLEMENTATIONS)}")
        module = f"{self.package}.{IMPLEMENTATIONS[name]}"
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.import_module(module)

    def refusal(self, name: str, x: torch.Tensor) -> str | None:
        """Why implementation `name` cannot take a call on `x`; None if it can."""
        if x.dtype not in FLOATS:
            return f"dtype is {x.dtype}, {SERVED}"
        if name == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'leantune[gpu]')"
        module = self.implementation(name)
        return "not written for this op" if module is None else module.refuses(x)

    def pick(self, x: torch.Tensor) -> ModuleType:
        """The implementation for a call whose main tensor is `x`. Raises CannotServe, for other dtypes in any case.

        While torch.compile traces, it is a stand-in that picks when the graph runs.
        """
        if x.dtype not in FLOATS:
            raise CannotServe(f"{self.name}: a tensor is {x.dtype}; {SERVED}: convert it with .float() or .to(dtype)")
        if torch.compiler.is_compiling():
            return Traced(self.package, self.effects)  # type: ignore[return-value]
        key = (os.environ.get("LEANTUNE_IMPL"), x.device.type, x.dtype, tuple([x.shape[dim] for dim in self.dims]))
        module = self._picked.get(key)
        if module is None:
            module = self._picked[key] = self._choose(key[0], x)
        return module

    def _choose(self, setting: str | None, x: torch.Tensor) -> ModuleType:
        wanted = forced(setting, self.name)
        reasons: list[str] = []
        for name in [wanted] if wanted else IMPLEMENTATIONS:
            reason = self.refusal(name, x)
            if reason is None and not wanted and name in EMULATED and x.device.type == "cpu":
                reason = "emulated on cpu, so only where it is forced"
            if reason is None:
                passed_over = f" ({'; '.join(reasons)})" if reasons else ""
                log.info("%s on %s %s: %s%s", self.name, x.device.type, x.dtype, name, passed_over)
                module = self.implementation(name)
                assert module is not None
                return module
            reasons.append(f"{name}: {reason}")
        how = f" (LEANTUNE_IMPL={setting})" if wanted else ""
        raise CannotServe(f"{self.name}{how} cannot run on {x.device.type} {x.dtype}: " + "; ".join(reasons))


def forced(setting: str | None, op: str) -> str | None:
    """The implementation that the LEANTUNE_IMPL value `setting` names for `op`; None if it leaves the choice open.

    An entry for the op goes before one for all. Raises CannotServe for an unknown op or implementation, and for two
    entries that contradict each other.
    """
    import leantune_kernels

    chosen: dict[str, str] = {}  # by op; "" is all of them
    for entry in filter(None, (part.strip() for part in (setting or "").split(","))):
        target, colon, name = (part.strip() for part in entry.rpartition(":"))
        if name not in IMPLEMENTATIONS:
            raise CannotServe(
                f"LEANTUNE_IMPL={setting}: {name!r} is no implementation; use {', '.join(IMPLEMENTATIONS)}"
            )
        if colon and target not in leantune_kernels.ops():
            raise CannotServe(f"LEANTUNE_IMPL={setting}: {target!r} is no op; use {', '.join(leantune_kernels.ops())}")
        if chosen.setdefault(target, name) != name:
            what = target or "all ops"
            raise CannotServe(f"LEANTUNE_IMPL={setting} names both {chosen[target]} and {name} for {what}; keep one")
    return chosen.get(op, chosen.get(""))


def table(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str | None]]:
    """{op: {implementation: None if it can serve such a tensor, else the reason why not}}, all ops."""
    import leantune_kernels

    x = torch.empty(0, device=device, dtype=dtype)
    result = {}
    for name in leantune_kernels.ops():
        op = Op(f"leantune_kernels.{name}")
        result[name] = {impl: op.refusal(impl, x) for impl in IMPLEMENTATIONS}
    return result
