"""The kernels in other programs: the examples run as their comments say, and PyTorch is never loaded."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "embedding"


@pytest.fixture
def python_on_path(tmp_path):
    """An environment where `python` is the interpreter of the tests, with the packages of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    kernels = str(ROOT / "kernels")
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": kernels}


def test_the_c_program_builds_as_its_comment_says(tmp_path, python_on_path):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (cc)")
    source = shutil.copy(EXAMPLES / "rms_norm.c", tmp_path)
    (command,) = re.findall(r"^ \*   (cc .*)$", Path(source).read_text(), re.MULTILINE)
    for level in ("", "base"):
        environment = {**python_on_path, **({"LEANTUNE_ISA": level} if level else {})}
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "largest error" in done.stdout and f"level {level}" in done.stdout


def run_example(name: str, more: str = "") -> list[float]:
    """The losses that examples/embedding/<name> prints, in a process that must not import torch; then `more` runs."""
    code = f"""
import runpy, sys
example = runpy.run_path({str(EXAMPLES / name)!r})
example["main"]()
{more}
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]


def test_numpy_trains_without_pytorch():
    losses = run_example("numpy_step.py")
    assert len(losses) == 10 and all(a > b for a, b in itertools.pairwise(losses))


COMPARE_WITH_JAX = """
import jax, jax.numpy as jnp, numpy as np

def plain(params, frozen, x, targets):
    h = x / jnp.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * params["norm"]
    logits = h @ frozen.T + example["SCALE"] * (h @ params["A"].T) @ params["B"].T
    chosen = targets != example["IGNORE"]
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), jnp.where(chosen, targets, 0)]
    return (losses * chosen).sum() / chosen.sum()

keys = jax.random.split(jax.random.key(1), 5)
shapes = {"A": (8, 64), "B": (101, 8), "norm": 64}
params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
frozen, x = jax.random.normal(keys[3], (101, 64)), jax.random.normal(keys[4], (33, 64))
targets = jnp.arange(33).at[:5].set(example["IGNORE"])
found = example["loss_and_gradients"](params, frozen, x, targets)
wanted = jax.value_and_grad(plain)(params, frozen, x, targets)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
"""


def test_jax_trains_without_pytorch_and_its_gradients_are_jaxs_own():
    pytest.importorskip("jax", reason="JAX is not installed (pip install 'leantune[embed]')")
    losses = run_example("jax_step.py", COMPARE_WITH_JAX)
    assert len(losses) == 10 and all(a > b for a, b in itertools.pairwise(losses))
