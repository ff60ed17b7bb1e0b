"""Packed attention: what the generic tests of test_ops.py do not cover.

The CUDA kernels run in the emulator of tests/cuda_host, the Triton kernels in Triton's interpreter.
"""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_host import host
from helpers_kernels import each_of
from leantune_kernels import attention as ops
from leantune_kernels import testing
from leantune_kernels.attention.cases import cumulative
from leantune_kernels.attention.reference import plain
from leantune_kernels.dispatch import CannotServe

LENGTHS = [5, 70, 0, 33, 130]
HEADS, KV_HEADS, DIM = 4, 2, 24
SCALE = DIM**-0.5

implementation = each_of("reference", "cpu", "triton", "cuda", autouse=True)


def qkv_slices(buffer):
    """q, k, v as slices of one projection's output [T, (Hq + 2 Hk) * D]."""
    return buffer.unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)


def random_qkv(tokens, seed=0):
    return torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(q, k, v, do, cu_seqlens, causal, window=None):
    o, lse = ops.forward(q, k, v, cu_seqlens, SCALE, causal, window=window)
    return (o, lse.T, *ops.backward(do, q, k, v, o, lse, cu_seqlens, SCALE, causal, window=window))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 40), (False, 7)])
def test_a_sequence_does_not_see_another(causal, window):
    """Not a bit of the others' outputs and gradients changes when one sequence's tokens become NaN."""
    cu_seqlens, tokens = cumulative(LENGTHS), sum(LENGTHS)
    before, after = random_qkv(tokens), random_qkv(tokens)
    changed = slice(int(cu_seqlens[1]), int(cu_seqlens[2]))
    after[changed] = float("nan")
    do = torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    first = outputs_and_gradients(*qkv_slices(before), do, cu_seqlens, causal, window)
    second = outputs_and_gradients(*qkv_slices(after), do, cu_seqlens, causal, window)
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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 50])
def test_a_token_does_not_see_what_lies_outside_its_window(causal, window):
    """Not a bit of its output changes with keys and values at a distance of `window`, and not only nearer ones."""
    cu_seqlens, tokens, at = cumulative([130]), 130, 77
    before, after = random_qkv(tokens), random_qkv(tokens)
    distance = (torch.arange(tokens) - at).abs()
    after[distance >= window] = 1e4 * after[distance >= window].roll(1, 0)
    first, second = (ops.forward(*qkv_slices(x), cu_seqlens, SCALE, causal, window=window)[0] for x in (before, after))
    assert torch.equal(first[at], second[at])
    after = before.clone()
    after[at - window + 1] = 0  # the farthest that it sees
    assert not torch.equal(first[at], ops.forward(*qkv_slices(after), cu_seqlens, SCALE, causal, window=window)[0][at])


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_as_long_as_the_sequence_is_none(causal, implementation):
    cu_seqlens, tokens = cumulative(LENGTHS), sum(LENGTHS)
    q, k, v = qkv_slices(random_qkv(tokens))
    do = torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    none = outputs_and_gradients(q, k, v, do, cu_seqlens, causal)
    for window in (max(LENGTHS), 10**12):
        for a, b in zip(none, outputs_and_gradients(q, k, v, do, cu_seqlens, causal, window), strict=True):
            assert torch.equal(a, b)


def test_a_window_of_one_token_is_the_identity():
    """Each token sees itself alone: o = v, dv = do, and q and k get no gradient beyond rounding."""
    cu_seqlens, tokens = cumulative([70, 3]), 73
    q, k, v = qkv_slices(random_qkv(tokens))
    do = torch.randn(tokens, HEADS, DIM)
    for causal in (True, False):
        o, _, dq, dk, dv = outputs_and_gradients(q, k, v, do, cu_seqlens, causal, window=1)
        torch.testing.assert_close(o, v.repeat_interleave(2, 1))
        torch.testing.assert_close(dv, do.unflatten(1, (-1, 2)).sum(2))
        assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4


