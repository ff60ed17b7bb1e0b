"""linear_distillation: its three kinds of teacher, its limits, and that no tensor of all logits ever exists."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import testing
from leantune_kernels.cpu import lib
from leantune_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_distillation,
    native_impl,
    reference,
)
from leantune_kernels.linear_cross_entropy.cases import _case


def problem(rows=21, cols=12, vocab=90, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = -100
    hidden, weight = torch.randn(rows, cols, generator=g), torch.randn(vocab, cols, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), 2 * torch.randn(rows, vocab, generator=g), targets


implementation = each_of("cpu", "reference", autouse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        _case(12, 16, 2500, teacher="logits", bias=True, alpha=0.7, temperature=4.0, chunk_rows=5),
        _case(3, 4, 30_001, teacher="probabilities", alpha=0.2, temperature=0.5, reduction="none"),
        _case(5, 8, 2049, teacher="logits", labels=False, alpha=1.0),
    ],
    ids=lambda case: case.name,
)
def test_large_vocabulary(case, dtype):
    from leantune_kernels.linear_cross_entropy.cases import function, plain

    testing.accept(case, dtype, function, plain)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 30),
    vocab=st.integers(1, 300),
    chunk_rows=st.integers(1, 40),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_any_shape(rows, vocab, chunk_rows, alpha, temperature, reduction):
    hidden, weight, teacher, targets = problem(rows, 6, vocab)
    options = {"alpha": alpha, "temperature": temperature, "reduction": reduction}
    ours = linear_distillation(hidden, weight, teacher, targets, chunk_rows=chunk_rows, **options)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = reference.plain_distillation(*exact, teacher.double(), targets, **options)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)
    upstream = torch.rand(ours.shape)
    found = torch.autograd.grad(ours, (hidden, weight), upstream)
    for a, b in zip(found, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_without_a_teachers_part_it_is_cross_entropy():
    hidden, weight, teacher, targets = problem()
    hard = linear_cross_entropy(hidden, weight, targets)
    soft = linear_distillation(hidden, weight, teacher, targets, alpha=0.0)
    torch.testing.assert_close(soft, hard)
    pairs = zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (soft, hard)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_the_teachers_three_forms_agree():
    hidden, weight, _, targets = problem()
    own = torch.randn(21, 5), torch.randn(90, 5)
    logits = own[0] @ own[1].t()
    options = {"temperature": 2.0, "chunk_rows": 4}
    losses = [
        linear_distillation(hidden, weight, logits, targets, **options),
        linear_distillation(hidden, weight, own, targets, **options),
        linear_distillation(hidden, weight, (logits / 2).softmax(-1), targets, probabilities=True, **options),
        linear_distillation(hidden, weight, 3 * (logits / 2).softmax(-1), targets, probabilities=True, **options),
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)


def test_a_teacher_equal_to_the_student_gives_nothing():
    hidden, weight, _, _ = problem(ignored=0)
    loss = linear_distillation(hidden, weight, (hidden.detach(), weight.detach()), alpha=1.0, temperature=2.0)
    assert loss.abs().item() < 1e-5
    for g in torch.autograd.grad(loss, (hidden, weight)):
        assert g.abs().max() < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_all_rows_ignored_gives_zero_loss_and_zero_gradients(reduction, alpha):
    hidden, weight, teacher, targets = problem(ignored=2.0)
    loss = linear_distillation(hidden, weight, teacher, targets, alpha=alpha, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert all(t.abs().max() == 0 for t in (loss, *grads))


def test_ignored_rows_of_the_teacher_may_be_nan():
    hidden, weight, teacher, targets = problem()
    expected = linear_distillation(hidden, weight, teacher, targets)
    teacher[targets == -100] = torch.nan
    assert torch.equal(linear_distillation(hidden, weight, teacher, targets), expected)


def test_a_kept_graph_and_an_upstream_gradient():
    hidden, weight, teacher, targets = problem()
    loss = linear_distillation(hidden, weight, teacher, targets)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    expected = first.clone()
    (scaled,) = torch.autograd.grad(loss, hidden, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(scaled, 3 * expected)
    for times in (1, 2):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(hidden.grad, times * expected)


def test_impossible_tokens_of_teacher_and_student():
    """-infinity is a probability of 0: nothing where the teacher has it, infinite loss where the student alone has."""
    hidden, weight, teacher, _ = problem(vocab=2100)
    bias = torch.zeros(2100)
    bias[:1500] = teacher[:, :1500] = -torch.inf
    loss = linear_distillation(hidden, weight, teacher, bias=bias, alpha=1.0, temperature=2.0)
    narrow = linear_distillation(hidden, weight[1500:], teacher[:, 1500:], alpha=1.0, temperature=2.0)
    torch.testing.assert_close(loss, narrow)
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
    teacher[3, 7] = 0.0
    losses = linear_distillation(hidden, weight, teacher, bias=bias, alpha=1.0, reduction="none")
    assert losses.isinf().tolist() == [i == 3 for i in range(21)]


def test_probabilities_with_zeros():
    hidden, weight, teacher, _ = problem()
    wanted = teacher.softmax(-1)
    wanted[:, ::3] = 0
    loss = linear_distillation(hidden, weight, wanted, probabilities=True, alpha=1.0)
    exact = reference.plain_distillation(hidden, weight, wanted, probabilities=True, alpha=1.0)
    torch.testing.assert_close(loss, exact)


def test_agrees_with_torch_kl_div():
    hidden, weight, teacher, _ = problem()
    loss = linear_distillation(hidden, weight, teacher, alpha=1.0, temperature=2.0)
    log_q, p = (F.linear(hidden, weight) / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    torch.testing.assert_close(loss, 4 * F.kl_div(log_q, p, reduction="batchmean"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_all_rows_never_exist(reduction):
    from torch.utils._python_dispatch import TorchDispatchMode

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return result

    hidden, weight, _, targets = problem(rows=64, vocab=500, ignored=0.1)
    own = torch.randn(64, 5), torch.randn(500, 5)
    with LargestTensor() as largest:
        loss = linear_distillation(hidden, weight, own, targets, chunk_rows=16, reduction=reduction)
        torch.autograd.grad(loss.sum(), (hidden, weight))
    assert largest.numel == 16 * 500


def test_rows_have_the_same_bits_for_any_number_of_threads():
    logits, teacher = torch.randn(2, 37, 3001).mul(4).unbind(0)
    options = {"targets": torch.randint(3001, (37,)), "row_scale": torch.rand(37), "scale": 0.5, "alpha": 0.4}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = logits.clone()
            losses = native_impl.distillation_rows(
                logits=x, teacher=teacher, temperature=2.0, need_gradient=True, **options
            )
            results.append((x, losses))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_rows_refuse_a_target_outside_the_vocabulary():
    x, targets, losses = torch.zeros(2, 5), torch.tensor([0, 5]), torch.zeros(2, dtype=torch.float64)
    arguments = (x.data_ptr(), 5, 0, x.data_ptr(), 5, targets.data_ptr(), 0, 1.0)
    with pytest.raises(RuntimeError, match=r"targets\[1\] = 5 is outside \[0, 5\)"):
        lib.distillation_rows(*arguments, 0.5, 1.0, 0, losses.data_ptr(), 2, 5)
    lib.distillation_rows(*arguments, 1.0, 1.0, 0, losses.data_ptr(), 2, 5)  # where targets are not read
    assert losses.abs().max() < 1e-6


def test_errors_name_the_argument():
    hidden, weight, teacher, targets = problem()
    for options, words in (
        ({"alpha": 1.5}, "alpha=1.5 is outside"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"targets": None}, "alpha=0.5 needs targets"),
        ({"teacher": teacher[1:]}, r"teacher is torch\.float32 for \[20, 90\] logits; .* give \[21, 90\]"),
        ({"teacher": teacher.double()}, r"teacher is torch\.float64"),
        ({"teacher": (hidden, weight[:, 1:])}, r"for \[\] logits"),
        ({"teacher": (hidden, weight), "probabilities": True}, "probabilities=True needs teacher as one tensor"),
        ({"targets": targets[1:]}, "targets is"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_distillation(
                **{"hidden": hidden, "weight": weight, "teacher": teacher, "targets": targets} | options
            )
