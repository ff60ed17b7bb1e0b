"""What autograd sees of the ops: the forward pass alone where nobody asks for a gradient, and one derivative."""

import importlib

import pytest
import torch
from torch.autograd import forward_ad

import leantune_kernels
from leantune_kernels.activation import silu as swish
from leantune_kernels.dropout import dropout
from leantune_kernels.rms_norm import rms_norm


def cases_of(op):
    return importlib.import_module(f"leantune_kernels.{op}.cases")


X, WEIGHT = torch.randn(5, 8), torch.randn(8)


@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("of_weight", [False, True])
def test_gradients_flow_to_whoever_asks(of_x, of_weight):
    x, weight = X.clone().requires_grad_(of_x), WEIGHT.clone().requires_grad_(of_weight)
    y = rms_norm(x, weight)
    assert (y.grad_fn is not None) == (of_x or of_weight)
    assert torch.equal(y, rms_norm(X, WEIGHT))
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None) == of_x and (weight.grad is not None) == of_weight


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(mode):
    x = X.clone().requires_grad_()
    with mode():
        assert not rms_norm(x, WEIGHT).requires_grad


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(X[None]),
    "vmap of what asks for a gradient": lambda f: torch.vmap(f)(X[None].clone().requires_grad_()),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: torch.func.vjp(f, X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("function", [lambda x: rms_norm(x, WEIGHT), swish, lambda x: dropout(x, 0.5, 1, 0)])
def test_transforms_of_torch_func_are_refused_in_clear_words(transform, function):
    with pytest.raises(RuntimeError, match=r"leantune_kernels\..* inside a transform of torch\.func .*; call it with"):
        transform(function)


def test_functional_call_is_no_transform():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(WEIGHT)

        def forward(self, x):
            return rms_norm(x, self.weight)

    y = torch.func.functional_call(Norm(), {"weight": 2 * WEIGHT}, (X,))
    assert torch.equal(y, rms_norm(X, 2 * WEIGHT))


def test_tangents_are_refused_and_not_dropped():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(RuntimeError, match="jvp"):
            rms_norm(x, WEIGHT)


@pytest.mark.parametrize("op", [op for op in leantune_kernels.ops() if cases_of(op).CASES[0].differentiable])
def test_a_second_derivative_is_refused_and_not_wrong(op):
    cases = cases_of(op)
    case = next(c for c in cases.CASES if c.differentiable)
    inputs = case.make(torch.Generator().manual_seed(0), torch.float32)
    name = case.differentiable[0]
    start = inputs[name].requires_grad_()
    output = cases.function(**inputs | {name: start * start})
    outputs = output if isinstance(output, tuple) else (output,)
    (first,) = torch.autograd.grad(sum(o.float().sum() for o in outputs), start, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        first.pow(2).sum().backward()
