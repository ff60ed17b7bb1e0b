"""AdamW against torch.optim.AdamW in fp64 over many steps, and the list of tensors that it takes."""

import pytest
import torch

from helpers_kernels import each_of
from leantune_kernels.adamw import AdamWTable, adamw_step

SHAPES = [(7,), (64, 33), (0, 5), (), (3, 8192)]

implementation = each_of("reference", "cpu", "cuda")


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in SHAPES]


def zeros():
    return [torch.zeros(shape) for shape in SHAPES]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fifty_steps_of_torch_adamw(implementation, grad_dtype):
    lr, decay = [1e-2, 1e-3, 1e-3, 1e-2, 3e-3], [0.1, 0.0, 0.1, 0.0, 0.5]
    params, m, v = tensors(), zeros(), zeros()
    exact = [p.double().requires_grad_() for p in params]
    groups = [{"params": [p], "lr": a, "weight_decay": w} for p, a, w in zip(exact, lr, decay, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    table = AdamWTable(params, m, v)
    for step in range(1, 51):
        grads = [g.to(grad_dtype) for g in tensors(seed=step)]
        numbers = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "grad_scale": 0.5}
        table.step(grads, step=step, lr=lr, weight_decay=decay, **numbers)
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double() * 0.5
        optimizer.step()
    for p, m_p, v_p, e in zip(params, m, v, exact, strict=True):
        torch.testing.assert_close(p.double(), e.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(m_p.double(), optimizer.state[e]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v_p.double(), optimizer.state[e]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


def test_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params, m, v = tensors(), zeros(), zeros()
            for step in (1, 2):
                adamw_step(params, tensors(seed=step), m, v, step=step, lr=1e-2, weight_decay=0.1)
            results.append([*params, *m, *v])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_a_tensor_without_gradient_is_left_alone_and_others_get_theirs_from_any_strides():
    params, m, v = tensors(), zeros(), zeros()
    before = [p.clone() for p in params]
    grads = tensors(seed=1)
    grads[1] = grads[1].t().contiguous().t()
    grads[0], grads[4] = None, torch.ones(()).expand(3, 8192)
    adamw_step(params, grads, m, v, step=1, lr=1e-2, weight_decay=0.1)
    assert torch.equal(params[0], before[0]) and m[0].abs().max() == v[0].abs().max() == 0
    torch.testing.assert_close(params[1], before[1] * (1 - 1e-3) - 1e-2 * grads[1].sign(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(params[4], before[4] * (1 - 1e-3) - 1e-2, rtol=1e-5, atol=1e-6)


def test_parameters_that_require_gradients_are_updated_in_place_and_nan_is_not_hidden():
    p = torch.nn.Parameter(torch.ones(5))
    grad = torch.tensor([1.0, torch.nan, 1.0, torch.inf, 1.0])
    adamw_step([p], [grad], [torch.zeros(5)], [torch.zeros(5)], step=1, lr=0.5)
    assert p.isnan().tolist() == [False, True, False, True, False]
    assert p[0].item() == pytest.approx(0.5)


def test_no_tensors():
    adamw_step([], [], [], [], step=1, lr=1e-3)


def test_errors_name_the_tensor():
    p, other = torch.zeros(4, 3), torch.zeros(3, 4).t()
    for arguments, message in [
        (([p, other], [p, p], [p, p], [p, p]), r"params\[1\] .*must be contiguous"),
        (([p, p], [p, p], [p, other], [p, p]), r"exp_avgs\[1\]"),
        (([p], [p], [p], [p.double()]), r"exp_avg_sqs\[0\] is torch.float64"),
        (([p], [p], [p], []), "exp_avg_sqs has 0 tensors"),
        (([p], [p[0]], [p], [p]), r"grads\[0\] is torch.float32 of shape \(3,\)"),
        (([p], [], [p], [p]), "grads has 0 entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            adamw_step(*arguments, step=1, lr=1e-3)
    for numbers, message in [
        ({"step": 0, "lr": 1e-3}, "step=0"),
        ({"step": 1, "lr": [1e-3, 1e-3]}, "lr has 2 numbers"),
        ({"step": 1, "lr": 1e-3, "beta2": 1.0}, "beta2=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            adamw_step([p], [p], [p.clone()], [p.clone()], **numbers)


@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e-30])
def test_gradients_of_any_size_update_as_in_torch(implementation, eps):
    """Where the moments under- or overflow, and where eps is 0; each beside ordinary elements of the same vector."""
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1e-23, 1e-19, 1e-12, 1e-5, 1.0, 1e8, 1e18, 1e20, 1e38, torch.inf])
    grad = torch.cat([sizes, -sizes, torch.tensor([torch.nan]), torch.ones(31)])[torch.randperm(58)].contiguous()
    p = torch.zeros_like(grad)
    theirs = p.clone().requires_grad_()
    theirs.grad = grad.clone()
    torch.optim.AdamW([theirs], lr=1.0, eps=eps, weight_decay=0.0).step()
    adamw_step([p], [grad], [torch.zeros_like(p)], [torch.zeros_like(p)], step=1, lr=1.0, eps=eps)
    ordinary = (grad == 0) | (grad.abs() > 1e-18)  # below, squares are subnormal and lose their digits, ours and theirs
    torch.testing.assert_close(p[ordinary], theirs.detach()[ordinary], rtol=2e-6, atol=0, equal_nan=True)
    assert torch.equal(p.isfinite(), theirs.detach().isfinite())
