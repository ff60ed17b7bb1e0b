"""The conformance kit: every op's own cases, run on this machine's implementations or on anybody's.

    python -m leantune_kernels.conformance --device cuda --dtype bfloat16
    python -m leantune_kernels.conformance --op rms_norm --impl my_package.norms:rms_norm

`leantune kernels --check` is the same. What is checked, for every case of leantune_kernels/<op>/cases.py:

- error: each output and gradient is no further from fp64 than plain PyTorch in the same dtype, times a small factor;
- memory: so it stays when memory that nobody wrote holds NaN (torch.empty and its like);
- strides: so it stays for upstream gradients that are not contiguous, and for one number expanded (strides 0);
- inputs: neither arguments nor upstream gradients are changed, and a second backward pass gives the same gradients;
- bits: two runs give the same bits.

An implementation of your own (`--impl module:function`) is differentiated by PyTorch. It takes the arguments of the
`function` of the op's cases.py, which is the op's public function in most of them; cases pass them all by name, such as
impl(x=, weight=, eps=, residual=) for rms_norm. Where it does not take them, the failure lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import leantune_kernels
from leantune_kernels import checks, dispatch, testing
from leantune_kernels.dispatch import IMPLEMENTATIONS, CannotServe, Op
from leantune_kernels.testing import Case, Expected, Measured

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Function = Callable[..., Any]

# What is allowed is plain PyTorch's error of one draw, which another upstream gradient may exceed by chance in a kernel
# that is as good, above all one number expanded, whose gradients may be one number, too: twice that, and a unit in the
# last place. Strides that are not followed give errors of the size of the result.
STRIDES_SLACK = 2.0


class UnknownName(ValueError):
    """An op, implementation, dtype, device or function that there is none of; the message names what there is."""


@dataclass
class Report:
    """What the checks of one implementation in one dtype found."""

    op: str
    implementation: str
    dtype: str
    cases: int = 0
    worst: str = ""  # the result that came nearest to what is allowed
    error: float | None = None  # its error against fp64, None where nothing was measured ...
    allowed: float | None = None  # ... and the largest that is accepted
    skipped: str = ""  # why nothing, or not every case, was checked
    failures: dict[str, list[str]] = field(default_factory=dict)  # check -> what went wrong in which case

    @property
    def passed(self) -> bool:
        """No check failed, and there was something to check."""
        return self.cases > 0 and not self.failures

    def fail(self, check: str, message: str) -> None:
        self.failures.setdefault(check, []).append(message)


# ---- the checks ------------------------------------------------------------------------------------------------------


class Subject:
    """An implementation under test: how to call it, on which device, and where its results go."""

    def __init__(self, function: Function, public: Function, device: str, report: Report) -> None:
        self.function, self.device, self.report = function, device, report
        self.public = public  # the op's own function, whose dtypes count

    def check(self, case: Case, expected: dict[str, Expected]) -> None:
        """All checks of one case. `expected` has it for the upstream gradients of `testing`, by name."""
        with self._catching("error", case, expected):
            self._check_call(case, expected["dense"].inputs)
            self._keep_worst(case, self._compare("error", expected["dense"]))
        self.report.cases += 1  # not where it could not serve
        with self._catching("inputs", case, expected):
            self._check_inputs(case, expected["dense"].inputs)
        if "error" in self.report.failures:
            return  # the other checks would say the same again, in other words
        with self._catching("memory", case, expected), uninitialised_is_nan():
            self._compare("memory", expected["dense"], "where unwritten memory holds NaN")
        with self._catching("bits", case, expected):
            self._check_bits(case, expected["dense"].inputs)
        for kind in ("strided", "expanded") if case.differentiable else ():
            with self._catching("strides", case, expected):
                self._compare("strides", expected[kind], f"for an upstream gradient that is {kind}", STRIDES_SLACK)

    @contextmanager
    def _catching(self, check: str, case: Case, expected: dict[str, Expected]) -> Iterator[None]:
        """What is raised inside becomes a failure, and arguments that were overwritten get their values back."""
        with contextlib.ExitStack() as stack:
            for e in expected.values():
                stack.enter_context(restored(e.inputs))
            try:
                yield
            except CannotServe:
                raise
            except Exception as error:
                if "error" not in self.report.failures:
                    self.report.fail(check, f"{case.name}: {type(error).__name__}: {error}")

    def _check_call(self, case: Case, inputs: testing.Inputs) -> None:
        """TypeError where the function does not take the case's arguments, or returns no tensors or other dtypes."""
        given = testing.prepare(inputs, case, device=self.device)
        names = ", ".join(f"{name}=" for name in given)
        try:
            inspect.signature(self.function).bind(**given)
        except TypeError as error:
            raise TypeError(f"{error}; cases call impl({names})") from error
        except ValueError:  # a function in C without a signature: the call itself will tell
            pass
        with restored(given):
            outputs = listed(self.function(**given))
        for i, output in enumerate(outputs):
            if not isinstance(output, torch.Tensor):
                raise TypeError(
                    f"output {i} is {checks.kind(output)}; impl({names}) must return a torch.Tensor or a tuple of them"
                )
        with restored(given), forcing("reference"):
            wanted = listed(self.public(**given))
        for i, (output, like) in enumerate(zip(outputs, wanted, strict=False)):
            if output.dtype != like.dtype:
                raise TypeError(f"output {i} is {output.dtype}; it must be {like.dtype}")

    def _compare(self, check: str, expected: Expected, when: str = "", slack: float = 1.0) -> list[Measured]:
        measured = expected.measure(self.function, self.device)
        unit = torch.finfo(expected.dtype).eps if slack > 1.0 else 0.0
        for m in measured:
            allowed = slack * m.allowed + unit
            if not m.error <= allowed:
                words = f"error {m.error:.3g}, allowed {allowed:.3g} {when}".rstrip()
                self.report.fail(check, f"{expected.case.name}, {m.name}: {words}")
        return measured

    def _keep_worst(self, case: Case, measured: list[Measured]) -> None:
        report = self.report
        for m in measured:
            if report.error is None or report.allowed is None or m.error / m.allowed >= report.error / report.allowed:
                report.worst, report.error, report.allowed = f"{case.name}, {m.name}", m.error, m.allowed

    def _check_inputs(self, case: Case, inputs: testing.Inputs) -> None:
        given = testing.prepare(inputs, case, device=self.device)
        tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
        before = {k: v.detach().clone() for k, v in tensors.items()}
        outputs = listed(self.function(**given))
        if case.differentiable:
            generator = torch.Generator().manual_seed(1)
            upstream = [testing.dense(o, generator) for o in outputs]
            named = {f"the upstream gradient of output {i}": u for i, u in enumerate(upstream)}
            tensors |= named
            before |= {name: u.clone() for name, u in named.items()}
            wanted = [given[k] for k in case.differentiable]
            first, second = (
                [g.clone() for g in torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)] for _ in range(2)
            )
            for name, one, two in zip(case.differentiable, first, second, strict=True):
                if not same_bits(one, two):
                    self.report.fail("inputs", f"{case.name}: a second backward pass changes the gradient of {name}")
        for name, tensor in tensors.items():
            if not same_bits(tensor.detach(), before[name]):
                self.report.fail("inputs", f"{case.name}: {name} was overwritten")

    def _check_bits(self, case: Case, inputs: testing.Inputs) -> None:
        with restored(inputs):
            first = testing.run(self.function, inputs, case, device=self.device)
        second = testing.run(self.function, inputs, case, device=self.device)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            if not same_bits(a, b):
                self.report.fail("bits", f"{case.name}: result {i} differs between two runs")


