"""Rows further apart than 2^31 elements: an offset in 32 bits would read and write somewhere else.

The memory between the rows is never touched, so it is address space alone.
"""

import pytest
import torch

from leantune_kernels import activation, glu, rms_norm, rope
from leantune_kernels.rope.cases import tables

ROWS, COLS, TENSORS = 2, 40, 5
STRIDE = 2**31 + 64


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def far(request, monkeypatch):
    """far(tensor) is a copy with its rows STRIDE apart; the copies lie side by side in one block of memory."""
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")
    torch.manual_seed(0)
    try:
        block = torch.empty((ROWS - 1) * STRIDE + TENSORS * COLS, dtype=request.param)
    except RuntimeError as error:
        pytest.skip(f"this machine refuses {STRIDE * request.param.itemsize >> 30} GiB of address space: {error}")
    used = 0

    def make(values):
        nonlocal used
        view = block.as_strided((ROWS, COLS), (STRIDE, 1), used)
        used += COLS
        return view.copy_(values)

    make.dtype = request.param
    return make


def test_rms_norm(far):
    x, dy, residual = (torch.randn(ROWS, COLS, dtype=far.dtype) for _ in range(3))
    weight = torch.randn(COLS, dtype=far.dtype)
    nan = torch.full_like(x, torch.nan)
    far_x = far(x)
    y, rstd = rms_norm.forward(x, weight, 1e-5)
    far_y, far_rstd = rms_norm.forward(far_x, weight, 1e-5, far(nan))
    assert torch.equal(far_y, y) and torch.equal(far_rstd, rstd)
    wanted = rms_norm.backward(dy, x, weight, rstd, residual, need_dweight=True)
    found = rms_norm.backward(far(dy), far_x, weight, rstd, far(residual), far(nan), need_dweight=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("heads_first", [False, True])
def test_rope(far, heads_first):
    x = torch.randn(ROWS, COLS, dtype=far.dtype)
    shape = (ROWS, 2, COLS // 2)  # tokens, heads, head_dim
    near, distant = (t.view(shape).transpose(0, int(heads_first)) for t in (x, far(x)))
    cos, sin = tables(9, COLS // 4)
    positions = torch.tensor([3, 8])
    rope.apply_(near, cos, sin, positions)
    rope.apply_(distant, cos, sin, positions)
    assert torch.equal(distant, near)


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_glu(far, name):
    dh, gate, up = (torch.randn(ROWS, COLS, dtype=far.dtype) for _ in range(3))
    far_gate, far_up = far(gate), far(up)
    h = glu.forward(far_gate, far_up, far(torch.full_like(gate, torch.nan)), name)
    assert torch.equal(h, glu.forward(gate, up, activation=name))
    found, wanted = glu.backward_(far(dh), far_gate, far_up, name), glu.backward_(dh, gate, up, name)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_activation(far, name):
    dy, x = (torch.randn(ROWS, COLS, dtype=far.dtype) for _ in range(2))
    far_x, nan = far(x), torch.full_like(x, torch.nan)
    assert torch.equal(activation.forward(far_x, name, far(nan)), activation.forward(x, name))
    assert torch.equal(activation.backward(far(dy), far_x, name, far(nan)), activation.backward(dy, x, name))
