"""Offsets beyond 2^31 elements in every op and implementation: one of 32 bits would read and write somewhere else.

Rows lie so far apart, in memory that is never touched between them and so is address space alone. What must be dense
has more than 2^31 elements instead: of those, Triton and CUDA run the last program of a launch alone, and C++ what
reads them all and writes little. Left out: what would write 2^31 results in C++ (quantising, dropout, NF4 dequantised,
optimizers), since that takes gigabytes; and gated_mlp, whose kernel is that of glu.
"""

import importlib
import math
import mmap
from contextlib import contextmanager

import pytest
import torch

from cuda_host import host
from helpers_kernels import each_of
from leantune_kernels import (
    activation,
    activation_pack,
    attention,
    bottleneck,
    dropout,
    embedding,
    glu,
    int8,
    layer_norm,
    linear_cross_entropy,
    low_rank,
    nf4,
    rms_norm,
    rope,
)
from leantune_kernels.adamw import AdamWTable
from leantune_kernels.adamw_8bit import AdamW8bitTable
from leantune_kernels.dropout import reference
from leantune_kernels.grad_norm import clip_grad_norm_, grad_norm
from leantune_kernels.rmsprop import RMSpropTable
from leantune_kernels.rope.cases import tables
from leantune_kernels.sgd import SGDTable
from leantune_kernels.tensor_list import pieces

