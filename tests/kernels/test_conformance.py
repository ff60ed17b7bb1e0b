"""The conformance kit: green on every op, and each of its checks finds the mistake that it is there for."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

import leantune_kernels
from leantune_kernels import conformance, testing
from leantune_kernels.attention import cases as attention
from leantune_kernels.dispatch import CannotServe, Op
from leantune_kernels.rms_norm import cases as rms_norm_cases

HERE = Path(__file__).parent


@pytest.mark.parametrize("op", leantune_kernels.ops())
def test_every_op_conforms(op):
    """The CUDA kernels, on the emulator, have the same in test_cuda_host.py."""
    conforms(op, ["cpu", "reference"])


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a device test_cuda.py does this")
@pytest.mark.parametrize("op", leantune_kernels.ops())
def test_every_triton_kernel_conforms(op, monkeypatch):
    """In the interpreter, which is slow: in one dtype, and attention's small cases; test_ops.py has every error."""
    if Op(f"leantune_kernels.{op}").implementation("triton") is None:
        pytest.skip(f"{op} has no triton implementation")
    if op == "attention":
        monkeypatch.setattr(attention, "CASES", [case for case in attention.CASES if elements(case) < 10_000])
    conforms(op, ["triton"], ["float32"])


def elements(case):
    return case.make(torch.Generator(), torch.float32)["q"].numel()


def conforms(op, implementations, dtypes=()):
    reports = list(conformance.check([op], implementations, dtypes))
    assert {report.implementation for report in reports} == set(implementations)
    assert not [(report, report.failures) for report in reports if not report.passed or report.skipped]
    assert all(report.cases and report.error <= report.allowed for report in reports)


@pytest.fixture
def wrong(monkeypatch):
    """wrong(name) checks wrong_rms_norms:<name> and returns the report."""
    monkeypatch.syspath_prepend(HERE)

    def check(name):
        (report,) = conformance.check(["rms_norm"], dtypes=["float32"], impl=f"wrong_rms_norms:{name}")
        return report

    return check


def test_a_good_implementation_passes(wrong):
    assert wrong("good").passed


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("without_eps", "error", "5x64 scale 0.001, output 0: error"),
        (
            "without_residual",
            "error",
            "unexpected keyword argument 'residual'; cases call impl(x=, weight=, eps=, residual=)",
        ),
        ("of_another_dtype", "error", "output 0 is torch.float64; it must be torch.float32"),
        ("returns_nothing", "error", "output 0 is None; impl(x=, weight=, eps=) must return a torch.Tensor"),
        ("half_the_rows", "error", "gradient of weight: error"),
        ("forgets_the_weight", "error", "no gradient for ['weight']"),
        ("of_another_shape", "error", "output 0: shape (1, 1, 5), not (1, 5)"),
        ("reads_unwritten_memory", "memory", "output 0: error inf, allowed"),
        ("takes_gradients_for_contiguous", "strides", "for an upstream gradient that is strided"),
        ("takes_gradients_for_contiguous", "strides", "for an upstream gradient that is expanded"),
        ("overwrites_its_input", "inputs", "3x17: x was overwritten"),
        ("overwrites_the_upstream_gradient", "inputs", "3x17: the upstream gradient of output 0 was overwritten"),
        ("overwrites_the_upstream_gradient", "inputs", "3x17: a second backward pass changes the gradient of x"),
        ("differs_from_run_to_run", "bits", "result 0 differs between two runs"),
    ],
)
def test_each_check_finds_its_mistake_and_no_other_does(wrong, name, check, words):
    failures = wrong(name).failures
    assert any(words in message for message in failures[check]), failures
    chance = {"bits"} if name == "reads_unwritten_memory" else set()  # what it reads may be the same in two runs or not
    assert set(failures) - chance == {check}