def listed(outputs: Any) -> list[Any]:
    """What a function returned as a list."""
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN counting as equal to NaN."""
    if torch.equal(a, b):
        return True
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextmanager
def restored(inputs: testing.Inputs) -> Iterator[None]:
    """Tensors that are overwritten inside the block get their values back."""
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    try:
        yield
    finally:
        for name, value in before.items():
            if not same_bits(inputs[name].detach(), value):
                inputs[name].detach().copy_(value)


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """torch.empty and its like return NaN inside the block."""
    settings: Any = torch.utils.deterministic
    switch, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without a deterministic form, which is not what is asked here
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(switch, warn_only=only_warns)
            settings.fill_uninitialized_memory = fill


@contextmanager
def forcing(implementation: str) -> Iterator[None]:
    """LEANTUNE_IMPL inside the block."""
    before = os.environ.get("LEANTUNE_IMPL")
    os.environ["LEANTUNE_IMPL"] = implementation
    try:
        yield
    finally:
        if before is None:
            del os.environ["LEANTUNE_IMPL"]
        else:
            os.environ["LEANTUNE_IMPL"] = before


# ---- what is checked -------------------------------------------------------------------------------------------------


def check(
    ops: Sequence[str] = (),
    implementations: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    device: str = "cpu",
    impl: str | None = None,
) -> Iterator[Report]:
    """One Report after another: `ops` (all) x `dtypes` (all) x `implementations` (those that can serve on `device`).

    An implementation named here that cannot serve has a report as well, with the reason; it has not passed. `impl`,
    "module:function", is checked instead of the op's implementations. Raises UnknownName, also for a device that is
    not there.
    """
    chosen = [_known("op", name, leantune_kernels.ops()) for name in ops] or leantune_kernels.ops()
    names = [_known("dtype", name, DTYPES) for name in dtypes] or list(DTYPES)
    wanted = [_known("implementation", name, IMPLEMENTATIONS) for name in implementations]
    _require(device)
    own = None if impl is None else load(impl)
    if own is not None and wanted:
        raise UnknownName(f"impl={impl!r} is checked instead of the op's own; leave out implementation={wanted[0]!r}")
    if own is not None and len(chosen) != 1:
        raise UnknownName(f"impl={impl!r} is an implementation of one op; name it with op (--op NAME)")
    for op in chosen:
        cases = importlib.import_module(f"leantune_kernels.{op}.cases")
        possible = [d for d in names if DTYPES[d] in getattr(cases, "DTYPES", DTYPES.values())]
        for dtype in possible:
            if own is not None and impl is not None:
                reports = {impl: Report(op, impl, dtype)}
                subjects = {impl: Subject(own, cases.function, device, reports[impl])}
            else:
                reports, subjects = _implementations(op, cases.function, wanted, dtype, device)
            _check_cases(cases, dtype, subjects)
            yield from reports.values()


def support(device: str = "cpu", dtype: str = "float32") -> dict[str, dict[str, str | None]]:
    """dispatch.table for a device and a dtype by name. Raises UnknownName."""
    _require(device)
    return dispatch.table(device, DTYPES[_known("dtype", dtype, DTYPES)])


def _implementations(
    op: str, function: Function, wanted: Sequence[str], dtype: str, device: str
) -> tuple[dict[str, Report], dict[str, Subject]]:
    """Reports of the wanted implementations (of those that can serve), and those to check."""
    reports, subjects = {}, {}
    probe = torch.empty(0, dtype=DTYPES[dtype], device=device)
    for name in wanted or IMPLEMENTATIONS:
        reason = Op(f"leantune_kernels.{op}").refusal(name, probe)
        if reason is None:
            reports[name] = Report(op, name, dtype)
            subjects[name] = Subject(function, function, device, reports[name])
        elif wanted:
            reports[name] = Report(op, name, dtype, skipped=reason)
    return reports, subjects


def _check_cases(cases: ModuleType, dtype: str, subjects: dict[str, Subject]) -> None:
    for case in cases.CASES:
        kinds = ("dense", "strided", "expanded") if case.differentiable else ("dense",)
        factor = testing.factor_of(cases, DTYPES[dtype])
        expected = {
            kind: Expected(case, DTYPES[dtype], cases.plain, factor, upstream=getattr(testing, kind)) for kind in kinds
        }
        for name, subject in subjects.items():
            with forcing(name) if name in IMPLEMENTATIONS else contextlib.nullcontext():
                try:
                    subject.check(case, expected)
                except CannotServe as reason:
                    subject.report.skipped = f"{case.name}: {reason}"


def load(impl: str) -> Function:
    """The function that "module:function" names; modules of the working directory are found, too."""
    module, _, name = impl.partition(":")
    if os.curdir not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.curdir)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownName(f"impl={impl!r} is not to be had: {error}; write it as module:function") from error
    if not callable(found):
        raise UnknownName(f"impl={impl!r} is a {type(found).__name__}; it must be a function")
    return found


def _known(what: str, name: str, known: Sequence[str] | dict[str, Any]) -> str:
    if name not in known:
        raise UnknownName(f"{what}={name!r} is unknown; use {', '.join(known)}")
    return name


def _require(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UnknownName(f"device={device!r} is not available: {str(error).splitlines()[0]}") from error


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(reports: Sequence[Report]) -> Table:
    """A line for each report: its worst error in comparison with what is allowed, and the checks that failed."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("op", "implementation", "dtype", "cases", "error / allowed", "result"):
        shown.add_column(name, no_wrap=name not in ("implementation", "result"))
    for report in reports:
        worst = f"{report.error:.2g} / {report.allowed:.2g}" if report.worst else ""
        if report.failures:
            result = f"[red]FAILED: {', '.join(report.failures)}[/]"
        elif report.skipped:
            result = f"[{'yellow' if report.cases else 'red'}]not checked: {_plain(report.skipped)}[/]"
        else:
            result = "[green]ok[/]"
        shown.add_row(report.op, _plain(report.implementation), report.dtype, str(report.cases), worst, result)
    return shown


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def show(reports: Sequence[Report]) -> None:
    """Prints the table, then what failed and how."""
    from rich.console import Console

    console = Console()
    console.print(table(reports))
    for report in reports:
        for check_name, messages in report.failures.items():
            console.print(f"[red]{report.op}, {_plain(report.implementation)}, {report.dtype}, {check_name}[/]")
            for message in messages:
                console.print("  " + _plain(message))