COLS, TENSORS = 128, 10
LARGE = 2**31
# (rows, distance between them): one distance is more than 32 bits hold, two are, or 64 are: a whole block of rows.
LAYOUTS = {"one": (2, LARGE + 64), "two": (3, LARGE // 2 + 64), "block": (70, LARGE // 64 + 64)}

implementation = each_of("cpu", "triton", "cuda")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def untouched(*shape, dtype):
    """Zeros that take no memory before they are written; skips where the machine refuses the addresses."""
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        pytest.skip(f"this machine refuses the address space: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Far:
    """far(matrix) is a copy with its rows `stride` apart; the copies lie side by side in one block of memory."""

    def __init__(self, rows, stride):
        self.rows, self.stride = rows, stride
        self.block = untouched((rows - 1) * stride + TENSORS * COLS, dtype=torch.float32)
        self.used = 0

    def __call__(self, values):
        assert self.used < TENSORS and values.shape[0] == self.rows and values.shape[1] <= COLS
        place = self.used * COLS * 4 // values.element_size()
        self.used += 1
        return self.block.view(values.dtype).as_strided(values.shape, (self.stride, 1), place).copy_(values)

    def like(self, values):
        """For a result: NaN."""
        return self(torch.full_like(values, torch.nan))

    def random(self, dtype, cols=COLS):
        """(a matrix, its copy with the rows far apart)."""
        near = torch.randn(self.rows, cols).to(dtype)
        return near, self(near)


@pytest.fixture(params=LAYOUTS)
def far(request, implementation):
    return Far(*LAYOUTS[request.param])


def assert_equal(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if b is not None)


# ---- rows far apart


def test_rms_norm(far, dtype):
    (x, far_x), (dy, far_dy), (residual, far_residual) = (far.random(dtype) for _ in range(3))
    weight = torch.randn(COLS, dtype=dtype)
    y, rstd = rms_norm.forward(x, weight, 1e-5)
    assert_equal(rms_norm.forward(far_x, weight, 1e-5, far.like(x)), (y, rstd))
    wanted = rms_norm.backward(dy, x, weight, rstd, residual, need_dweight=True)
    assert_equal(rms_norm.backward(far_dy, far_x, weight, rstd, far_residual, far.like(x), need_dweight=True), wanted)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_of_a_sum(norm, far, dtype):
    (x, far_x), (dy, far_dy), (residual, far_residual) = (far.random(dtype) for _ in range(3))
    weight, bias = torch.randn(2, COLS, dtype=dtype)
    op, parameters = (layer_norm, (weight, bias)) if norm == "layer" else (rms_norm, (weight,))
    needed = {"need_dweight": True} | ({"need_dbias": True} if norm == "layer" else {})
    total, far_total = torch.empty_like(x), far.like(x)
    wanted = op.forward(x, *parameters, 1e-5, None, residual, total)
    found = op.forward(far_x, *parameters, 1e-5, far.like(x), far_residual, far_total)
    assert_equal((far_total, *found), (total, *wanted))
    wanted = op.backward(dy, total, weight, *wanted[1:], residual, **needed)
    assert_equal(op.backward(far_dy, far_total, weight, *found[1:], far_residual, far.like(x), **needed), wanted)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
def test_rope(heads_first, interleaved, far, dtype):
    """Tokens far apart, or heads."""

    def view(t):
        return t.unflatten(1, (2, COLS // 2)).transpose(0, int(heads_first))

    (q, far_q), (k, far_k) = ([view(t) for t in far.random(dtype)] for _ in range(2))
    cos, sin = tables(9, COLS // 4)
    positions = torch.arange(q.shape[0]) % 9
    rope.apply_(q, cos, sin, positions, interleaved=interleaved, k=k)
    rope.apply_(far_q, cos, sin, positions, interleaved=interleaved, k=far_k)
    assert_equal((far_q, far_k), (q, k))


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_glu(name, far, dtype):
    (dh, far_dh), (gate, far_gate), (up, far_up) = (far.random(dtype) for _ in range(3))
    assert torch.equal(glu.forward(far_gate, far_up, far.like(up), name), glu.forward(gate, up, activation=name))
    assert_equal(glu.backward(far_dh, far_gate, far_up, name), glu.backward(dh, gate, up, name))
    assert_equal(glu.backward_(far_dh, far_gate, far_up, name), glu.backward_(dh, gate, up, name))


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_activation(name, far, dtype):
    (dy, far_dy), (x, far_x) = (far.random(dtype) for _ in range(2))
    assert torch.equal(activation.forward(far_x, name, far.like(x)), activation.forward(x, name))
    assert torch.equal(activation.backward(far_dy, far_x, name, far.like(x)), activation.backward(dy, x, name))


def test_embedding(far, dtype):
    (weight, far_weight), (dy, far_dy) = (far.random(dtype) for _ in range(2))
    ids = torch.randint(far.rows, (far.rows,))
    ids[0] = far.rows - 1
    assert torch.equal(embedding.forward(ids, far_weight, out=far.like(dy)), embedding.forward(ids, weight))
    wanted = embedding.backward(dy, ids, torch.empty_like(weight))
    assert torch.equal(embedding.backward(far_dy, ids, far.like(weight)), wanted)
    embedding.backward(far_dy, ids, far_weight, accumulate=True)
    assert torch.equal(far_weight, embedding.backward(dy, ids, weight, accumulate=True))


def test_cross_entropy_rows(far):
    logits, far_logits = far.random(torch.float32)
    op = linear_cross_entropy.OP.pick(logits)
    options = {"targets": torch.randint(COLS, (far.rows,)), "row_scale": torch.rand(far.rows), "scale": 0.5}
    wanted, found = (
        op.cross_entropy_rows(logits=x, label_smoothing=0.1, z_loss=0.01, need_gradient=True, **options)
        for x in (logits, far_logits)
    )
    assert_equal((found, far_logits), (wanted, logits))


def test_distillation_rows(far, dtype):
    (logits, far_logits), (teacher, far_teacher) = far.random(torch.float32), far.random(dtype)
    op = linear_cross_entropy.OP.pick(logits)
    options = {"targets": torch.randint(COLS, (far.rows,)), "row_scale": None, "scale": 1.0}
    wanted, found = (
        op.distillation_rows(logits=x, teacher=z, alpha=0.5, temperature=2.0, need_gradient=True, **options)
        for x, z in ((logits, teacher), (far_logits, far_teacher))
    )
    assert_equal((found, far_logits), (wanted, logits))


@pytest.mark.parametrize(
    ("far", "heads_first", "dim"),
    [("one", False, 27), ("one", True, 64), ("two", False, 64), ("two", True, 27), ("block", False, 64)],
    indirect=["far"],
)
def test_attention(heads_first, dim, far, dtype):
    """Tokens far apart, or heads; head dimensions that vectors fit, and one that none does."""

    def view(t):
        return t.unflatten(1, (2, COLS // 2))[..., :dim].transpose(0, int(heads_first))

    (q, far_q), (k, far_k), (v, far_v), (do, far_do) = ([view(t) for t in far.random(dtype)] for _ in range(4))
    o, dq, dk, dv = (view(far.like(torch.empty(far.rows, COLS, dtype=dtype))) for _ in range(4))
    shared = torch.tensor([0, q.shape[0]], dtype=torch.int32), 0.2, True
    wanted, lse = attention.forward(q, k, v, *shared)
    assert_equal(attention.forward(far_q, far_k, far_v, *shared, o), (wanted, lse))
    wanted = attention.backward(do, q, k, v, wanted, lse, *shared)
    attention.backward(far_do, far_q, far_k, far_v, o, lse, *shared, dq, dk, dv)
    assert_equal((dq, dk, dv), wanted)


def test_low_rank_products_of_tokens(far, dtype):
    (x, far_x), (y, far_y), (dy, far_dy), (dx, far_dx) = (far.random(dtype) for _ in range(4))
    A, B = torch.randn(5, COLS), torch.randn(COLS, 5)
    assert torch.equal(low_rank.add_(far_y, far_x, A, B, 0.5), low_rank.add_(y, x, A, B, 0.5))
    assert torch.equal(low_rank.input_gradient_(far_dx, far_dy, A, B, 0.5), low_rank.input_gradient_(dx, dy, A, B, 0.5))
    assert_equal(low_rank.gradients(far_x, far_dy, A, B, 0.5), low_rank.gradients(x, dy, A, B, 0.5))


def test_low_rank_factors_and_merged_weight(far, dtype):
    """As many outputs, and as large a rank, as there are rows."""
    n = far.rows
    (weight, far_weight), (A, far_A), (B, far_B) = (
        far.random(dtype), far.random(torch.float32), far.random(torch.float32, n)
    )  # fmt: skip
    out = far.like(A)
    assert torch.equal(low_rank.merge(far_weight, far_A, far_B, 0.5, out), low_rank.merge(weight, A, B, 0.5))
    x, dy, y, dx = (torch.randn(7, cols).to(dtype) for cols in (COLS, n, n, COLS))
    wanted = low_rank.add_(y.clone(), x, A, B, 0.5)
    assert torch.equal(low_rank.add_(y, x, far_A, far_B, 0.5), wanted)
    wanted = low_rank.input_gradient_(dx.clone(), dy, A, B, 0.5)
    assert torch.equal(low_rank.input_gradient_(dx, dy, far_A, far_B, 0.5), wanted)
    wanted = low_rank.gradients(x, dy, A, B, 0.5)
    assert_equal(low_rank.gradients(x, dy, far_A, far_B, 0.5, out, far.like(B)), wanted)


def test_low_rank_layer(far, dtype):
    """The linear layer with its adapter, forward and for the gradient of its input.

    Not bit by bit: beside C++ the vendor's library multiplies, which sums in another order for strides beyond 2^31.
    """
    (x, far_x), (weight, far_weight), (A, far_A) = (far.random(t) for t in (dtype, dtype, torch.float32))
    (dy, far_dy), (B, far_B) = (far.random(t, far.rows) for t in (dtype, torch.float32))
    op, bias = low_rank.OP.pick(x), torch.randn(far.rows).to(dtype)
    layers = [low_rank.LoRALayer(w, bias, a, b, 0.5) for w, a, b in ((weight, A, B), (far_weight, far_A, far_B))]
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    far_y, far_dx = far.like(y), far.like(dx)
    op.linear_group(x, x, layers[:1], [y])
    op.linear_group(far_x, far_x, layers[1:], [far_y])
    op.input_gradient_group(dx, [dy], layers[:1])
    op.input_gradient_group(far_dx, [far_dy], layers[1:])
    torch.testing.assert_close((far_y, far_dx), (y, dx))


def test_bottleneck(far, dtype):
    (x, far_x), (dy, far_dy) = (far.random(dtype) for _ in range(2))
    weights = bottleneck.Weights(*(torch.randn(shape) for shape in ((5, COLS), (COLS, 5), (5,), (COLS,))))
    wanted = bottleneck.forward(x, weights, 0.5, "silu")
    assert torch.equal(bottleneck.forward(far_x, weights, 0.5, "silu", far.like(x)), wanted)
    wanted = bottleneck.backward(dy, x, weights, 0.5, "silu", (True,) * 5)
    found = [far.like(x), *(torch.full_like(w, torch.nan) for w in weights)]
    bottleneck.OP.pick(x).backward(far_dy, far_x, weights, 0.5, "silu", *found)
    assert_equal(found, wanted)


def test_int8(far, dtype):
    (weight, far_weight), (x, far_x) = (far.random(dtype) for _ in range(2))
    w, found = int8.quantise(weight), int8.quantise(far_weight)
    assert_equal((found.codes, found.scales), (w.codes, w.scales))
    assert torch.equal(int8.dequantise(w, out=far.like(weight)), int8.dequantise(w))
    y = int8.fused_linear(x, w, None, torch.empty(far.rows, far.rows, dtype=dtype))
    assert torch.equal(int8.fused_linear(far_x, w, None, far.like(y)), y)


def test_nf4(far, dtype):
    (weight, far_weight), (x, far_x) = (far.random(dtype) for _ in range(2))
    w, found = nf4.quantise(weight, False), nf4.quantise(far_weight, False)
    assert_equal((found.codes, found.absmax), (w.codes, w.absmax))
    y = nf4.fused_linear(x, w, None, torch.empty(far.rows, far.rows, dtype=dtype))
    assert torch.equal(nf4.fused_linear(far_x, w, None, far.like(y)), y)
    with pytest.raises(ValueError, match="out has strides .* must be contiguous"):
        nf4.dequantise(w, out=far_weight)


def test_activation_pack(far, dtype):
    x, far_x = far.random(dtype)
    op = activation_pack.OP.pick(x)
    for mode in activation_pack.MODES:
        packed, found = activation_pack.pack(x, mode), activation_pack.pack(far_x, mode)
        assert torch.equal(found.data, packed.data)
        assert packed.scales is None or torch.equal(found.scales, packed.scales)
        out = far.like(x)
        if mode == "bf16":
            op.unpack_bf16(packed.data, out)
        else:
            op.unpack_int8(packed.data, packed.scales, out, False)
        assert torch.equal(out, activation_pack.unpack(packed))
    with pytest.raises(ValueError, match="out has strides .* must be contiguous"):
        activation_pack.unpack(packed, far_x)


# ---- dense tensors of more than 2^31 elements


@contextmanager
def last_program_alone(implementation):
    """Of every launch, so that all elements before its own stay untouched; C++ runs whole."""
    if implementation == "triton":
        import triton_interpreter

        with triton_interpreter.last_program_alone():
            yield
    elif implementation == "cuda":
        with host.last_block_alone():
            yield
    else:
        yield


on_devices = pytest.mark.parametrize("implementation", ["triton", "cuda"], indirect=True)
WIDE, LAST = 2**18, nf4.BLOCK


def int8_zeros():
    """Codes of more than 2^31 zeros, the last LAST of which are other numbers."""
    codes, scales = untouched(LARGE // WIDE + 1, WIDE, dtype=torch.int8), torch.zeros(LARGE // WIDE + 1)
    codes[-1, -LAST:], scales[-1] = torch.arange(LAST), 0.5
    return int8.Int8Weight(codes, scales, torch.float32)


def nf4_zeros():
    """More than 2^32 weights of absmax 0, so that their bytes are more than 2^31, but for the last LAST."""
    rows = 2 * LARGE // WIDE + 1
    codes = untouched(rows * WIDE // 2, dtype=torch.uint8)
    absmax = untouched(rows * WIDE // nf4.BLOCK, dtype=torch.float32)
    codes[-LAST // 2 :], absmax[-1] = torch.arange(LAST // 2) * 7 + 3, 2.0
    return nf4.NF4Weight(codes, absmax, None, None, (rows, WIDE), torch.float32)


def last_of_nf4(w):
    last = nf4.NF4Weight(w.codes[-LAST // 2 :], w.absmax[-1:], None, None, (LAST,), torch.float32)
    return nf4.dequantise(last)


def check_product(linear, w, last, implementation):
    """Of one row of x, all zeros but where the weights are not."""
    x = torch.zeros(1, WIDE)
    x[0, -LAST:] = torch.randn(LAST)
    y = torch.zeros(1, w.shape[0])
    with last_program_alone(implementation):
        linear(x, w, None, y)
    torch.testing.assert_close(y[0, -1], x[0, -LAST:] @ last)
    assert not y[0, :-1].any()


def test_int8_product(implementation):
    w = int8_zeros()
    check_product(int8.fused_linear, w, w.codes[-1, -LAST:] * w.scales[-1], implementation)


def test_nf4_product(implementation):
    w = nf4_zeros()
    check_product(nf4.fused_linear, w, last_of_nf4(w), implementation)


@on_devices
def test_int8_of_a_dense_weight(implementation):
    w = int8_zeros()
    weight = untouched(*w.shape, dtype=torch.bfloat16)
    with last_program_alone(implementation):
        int8.dequantise(w, out=weight)
    wanted = (w.codes[-1, -LAST:] * w.scales[-1]).bfloat16()
    assert torch.equal(weight[-1, -LAST:], wanted) and wanted.any()
    w.codes[-1, -LAST:], w.scales[-1] = 0, 0
    with last_program_alone(implementation):
        int8.OP.pick(weight).quantise(weight, w.codes, w.scales)
    wanted = int8.quantise(weight[-1:])
    assert_equal((w.codes[-1:], w.scales[-1:]), (wanted.codes, wanted.scales))


@on_devices
def test_nf4_of_a_dense_weight(implementation):
    w = nf4_zeros()
    weight = untouched(*w.shape, dtype=torch.bfloat16)
    with last_program_alone(implementation):
        nf4.dequantise(w, out=weight)
    wanted = last_of_nf4(w)
    assert torch.equal(weight[-1, -LAST:], wanted.bfloat16()) and wanted.any()
    with last_program_alone(implementation):
        found = nf4.quantise(weight, False)
    wanted = nf4.quantise(weight[-1, -LAST:], False)
    assert_equal((found.codes[-LAST // 2 :], found.absmax[-1:]), (wanted.codes, wanted.absmax))


@on_devices
def test_dropout_of_a_dense_tensor(implementation):
    """As many elements as the last of all blocks ends with in CUDA, where blocks go through x in strides."""
    x = untouched(2 * LARGE, dtype=torch.bfloat16)
    x[-LAST:] = torch.randn(LAST).bfloat16()
    wanted = dropout.forward(x[-LAST:].clone(), 0.5, 3, 4 + len(x) - LAST)
    with last_program_alone(implementation):
        dropout.forward(x, 0.5, 3, 4, out=x)
    assert torch.equal(x[-LAST:], wanted) and wanted.any()


@pytest.mark.parametrize("border", [LARGE, 2 * LARGE, 4 * LARGE, 8 * LARGE])
def test_a_dropout_mask_from_before_a_border_to_beyond(border, implementation, dtype):
    """Of positions, and of counters of four positions each."""
    x = torch.ones(2000, dtype=dtype)
    found = dropout.forward(x, 0.5, 3, border - 1001)
    assert torch.equal(found, reference.forward(x, dropout.threshold(0.5), 2.0, 3, border - 1001))


def test_grad_norm(implementation, monkeypatch):
    """In C++ of all elements, in Triton and CUDA of the last piece, which is scaled as well."""
    x = untouched(LARGE + 5, dtype=torch.bfloat16)
    x[-6:] = 3.0
    if implementation == "cpu":
        assert grad_norm([x]) == pytest.approx(54**0.5)
        return
    op = importlib.import_module(f"leantune_kernels.grad_norm.{implementation}_impl")
    monkeypatch.setattr(op, "pieces", lambda sizes, device: pieces(sizes, device)[-1:])
    assert float(clip_grad_norm_([x], 45**0.5 / 2)) == pytest.approx(45**0.5)
    assert x[-6:].tolist() == [3.0] + [1.5] * 5


def states(p, *dtypes):
    """As an optimizer keeps them, of zeros: maxima are one for each 256 codes."""
    sizes = [-(-len(p) // 256) if d is None else len(p) for d in dtypes]
    return [[untouched(n, dtype=d or torch.float32)] for n, d in zip(sizes, dtypes, strict=True)]


FLOAT, CODES, MAXIMA = torch.float32, torch.uint8, None
OPTIMIZERS = {
    "sgd": lambda p: (SGDTable([p], *states(p, FLOAT)), {"momentum": 0.5}),
    "rmsprop": lambda p: (RMSpropTable([p], *states(p, FLOAT, FLOAT, FLOAT)), {"momentum": 0.5}),
    "adamw": lambda p: (AdamWTable([p], *states(p, FLOAT, FLOAT)), {}),
    "adamw_8bit": lambda p: (AdamW8bitTable([p], *states(p, CODES, MAXIMA, CODES, MAXIMA)), {}),
}


@on_devices
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer(optimizer, implementation):
    """Two steps of the last piece alone, beside a tensor of as many elements."""
    results, values = [], torch.randn(5)
    for size in (5, LARGE + 5):
        p, g = untouched(size, dtype=torch.float32), untouched(size, dtype=torch.bfloat16)
        p[-5:], g[-5:] = values, values.flip(0)
        p[:-5][-1:] = 7.0
        table, options = OPTIMIZERS[optimizer](p)
        table._pieces = pieces([size], p.device)[-1:]
        for step in (1, 2):
            table.step([g], step=step, lr=0.25, weight_decay=0.1, **options)
        results.append([p[-5:], *(s[0][-5:] for s in table.states if s is not None and len(s[0]) == size)])
    assert p[-6] == 7 and not torch.equal(p[-5:], values)
    assert_equal(*results)
