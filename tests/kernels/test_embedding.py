"""Embedding: repeated ids against fp64 sums, what the rows that no id names hold, accumulation, padding and errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_host import host
from helpers_kernels import each_of
from leantune_kernels.embedding import OP, backward, embedding, forward

implementation = each_of("cpu", "reference", "triton", "cuda", autouse=True)


def exact_gradient(dy, ids, vocabulary, scale=1.0, padding_idx=None):
    kept = ids != (-1 if padding_idx is None else padding_idx)
    exact = torch.zeros(vocabulary, dy.shape[1], dtype=torch.float64)
    return exact.index_add(0, ids[kept], dy[kept].double()) * scale


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 300),
    vocabulary=st.integers(1, 600),
    distinct=st.integers(1, 600),
    cols=st.integers(1, 40),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(tokens, vocabulary, distinct, cols, padded, dtype):
    ids = torch.randint(min(distinct, vocabulary), (tokens,))
    padding_idx = 0 if padded else None
    weight = torch.randn(vocabulary, cols).to(dtype)
    assert torch.equal(forward(ids, weight), F.embedding(ids, weight))
    dy = torch.randn(tokens, cols).to(dtype)
    dweight = torch.full((vocabulary, cols), torch.nan)
    assert backward(dy, ids, dweight, 0.5, padding_idx) is dweight
    wanted = exact_gradient(dy, ids, vocabulary, 0.5, padding_idx)
    torch.testing.assert_close(dweight.double(), wanted, rtol=1e-5, atol=1e-5)
    untouched = torch.ones(vocabulary, dtype=torch.bool)
    untouched[ids] = False
    assert not dweight[untouched].any()
    assert padding_idx is None or not dweight[0].any()


@pytest.mark.parametrize("ids", [[], [3], [3] * 200, [0, 4] * 100, [*range(5)] * 64, [2] * 63 + [3] * 65 + [4]])
def test_segments_that_begin_and_end_at_pieces(ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    dy = torch.randn(len(ids), 17)
    dweight = backward(dy, ids, torch.full((5, 17), torch.nan))
    torch.testing.assert_close(dweight.double(), exact_gradient(dy, ids, 5), rtol=1e-6, atol=1e-5)


def test_accumulation_touches_the_rows_that_ids_name_alone():
    ids = torch.tensor([1, 6, 1, 3])
    dy = torch.randn(4, 9)
    before = torch.randn(8, 9)
    before[5] = torch.nan  # its bits stay
    after = backward(dy, ids, before.clone(), 2.0, padding_idx=3, accumulate=True)
    rest = [0, 2, 3, 4, 5, 7]
    assert torch.equal(after[rest].view(torch.int32), before[rest].view(torch.int32))
    wanted = (before + exact_gradient(dy, ids, 8, 2.0, 3)).float()
    torch.testing.assert_close(after[[1, 6]], wanted[[1, 6]])


def test_gradient_of_a_strided_table_leaves_what_lies_beside_it():
    ids = torch.randint(6, (40,))
    dy = torch.randn(40, 8)
    wide = torch.full((6, 11), torch.nan)
    backward(dy, ids, wide[:, :8])
    torch.testing.assert_close(wide[:, :8].double(), exact_gradient(dy, ids, 6), rtol=1e-6, atol=1e-5)
    assert wide[:, 8:].isnan().all()


def test_sums_are_fp32_whatever_the_storage(implementation):
    ids = torch.zeros(5000, dtype=torch.int64)
    dy = torch.full((5000, 3), 0.125, dtype=torch.bfloat16)
    found = backward(dy, ids, torch.empty(1, 3, dtype=torch.bfloat16))
    assert torch.equal(found, torch.full((1, 3), 625.0).bfloat16())


def test_the_order_of_a_segments_sum_is_that_of_the_tokens():
    """1 is lost beside 2^24 in fp32, unless the large ones cancel before it comes."""
    dy = torch.tensor([[2.0**24], [-(2.0**24)], [1.0]])
    ids = torch.zeros(3, dtype=torch.int64)
    assert backward(dy, ids, torch.empty(1, 1)).item() == 1
    assert backward(dy[[2, 0, 1]], ids, torch.empty(1, 1)).item() == 0


def test_same_bits_for_any_number_of_threads():
    ids = torch.randint(7, (1000,))
    dy = torch.randn(1000, 33)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(backward(dy, ids, torch.empty(7, 33)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_scale_is_applied_before_rounding():
    weight = torch.randn(9, 7).bfloat16()
    ids = torch.tensor([[0, 8], [3, 3]])
    scaled = embedding(ids, weight, scale=7**0.5)
    assert torch.equal(scaled, (weight.float()[ids] * torch.tensor(7**0.5)).bfloat16())
    assert torch.equal(embedding(ids, weight, scale=7**0.5, dtype=torch.float32), weight.float()[ids] * 7**0.5)


def test_gradient_used_twice_and_zero_stride():
    weight = torch.randn(6, 5, requires_grad=True)
    ids = torch.tensor([1, 1, 4])
    y = embedding(ids, weight)
    (first,) = torch.autograd.grad(y, weight, torch.ones(()).expand(3, 5), retain_graph=True)
    (again,) = torch.autograd.grad(y, weight, torch.ones(3, 5))
    assert torch.equal(first, again) and first.sum() == 15
    (twice,) = torch.autograd.grad((lambda e: e + e)(embedding(ids, weight)), weight, torch.ones(3, 5))
    assert torch.equal(twice, 2 * first)


@pytest.mark.parametrize("implementation", ["triton", "cuda"], indirect=True)
def test_unknown_ids(implementation):
    """What a device does with ids that nobody has checked: NaN forward, nothing backward."""
    weight, ids = torch.randn(5, 6), torch.tensor([4, 5, -1, 0, 2**40, 4])
    y, op = torch.zeros(6, 6), OP.pick(weight)
    op.forward(ids, weight, 2.0, y)
    known = torch.tensor([0, 3, 5])
    assert torch.equal(y[known], 2 * weight[ids[known]]) and y[[1, 2, 4]].isnan().all()
    dy, dweight = torch.randn(6, 6), torch.full((5, 6), torch.nan)
    op.backward(dy, ids, dweight, 1.0, None, False)
    torch.testing.assert_close(dweight.double(), exact_gradient(dy[known], ids[known], 5), rtol=1e-6, atol=1e-6)


def test_cuda_bits_on_every_run_and_in_every_order():
    ids = torch.randint(7, (700,))
    dy = torch.randn(700, 33)
    with host.kernels("plain") as library:
        results = []
        for order in (b"forward", b"reverse", b"random:1"):
            library.lt_host_order(order)
            results.append(backward(dy, ids, torch.empty(7, 33)))
        library.lt_host_order(b"forward")
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_ids_outside_the_table_are_named(implementation):
    if implementation in ("triton", "cuda"):
        pytest.skip("ids on a device are not read back")
    weight = torch.randn(5, 4)
    for bad, words in ((torch.tensor([0, 5, -1]), r"ids\[1\]=5"), (torch.tensor([3, -1]), r"ids\[1\]=-1")):
        with pytest.raises(ValueError, match=words + r" is not a row of weight, \[0, 5\)"):
            embedding(bad, weight)
        with pytest.raises(ValueError, match=words):
            backward(torch.zeros(len(bad), 4), bad, torch.empty(5, 4))


def test_errors_name_the_argument():
    weight, ids = torch.randn(5, 4), torch.tensor([0, 4])
    for padding_idx in (5, -1):
        with pytest.raises(ValueError, match=f"padding_idx={padding_idx}"):
            embedding(ids, weight, padding_idx=padding_idx)
    for arguments, words in (
        ((ids.int(), weight), r"ids is torch\.int32"),
        ((ids, weight[0]), "weight has shape"),
        ((ids, weight.double()), r"weight has dtype torch\.float64"),
        ((ids, weight, 1.0, torch.empty(2, 3)), "out is"),
    ):
        with pytest.raises(ValueError, match=words):
            forward(*arguments)
    with pytest.raises(ValueError, match="dy is"):
        backward(torch.zeros(2, 3), ids, torch.empty(5, 4))
    with pytest.raises(ValueError, match="dweight is .* last dimension contiguous"):
        backward(torch.zeros(2, 4), ids, torch.empty(4, 5).t())
