"""linear_cross_entropy beyond the generic tests: many blocks of vocabulary, mixed storage types, and
what others got wrong: ignored labels, gradients used twice, logits that are there after all.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_host import host
from leantune_kernels import testing
from leantune_kernels.cpu import lib
from leantune_kernels.linear_cross_entropy import cuda_impl, forward, linear_cross_entropy, native_impl, reference
from leantune_kernels.linear_cross_entropy.cases import _case


def problem(rows=21, cols=12, vocab=90, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    hidden, weight = torch.randn(rows, cols, generator=g), torch.randn(vocab, cols, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        _case(30, 16, 2500, bias=True, label_smoothing=0.1, z_loss=1e-2, chunk_rows=16),  # blocks of a row
        _case(9, 8, 9000, reduction="sum"),  # two blocks of a half-precision head
        _case(2, 4, 300_001, ignored=0.0),  # blocks beyond their usual size
    ],
    ids=lambda case: case.name,
)
def test_large_vocabulary(case, dtype):
    testing.accept(case, dtype, linear_cross_entropy, reference.plain)


@pytest.mark.parametrize("need_gradient", [True, False])
def test_rows_have_the_same_bits_for_any_number_of_threads(need_gradient):
    logits = torch.randn(37, 3001, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.randint(3001, (37,), generator=torch.Generator().manual_seed(1))
    options = {"row_scale": torch.rand(37), "scale": 0.5, "label_smoothing": 0.1, "z_loss": 0.01}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = logits.clone()
            losses = native_impl.cross_entropy_rows(logits=x, targets=targets, need_gradient=need_gradient, **options)
            results.append((x, losses))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    assert need_gradient or torch.equal(results[0][0], logits)


def test_rows_refuse_a_target_outside_the_vocabulary():
    logits, targets, losses = torch.zeros(2, 5), torch.tensor([0, 5]), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"targets\[1\] = 5 is outside \[0, 5\)"):
        lib.cross_entropy_rows(logits.data_ptr(), 5, targets.data_ptr(), 0, 1.0, 0.0, 0.0, 0, losses.data_ptr(), 2, 5)


OPTIONS = {"row_scale": None, "scale": 0.5, "need_gradient": True}


@pytest.mark.parametrize("cols", [5, 132, 60_000], ids=["scalar", "vectors", "beyond shared memory"])
def test_cuda_rows_are_the_references(cols):
    """Rows 16 bytes apart or not; the last size does not fit the shared memory that the emulator has."""
    logits, teacher = torch.randn(2, 2, cols).mul(4).unbind(0)
    targets = torch.tensor([0, cols - 1])
    for name, options in (
        ("cross_entropy_rows", {"label_smoothing": 0.1, "z_loss": 0.01}),
        ("distillation_rows", {"teacher": teacher, "alpha": 0.6, "temperature": 2.0}),
    ):
        expected, found = logits.clone(), logits.clone()
        wanted = getattr(reference, name)(logits=expected, targets=targets, **OPTIONS, **options)
        with host.kernels("plain"):
            losses = getattr(cuda_impl, name)(logits=found, targets=targets, **OPTIONS, **options)
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_cuda_row_with_an_impossible_target_is_nan():
    logits, targets = torch.randn(3, 8), torch.tensor([1, 8, -100])
    teacher = torch.randn(3, 8)
    with host.kernels("plain"):
        for name, options in (
            ("cross_entropy_rows", {"label_smoothing": 0.0, "z_loss": 0.0}),
            ("distillation_rows", {"teacher": teacher, "alpha": 0.6, "temperature": 2.0}),
        ):
            x = logits.clone()
            losses = getattr(cuda_impl, name)(logits=x, targets=targets, **OPTIONS, **options)
            assert losses.isnan().tolist() == [False, True, True]
            assert x.isnan().any(1).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_head_in_half_precision_is_used_exactly(dtype):
    hidden, weight, targets = problem(vocab=9000)
    stored = weight.detach().to(dtype)
    mixed = linear_cross_entropy(hidden, stored, targets)
    exact = linear_cross_entropy(hidden, stored.float(), targets)
    torch.testing.assert_close(mixed, exact, rtol=1e-6, atol=0)
    (found,), (expected,) = torch.autograd.grad(mixed, hidden), torch.autograd.grad(exact, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_scale_lifts_float16_gradients_before_they_are_rounded():
    """Divided by 4096 rows they are subnormal in float16; times 2^16 they are not."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 8, generator=g).half().requires_grad_()
    weight, targets = torch.randn(16, 8, generator=g) * 0.02, torch.randint(16, (4096,), generator=g)
    loss = linear_cross_entropy(hidden, weight.half(), targets)
    (found,) = torch.autograd.grad(loss, hidden, torch.tensor(65536.0))
    exact = hidden.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(exact @ weight.half().double().t(), targets), exact)
    assert found.dtype == torch.float16
    assert (found.double() - 65536 * wanted).norm() < 2**-11 * (65536 * wanted).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_labels_ignored_gives_zero_loss_and_zero_gradients(reduction):
    hidden, weight, targets = problem(ignored=2.0)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert all(t.abs().max() == 0 for t in (loss, *grads))
    result = forward(hidden, weight, targets, need_dweight=True)
    assert result.label_count == 0 and result.loss_sum == 0 and result.dhidden.abs().max() == 0


