"""Rotary embedding: the raw in-place form on strided views, partial rotation, and its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import rope
from leantune_kernels.rope.cases import tables
from leantune_kernels.rope.reference import plain

implementation = each_of("cpu", "reference", autouse=True)


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_queries_and_keys_of_one_buffer_in_one_call(tokens):
    """The values beside them, and the columns past rotary_dim, keep their bits."""
    query_heads, kv_heads, head_dim, rotary_dim = 4, 2, 24, 14
    buffer = torch.randn(tokens, (query_heads + 2 * kv_heads) * head_dim)
    before = buffer.clone()
    cos, sin = tables(40, rotary_dim // 2)
    positions = torch.randint(40, (tokens,))
    turned = (query_heads + kv_heads) * head_dim
    heads, old = (b[:, :turned].unflatten(1, (query_heads + kv_heads, head_dim)) for b in (buffer, before))
    assert rope.apply_(heads, cos, sin, positions) is heads

    wanted = plain(old.double(), cos.double(), sin.double(), positions)
    torch.testing.assert_close(heads.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(heads[..., rotary_dim:], old[..., rotary_dim:])
    assert torch.equal(buffer[:, turned:], before[:, turned:])


def test_heads_first_layout_and_inverse_restores():
    x = torch.randn(3, 9, 16)  # [heads, tokens, head_dim], seen as [tokens, heads, head_dim]
    before = x.clone()
    cos, sin = tables(9, 8)
    view = x.transpose(0, 1)
    rope.apply_(view, cos, sin, torch.arange(9))
    assert not torch.allclose(x, before)
    rope.apply_(view, cos, sin, torch.arange(9), inverse=True)
    torch.testing.assert_close(x, before, rtol=0, atol=1e-6)


def test_matches_rotate_half_of_hugging_face():
    x = torch.randn(5, 2, 12)
    cos, sin = tables(8, 6)
    positions = torch.tensor([0, 1, 2, 0, 7])
    rotated = torch.cat((-x[..., 6:], x[..., :6]), dim=-1)
    full_cos, full_sin = (torch.cat((t, t), dim=-1)[positions][:, None] for t in (cos, sin))
    y = rope.rope(x, cos, sin, positions)
    torch.testing.assert_close(y, x * full_cos + rotated * full_sin, rtol=0, atol=1e-6)


def test_interleaved_matches_rotate_every_two_of_gpt_j():
    x = torch.randn(5, 2, 14)
    cos, sin = tables(8, 6)
    positions = torch.tensor([0, 1, 2, 0, 7])
    turned = x[..., :12]
    swapped = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    full_cos, full_sin = (t[positions][:, None].repeat_interleave(2, dim=-1) for t in (cos, sin))
    y = rope.rope(x, cos, sin, positions, interleaved=True)
    torch.testing.assert_close(y[..., :12], turned * full_cos + swapped * full_sin, rtol=0, atol=1e-6)
    assert torch.equal(y[..., 12:], x[..., 12:])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half=st.integers(0, 40),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
    inverse=st.booleans(),
)
def test_q_and_k_of_any_shape_in_one_launch(tokens, heads, kv_heads, half, rest, interleaved, inverse):
    """Heads lie apart; what lies between them, and past the rotated columns, keeps its bits."""
    head_dim = 2 * half + rest
    cos, sin = tables(9, half)
    positions = torch.randint(9, (tokens,))
    buffers = [torch.randn(tokens, n, head_dim + 3) for n in (heads, kv_heads)]
    before = [b.clone() for b in buffers]
    q, k = (b[..., :head_dim] for b in buffers)
    assert rope.apply_(q, cos, sin, positions, inverse, interleaved, k) is q
    sign = -1 if inverse else 1
    for now, old in zip(buffers, before, strict=True):
        wanted = plain(old[..., :head_dim].double(), cos.double(), sign * sin.double(), positions, interleaved)
        torch.testing.assert_close(now[..., :head_dim].double(), wanted, rtol=0, atol=2e-6)
        assert torch.equal(now[..., 2 * half :], old[..., 2 * half :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_q_and_k_together_are_those_of_each_alone(interleaved):
    q, k = (torch.randn(6, n, 10, requires_grad=True) for n in (3, 1))
    cos, sin = tables(6, 5)
    arguments = (cos, sin, torch.arange(6), interleaved)
    outputs = rope.rope_qk(q, k, *arguments)
    upstream = [torch.randn_like(o) for o in outputs]
    together = torch.autograd.grad(outputs, (q, k), upstream)
    for x, y, dy, dx in zip((q, k), outputs, upstream, together, strict=True):
        alone = rope.rope(x, *arguments)
        assert torch.equal(alone, y)
        assert torch.equal(torch.autograd.grad(alone, x, dy)[0], dx)


def test_only_one_of_q_and_k_needs_a_gradient():
    q, k = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 1, 8)
    cos, sin = tables(4, 4)
    rotated, _ = rope.rope_qk(q, k, cos, sin, torch.arange(4))
    (dq,) = torch.autograd.grad(rotated.sum(), q)
    (alone,) = torch.autograd.grad(rope.rope(q, cos, sin, torch.arange(4)).sum(), q)
    assert torch.equal(dq, alone)


def test_a_gradient_used_twice():
    x = torch.randn(4, 2, 8, requires_grad=True)
    cos, sin = tables(4, 4)
    y = rope.rope(x, cos, sin, torch.arange(4))
    (gradient,) = torch.autograd.grad(y + y, x, torch.ones_like(y))
    (once,) = torch.autograd.grad(rope.rope(x, cos, sin, torch.arange(4)), x, torch.ones_like(y))
    torch.testing.assert_close(gradient, 2 * once)


@pytest.mark.parametrize("implementation", ["triton", "cuda"], indirect=True)
def test_unknown_positions(implementation):
    """What a device does with positions that nobody has checked."""
    x, (cos, sin) = torch.randn(4, 2, 10), tables(5, 3)
    y = x.clone()
    rope.OP.pick(x).apply_(y, None, cos, sin, torch.tensor([4, 5, -1, 0]), False, False)
    assert y[[1, 2], :, :6].isnan().all() and torch.equal(y[..., 6:], x[..., 6:])
    wanted = plain(x[[0, 3]], cos, sin, torch.tensor([4, 0]))
    torch.testing.assert_close(y[[0, 3]], wanted, rtol=0, atol=1e-6)


def test_errors_name_the_argument():
    x, (cos, sin), positions = torch.randn(3, 2, 8), tables(5, 4), torch.arange(3)
    for bad in (positions + 3, positions - 1):
        with pytest.raises(ValueError, match=r"positions range over .*\[0, 5\)"):
            rope.rope(x, cos, sin, bad)
    with pytest.raises(ValueError, match=r"positions is torch\.int32"):
        rope.rope(x, cos, sin, positions.int())
    with pytest.raises(ValueError, match="positions is"):
        rope.rope(x, cos, sin, positions[:2])
    with pytest.raises(ValueError, match="rotary_dim <= head_dim=6"):
        rope.rope(x[..., :6], cos, sin, positions)
    with pytest.raises(ValueError, match=r"sin is torch\.float16"):
        rope.rope(x, cos, sin.half(), positions)
    with pytest.raises(ValueError, match="cos is .* on meta; it must be .* on cpu"):
        rope.rope(x, cos.to("meta"), sin, positions)
    with pytest.raises(ValueError, match=r"k is torch\.float16 .* must be torch\.float32 \(3, 1, 8\)"):
        rope.rope_qk(x, torch.zeros(3, 1, 8, dtype=torch.float16), cos, sin, positions)
    with pytest.raises(ValueError, match="last dimension contiguous"):
        rope.apply_(torch.randn(3, 8, 2).transpose(1, 2), cos, sin, positions)
