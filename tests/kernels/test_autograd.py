"""autograd.call: the forward pass alone exactly where nobody asks for a gradient."""

import pytest
import torch
from torch.autograd import forward_ad

from leantune_kernels.rms_norm import rms_norm

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


def test_tangents_are_refused_and_not_dropped():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(RuntimeError, match="jvp"):
            rms_norm(x, WEIGHT)
