"""Rows further apart than 2^31 elements: an offset in 32 bits would read and write somewhere else.

The memory between the rows is never touched, so it is address space alone.
"""

from contextlib import nullcontext

import pytest
import torch

from cuda_host import host
from leantune_kernels import activation, embedding, glu, layer_norm, linear_cross_entropy, rms_norm, rope
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


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request):
    """`with kernels():` runs the C++ kernels, or the CUDA ones on the cpu."""
    return (lambda: host.kernels("plain")) if request.param == "cuda" else nullcontext


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_rope(far, kernels, heads_first, interleaved):
    x = torch.randn(ROWS, COLS, dtype=far.dtype)
    shape = (ROWS, 2, COLS // 2)  # tokens, heads, head_dim
    near, distant = (t.view(shape).transpose(0, int(heads_first)) for t in (x, far(x)))
    k = torch.randn(2, 1, COLS // 2, dtype=far.dtype)
    cos, sin = tables(9, COLS // 4)
    positions = torch.tensor([3, 8])
    with kernels():
        rope.apply_(near, cos, sin, positions, interleaved=interleaved, k=k.clone())
        rope.apply_(distant, cos, sin, positions, interleaved=interleaved, k=k)
    assert torch.equal(distant, near)


def test_embedding(far, kernels):
    weight, dy = (torch.randn(ROWS, COLS, dtype=far.dtype) for _ in range(2))
    nan = torch.full_like(weight, torch.nan)
    ids = torch.tensor([1, 0])
    with kernels():
        y, far_y = embedding.forward(ids, weight), embedding.forward(ids, far(weight), out=far(nan))
        wanted, found = embedding.backward(dy, ids, nan.clone()), embedding.backward(far(dy), ids, far(nan))
    assert torch.equal(far_y, y) and torch.equal(found, wanted)


def test_cross_entropy_rows(far, kernels):
    logits, teacher = torch.randn(ROWS, COLS), torch.randn(ROWS, COLS, dtype=far.dtype)
    targets = torch.tensor([3, 39])
    options = {"targets": targets, "row_scale": None, "scale": 1.0, "need_gradient": True}
    soft = {"alpha": 0.5, "temperature": 2.0}
    with kernels():
        implementation = linear_cross_entropy.OP.pick(logits)
        near, distant = logits.clone(), logits.clone()
        wanted = implementation.distillation_rows(logits=near, teacher=teacher, **soft, **options)
        found = implementation.distillation_rows(logits=distant, teacher=far(teacher), **soft, **options)
        assert torch.equal(found, wanted) and torch.equal(distant, near)
        if far.dtype == torch.float32:  # that of the logits
            near, distant = logits.clone(), far(logits)
            wanted, found = (
                implementation.cross_entropy_rows(logits=x, label_smoothing=0.1, z_loss=0.01, **options)
                for x in (near, distant)
            )
            assert torch.equal(found, wanted) and torch.equal(distant, near)


def test_layer_norm_of_a_sum(far):
    x, dy, residual = (torch.randn(ROWS, COLS, dtype=far.dtype) for _ in range(3))
    weight, bias = torch.randn(2, COLS, dtype=far.dtype)
    near_sum, far_sum = torch.empty_like(x), far(residual)
    wanted = layer_norm.forward(x, weight, bias, 1e-5, None, residual, near_sum)
    found = layer_norm.forward(far(x), weight, bias, 1e-5, far(torch.full_like(x, torch.nan)), far_sum, far_sum)
    assert torch.equal(far_sum, near_sum) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    far_dy = far(dy)
    needed = {"need_dweight": True, "need_dbias": True}
    wanted = layer_norm.backward(dy, near_sum, weight, *wanted[1:], near_sum, **needed)
    found = layer_norm.backward(far_dy, far_sum, weight, *found[1:], far_sum, far_dy, **needed)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


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
