"""A whole tiny Llama trains on each implementation, and its losses are those of the C++ kernels.

Triton runs in its interpreter where there is no GPU, the CUDA sources on the emulator of tests/cuda_host.
"""

from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

import leantune as lt
from helpers_training import prepared, records, trainer

STEPS = 5
DEVICE = torch.cuda.is_available()


@contextmanager
def on(implementation, monkeypatch):
    if implementation == "cuda":
        from cuda_host import host

        with host.kernels("plain"):
            yield
        return
    monkeypatch.setenv("LEANTUNE_IMPL", implementation)
    yield


def losses(directory, method, **settings):
    if method == "full":
        model = lt.load(directory)
        lt.Full().apply(model)
    else:
        model = prepared(directory, dropout=0.1)
    data = lt.data.chat(records(8), model.tokenizer)
    run = trainer(model, data, batch_size=2, max_grad_norm=0.5, weight_decay=0.01, **settings)
    run.fit(max_steps=STEPS)
    return [log.loss for log in run.history], [log.grad_norm for log in run.history]


@pytest.mark.skipif(DEVICE, reason="emulation is for machines without a GPU")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("implementation", ["reference", "triton", "cuda"])
def test_five_steps_follow_the_cpp_kernels(implementation, method, tiny_directory, monkeypatch):
    if implementation == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with on("cpu", monkeypatch):
        expected, expected_norms = losses(tiny_directory, method)
    with on(implementation, monkeypatch):
        found, norms = losses(tiny_directory, method)
    assert expected[-1] < expected[0] - 0.01
    assert found == pytest.approx(expected, abs=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
