"""What all optimizers share: bf16 parameters, rounded stochastically or beside a master; lists; torch.optim as peer.

Every implementation is asked: reference, C++, Triton (interpreted without a GPU) and CUDA (on the emulator).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels.adamw import AdamWTable, adamw_step
from leantune_kernels.adamw_8bit import adamw_8bit_step, zero_states
from leantune_kernels.rmsprop import RMSpropTable, rmsprop_step
from leantune_kernels.sgd import SGDTable, sgd_step
from leantune_kernels.tensor_list import PIECE, halves, pieces, round_stochastically

SHAPES = [(7,), (64, 33), (0, 5), (), (3, 683)]


implementation = each_of("reference", "cpu", "triton", "cuda")


def normal(seed, dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def zeros(like):
    return [torch.zeros(t.shape) for t in like]


def adamw(params, grads, states, **numbers):
    adamw_step(params, grads, *states[:2], **numbers)


def sgd(params, grads, states, **numbers):
    sgd_step(params, grads, states[0], momentum=0.9, **numbers)


def rmsprop(params, grads, states, **numbers):
    rmsprop_step(params, grads, *states[:3], momentum=0.9, **numbers)


def adamw_8bit(params, grads, states, **numbers):
    adamw_8bit_step(params, grads, *states[3:], **numbers)


OPTIMIZERS = [adamw, sgd, rmsprop, adamw_8bit]


def new_states(params):
    return [*(zeros(params) for _ in range(3)), *zero_states(params)]


# ---- torch.optim


def compare_with_torch(make_ours, make_torch, steps=8):
    """Steps of ours on fp32 tensors and of torch.optim's on the same in fp64, with rates for each tensor."""
    lr, decay = [1e-2, 1e-3, 1e-3, 1e-2, 3e-3], [0.1, 0.0, 0.1, 0.0, 0.5]
    params = normal(0)
    ours = make_ours(params)
    exact = [p.double().requires_grad_() for p in params]
    groups = [{"params": [p], "lr": a, "weight_decay": w} for p, a, w in zip(exact, lr, decay, strict=True)]
    optimizer = make_torch(groups)
    for step in range(1, steps + 1):
        grads = normal(step)
        ours(grads, step=step, lr=lr, weight_decay=decay, grad_scale=0.5)
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double() * 0.5
        optimizer.step()
    for p, e in zip(params, exact, strict=True):
        torch.testing.assert_close(p.double(), e.detach(), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=str,
)
def test_sgd_is_torchs(implementation, options):
    def ours(params):
        table = SGDTable(params, zeros(params) if options else None)
        return lambda grads, **numbers: table.step(grads, **numbers, **options)

    compare_with_torch(ours, lambda groups: torch.optim.SGD(groups, lr=0.1, **options))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_is_torchs(implementation, momentum, centered):
    options = {"alpha": 0.9, "eps": 1e-4, "momentum": momentum}

    def ours(params):
        buffers, means = (zeros(params) if wanted else None for wanted in (momentum, centered))
        table = RMSpropTable(params, zeros(params), buffers, means)
        return lambda grads, **numbers: table.step(grads, **numbers, **options)

    compare_with_torch(ours, lambda groups: torch.optim.RMSprop(groups, centered=centered, **options))


def test_adamw_is_torchs(implementation):
    options = {"eps": 1e-6}

    def ours(params):
        table = AdamWTable(params, zeros(params), zeros(params))
        return lambda grads, **numbers: table.step(grads, beta1=0.8, beta2=0.95, **numbers, **options)

    compare_with_torch(ours, lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), **options))


# ---- bf16 with stochastic rounding


def exact_step(params, grads, **numbers):
    """SGD whose result in fp32 needs no rounding: what reaches bf16's rounding is the same everywhere."""
    sgd_step(params, grads, lr=2.0**-12, **numbers)


