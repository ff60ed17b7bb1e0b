"""grad_norm and clip_factor against PyTorch's own clipping."""

import math

import pytest
import torch

from helpers_kernels import each_of
from leantune_kernels.grad_norm import clip_factor, clip_grad_norm_, grad_norm, grad_norm_tensor

implementation = each_of("reference", "cpu", "triton", "cuda", autouse=True)


def test_mixed_types_strides_and_absent_gradients():
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, 37, generator=g) for n in (1, 0, 300, 5)]
    grads = [grads[0].bfloat16(), grads[1], grads[2].t(), grads[3].half(), torch.ones(()).expand(9, 9)]
    exact = math.sqrt(sum(float(t.double().square().sum()) for t in grads))
    assert grad_norm([None, *grads, None]) == pytest.approx(exact, rel=1e-6)


def test_more_pieces_than_a_block_adds_at_once():
    grads = list(torch.arange(1.0, 1031).split(1))
    assert grad_norm(grads) == pytest.approx(math.sqrt(1030 * 1031 * 2061 / 6), rel=1e-6)


def test_nothing_is_zero():
    assert grad_norm([]) == grad_norm([None]) == grad_norm([torch.empty(0)]) == 0.0


def test_infinity_and_nan_reach_the_norm():
    grads = [torch.ones(10_000), torch.ones(3)]
    grads[0][9_999] = torch.inf
    assert grad_norm(grads) == math.inf
    grads[1][0] = torch.nan
    assert math.isnan(grad_norm(grads))


def test_many_equal_elements_are_summed_without_drift():
    assert grad_norm([torch.full((1 << 20,), 0.1)]) == pytest.approx(0.1 * 2**10, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_factor_is_torchs(max_norm):
    p = torch.nn.Parameter(torch.zeros(50))
    p.grad = torch.randn(50, generator=torch.Generator().manual_seed(0))
    expected = p.grad * clip_factor(grad_norm([p.grad]), max_norm)
    torch.nn.utils.clip_grad_norm_([p], max_norm)
    torch.testing.assert_close(p.grad, expected)


def test_clip_factor_of_what_is_not_finite():
    assert clip_factor(math.inf, 1.0) == 0.0 and math.isnan(clip_factor(math.nan, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping_in_place_is_torchs(max_norm, dtype):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=g).to(dtype) for n in (1, 0, 17000, 33)]
    leaves = [torch.nn.Parameter(torch.zeros(t.shape)) for t in grads]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.float().clone()
    norm = clip_grad_norm_([None, *grads], max_norm)
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(leaves, max_norm)), rel=1e-5)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(grad, leaf.grad.to(dtype), rtol=2e-5 if dtype == torch.float32 else 0.01, atol=1e-9)


def test_gradients_within_the_norm_keep_their_bits_and_odd_addresses_work():
    grads = [torch.randn(301)[1:], torch.full((9,), -0.0)]
    before = [g.clone() for g in grads]
    norm = clip_grad_norm_(grads, 1e3)
    assert norm.dim() == 0 and all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    clip_grad_norm_(grads, float(norm) / 4)
    torch.testing.assert_close(grads[0], before[0] / 4, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under Triton's interpreter
def test_clipping_what_is_not_finite_is_torchs():
    for bad in (math.inf, math.nan):
        grads = [torch.tensor([1.0, bad, -2.0])]
        leaf = torch.nn.Parameter(torch.zeros(3))
        leaf.grad = grads[0].clone()
        clip_grad_norm_(grads, 1.0)
        torch.nn.utils.clip_grad_norm_(leaf, 1.0)
        torch.testing.assert_close(grads[0], leaf.grad, equal_nan=True)


def test_nothing_to_clip():
    assert float(clip_grad_norm_([], 1.0)) == float(clip_grad_norm_([None], 1.0)) == 0.0
    assert float(grad_norm_tensor([torch.empty(0)])) == 0.0


def test_errors_of_clipping_name_the_argument():
    with pytest.raises(ValueError, match="max_norm=-1.0"):
        clip_grad_norm_([torch.ones(2)], -1.0)
    with pytest.raises(ValueError, match=r"gradient 0 has strides \(1, 2\)"):
        clip_grad_norm_([torch.ones(3, 2).t()], 1.0)


def test_error_names_the_tensor():
    with pytest.raises(ValueError, match=r"grads\[1\] is torch.float64"):
        grad_norm([torch.ones(2), torch.ones(2, dtype=torch.float64)])
