"""Who races on a GPU, shown without one: a stub has Liger Kernel's signatures, torch.compile returns its argument."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F


def liger_jsd(input, target, shift_labels=None, beta=0.5, ignore_index=-100):
    assert beta == 0
    kept = shift_labels != ignore_index
    return F.kl_div(input[kept], target[kept], log_target=True, reduction="batchmean")


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    return turned(q), turned(k)


LIGER = {
    "liger_rms_norm": lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True: F.rms_norm(
        X, W.shape, W.to(X.dtype), eps
    ),
    "liger_layer_norm": lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
    "liger_swiglu": lambda a, b: F.silu(a) * b,
    "liger_geglu": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "liger_fused_linear_cross_entropy": lambda input, weight, target: F.cross_entropy(input @ weight.t(), target),
    "liger_cross_entropy": F.cross_entropy,
    "liger_jsd": liger_jsd,
    "liger_rope": liger_rope,
}
HAS = [
    ("rms_norm", "x residual"), ("rms_norm", "x"), ("layer_norm", "x residual"), ("layer_norm", "x"), ("glu", "silu"),
    ("glu", "gelu_tanh"), ("rope", "plain"), ("linear_cross_entropy", "labels"), ("linear_cross_entropy", "teacher"),
]  # fmt: skip
LACKS = [("glu", "gelu"), ("rope", "interleaved"), ("activation", "silu")]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["liger_kernel.transformers"].functional = module
    vars(module).update(LIGER)
    found = importlib.import_module("bench_ops")
    monkeypatch.setattr(found, "DEVICE", "cuda")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    return found


def small(op, kind):
    """A case of few rows that has what BENCHMARKS' cases have."""
    make = importlib.import_module(f"leantune_kernels.{op}.cases")._case
    if op in ("rms_norm", "layer_norm"):
        return make(5, 16, residual="residual" in kind)
    if op in ("glu", "activation"):
        return make(kind, 5, 16)
    if op == "rope":
        return make(5, 3, 8, 8, kind == "interleaved", 1, gradients=False)
    teacher = {"teacher": "logits", "temperature": 2.0} if kind == "teacher" else {}
    return make(9, 16, 40, gradients=False, **teacher)


def contenders(bench, op, kind, backward):
    case = small(op, kind)
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32)
    cases = importlib.import_module(f"leantune_kernels.{op}.cases")
    return bench.contenders(cases, case, inputs, backward and bool(case.differentiable))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("op", "kind"), HAS)
def test_liger_computes_what_ours_does(op, kind, backward, bench):
    torch.manual_seed(0)
    found = contenders(bench, op, kind, backward)
    assert {"leantune", "torch", "torch.compile", "liger"} <= set(found)
    got, want = found["liger"](), found["torch"]()
    if op == "rope":  # [1, heads, T, head_dim] in place of [T, heads, head_dim]
        got = tuple(x[0].transpose(0, 1) for x in got)
    elif op == "linear_cross_entropy":
        got = got[got.abs().sum(-1) > 0]  # the labelled rows
    elif backward:
        assert [g.shape for g in got] == [w.shape for w in want]
        return  # each has its own upstream gradient
    torch.testing.assert_close(got, type(got)(want) if isinstance(got, tuple) else want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "kind"), LACKS)
def test_liger_is_left_out_where_it_lacks_the_function(op, kind, bench):
    assert "liger" not in contenders(bench, op, kind, backward=False)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(["torch"], "torch"), (["torch fused", "torch foreach"], "torch foreach"), (["torch, chunks"], "torch, chunks")],
)
def test_the_compiler_gets_a_contender_of_pytorch(names, chosen, bench):
    found = {name: lambda name=name: name for name in ["leantune", *names]}
    assert bench.device_peers.compiled(found)["torch.compile"]() == chosen