def test_stochastic_rounding_gives_the_same_bits_in_every_implementation(implementation):
    for seed, step in [(0, 1), (5, 2), (2**64 - 1, 2**32 - 1)]:
        shapes = [(1,), (17, 63), (2055,)]
        params, grads = normal(0, torch.bfloat16, shapes), normal(1, torch.bfloat16, shapes)
        wanted = [p.float() - 2.0**-12 * g.float() for p, g in zip(params, grads, strict=True)]
        exact_step(params, grads, step=step, seed=seed)
        for i, (p, w) in enumerate(zip(params, wanted, strict=True)):
            assert torch.equal(p, round_stochastically(w, i, seed=seed, step=step))


def test_the_noise_belongs_to_seed_step_tensor_and_element():
    base = halves(4096, 0, seed=1, step=1, device=torch.device("cpu"))
    assert torch.equal(base[:999], halves(999, 0, seed=1, step=1, device=torch.device("cpu")))
    for tensor, seed, step in [(1, 1, 1), (0, 2, 1), (0, 1 + 2**32, 1), (0, 1, 2)]:
        other = halves(4096, tensor, seed=seed, step=step, device=torch.device("cpu"))
        assert (other == base).double().mean() < 0.01
    assert base.min() >= 0 and base.max() < 2**16
    assert abs(base.double().mean() / 2**15 - 1) < 0.03


def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_keeps_the_mean(implementation):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(256, generator=g)
    below = values.view(torch.int32).bitwise_and(-65536).view(torch.float32)  # towards zero
    above = (values.view(torch.int32).bitwise_and(-65536) + 65536).view(torch.float32)
    start = values.bfloat16()
    grads, total, steps = [(start.float() - values) * 2.0**12], torch.zeros(256).double(), 60
    for step in range(1, steps + 1):
        params = [start.clone()]
        exact_step(params, grads, step=step, seed=3)
        result = params[0].float()
        assert ((result == below) | (result == above)).all()
        total += (result.double() - values) / (above - below).abs()
    error = total / steps
    assert abs(float(error.mean())) < 3 * 0.5 / (256 * steps) ** 0.5  # three standard deviations at most
    assert float(error.abs().max()) < 4.5 * 0.5 / steps**0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bf16_steps_are_the_references_but_for_ties_and_repeat_themselves(implementation, optimizer, monkeypatch):
    def run(steps):
        params = normal(0, torch.bfloat16)
        states = new_states(params)
        for step in range(1, steps + 1):
            optimizer(params, normal(step, torch.bfloat16), states, step=step, lr=1e-2, weight_decay=0.1, seed=9)
        return params

    params = run(2)
    assert all(torch.equal(a, b) for a, b in zip(params, run(2), strict=True))
    monkeypatch.setenv("LEANTUNE_IMPL", "reference")
    found, wanted = (torch.cat([p.flatten() for p in ps]) for ps in (params, run(2)))
    assert (found != wanted).sum() <= 4  # where one bit of fp32 decides
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-3)


def test_infinity_and_nan_pass_through_the_rounding(implementation):
    params = [torch.tensor([1.0, 2.0, 3.0, -4.0], dtype=torch.bfloat16)]
    grads = [torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])]
    sgd_step(params, grads, step=1, lr=1.0)
    assert params[0].isnan().tolist() == [True, False, False, False]
    assert params[0][1:].tolist() == [-torch.inf, torch.inf, -4.0]


# ---- masters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_master_is_updated_as_fp32_is_and_rounded_to_nearest(implementation, optimizer, dtype):
    params = normal(0, dtype)
    masters, alone = [p.float() for p in params], [p.float() for p in params]
    states, states_alone = new_states(params), new_states(alone)
    for step in (1, 2, 3):
        numbers = {"step": step, "lr": 1e-3, "weight_decay": 0.1}
        optimizer(params, normal(step, dtype), states, masters=masters, **numbers)
        optimizer(alone, normal(step, dtype), states_alone, **numbers)
    for p, master, a in zip(params, masters, alone, strict=True):
        assert torch.equal(master, a) and torch.equal(p, a.to(dtype))


