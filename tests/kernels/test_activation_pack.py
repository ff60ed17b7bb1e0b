"""Packed activations: the same bits from every implementation, and modules whose saved tensors are packed."""

import pytest
import torch

from helpers_kernels import DTYPES, IMPLEMENTATIONS, by_reference, each_of, same
from leantune_kernels import activation_pack
from leantune_kernels.activation_pack import Packed, pack, packed_saves, unpack
from leantune_kernels.attention import attention
from leantune_kernels.bottleneck import bottleneck
from leantune_kernels.gated_mlp import gated_mlp
from leantune_kernels.layer_norm import layer_norm
from leantune_kernels.linear_cross_entropy import linear_cross_entropy
from leantune_kernels.rms_norm import rms_norm
from leantune_kernels.rope import rope

implementation = each_of(*IMPLEMENTATIONS)


@pytest.mark.parametrize("mode", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 17), (2, 3, 128), (0, 8), (4, 0), (2, 4100)])
def test_same_bits_as_the_reference(mode, shape, implementation):
    torch.manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype)
        packed = pack(x, mode)
        expected = by_reference(pack, x, mode)
        assert same(packed.data, expected.data) and packed.data.shape == x.shape
        assert packed.scales is None or same(packed.scales, expected.scales)
        assert same(unpack(packed), by_reference(unpack, expected))


