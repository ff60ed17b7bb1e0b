"""The raw low-rank products against fp64: odd sizes, strided slices, poisoned outputs, sums, groups."""

import pytest
import torch

from helpers_kernels import each_of
from leantune_kernels import low_rank
from leantune_kernels.testing import error

SIZES = [
    (1, 5, 3, 1),
    (7, 33, 50, 5),
    (33, 48, 17, 8),
    (100, 576, 192, 16),
    (61, 100, 130, 64),
    (9, 20, 300, 256),
]


implementation = each_of("reference", "cpu:base", "cpu:avx2", "cpu:avx512", "triton", "cuda", autouse=True)


def inside(values, before=3, after=4):
    """The same values as a column slice of a wider buffer that holds NaN elsewhere."""
    wide = torch.full((values.shape[0], before + values.shape[1] + after), float("nan"), dtype=values.dtype)
    part = wide[:, before : before + values.shape[1]]
    part.copy_(values)
    return wide, part


def poisoned(*shape):
    return inside(torch.full(shape, float("nan")))


def factors(inputs, outputs, rank):
    return torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank) / rank**0.5


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), SIZES)
def test_gradients_of_strided_slices(rows, inputs, outputs, rank):
    (_, x), (_, dy) = inside(torch.randn(rows, inputs)), inside(torch.randn(rows, outputs))
    A, B = factors(inputs, outputs, rank)
    (wide_dA, dA), (_, dB) = poisoned(rank, inputs), poisoned(outputs, rank)
    results = low_rank.gradients(x, dy, A, B, 0.5, dA, dB)
    exact_dA = 0.5 * (dy.double() @ B.double()).t() @ x.double()
    exact_dB = 0.5 * dy.double().t() @ (x.double() @ A.double().t())
    assert results[0] is dA and results[1] is dB
    assert error(dA, exact_dA) < 1e-6 and error(dB, exact_dB) < 1e-6
    assert wide_dA.isnan().sum() == wide_dA.numel() - dA.numel()

    low_rank.gradients(x, dy, A, B, 0.5, dA, dB, accumulate=True)
    assert error(dA, 2 * exact_dA) < 1e-6 and error(dB, 2 * exact_dB) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_that_shares_its_input_is_what_its_members_give_alone(dtype, implementation):
    # Tensor cores multiply S, dS and the factors rounded to x's dtype, as plain PyTorch does; elsewhere they are fp32.
    limit = torch.finfo(dtype).eps if implementation == "cuda" and dtype != torch.float32 else 1e-6
    x, dy = torch.randn(130, 48).to(dtype), torch.randn(130, 100).to(dtype)
    adapters = []
    for part, rank in zip(dy.split([60, 17, 23], dim=1), (16, 5, 8), strict=True):
        adapters.append(low_rank.Adapter(part, *factors(48, part.shape[1], rank), scale=float(rank)))
    for (dA, dB), adapter in zip(low_rank.gradients_group(x, adapters), adapters, strict=True):
        exact = [t.double() for t in (x, adapter.dy, adapter.A, adapter.B)]
        assert error(dA, adapter.scale * (exact[1] @ exact[3]).t() @ exact[0]) < limit
        assert error(dB, adapter.scale * exact[1].t() @ (exact[0] @ exact[2].t())) < limit
        alone = low_rank.gradients(x, *adapter)
        torch.testing.assert_close((dA, dB), alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_input_gradient_of_a_group_is_rounded_once(dtype, implementation):
    if implementation.startswith("cpu"):
        pytest.skip("the vendor's products round dx after each layer, as native_impl says")
    x = torch.randn(70, 48).to(dtype).requires_grad_()
    layers, exact = [], torch.zeros(70, 48, dtype=torch.float64)
    for outputs, rank in ((60, 16), (17, 5), (33, 8), (40, 3)):
        A, B = (factor.to(dtype).float() for factor in factors(48, outputs, rank))
        layers.append(low_rank.LoRALayer(torch.randn(outputs, 48).to(dtype), None, A, B, 0.001))
    dys = [torch.randn(70, layer.weight.shape[0]).to(dtype) for layer in layers]
    for (weight, _, A, B, scale), dy in zip(layers, dys, strict=True):
        exact += dy.double() @ (weight.double() + scale * B.double() @ A.double())
    (dx,) = torch.autograd.grad(low_rank.lora_linear_group(x, layers), x, dys)
    assert (dx != exact.to(dtype)).double().mean() < 0.01  # a second rounding changes some 30%


def test_gradients_of_no_rows_are_zero_and_accumulating_them_changes_nothing():
    A, B = factors(20, 30, 4)
    x, dy = torch.empty(0, 20), torch.empty(0, 30)
    dA, dB = low_rank.gradients(x, dy, A, B, 1.0, torch.full_like(A, float("nan")), torch.full_like(B, float("nan")))
    assert not dA.any() and not dB.any()
    dA, dB = low_rank.gradients(x, dy, A, B, 1.0, torch.ones_like(A), torch.ones_like(B), accumulate=True)
    assert (dA == 1).all() and (dB == 1).all()


def test_gradients_over_many_chunks_have_the_same_bits_for_any_number_of_threads():
    x, dy, (A, B) = torch.randn(1000, 80), torch.randn(1000, 33), factors(80, 33, 8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (before, 1, 3):
            torch.set_num_threads(threads)
            results.append(low_rank.gradients(x, dy, A, B, 1.0))
    finally:
        torch.set_num_threads(before)
    if low_rank.OP.pick(x).__name__.endswith("reference"):
        return  # plain PyTorch makes no such promise
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), SIZES)
def test_merge_into_a_slice(rows, inputs, outputs, rank, dtype):
    A, B = factors(inputs, outputs, rank)
    _, weight = inside(torch.randn(outputs, inputs).to(dtype))
    wide, out = poisoned(outputs, inputs)
    assert low_rank.merge(weight, A, B, 0.25, out) is out
    assert error(out, weight.double() + 0.25 * B.double() @ A.double()) < 1e-6
    assert wide.isnan().sum() == wide.numel() - out.numel()


