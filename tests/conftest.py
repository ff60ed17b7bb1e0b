"""Fixtures that more than one test file uses."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("triton") and not torch.cuda.is_available():
    import triton_interpreter  # before any kernel is imported

    triton_interpreter.install()

import leantune as lt
from helpers_model import tiny_model
from helpers_training import records

REAL_MODEL = Path(__file__).parent.parent / "runs" / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def real_model_directory() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    if not (REAL_MODEL / "model.safetensors").exists():
        pytest.skip("the real model is not here; `make model` fetches it")
    return REAL_MODEL


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    """A random two-layer Llama with a tokenizer and a chat template."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny(tiny_directory) -> lt.Model:
    return lt.load(tiny_directory)


@pytest.fixture
def data(tiny) -> lt.data.Dataset:
    """24 questions and answers of very different lengths."""
    return lt.data.chat(records(24), tiny.tokenizer)
