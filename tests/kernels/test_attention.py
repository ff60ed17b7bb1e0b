"""Packed attention: what the generic tests of test_ops.py do not cover."""

import pytest
import torch

from leantune_kernels import attention as ops
from leantune_kernels import testing
from leantune_kernels.attention.cases import cumulative
from leantune_kernels.attention.reference import plain

LENGTHS = [5, 70, 0, 33, 130]
HEADS, KV_HEADS, DIM = 4, 2, 24
SCALE = DIM**-0.5


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", request.param)
    return request.param


def qkv_slices(buffer):
    """q, k, v as slices of one projection's output [T, (Hq + 2 Hk) * D]."""
    return buffer.unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)


def random_qkv(tokens, seed=0):
    return torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(q, k, v, do, cu_seqlens, causal):
    o, lse = ops.forward(q, k, v, cu_seqlens, SCALE, causal)
    return (o, lse.T, *ops.backward(do, q, k, v, o, lse, cu_seqlens, SCALE, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_does_not_see_another(causal):
    """Not a bit of the others' outputs and gradients changes when one sequence's tokens become NaN."""
    cu_seqlens, tokens = cumulative(LENGTHS), sum(LENGTHS)
    before, after = random_qkv(tokens), random_qkv(tokens)
    changed = slice(int(cu_seqlens[1]), int(cu_seqlens[2]))
    after[changed] = float("nan")
    do = torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    first = outputs_and_gradients(*qkv_slices(before), do, cu_seqlens, causal)
    second = outputs_and_gradients(*qkv_slices(after), do, cu_seqlens, causal)
    others = torch.ones(tokens, dtype=torch.bool)
    others[changed] = False
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[others], b[others])
        assert b[changed].isnan().all()


def test_a_token_does_not_see_what_follows_it():
    cu_seqlens, tokens = cumulative([130]), 130
    before, after = random_qkv(tokens), random_qkv(tokens)
    after[77:] = 1e4 * after[77:].roll(1, 0)
    first, _ = ops.forward(*qkv_slices(before), cu_seqlens, SCALE, True)
    second, _ = ops.forward(*qkv_slices(after), cu_seqlens, SCALE, True)
    assert torch.equal(first[:77], second[:77])


def test_a_sequence_alone_gives_what_it_gives_in_a_pack(implementation):
    if implementation == "reference":
        pytest.skip("torch.matmul promises no equal bits across shapes")
    cu_seqlens, buffer = cumulative(LENGTHS), random_qkv(sum(LENGTHS))
    do = torch.randn(sum(LENGTHS), HEADS, DIM)
    packed = outputs_and_gradients(*qkv_slices(buffer), do, cu_seqlens, True)
    for i, length in enumerate(LENGTHS):
        part = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        alone = outputs_and_gradients(*qkv_slices(buffer[part]), do[part], cumulative([length]), True)
        for a, b in zip(packed, alone, strict=True):
            assert torch.equal(a[part], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_slices_of_one_buffer_in_and_out(dtype):
    """q, k, v and dq, dk, dv as strided views; results fill NaN-filled memory, and nothing beside it."""
    cu_seqlens, tokens = cumulative(LENGTHS), sum(LENGTHS)
    buffer = random_qkv(tokens).to(dtype)
    q, k, v = qkv_slices(buffer)
    do = torch.randn(tokens, HEADS, DIM).to(dtype)
    dense = ops.forward(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, SCALE, True)
    wide = torch.full((tokens, HEADS + 1, DIM + 3), float("nan"), dtype=dtype)
    out = wide[:, 1:, :DIM]
    o, lse = ops.forward(q, k, v, cu_seqlens, SCALE, True, out=out)
    assert o.data_ptr() == out.data_ptr()
    assert torch.equal(out, dense[0])
    assert torch.equal(lse, dense[1])
    assert wide[:, 0].isnan().all() and wide[:, :, DIM:].isnan().all()

    expected = ops.backward(
        do, q.contiguous(), k.contiguous(), v.contiguous(), o.contiguous(), lse, cu_seqlens, SCALE, True
    )
    gradient = torch.full((tokens, buffer.shape[1] + 8), float("nan"), dtype=dtype)
    dq, dk, dv = qkv_slices(gradient[:, :-8])
    # Heads outermost in memory, as attention written for [heads, tokens, dim] leaves its gradient.
    do = do.transpose(0, 1).contiguous().transpose(0, 1)
    ops.backward(do, q, k, v, o, lse, cu_seqlens, SCALE, True, dq=dq, dk=dk, dv=dv)
    for name, found, wanted in zip("qkv", (dq, dk, dv), expected, strict=True):
        assert torch.equal(found, wanted), f"d{name}"
    assert gradient[:, -8:].isnan().all()


def test_long_sequence_into_poisoned_outputs():
    """Two slots of keys, so that dq is a sum of shares."""
    tokens, cu_seqlens = 500, cumulative([500])
    q, k, v = qkv_slices(random_qkv(tokens))
    do = torch.randn(tokens, HEADS, DIM)
    o, lse = ops.forward(q, k, v, cu_seqlens, SCALE, True)
    expected = ops.backward(do, q, k, v, o, lse, cu_seqlens, SCALE, True)
    outs = [torch.full(x.shape, float("nan")) for x in (q, k, v)]
    ops.backward(do, q, k, v, o, lse, cu_seqlens, SCALE, True, *outs)
    for found, wanted in zip(outs, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scale", [100.0, 0.0, -1.0])
def test_large_scores_neither_overflow_nor_become_nan(scale):
    """With a scale of 100 scores reach thousands; a rounded lse of that size costs that much."""
    generator = torch.Generator().manual_seed(0)
    tensors = {x: testing.normal(generator, 70, 2, 16, dtype=torch.float32) for x in "qkv"}
    inputs = {**tensors, "cu_seqlens": cumulative([50, 20]), "scale": scale}
    case = testing.Case("", lambda *_: inputs, ("q", "k", "v"))
    truth = testing.run(plain, inputs, case, torch.float64)
    largest = abs(scale) * tensors["q"].norm(dim=-1).max() * tensors["k"].norm(dim=-1).max()
    for value, exact in zip(testing.run(ops.attention, inputs, case), truth, strict=True):
        assert testing.error(value, exact) <= torch.finfo(torch.float32).eps * (largest + 4)


def test_lse_is_the_logarithm_of_the_denominator():
    q, k, v = (torch.randn(9, 1, 4) for _ in range(3))
    _, lse = ops.forward(q, k, v, cumulative([9]), 0.5, False)
    torch.testing.assert_close(lse[0], (q[:, 0] @ k[:, 0].T * 0.5).logsumexp(-1))


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
def test_no_tokens(bounds):
    q, k, v = (torch.empty(0, h, 8, requires_grad=True) for h in (4, 2, 2))
    o = ops.attention(q, k, v, torch.tensor(bounds, dtype=torch.int32))
    o.sum().backward()
    assert o.shape == q.shape and q.grad.shape == q.shape and k.grad.shape == k.shape


def test_gradients_of_a_subset_and_used_twice():
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    cu_seqlens = cumulative([12])
    k.requires_grad_()
    o = ops.attention(q, k, v, cu_seqlens)
    once = torch.autograd.grad(o.sum(), k, retain_graph=True)[0].clone()
    twice = torch.autograd.grad(o.sum() + o.sum(), k)[0]
    torch.testing.assert_close(twice, 2 * once)
    with torch.no_grad():
        assert not ops.attention(q, k, v, cu_seqlens).requires_grad


@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [0, 4, 3, 6], [0, 7], []])
def test_bounds_that_do_not_rise_from_zero_to_the_number_of_tokens(bounds):
    x = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.attention(x, x, x, torch.tensor(bounds, dtype=torch.int32))


def test_arguments_that_do_not_fit():
    x, cu_seqlens = torch.randn(6, 4, 8), cumulative([6])
    with pytest.raises(ValueError, match=r"cu_seqlens is torch\.int64"):
        ops.attention(x, x, x, cu_seqlens.long())
    with pytest.raises(ValueError, match="q has 4 heads; they must be a multiple of the 3"):
        ops.attention(x, x[:, :3], x[:, :3], cu_seqlens)
    with pytest.raises(ValueError, match=r"v is torch\.float32 with shape \(6, 4, 4\)"):
        ops.attention(x, x, x[..., :4], cu_seqlens)
    with pytest.raises(ValueError, match="k is torch.float16"):
        ops.attention(x, x.half(), x, cu_seqlens)


def test_raw_forms_name_what_does_not_fit():
    x, cu_seqlens = torch.randn(6, 4, 8), cumulative([6])
    half, short, strided = x.half(), x[:5], torch.empty(6, 8, 4).mT
    for out in (half, short, strided, x[..., :4]):
        with pytest.raises(ValueError, match="out is"):
            ops.forward(x, x, x, cu_seqlens, 1.0, True, out=out)
    o, lse = ops.forward(x, x, x, cu_seqlens, 1.0, True)
    right = {"do": x, "q": x, "k": x, "v": x, "o": o, "lse": lse, "cu_seqlens": cu_seqlens, "dq": x, "dk": x, "dv": x}
    for name, bad in [
        *((name, bad) for name in ("do", "o", "dq", "dk", "dv") for bad in (half, short)),
        *((name, strided) for name in ("dq", "dk", "dv")),
        ("k", short),
        ("v", half),
        ("lse", lse.double()),
        ("lse", lse[:, :5]),
        ("cu_seqlens", cu_seqlens.long()),
    ]:
        with pytest.raises(ValueError, match=f"{name} is"):
            ops.backward(**{**right, name: bad}, scale=1.0, causal=True)