def as_json(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The reports as JSON has them: null for an infinite error, which it has no word for."""

    def finite(number: float | None) -> float | None:
        return number if number is not None and math.isfinite(number) else None

    return [{**asdict(r), "error": finite(r.error), "allowed": finite(r.allowed), "passed": r.passed} for r in reports]


def exit_code(reports: Sequence[Report]) -> int:
    """0 if all passed, and there is one at all: an op may have no case in the dtype that was asked for."""
    return 0 if reports and all(report.passed for report in reports) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m leantune_kernels.conformance",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for name, known in (("op", ()), ("implementation", IMPLEMENTATIONS), ("dtype", DTYPES)):
        of = f" of {', '.join(known)}" if known else ""
        words = f"one{of}; all that there are where none is named (repeat it for several)"
        parser.add_argument(f"--{name}", action="append", default=[], metavar="NAME", help=words)
    parser.add_argument("--device", default="cpu", help="where tensors lie, such as cuda or cuda:1 (cpu)")
    parser.add_argument("--impl", metavar="MODULE:FUNCTION", help="check this function instead; needs --op")
    asked = parser.parse_args(arguments)
    try:
        reports = list(check(asked.op, asked.implementation, asked.dtype, asked.device, asked.impl))
    except UnknownName as error:
        parser.error(str(error))
    show(reports)
    return exit_code(reports)


if __name__ == "__main__":
    sys.exit(main())
