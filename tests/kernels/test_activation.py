"""GELU and SiLU: in place, both tails, numbers of dimensions, arguments refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import activation
from leantune_kernels.activation.reference import plain

implementation = each_of("cpu", "reference", autouse=True)


def exact_results(dy, x, name):
    """y and dx in fp64."""
    exact = x.double().requires_grad_()
    y = plain(exact, name)
    return y.detach(), torch.autograd.grad(y, exact, dy.double())[0]


def near(value, truth, limit):
    """Whether it is, of values of the order of 1: a slope near its zero has no digits of its own."""
    return (value.double() - truth).norm() <= limit * (truth.norm() + 3 * truth.numel() ** 0.5)


@settings(deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 70),
    gap=st.integers(0, 3),
    name=st.sampled_from([*activation.ACTIVATIONS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_and_stride_and_in_place(rows, cols, gap, name, dtype):
    dy, x = (torch.randn(rows, cols + gap).to(dtype)[:, :cols] for _ in range(2))
    y, dx = exact_results(dy, x, name)
    limit = 5e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
    out = torch.full((rows, cols + gap), float("nan"), dtype=dtype)[:, :cols]
    assert near(activation.forward(x, name, out), y, limit)
    assert near(activation.backward(dy, x, name, out), dx, limit)
    assert near(activation.backward(dy, x, name, dy), dx, limit)  # dx over dy
    assert near(activation.forward(x, name, x), y, limit)  # y over x


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_both_tails_keep_their_digits(name):
    """x from -9 to 9: the relative error of each value, where 1 + erf(x) and 1 + tanh(x) have none left."""
    x = torch.linspace(-9, 9, 40001)[None]
    y = activation.forward(x, name)
    z = x.double()
    s = {
        "gelu": lambda: 0.5 * torch.erfc(-z * 0.5**0.5),
        "gelu_tanh": lambda: torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
        "silu": lambda: torch.sigmoid(z),
    }[name]()
    relative = (y / (z * s) - 1).abs()[:, x[0] != 0]
    assert relative.max() < 1.5e-5 and relative[:, z[0, x[0] != 0] > -1].max() < 5e-7


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (0, 4), (2, 3, 5)])
def test_any_number_of_dimensions(shape):
    x = torch.randn(shape, requires_grad=True)
    y = activation.gelu(x)
    assert y.shape == x.shape
    (dx,) = torch.autograd.grad(y, x, torch.ones(()).expand(shape))
    torch.testing.assert_close(dx, torch.autograd.grad(plain(x, "gelu"), x, torch.ones(shape))[0])


def test_an_upstream_gradient_stays_as_it_is():
    x, dy = torch.randn(5, 20, requires_grad=True), torch.randn(5, 20)
    before = dy.clone()
    y = activation.silu(x)
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(dy, before)


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), 1e4, -1e4, 88.8, -88.8, 0.0])
def test_extremes_are_what_pytorch_gives(value, name):
    x = torch.full((1, 17), value)
    y, dx = exact_results(torch.ones_like(x), x, name)
    torch.testing.assert_close(activation.forward(x, name).double(), y, equal_nan=True, rtol=1e-5, atol=1e-30)
    found = activation.backward(torch.ones_like(x), x, name)
    torch.testing.assert_close(found.double(), dx, equal_nan=True, rtol=1e-5, atol=1e-30)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="approximate='sigmoid' must be"):
        activation.gelu(x, approximate="sigmoid")
    with pytest.raises(ValueError, match="activation='relu' is none of silu, gelu, gelu_tanh"):
        activation.forward(x, "relu")
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        activation.forward(x[0], "silu")
    for bad in (torch.zeros(2, 4), x.bfloat16(), torch.zeros(3, 2).t()):
        with pytest.raises(ValueError, match="out is"):
            activation.forward(x, "silu", bad)
        with pytest.raises(ValueError, match="out is"):
            activation.backward(x, x, "silu", bad)
    with pytest.raises(ValueError, match="dy is"):
        activation.backward(x.bfloat16(), x, "silu")