def test_agrees_with_torch_cross_entropy():
    hidden, weight, targets = problem()
    for options in ({}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"reduction": "none"}):
        ours = linear_cross_entropy(hidden, weight, targets, chunk_rows=4, **options)
        torchs = F.cross_entropy(F.linear(hidden, weight), targets, **options)
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept_gives_its_gradient_again(reduction):
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    expected = first.clone()
    (scaled,) = torch.autograd.grad(loss, hidden, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(scaled, 3 * expected)
    for times in (1, 2, 3):  # accumulates into hidden.grad, which must not be the saved gradient itself
        loss.backward(retain_graph=True)
        torch.testing.assert_close(hidden.grad, times * expected)


def test_raw_forward_scales_gradients_alone_and_reports_labels():
    hidden, weight, targets = problem()
    plain = forward(hidden, weight, targets, need_dweight=True, chunk_rows=5)
    scaled = forward(hidden, weight, targets, need_dweight=True, chunk_rows=5, grad_scale=0.25)
    assert plain.label_count == int((targets != -100).sum()) and plain.dbias is None
    assert torch.equal(plain.loss_sum, scaled.loss_sum)
    torch.testing.assert_close(scaled.dhidden, plain.dhidden / 4)
    torch.testing.assert_close(scaled.dweight, plain.dweight / 4)
    assert plain.dhidden[targets == -100].abs().max() == 0
    neither = forward(hidden, weight, targets, need_dhidden=False)
    assert neither.dhidden is None and neither.dweight is None
    torch.testing.assert_close(neither.loss_sum, plain.loss_sum)


def test_nothing_depends_on_uninitialised_memory():
    hidden, weight, targets = problem(vocab=9000)
    head = weight.detach().bfloat16()
    expected = forward(hidden, head, targets, need_dweight=True, chunk_rows=4)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = forward(hidden, head, targets, need_dweight=True, chunk_rows=4)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("loss_sum", "dhidden", "dweight"):
        torch.testing.assert_close(getattr(poisoned, name), getattr(expected, name), rtol=0, atol=0)


def test_inputs_of_any_strides():
    hidden, weight, targets = problem()
    strided = [t.detach().t().contiguous().t().requires_grad_() for t in (hidden, weight)]
    ours, dense = (linear_cross_entropy(h, w, targets) for h, w in (strided, (hidden, weight)))
    pairs = zip(torch.autograd.grad(ours, strided), torch.autograd.grad(dense, (hidden, weight)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_weight_gradient_over_many_chunks_is_not_rounded_to_half_precision():
    hidden, weight, targets = problem(rows=300, ignored=0.0)
    half = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    dweight = forward(*half, targets, need_dweight=True, chunk_rows=2).dweight
    exact = forward(*(t.float() for t in half), targets, need_dweight=True, chunk_rows=300).dweight
    assert dweight.dtype == torch.float32
    torch.testing.assert_close(dweight, exact, rtol=1e-4, atol=1e-4)


def test_masked_vocabulary_and_nan():
    hidden, weight, _ = problem(vocab=2100)
    targets = torch.full((21,), 2000)
    bias = torch.zeros(2100)
    bias[:1500] = -torch.inf  # more than the first block of the row
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight, bias), targets))
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
    with torch.no_grad():
        hidden[3, 0] = torch.nan
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
    assert losses.isnan().tolist() == [i == 3 for i in range(21)]


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_all_rows_never_exist(reduction):
    hidden, weight, targets = problem(rows=64, vocab=500, ignored=0.1)
    with LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=16, reduction=reduction)
        torch.autograd.grad(loss.sum(), (hidden, weight))
    assert largest.numel == 16 * 500


def test_no_gradient_is_computed_without_need(monkeypatch):
    hidden, weight, targets = problem()
    expected = linear_cross_entropy(hidden, weight, targets).detach()
    asked = []
    rows = native_impl.cross_entropy_rows
    monkeypatch.setattr(
        native_impl, "cross_entropy_rows", lambda **kw: (asked.append(kw["need_gradient"]), rows(**kw))[1]
    )
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad and asked == [False]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_workspace_of_the_callers_takes_the_logits(reduction):
    hidden, weight, targets = problem(rows=64, vocab=500, ignored=0.1)
    wide = torch.full((20, 510), torch.nan)
    workspace = wide[:, :500]
    options = {"chunk_rows": 16, "reduction": reduction}
    expected = linear_cross_entropy(hidden, weight, targets, **options)
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    with LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, **options, workspace=workspace)
        found = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip((loss, *found), (expected, *wanted), strict=True))
    assert largest.numel <= workspace.numel() and not workspace[:16].isnan().any() and wide[:, 500:].isnan().all()
    for bad in (workspace[:15], workspace[:, 1:], workspace.double(), torch.empty(500, 20).t(), workspace[0]):
        with pytest.raises(ValueError, match="workspace"):
            linear_cross_entropy(hidden, weight, targets, **options, workspace=bad)


def test_errors_name_the_argument():
    hidden, weight, targets = problem(ignored=0.0)
    targets[5], targets[7] = 90, -1
    with pytest.raises(ValueError, match=r"targets\[5\]=90 is neither ignore_index=-100"):
        linear_cross_entropy(hidden, weight, targets)
    for arguments, message in [
        ((hidden[None], weight, targets), "hidden has shape"),
        ((hidden, weight[:, 1:], targets), "weight has shape"),
        ((hidden, weight, targets[1:]), "targets is"),
        ((hidden, weight, targets.int()), "targets is torch.int32"),
        ((hidden, weight.double(), targets), "weight has dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    for option in (
        {"reduction": "avg"},
        {"label_smoothing": 2.0},
        {"chunk_rows": 0},
        {"bias": torch.ones(3)},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            linear_cross_entropy(hidden, weight, targets, **option)
