"""Dropout's generator against its published answers, and the same mask from every implementation."""

import itertools

import pytest
import torch

from helpers_kernels import DTYPES, IMPLEMENTATIONS, LEVELS, each_of
from leantune_kernels.dropout import dropout, forward, native_impl, reference, threshold

implementation = each_of(*IMPLEMENTATIONS)
levels = pytest.mark.parametrize("implementation", [f"cpu:{level}" for level in LEVELS], indirect=True)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # philox4x32 10, from the known-answer file of the Random123 library
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert reference.philox(torch.tensor([words[0]]), tuple(words[1])).tolist() == [words[2]]


@levels
def test_first_words_of_the_cpp_generator(implementation):
    """An element is kept if its word is at least the threshold: two thresholds pin each word at counter 0."""
    x = torch.ones(4)
    for i, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        assert native_impl.forward(x, word, 1.0, 0, 0)[i] == 1
        assert native_impl.forward(x, word + 1, 1.0, 0, 0)[i] == 0


@levels
@pytest.mark.parametrize("offset", [0, 1, 254, 2**32 * 4 - 5, 2**62 + 3])
@pytest.mark.parametrize("seed", [0, 12345, 2**64 - 1])
def test_mask_is_the_references(implementation, seed, offset):
    for n in (1, 5, 255, 257, 40_000):
        x = torch.ones(n)
        for p in (0.05, 0.5, 0.999999):
            expected = reference.forward(x, threshold(p), 1.0, seed, offset)
            assert torch.equal(native_impl.forward(x, threshold(p), 1.0, seed, offset), expected)


def test_values_are_the_references_bit_by_bit(implementation):
    given = [torch.randn(1030)[3:]]  # no multiple of 16 bytes
    for n in (1, 5, 2051, 2048, 1027, 700):
        given += [torch.randn(n).to(dtype) for dtype in DTYPES]
    for x, offset, seed in itertools.product(given, (0, 3, 8, 2**62 + 3), (0, 2**64 - 1)):
        wanted = reference.forward(x, threshold(0.3), 1 / 0.7, seed, offset)
        assert torch.equal(forward(x, 0.3, seed, offset), wanted)


def test_mask_belongs_to_the_position():
    whole = dropout(torch.ones(70_000), 0.3, seed=5, offset=0)
    assert torch.equal(dropout(torch.ones(50_000), 0.3, seed=5, offset=1_003), whole[1_003:51_003])
    assert not torch.equal(dropout(torch.ones(70_000), 0.3, seed=6, offset=0), whole)
    kept = whole != 0
    assert abs(kept.double().mean() - 0.7) < 0.01
    assert torch.equal(whole[kept].unique(), torch.tensor([1 / 0.7]))


def test_backward_makes_the_same_mask_again_for_any_strides():
    x = torch.randn(33, 65).requires_grad_()
    y = dropout(x, 0.4, seed=1, offset=7)
    (dx,) = torch.autograd.grad(y, x, torch.ones(()).expand(33, 65))
    assert torch.equal(dx, dropout(torch.ones(33, 65), 0.4, seed=1, offset=7))
    strided = x.detach().t().contiguous().t()
    assert torch.equal(dropout(strided, 0.4, seed=1, offset=7), y)


def test_out_may_be_poisoned_or_the_input_itself():
    x = torch.randn(1000)
    expected = dropout(x, 0.5, seed=1, offset=0)
    out = torch.full_like(x, torch.nan)
    assert forward(x, 0.5, 1, 0, out) is out and torch.equal(out, expected)
    assert torch.equal(forward(x, 0.5, 1, 0, x), expected)


def test_zero_is_the_identity_and_nan_is_not_hidden():
    x = torch.full((100,), torch.nan)
    assert dropout(x, 0.0, seed=0, offset=0) is x
    assert dropout(x, 0.9, seed=0, offset=0).isnan().all()


def test_errors_name_the_argument():
    x = torch.ones(4)
    for p, seed, offset, name in [
        (1.0, 0, 0, "p="),
        (-0.1, 0, 0, "p="),
        (0.5, -1, 0, "seed="),
        (0.5, 0, -1, "offset="),
    ]:
        with pytest.raises(ValueError, match=name):
            dropout(x, p, seed, offset)
    with pytest.raises(ValueError, match=r"out is torch\.float32"):
        forward(x, 0.5, 0, 0, torch.ones(5))