@pytest.mark.parametrize("causal", [True, False])
def test_window_as_hugging_face_masks(causal):
    """Causal as Mistral's sliding_window; bidirectional as ModernBERT's, whose layers ask for a window of half + 1."""
    masking = pytest.importorskip("transformers.masking_utils")
    length, half = 33, 8
    mask = masking.sliding_window_causal_mask_function(half) if causal else (
        masking.sliding_window_bidirectional_mask_function(half)
    )  # fmt: skip
    token = torch.arange(length)
    sees = mask(0, 0, token[:, None], token[None, :]).expand(length, length)
    q, k, v = (torch.randn(length, 1, 16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=sees)
    o = ops.attention(q, k, v, cumulative([length]), causal=causal, window=half if causal else half + 1)
    torch.testing.assert_close(o, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


@st.composite
def packs(draw):
    """(lengths, heads, kv_heads, head_dim, causal, window)"""
    lengths = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(60, 140)), min_size=1, max_size=3))
    kv_heads = draw(st.integers(1, 2))
    window = draw(st.one_of(st.none(), st.integers(1, 150)))
    return lengths, kv_heads * draw(st.integers(1, 3)), kv_heads, draw(st.integers(1, 72)), draw(st.booleans()), window


# The reference is the plain formula, and Triton's interpreter too slow; test_ops.py has the cases.
@pytest.mark.parametrize("implementation", ["cpu", "cuda"], indirect=True)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(packs(), st.integers(0, 500))  # a longer sequence for the C++ kernel, which divides its keys from 384 on
def test_any_pack_is_within_plain_pytorchs_own_error(implementation, pack, longer):
    lengths, heads, kv_heads, dim, causal, window = pack
    if implementation == "cpu":
        lengths = [*lengths, longer]
    generator, tokens = torch.Generator().manual_seed(0), sum(lengths)
    inputs = {
        name: testing.normal(generator, tokens, n, dim, dtype=torch.float32)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    inputs |= {"cu_seqlens": cumulative(lengths), "causal": causal, "window": window}
    case = testing.Case("", lambda *_: inputs, ("q", "k", "v"))
    truth, own = (testing.run(plain, inputs, case, dtype) for dtype in (torch.float64, None))
    for value, exact, ours in zip(testing.run(ops.attention, inputs, case), truth, own, strict=True):
        # where tokens see hardly more than themselves, gradients are differences of equal terms: near 0 but for them
        assert (value - exact).norm() <= 1.5 * (ours - exact).norm() + 1e-6 * (exact.norm() + exact.numel() ** 0.5)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "dim", "causal", "window"), [([70, 3], 256, True, None), ([40], 160, False, 9)])
def test_wide_heads(lengths, dim, causal, window, dtype, implementation):
    """On CUDA warps share the columns of such heads; the emulator looks for races."""
    tokens = sum(lengths)
    case = testing.Case(
        f"{lengths} dim {dim}",
        lambda g, dtype: {
            "q": testing.normal(g, tokens, 2, dim, dtype=dtype),
            "k": testing.normal(g, tokens, 1, dim, dtype=dtype),
            "v": testing.normal(g, tokens, 1, dim, dtype=dtype),
            "cu_seqlens": cumulative(lengths),
            "causal": causal,
            "window": window,
        },
        ("q", "k", "v"),
    )
    with host.kernels("traced") if implementation == "cuda" else nullcontext():
        testing.accept(case, dtype, ops.attention, plain)


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


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_the_token_itself(window):
    x = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match=f"window={window}; a token sees at least itself"):
        ops.attention(x, x, x, cumulative([6]), window=window)


@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [0, 4, 3, 6], [0, 7], []])
def test_bounds_that_do_not_rise_from_zero_to_the_number_of_tokens(bounds):
    x = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.attention(x, x, x, torch.tensor(bounds, dtype=torch.int32))


def test_a_head_too_wide_for_a_device(implementation):
    if implementation not in ("cuda", "triton"):
        pytest.skip("any head_dim fits")
    x = torch.randn(6, 1, 264)
    with pytest.raises(CannotServe, match=f"{implementation}: head_dim=264 exceeds 256"):
        ops.attention(x, x, x, cumulative([6]))


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