def test_merge_without_an_adapter_is_the_weight():
    weight = torch.randn(19, 21).half()
    assert torch.equal(low_rank.merge(weight, None, None, 1.0), weight.float())
    assert torch.equal(low_rank.merge(weight, torch.empty(0, 21), torch.empty(19, 0), 1.0), weight.float())


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), SIZES)
def test_adding_to_outputs_and_input_gradients_in_place(rows, inputs, outputs, rank):
    A, B = factors(inputs, outputs, rank)
    (_, x), (wide, y) = inside(torch.randn(rows, inputs)), inside(torch.randn(rows, outputs))
    exact_y = y.double() + 3 * x.double() @ A.double().t() @ B.double().t()
    assert low_rank.add_(y, x, A, B, 3.0) is y
    assert error(y, exact_y) < 1e-6
    assert wide.isnan().sum() == wide.numel() - y.numel()

    dx = torch.randn(rows, inputs)
    exact_dx = dx.double() + 3 * y.double() @ B.double() @ A.double()
    assert low_rank.input_gradient_(dx, y, A, B, 3.0) is dx
    assert error(dx, exact_dx) < 1e-6


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, (A, B) = torch.randn(2, 3, 20), torch.randn(30, 20), factors(20, 30, 4)
    A.requires_grad_()
    y = low_rank.lora_linear(x, weight, None, A, B, 1.0)
    assert y.shape == (2, 3, 30)
    y.sum().backward()
    assert A.grad is not None and x.grad is None and weight.grad is None and B.grad is None


def test_nan_in_one_row_reaches_exactly_that_row():
    x, (A, B) = torch.randn(20, 40), factors(40, 50, 16)
    x[3, 7] = float("nan")
    y = low_rank.add_(torch.zeros(20, 50), x, A, B, 1.0)
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


def test_errors_name_the_argument():
    x, dy, weight, (A, B) = torch.zeros(4, 6), torch.zeros(4, 5), torch.zeros(5, 6), factors(6, 5, 2)
    with pytest.raises(ValueError, match=r"A and B have shapes \(2, 6\) and \(4, 2\)"):
        low_rank.merge(weight, A, B[:4], 1.0)
    with pytest.raises(ValueError, match="use float32, in which adapters are trained"):
        low_rank.merge(weight, A.half(), B.half(), 1.0)
    with pytest.raises(ValueError, match="out is"):
        low_rank.merge(weight, A, B, 1.0, torch.empty(6, 5))
    with pytest.raises(ValueError, match="dy is"):
        low_rank.gradients(x, dy[:3], A, B, 1.0)
    with pytest.raises(ValueError, match="only one of dA and dB"):
        low_rank.gradients(x, dy, A, B, 1.0, dA=A)
    with pytest.raises(ValueError, match="accumulate=True needs dA and dB"):
        low_rank.gradients(x, dy, A, B, 1.0, accumulate=True)
    with pytest.raises(ValueError, match="y is"):
        low_rank.add_(dy[:2], x, A, B, 1.0)
    with pytest.raises(ValueError, match=r"y is torch\.bfloat16"):
        low_rank.add_(dy.bfloat16(), x, A, B, 1.0)
    with pytest.raises(ValueError, match=r"dx is torch\.bfloat16"):
        low_rank.input_gradient_(x.bfloat16(), dy, A, B, 1.0)
    with pytest.raises(ValueError, match=r"dB is torch\.float16"):
        low_rank.gradients(x, dy, A, B, 1.0, dA=A.clone(), dB=B.half())
    with pytest.raises(ValueError, match="x has shape"):
        low_rank.add_(dy, x[None], A, B, 1.0)
    with pytest.raises(ValueError, match="A and B are on cpu and meta"):
        low_rank.merge(weight, A, B.to("meta"), 1.0)
    with pytest.raises(ValueError, match="weight is"):
        low_rank.lora_linear(x.half(), weight, None, A, B, 1.0)
