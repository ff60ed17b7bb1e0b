"""lora_linear and lora_linear_group: groups against singles, dropout's mask, any subset of gradients, any shape."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import dropout, low_rank
from leantune_kernels.low_rank.reference import plain

implementation = each_of("reference", "cpu", "triton", "cuda", autouse=True)


def layer(inputs, outputs, rank, bias=True, dtype=torch.float32):
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    A, B = torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank) / rank**0.5
    return low_rank.LoRALayer(weight, torch.randn(outputs).to(dtype) if bias else None, A, B, 1.5)


def leaves(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.3, "seed": 5, "offset": 7}], ids=["plain", "dropout"])
def test_a_group_gives_what_its_members_give_alone(dropout):
    x = torch.randn(2, 19, 40)
    layers = [layer(40, 33, 8), layer(40, 7, 3, bias=False), layer(40, 24, 70)]
    dys = [torch.randn(2, 19, one.weight.shape[0]) for one in layers]
    (together,), parts = leaves([x]), [low_rank.LoRALayer(*leaves(one[:4]), one.scale) for one in layers]
    outputs = low_rank.lora_linear_group(together, parts, **dropout)
    torch.autograd.backward(outputs, dys)
    (apart,) = leaves([x])
    for one, grouped, output, dy in zip(layers, parts, outputs, dys, strict=True):
        tensors = leaves(one[:4])
        alone = low_rank.lora_linear(apart, *tensors, one.scale, **dropout)
        torch.testing.assert_close(output, alone, rtol=1e-5, atol=1e-5)
        alone.backward(dy)
        for a, b in zip(grouped[:4], tensors, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together.grad, apart.grad, rtol=1e-5, atol=1e-4)


def test_a_member_whose_output_is_not_used_gets_no_gradient():
    x = torch.randn(9, 20, requires_grad=True)
    layers = [low_rank.LoRALayer(*leaves(layer(20, 12, 4)[:4]), 1.0) for _ in range(3)]
    low_rank.lora_linear_group(x, layers)[1].sum().backward()
    assert all(t.grad is None for i in (0, 2) for t in layers[i][:4])
    assert all(t.grad is not None for t in layers[1][:4])
    (alone,) = leaves([x])
    low_rank.lora_linear(alone, *leaves(layers[1][:4]), 1.0).sum().backward()
    torch.testing.assert_close(x.grad, alone.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [w for n in range(6) for w in itertools.combinations(range(5), n)])
def test_gradients_of_any_subset(wanted):
    one = layer(17, 11, 3)
    values, names = [torch.randn(6, 17), *one[:4]], ("x", "weight", "bias", "A", "B")
    given = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(values)]
    y = low_rank.lora_linear(*given, 1.5)
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    exact = [v.double().requires_grad_() for v in values]
    dy = torch.randn(6, 11)
    plain(*exact, 1.5).backward(dy.double())
    y.backward(dy)
    for i, (found, truth) in enumerate(zip(given, exact, strict=True)):
        assert (found.grad is not None) == (i in wanted), names[i]
        if i in wanted:
            torch.testing.assert_close(found.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_no_grad():
    x = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        assert not low_rank.lora_linear(x, *layer(8, 5, 2)[:4], 1.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_that_of_dropout_both_ways(dtype):
    """With a weight of zeros and factors of ones on the diagonal, y is dropout(x) and dx is dropout(dy)."""
    size, eye = 24, torch.eye(24)
    x = torch.randn(13, size).to(dtype).requires_grad_()
    key = {"seed": 2**63 + 5, "offset": 2**33 + 3}
    y = low_rank.lora_linear(x, torch.zeros(size, size, dtype=dtype), None, eye, eye, 1.0, dropout_p=0.3, **key)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-3}
    torch.testing.assert_close(y, dropout.dropout(x, 0.3, **key), **close)
    dy = torch.randn(13, size).to(dtype)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dropout.dropout(dy, 0.3, **key), **close)
    assert 0.5 < (y != 0).float().mean() < 0.9


def test_going_backward_twice_adds_the_same_again_and_changes_no_input():
    x = torch.randn(21, 30, requires_grad=True)
    layers = [low_rank.LoRALayer(*leaves(layer(30, 14, 5)[:4]), 2.0) for _ in range(2)]
    outputs = low_rank.lora_linear_group(x, layers)
    dys = [torch.randn(21, 14) for _ in layers]
    kept = [dy.clone() for dy in dys]
    torch.autograd.backward(outputs, dys, retain_graph=True)
    tensors = [x, *(t for one in layers for t in one[:4])]
    once = [t.grad.clone() for t in tensors]
    torch.autograd.backward(outputs, dys)
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(tensors, once, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(dys, kept, strict=True))


def test_zero_stride_upstream_gradient_of_a_group():
    x = torch.randn(10, 16, requires_grad=True)
    layers = [low_rank.LoRALayer(*leaves(layer(16, 6, 4)[:4]), 1.0) for _ in range(2)]
    wanted = [x, *(t for one in layers for t in one[:4])]
    outputs = low_rank.lora_linear_group(x, layers)
    dense = torch.autograd.grad(outputs, wanted, [torch.ones(10, 6)] * 2, retain_graph=True)
    strided = torch.autograd.grad(outputs, wanted, [torch.ones(()).expand(10, 6)] * 2)
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.integers(0, 70),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 140),
    rank=st.one_of(st.integers(1, 20), st.sampled_from([33, 64, 65, 80])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_rank(rows, inputs, outputs, rank, dtype, seed):
    """Errors are held against the same sums of magnitudes: a result near zero is as exact as its terms allow."""
    torch.manual_seed(seed)
    one, x = layer(inputs, outputs, rank, dtype=dtype), torch.randn(rows, inputs).to(dtype)
    dy = torch.randn(rows, outputs).to(dtype)

    def results(function, values, upstream):
        values = [v.requires_grad_() for v in values]
        y = function(*values, 1.5)
        return [y.detach(), *torch.autograd.grad(y, values, upstream)]

    values = [x, *one[:4]]
    found = results(low_rank.lora_linear, [v.clone() for v in values], dy)
    truth = results(plain, [v.double() for v in values], dy.double())
    sizes = results(plain, [v.double().abs() for v in values], dy.double().abs())
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for value, exact, size in zip(found, truth, sizes, strict=True):
        assert (value.double() - exact).norm() <= limit * size.norm()


def test_errors_name_the_argument():
    x, one = torch.zeros(3, 8), layer(8, 4, 2)
    with pytest.raises(ValueError, match="0 layers in a group"):
        low_rank.lora_linear_group(x, [])
    with pytest.raises(ValueError, match="17 layers in a group; it takes 1 to 16"):
        low_rank.lora_linear_group(x, [one] * 17)
    with pytest.raises(ValueError, match="p=1.0 is outside"):
        low_rank.lora_linear(x, *one[:4], 1.0, dropout_p=1.0)
    with pytest.raises(ValueError, match="bias is"):
        low_rank.lora_linear_group(x, [one._replace(bias=torch.zeros(5))])
