"""torch.compile: no op breaks the graph, results are those of the eager call to the bit, little is compiled anew."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import leantune_kernels
from leantune_kernels import graph, rms_norm, testing
from leantune_kernels.adamw import adamw_step
from leantune_kernels.dispatch import Op
from leantune_kernels.dropout import dropout
from leantune_kernels.glu import swiglu
from leantune_kernels.linear_cross_entropy import linear_cross_entropy
from leantune_kernels.low_rank import lora_linear
from leantune_kernels.rms_norm import rms_norm as norm


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def differentiable_cases():
    """The first and the last case of every differentiable op."""
    for op in leantune_kernels.ops():
        module = importlib.import_module(f"leantune_kernels.{op}.cases")
        cases = [case for case in module.CASES if case.differentiable]
        for case in dict.fromkeys((cases[0], cases[-1])) if cases else ():
            yield pytest.param(module, case, id=f"{op}-{case.name}")


@pytest.mark.parametrize(("module", "case"), differentiable_cases())
def test_the_graph_is_whole_and_gives_the_same_bits(module, case):
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32)
    compiled = torch.compile(module.function, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        testing.run(compiled, inputs, case), testing.run(module.function, inputs, case), strict=True
    ):
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype and found.stride() == wanted.stride()


def test_inductor_compiles_several_ops_around_others():
    """A layer as a model has it, with PyTorch's operations between the kernels, forward and backward."""
    inputs = {
        "x": torch.randn(6, 16),
        "weight": torch.randn(16) + 1,
        "base": torch.randn(32, 16) / 4,
        "A": torch.randn(3, 16),
        "B": torch.randn(32, 3),
        "head": torch.randn(11, 16),
        "targets": torch.tensor([3, -100, 0, 10, 5, 5]),
    }
    case = testing.Case("layer", lambda *_: inputs, ("x", "weight", "A", "B", "head"))

    def layer(x, weight, base, A, B, head, targets):
        hidden = lora_linear(norm(x, weight, 1e-5), base, None, A, B, 0.5)
        gate, up = hidden.chunk(2, -1)
        return linear_cross_entropy(x + swiglu(gate, up), head, targets)

    compiled = torch.compile(layer, fullgraph=True)
    for found, wanted in zip(testing.run(compiled, inputs, case), testing.run(layer, inputs, case), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_new_lengths_and_seeds_compile_nothing_new_after_the_second():
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, seed: norm(dropout(x, 0.5, seed, 0), torch.ones(7)), fullgraph=True, backend=counter
    )
    for rows, seed in ((3, 1), (5, 2), (8, 3), (13, 2**62)):
        x = torch.randn(rows, 7)
        assert torch.equal(compiled(x, seed), norm(dropout(x, 0.5, seed, 0), torch.ones(7)))
    assert counter.frame_count == 2


def test_seeds_of_64_bits():
    x = torch.randn(50)
    compiled = torch.compile(lambda x, seed: dropout(x, 0.5, seed, 0), fullgraph=True, backend="eager")
    for seed in (2**63 - 1, 2**63, 2**64 - 1):
        assert torch.equal(compiled(x, seed), dropout(x, 0.5, seed, 0))


def test_results_go_to_the_callers_memory():
    """`out` and functions that work in place: the graph copies what the operator returned."""
    x, weight = torch.randn(3, 8), torch.randn(8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def into(x, weight, out):
        y, rstd = rms_norm.forward(x, weight, 1e-5, out)
        return y + 1, rstd

    out = torch.full((3, 12), torch.nan)
    y, rstd = into(x, weight, out[:, 2:10])
    wanted, wanted_rstd = rms_norm.forward(x, weight, 1e-5)
    assert torch.equal(out[:, 2:10], wanted) and torch.equal(y, wanted + 1) and torch.equal(rstd, wanted_rstd)
    assert out[:, :2].isnan().all() and out[:, 10:].isnan().all()


def test_what_checks_cannot_see_in_a_graph_the_kernels_refuse():
    from leantune_kernels.rope import rope

    table = torch.zeros(4, 2)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="position"):
        compiled(torch.randn(1, 1, 4), table, table, torch.tensor([4]))


def test_errors_are_those_of_the_eager_call():
    compiled = torch.compile(norm, backend="aot_eager")
    with pytest.raises(ValueError, match="weight is torch.float32 with shape"):
        compiled(torch.randn(2, 3), torch.ones(4))


def test_an_optimizer_step_breaks_the_graph_and_is_made():
    def step(p, grad, m, v):
        adamw_step([p], [grad * 2], [m], [v], step=1, lr=0.1)
        return p + 1

    def tensors():
        return [torch.ones(4), torch.arange(4.0), torch.zeros(4), torch.zeros(4)]

    found, wanted = tensors(), tensors()
    assert torch.equal(torch.compile(step, backend="aot_eager")(*found), step(*wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_overwritten_argument_that_is_returned_must_be_declared():
    op = Op("leantune_kernels.rms_norm")  # without its effects
    x, weight = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(
        lambda x, weight, out: op.pick(x).forward(x, weight, 1e-5, out), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="returns an argument, which it writes to, but its op's"):
        compiled(x, weight, torch.empty(3, 8))


def test_arguments_survive_the_way_through_the_operator():
    tensors, ints, floats = [], [], []
    bundle = testing.Floor(1, 2, 3, 2**64 - 1)
    args = (torch.ones(2), None, [torch.zeros(1), (True, -5)], "a_word", 0.5, torch.bfloat16, bundle, ())
    layout = " ".join(graph._flatten(a, tensors, ints, floats) for a in args) + " named=B0"
    made, options = graph._arguments(layout, tensors, ints, floats)
    assert options == {"named": False} and made[1:2] + made[3:] == list(args[1:2] + args[3:])
    assert made[0] is args[0] and made[2][0] is args[2][0] and made[2][1] == (True, -5)
    with pytest.raises(TypeError, match="a set cannot be an argument of a kernel inside torch.compile"):
        graph._flatten({1}, [], [], [])
