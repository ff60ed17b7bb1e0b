"""grad_norm and clip_factor against PyTorch's own clipping."""

import math

import pytest
import torch

from leantune_kernels.grad_norm import clip_factor, grad_norm

IMPLEMENTATIONS = ["reference", "cpu"]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", request.param)


def test_mixed_types_strides_and_absent_gradients():
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, 37, generator=g) for n in (1, 0, 300, 5)]
    grads = [grads[0].bfloat16(), grads[1], grads[2].t(), grads[3].half(), torch.ones(()).expand(9, 9)]
    exact = math.sqrt(sum(float(t.double().square().sum()) for t in grads))
    assert grad_norm([None, *grads, None]) == pytest.approx(exact, rel=1e-6)


def test_nothing_is_zero():
    assert grad_norm([]) == grad_norm([None]) == grad_norm([torch.empty(0)]) == 0.0


def test_infinity_and_nan_reach_the_norm():
    grads = [torch.ones(10_000), torch.ones(3)]
    grads[0][9_999] = torch.inf
    assert grad_norm(grads) == math.inf
    grads[1][0] = torch.nan
    assert math.isnan(grad_norm(grads))


def test_many_equal_elements_are_summed_without_drift():
    assert grad_norm([torch.full((1 << 22,), 0.1)]) == pytest.approx(0.1 * 2**11, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_factor_is_torchs(max_norm):
    p = torch.nn.Parameter(torch.zeros(50))
    p.grad = torch.randn(50, generator=torch.Generator().manual_seed(0))
    expected = p.grad * clip_factor(grad_norm([p.grad]), max_norm)
    torch.nn.utils.clip_grad_norm_([p], max_norm)
    torch.testing.assert_close(p.grad, expected)


def test_clip_factor_of_what_is_not_finite():
    assert clip_factor(math.inf, 1.0) == 0.0 and math.isnan(clip_factor(math.nan, 1.0))


def test_error_names_the_tensor():
    with pytest.raises(ValueError, match=r"grads\[1\] is torch.float64"):
        grad_norm([torch.ones(2), torch.ones(2, dtype=torch.float64)])
