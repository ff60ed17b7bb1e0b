"""8-bit moments: the code books, quantisation to the nearest entry, the same codes everywhere, training with them."""

import pytest
import torch

from helpers_kernels import each_of
from leantune_kernels.adamw import AdamWTable
from leantune_kernels.adamw_8bit import AdamW8bitTable, adamw_8bit_step, zero_states
from leantune_kernels.adamw_8bit.code_book import BLOCK, CELLS, book, boundaries, cells, decode, encode

implementation = each_of("reference", "cpu", "triton", "cuda")


@pytest.mark.parametrize("signed", [True, False])
def test_books_are_the_papers(signed):
    entries = book(signed)
    assert len(entries) == 256 and (entries.diff() > 0).all()
    assert entries[127 if signed else 0] == 0 and entries[255] == 1
    top = entries[entries >= 0.1][:-1].double()
    parts = 64 if signed else 128  # of the decade from 0.1 to 1
    assert len(top) == parts
    torch.testing.assert_close(top, 0.1 + 0.9 * (torch.arange(parts).double() + 0.5) / parts, rtol=1e-6, atol=0)
    smallest = float(entries[entries > 0][0])
    assert smallest == pytest.approx(5.5e-7 if signed else 3.25e-7)
    if signed:
        assert torch.equal(entries[:127], -entries[128:255].flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_entry(signed):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8 * BLOCK, generator=g) * 10.0 ** torch.randint(-7, 1, (8 * BLOCK,), generator=g)
    x = x if signed else x.abs()
    codes, absmax = encode(x, signed)
    scaled = x / absmax.repeat_interleave(BLOCK)
    distance = (scaled.double()[:, None] - book(signed).double()).abs()
    found = distance.gather(1, codes.long()[:, None])[:, 0]
    assert (found <= distance.amin(1) + 1e-7).all()
    assert torch.equal(encode(decode(codes, absmax, signed), signed)[0], codes)


@pytest.mark.parametrize("signed", [True, False])
def test_cells_say_what_a_search_says(signed):
    edges, entry = boundaries(signed), cells(signed)
    assert entry.shape == (CELLS,)
    near = torch.cat((edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(2.0))))
    x = torch.cat((near, torch.rand(2000), torch.rand(2000) * 1e-6, torch.tensor([0.0, 1.0, 1.0 + 2**-23, 1e-30])))
    bits = x.view(torch.int32)
    found = entry[((bits >> 16) - (104 << 7)).clamp(0, CELLS - 1)]
    rank = (found >> 16) + ((bits & 0xFFFF) > (found & 0xFFFF)).int()
    assert torch.equal(rank.long(), torch.searchsorted(edges, x))


def step_from_nothing(grad, n, **numbers):
    """One step with beta 0, after which the moments are the gradient and its square, without any rounding."""
    params = [torch.zeros(n)]
    states = zero_states(params)
    adamw_8bit_step(params, [grad], *states, step=1, lr=0.0, beta1=0.0, beta2=0.0, **numbers)
    return [t[0] for t in states]


@pytest.mark.parametrize("n", [1, 255, 256, 300, 1024, 16384 + 700])
def test_same_codes_in_every_implementation(implementation, n):
    g = torch.Generator().manual_seed(n)
    grad = (torch.randn(n, generator=g) * 10.0 ** torch.randint(-4, 1, (n,), generator=g)).bfloat16().float()
    grad[:: max(1, n // 5)] = 0
    codes_m, absmax_m, codes_v, absmax_v = step_from_nothing(grad, n)  # squares of bf16 numbers are exact
    for codes, absmax, wanted in [
        (codes_m, absmax_m, encode(grad, signed=True)),
        (codes_v, absmax_v, encode(grad.square(), signed=False)),
    ]:
        assert torch.equal(codes, wanted[0]) and torch.equal(absmax, wanted[1])


def test_zero_and_tiny_blocks(implementation):
    grad = torch.zeros(600)
    grad[300] = 1e-30
    codes_m, absmax_m, _, absmax_v = step_from_nothing(grad, 600)
    assert absmax_m.tolist() == [0.0, pytest.approx(1e-30), 0.0] and absmax_v.max() == 0
    assert codes_m[300] == 255 and (codes_m[torch.arange(600) != 300] == 127).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under Triton's interpreter
def test_infinity_and_nan_stay_in_sight(implementation):
    grad = torch.ones(3 * BLOCK)
    grad[5], grad[BLOCK + 5] = torch.nan, torch.inf
    params = [torch.ones(3 * BLOCK)]
    states = zero_states(params)
    for step in (1, 2):
        adamw_8bit_step(params, [grad], *states, step=step, lr=0.1)
    assert not params[0][:BLOCK].isfinite().any() and not params[0][BLOCK + 5].isfinite()
    assert params[0][2 * BLOCK :].isfinite().all()
    assert states[1][0].isfinite().tolist() == [False, False, True]


def test_two_bytes_a_parameter():
    params = [torch.zeros(64, 100), torch.zeros(7)]
    size = sum(t.numel() * t.element_size() for states in zero_states(params) for t in states)
    assert size <= 2.05 * sum(p.numel() for p in params) + 8


def regression(table_of, steps):
    """Mean squared error after training a small network; weights of every run start alike."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 32, generator=g), torch.randn(32, 1, generator=g)
    y = torch.tanh(x @ target)
    params = [torch.randn(shape, generator=g) * 0.2 for shape in ((32, 48), (48,), (48, 1))]
    table = table_of(params)
    for step in range(1, steps + 1):
        leaves = [p.requires_grad_() for p in params]
        loss = (torch.tanh(x @ leaves[0] + leaves[1]) @ leaves[2] - y).square().mean()
        grads = list(torch.autograd.grad(loss, leaves))
        for p in params:
            p.requires_grad_(False)
        table.step(grads, step=step, lr=1e-2)
    return loss.item(), params


def test_training_follows_adamw_with_fp32_moments(monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")
    exact, _ = regression(lambda ps: AdamWTable(ps, *([torch.zeros_like(p) for p in ps] for _ in range(2))), 150)
    found, _ = regression(lambda ps: AdamW8bitTable(ps, *zero_states(ps)), 150)
    assert exact < 0.01 and found < 1.3 * exact + 1e-3


def test_training_is_the_same_in_every_implementation(implementation):
    _, found = regression(lambda ps: AdamW8bitTable(ps, *zero_states(ps)), 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANTUNE_IMPL", "reference")
        _, wanted = regression(lambda ps: AdamW8bitTable(ps, *zero_states(ps)), 5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)  # a code next to a boundary may differ