def test_what_cannot_serve_is_named_with_its_reason(monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", "triton")  # is not what is asked for here
    (report,) = conformance.check(["rms_norm"], ["cuda"], ["float32"])
    assert report.skipped in ("device is cpu", "the package was built without nvcc") and report.cases == 0
    assert not report.passed and conformance.exit_code([report]) == 1
    assert report.error is None and report.allowed is None
    assert report.skipped[:40] in shown([report])
    assert os.environ["LEANTUNE_IMPL"] == "triton"


def shown(reports):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(conformance.table(reports))
    return capture.get()


def test_nothing_to_check_is_no_success():
    """As for an op without cases in the dtype that was named."""
    assert conformance.exit_code([]) == 1


@pytest.mark.parametrize(("limit", "passed"), [(100, True), (-1, False)])
def test_a_case_that_cannot_be_served_is_not_counted(limit, passed, monkeypatch):
    """Some cases checked is enough to pass, none is not; the reason is in the report."""

    def picky(x, weight, eps, residual=None):
        if x.shape[0] > limit:
            raise CannotServe(f"{x.shape[0]} rows are too many")
        return rms_norm_cases.function(x, weight, eps, residual)

    monkeypatch.setattr(conformance, "load", lambda _: picky)
    (report,) = conformance.check(["rms_norm"], dtypes=["float32"], impl="picky:picky")
    assert report.passed == passed and "rows are too many" in report.skipped
    assert (0 < report.cases < len(rms_norm_cases.CASES)) == passed and not report.failures


def test_json_has_no_word_for_infinity(wrong):
    """The error is infinite where a NaN is, and nothing at all where nothing was measured."""
    reports = [wrong("with_a_nan"), wrong("good"), conformance.Report("rope", "cuda", "float32", skipped="no device")]
    found = json.loads(json.dumps(conformance.as_json(reports), allow_nan=False))
    assert [report["passed"] for report in found] == [False, True, False]
    assert [report["error"] is None for report in found] == [True, False, True]
    assert [report["allowed"] is None for report in found] == [False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["norm"]}, "op='norm' is unknown; use activation, "),
        ({"dtypes": ["float64"]}, "dtype='float64' is unknown; use float32, bfloat16, float16"),
        ({"implementations": ["gpu"]}, "implementation='gpu' is unknown; use cuda, triton, cpu, reference"),
        ({"device": "xyz"}, "device='xyz' is not available: "),
        ({"impl": "wrong_rms_norms:good"}, "is an implementation of one op; name it"),
        ({"impl": "wrong_rms_norms:good", "implementations": ["cpu"]}, "leave out implementation='cpu'"),
        ({"ops": ["rope"], "impl": "wrong_rms_norms:nothing"}, "is not to be had: .*nothing.* module:function"),
        ({"ops": ["rope"], "impl": "no_such_module:f"}, "is not to be had: No module named 'no_such_module'"),
        ({"ops": ["rope"], "impl": "wrong_rms_norms:torch"}, "is a module; it must be a function"),
    ],
)
def test_unknown_names_are_refused(arguments, message, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    with pytest.raises(conformance.UnknownName, match=message):
        list(conformance.check(**arguments))


@pytest.mark.parametrize(("name", "code"), [("good", 0), ("half_the_rows", 1), ("nothing", 2)])
def test_as_a_program(name, code):
    """An implementation in the working directory; the engine is not needed."""
    command = [sys.executable, "-m", "leantune_kernels.conformance", "--op", "rms_norm", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent / "kernels")}
    done = subprocess.run(
        [*command, "--impl", f"wrong_rms_norms:{name}"], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert {0: "ok", 1: "FAILED: error", 2: ""}[code] in done.stdout
    assert code != 2 or "is not to be had" in done.stderr


def test_upstream_gradients_are_what_their_names_say():
    output, generator = torch.empty(3, 4, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    assert testing.dense(output, generator).is_contiguous()
    assert testing.expanded(output, generator).stride() == (0, 0)
    assert testing.strided(output, generator).stride() == (2, 6)
    for make in (testing.dense, testing.expanded, testing.strided):
        assert make(output, generator).shape == (3, 4) and make(output, generator).dtype == torch.bfloat16
        assert make(torch.empty(()), generator).shape == ()