def test_storage_types_may_be_mixed_and_masters_be_for_some(implementation):
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]
    params = [torch.ones(300, dtype=d) for d in dtypes]
    masters = [None, None, torch.ones(300), torch.ones(300)]
    grads = [torch.ones(300, dtype=d) for d in reversed(dtypes)]
    sgd_step(params, grads, step=1, lr=2.0**-10, masters=masters)
    assert params[0].unique().tolist() == masters[2].unique().tolist() == [1 - 2.0**-10]
    assert set(params[1].unique().tolist()) == {1 - 2.0**-8, 1.0}  # a quarter of the way down
    assert 0.15 < (params[1] < 1).double().mean() < 0.35
    assert params[2].unique().item() == 1.0 and params[3].unique().item() == torch.tensor(1 - 2.0**-10).half()


# ---- lists


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_absent_gradients_odd_addresses_and_many_tiny_tensors(implementation, optimizer):
    """Tensors at every alignment, some without a gradient: each is what it is when it is stepped alone."""
    shapes = [(n,) for n in (1, 2, 3, 8, 0, 9, 255, 256, 257, 31)]
    params = [t[1:] for t in normal(0, shapes=[(n + 1,) for (n,) in shapes])]
    grads = [None if i == 3 else t for i, t in enumerate(normal(1, shapes=shapes))]
    before, states = [p.clone() for p in params], new_states(params)
    optimizer(params, grads, states, step=1, lr=1e-2, weight_decay=0.1)
    assert torch.equal(params[3], before[3])
    for i, (p, b, g) in enumerate(zip(params, before, grads, strict=True)):
        if g is not None:
            alone, states_alone = [b.clone()], new_states([b])
            optimizer(alone, [g], states_alone, step=1, lr=1e-2, weight_decay=0.1)
            assert not b.numel() or not torch.equal(p, before[i])
            torch.testing.assert_close(p, alone[0], rtol=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3 * PIECE + 1), max_size=6))
def test_pieces_cover_every_element_once(sizes):
    found = pieces(sizes, torch.device("cpu")).tolist()
    wanted = [[i, begin] for i, n in enumerate(sizes) for begin in range(0, n, PIECE)]
    assert found == wanted


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from(OPTIMIZERS), st.booleans())
def test_any_sizes(sizes, optimizer, half):
    dtype = torch.bfloat16 if half else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for name in ("reference", "cpu"):
            patch.setenv("LEANTUNE_IMPL", name)
            params = normal(0, dtype, [(n,) for n in sizes])
            optimizer(params, normal(1, dtype, [(n,) for n in sizes]), new_states(params), step=1, lr=1e-2)
            results.append(torch.cat(params))
    torch.testing.assert_close(*results, rtol=0.02 if half else 1e-5, atol=1e-3 if half else 1e-6)


# ---- errors


def test_errors_name_the_tensor_and_the_fix():
    p, half = torch.zeros(4), torch.zeros(4, dtype=torch.float16)
    for call, message in [
        (lambda: sgd_step([half], [p], step=1, lr=1.0), r"params\[0\] is torch.float16.*give masters\[0\]"),
        (lambda: sgd_step([p], [p], step=1, lr=1.0, masters=[p]), r"masters\[0\] must be None"),
        (lambda: sgd_step([half], [p], step=1, lr=1.0, masters=[half]), r"masters\[0\] is torch.float16"),
        (lambda: sgd_step([half], [p], step=1, lr=1.0, masters=[]), "masters has 0 tensors"),
        (lambda: sgd_step([p], [p], step=1, lr=1.0, momentum=0.9), "needs momentum_buffers"),
        (lambda: sgd_step([p], [p], [p], step=1, lr=1.0, nesterov=True), "nesterov needs momentum"),
        (lambda: sgd_step([p], [p], step=2**32, lr=1.0), "below 2\\^32"),
        (lambda: sgd_step([p], [p], step=1, lr=1.0, seed=-1), "seed=-1"),
        (lambda: rmsprop_step([p], [p], [p], step=1, lr=1.0, alpha=1.0), "alpha=1.0"),
        (lambda: rmsprop_step([p], [p], [p], [p], step=1, lr=1.0), "momentum=0.0"),
        (lambda: adamw_8bit_step([p], [p], [p], [p], [p], [p], step=1, lr=1.0), r"exp_avgs\[0\] .*contiguous uint8"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
