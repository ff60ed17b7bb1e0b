"""SwiGLU: the raw forms on halves of one buffer, the in-place backward, inputs that stay as they were."""

import pytest
import torch

from leantune_kernels import swiglu
from leantune_kernels.swiglu.reference import plain
from leantune_kernels.testing import error


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", request.param)
    torch.manual_seed(0)


@pytest.mark.parametrize(("rows", "cols"), [(1, 7), (7, 33), (33, 48), (0, 5)])
def test_in_place_backward_on_the_halves_of_one_buffer(rows, cols):
    both = torch.randn(rows, 2 * cols)
    gate, up = both[:, :cols], both[:, cols:]
    dh = torch.randn(rows, cols + 3)[:, :cols]
    exact = [t.double().requires_grad_() for t in (gate, up)]
    h = plain(*exact)
    wanted = [h.detach(), *torch.autograd.grad(h, exact, dh.double())]
    results = swiglu.backward_(dh, gate, up)
    for result, place, truth in zip(results, (dh, gate, up), wanted, strict=True):
        assert result is place
        assert error(result, truth) < 5e-7


def test_forward_writes_out_and_may_overwrite_an_input():
    both = torch.randn(9, 42)
    gate, up = both[:, :21], both[:, 21:]
    wanted = plain(gate, up)
    out = torch.full((9, 30), float("nan"))
    assert swiglu.forward(gate, up, out[:, :21]).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:, :21], wanted)
    assert out[:, 21:].isnan().all()
    swiglu.forward(gate, up, gate)
    torch.testing.assert_close(gate, wanted)


def test_public_backward_keeps_inputs_and_upstream_gradient():
    gate, up, dh = (torch.randn(5, 20, requires_grad=True) for _ in range(3))
    before = [t.detach().clone() for t in (gate, up, dh)]
    h = swiglu.swiglu(gate, up)
    first = torch.autograd.grad(h, (gate, up), dh.detach(), retain_graph=True)
    second = torch.autograd.grad(h, (gate, up), dh.detach())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, up, dh), before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), 1e4, -1e4, 88.8, -88.8, 0.0])
def test_extreme_gates_are_what_pytorch_gives(value):
    gate, up = torch.full((1, 17), value, requires_grad=True), torch.full((1, 17), 0.5)
    results, wanted = [], []
    for function, found in ((swiglu.swiglu, results), (plain, wanted)):
        h = function(gate, up)
        found += [h, *torch.autograd.grad(h, gate, torch.ones_like(h))]
    for a, b in zip(results, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-30)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="same shape and dtype"):
        swiglu.swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    x = torch.zeros(2, 3)
    for bad in (torch.zeros(2, 4), x.bfloat16(), torch.zeros(3, 2).t()):
        with pytest.raises(ValueError, match="dh is"):
            swiglu.backward_(bad, x, x)
        with pytest.raises(ValueError, match="up is"):
            swiglu.backward_(x, x, bad)
        with pytest.raises(ValueError, match="out is"):
            swiglu.forward(x, x, bad)
    with pytest.raises(ValueError, match=r"up is torch\.bfloat16"):
        swiglu.forward(x, x.bfloat16())
    with pytest.raises(ValueError, match="gate has shape"):
        swiglu.forward(x[0], x[0])