def test_bf16_rounds_to_nearest_even(implementation):
    """Half way between neighbours, just above it, the largest finite number, infinity, NaN, zeros and a subnormal."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0, 0x00008001], dtype=torch.int64
    )
    x = torch.cat((bits, bits + 0x80000000)).to(torch.int32).view(torch.float32)
    packed = pack(x, "bf16").data
    assert same(packed, x.to(torch.bfloat16))
    assert packed.view(torch.int16)[:5].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80]


def test_rows_that_are_not_finite_come_back_as_nan(implementation):
    x = torch.randn(3, 2, 40)
    x[0, 1, 5], x[2, 0, 39] = torch.nan, torch.inf
    y = unpack(pack(x, "int8"))
    assert y[0, 1].isnan().all() and y[2, 0].isnan().all() and y.isnan().sum() == 80
    y = unpack(pack(x, "bf16"))
    assert y.isnan().sum() == 1 and y[2, 0, 39] == torch.inf


def test_strided_input_and_a_given_output(implementation):
    x = torch.randn(40, 6, 10).permute(1, 2, 0)
    for mode, error in (("bf16", 2**-8), ("int8", 1 / 254)):
        out = torch.full(x.shape, torch.nan)
        assert unpack(pack(x, mode), out) is out
        assert same(out, unpack(pack(x.contiguous(), mode)))
        assert ((out - x).abs() <= error * x.abs().amax(-1, keepdim=True) * 1.001).all()


def block() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 64)
    )


def gradients(module, x, **settings):
    x = x.clone().requires_grad_()
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if settings:
            with packed_saves(**settings):
                y = module(x)
        else:
            y = module(x)
    return torch.autograd.grad((y * torch.arange(64)).sum(), [x, *module.parameters()])


@pytest.mark.parametrize(("mode", "error"), [("bf16", 0.01), ("int8", 0.03)])
def test_gradients_through_packed_saves(mode, error):
    module, x = block(), torch.randn(2, 50, 64)
    exact = gradients(module, x)
    found = gradients(module, x, mode=mode, minimum_size=1000)
    assert all((a - b).norm() <= error * b.norm() for a, b in zip(found, exact, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    untouched = gradients(module, x, mode=mode, minimum_size=10**6)
    assert all(torch.equal(a, b) for a, b in zip(untouched, exact, strict=True))


def test_what_is_packed(monkeypatch):
    """Activations above the size; not weights or views of them, not what is already small, not integers."""
    packed = []

    def spy(x, mode):
        packed.append((tuple(x.shape), x.dtype))
        return pack(x, mode)

    monkeypatch.setattr(activation_pack, "pack", spy)
    linear, table = torch.nn.Linear(64, 64), torch.nn.Embedding(100, 64)
    frozen = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
    x = torch.randn(100, 64, requires_grad=True)
    with packed_saves("bf16", minimum_size=4096):
        y = linear(x) @ frozen.t() + table(torch.arange(100))
        z = (x.bfloat16() * x.bfloat16()).sum() + (x[:3] * x[:3]).sum()
    (y.sum() + z).backward()
    assert packed == [((100, 64), torch.float32)]


def packed_by(monkeypatch, function):
    """The tensors that packed_saves packs while `function` runs, and its result."""
    seen = []

    def spy(x, mode):
        seen.append(x.detach().clone())
        return pack(x, mode)

    monkeypatch.setattr(activation_pack, "pack", spy)
    with packed_saves("int8", minimum_size=64):
        result = function()
    return seen, result


def test_weights_statistics_and_finished_gradients_are_not_packed(monkeypatch):
    """Of any kind: frozen ones as plain tensors, those that ask for a gradient, views of a larger one."""
    x, rows = torch.randn(100, 64, requires_grad=True), torch.randn(80, 64)
    cu_seqlens, table = torch.tensor([0, 100], dtype=torch.int32), torch.randn(100, 4)
    q, k = torch.randn(100, 2, 8, requires_grad=True), torch.randn(100, 1, 8)
    targets = torch.randint(80, (100,))
    kept_by = {
        "rms_norm": (lambda: rms_norm(x, rows[0]), [x]),
        "layer_norm": (lambda: layer_norm(x, rows[0], rows[1]), [x]),
        "gated_mlp": (
            lambda: gated_mlp(x, rows, rows.clone().requires_grad_(), rows.t()),
            [x, torch.empty(100, 80), torch.empty(100, 80)],
        ),
        "bottleneck": (lambda: bottleneck(x, rows, rows.t().contiguous()), [x]),
        "rope": (lambda: rope(q, table, table, torch.arange(100)), []),
        "attention": (lambda: attention(q, k, k, cu_seqlens), [q, k, k, q]),
        "cross-entropy": (lambda: linear_cross_entropy(x, rows, targets), []),
        "cross-entropy of rows": (lambda: linear_cross_entropy(x, rows, targets, reduction="none"), [x]),
        "PyTorch": (lambda: x * x, [x, x]),
    }
    for name, (function, packed) in kept_by.items():
        seen, _ = packed_by(monkeypatch, function)
        assert [t.shape for t in seen] == [t.shape for t in packed], name


def test_the_loss_has_exact_gradients(monkeypatch):
    x, weight = torch.randn(100, 64, requires_grad=True), torch.randn(80, 64, requires_grad=True)
    targets = torch.randint(80, (100,))
    _, loss = packed_by(monkeypatch, lambda: linear_cross_entropy(x, weight, targets))
    found = torch.autograd.grad(loss, (x, weight))
    exact = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_what_was_exact_is_not_so_for_ever(monkeypatch):
    """A weight's memory may be an activation's later on; and a call without gradients marks nothing."""
    weight, x = torch.randn(8, 64), torch.randn(8, 64, requires_grad=True)

    def later():
        rms_norm(x, weight[0])
        with torch.no_grad():
            rms_norm(x, weight[0])
        return x * weight

    assert [t.shape for t in packed_by(monkeypatch, later)[0]] == [x.shape, weight.shape]


@pytest.mark.parametrize(("mode", "error"), [("bf16", 0.01), ("int8", 0.03)])
def test_the_gated_mlp_keeps_its_widest_tensors_packed(mode, error, monkeypatch):
    torch.manual_seed(0)
    shapes = [(50, 64), (96, 64), (96, 64), (64, 96)]
    inputs = [(torch.randn(*shape) / shape[1] ** 0.5).requires_grad_() for shape in shapes]
    dy = torch.randn(50, 64)
    exact = torch.autograd.grad(gated_mlp(*inputs), inputs, dy)
    with packed_saves(mode, minimum_size=50 * 64):
        y = gated_mlp(*inputs)
    for _ in range(2):  # the second backward pass has another gate and up, computed again
        found = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        assert all((a - b).norm() <= error * b.norm() for a, b in zip(found, exact, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_the_saving_is_real():
    x = torch.randn(100, 1000)
    assert pack(x, "bf16").nbytes == x.nbytes // 2
    assert pack(x, "int8").nbytes == x.nbytes // 4 + 100 * 4


def test_errors_name_the_argument():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="mode='fp8'"):
        pack(x, "fp8")
    with pytest.raises(ValueError, match="mode='fp8'"), packed_saves("fp8"):
        pass
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        pack(x.double(), "int8")
    packed = pack(x, "int8")
    assert isinstance(packed, Packed)
    for out in (torch.empty(4, 3), x.bfloat16(), torch.empty(4, 3).t()):
        with pytest.raises(ValueError, match="out "):
            unpack(packed, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no device")
def test_no_pinned_memory_without_a_device():
    with pytest.raises(ValueError, match="to_host=True needs a CUDA device"), packed_saves("int8", to_host=True):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["bf16", "int8"])
def test_by_way_of_pinned_host_memory(mode):
    module, x = block().cuda(), torch.randn(2, 50, 64, device="cuda")
    here = gradients(module, x, mode=mode, minimum_size=1000)
    there = gradients(module, x, mode=mode, minimum_size=1000, to_host=True)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
