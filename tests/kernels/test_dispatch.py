"""Dispatch on devices that are not here: what implementations refuse, what takes their place, where Triton launches."""

import importlib
import logging
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import leantune_kernels
from leantune_kernels import cuda, dispatch
from leantune_kernels.dispatch import CannotServe, Op

CARD = torch.device("cuda", 1)
HAS_TRITON = find_spec("triton") is not None


class Card:
    """What `refuses` sees of a tensor [4, 2, head_dim] on a second card."""

    device = CARD

    def __init__(self, dtype=torch.bfloat16, head_dim=64):
        self.dtype, self.shape = dtype, (4, 2, head_dim)

    def element_size(self):
        return self.dtype.itemsize


@pytest.fixture
def card(monkeypatch):
    """Makes PyTorch report a card of this compute capability; returns the devices it was asked about."""

    def present(capability):
        asked = []
        monkeypatch.setattr(cuda, "library", lambda: "built")
        monkeypatch.setattr(cuda, "_device", "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
        return asked

    return present


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "compute capability is 7.5, the kernels need 8.0 or newer"),
        ((8, 0), None),
        ((8, 9), None),
        ((12, 0), None),
    ],
)
def test_the_cuda_kernels_refuse_a_card_that_they_have_no_code_for(capability, reason, card):
    asked = card(capability)
    for op in leantune_kernels.ops():
        assert Op(f"leantune_kernels.{op}").refusal("cuda", Card()) == reason
    assert set(asked) == {CARD}


@pytest.mark.parametrize(
    ("op", "x", "needed"),
    [
        ("attention", Card(torch.bfloat16, 128), None),
        ("attention", Card(torch.bfloat16, 129), 135168),
        ("attention", Card(torch.float32, 64), None),
        ("attention", Card(torch.float32, 72), 101632),
        ("bottleneck", Card(torch.bfloat16), None),
        ("bottleneck", Card(torch.float32), 106496),
    ],
)
def test_the_cuda_kernels_refuse_what_a_card_has_too_little_shared_memory_for(op, x, needed, card):
    card((8, 9))
    expected = needed and f"a block needs {needed} bytes of shared memory, compute capability 8.9 has 101376"
    assert Op(f"leantune_kernels.{op}").refusal("cuda", x) == expected
    card((8, 0))
    assert Op(f"leantune_kernels.{op}").refusal("cuda", x) is None


def test_a_head_too_wide_for_the_cuda_kernel_goes_to_the_next_implementation(monkeypatch, caplog):
    monkeypatch.delenv("LEANTUNE_IMPL", raising=False)
    monkeypatch.setattr(cuda, "refuses", lambda x: None)
    monkeypatch.setattr(dispatch, "EMULATED", ("triton",))
    op = Op("leantune_kernels.attention", dims=leantune_kernels.attention.OP.dims)
    with caplog.at_level(logging.INFO, "leantune_kernels"):
        for dim, wanted in ((256, "cuda_impl"), (264, "native_impl"), (256, "cuda_impl")):
            assert op.pick(torch.empty(6, 1, dim, dtype=torch.float16)).__name__.endswith(wanted)
    assert "attention on cpu torch.float16: cpu (cuda: head_dim=264 exceeds 256; triton: " in caplog.text
    monkeypatch.setenv("LEANTUNE_IMPL", "attention:cuda")
    with pytest.raises(CannotServe, match="cuda: head_dim=264 exceeds 256"):
        op.pick(torch.empty(6, 1, 264))


def raw_functions():
    """Of every triton_impl.py, but those that launch nothing themselves: gated_mlp's call glu's."""
    for op in leantune_kernels.ops():
        reference = importlib.import_module(f"leantune_kernels.{op}.reference")
        if HAS_TRITON and op != "gated_mlp" and find_spec(f"leantune_kernels.{op}.triton_impl"):
            module = importlib.import_module(f"leantune_kernels.{op}.triton_impl")
            for name in set(module.__all__) & set(vars(reference)) - {"refuses"}:
                yield pytest.param(getattr(module, name), id=f"{op}.{name}")


class Stop(Exception):
    pass


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("function", raw_functions())
def test_triton_launches_on_the_device_of_its_tensors(function, monkeypatch):
    from leantune_kernels import triton_runtime

    def entered(device):
        raise Stop(device)

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(triton_runtime, "_device_of", lambda values: CARD)
    with pytest.raises(Stop, match="cuda"):
        function()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_device_is_that_of_the_first_tensor(monkeypatch):
    from leantune_kernels import triton_runtime

    x, current = torch.empty(3, device="meta"), []
    table = SimpleNamespace(params=[x])
    for values in ([x], [1.0, None, x], [None, [None, x]], [table, [None]]):
        assert triton_runtime._device_of(values) == x.device
    assert triton_runtime._device_of([None, 1, "silu", []]) is None

    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or nullcontext())
    assert triton_runtime.on_device(lambda y: y is x)(x) is True
    assert current == []
