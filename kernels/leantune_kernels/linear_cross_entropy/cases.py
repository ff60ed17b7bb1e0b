"""Inputs of linear_cross_entropy and linear_distillation: odd sizes, several chunks, ignored rows, every option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leantune_kernels.linear_cross_entropy import linear_cross_entropy, linear_distillation
from leantune_kernels.linear_cross_entropy.reference import plain as plain_labels
from leantune_kernels.linear_cross_entropy.reference import plain_distillation
from leantune_kernels.testing import Case, Floor, Inputs, normal

__all__ = [
    "BENCHMARKS",
    "BITS_BY_THREADS",
    "CASES",
    "MEMORY_BOUND",
    "TRAFFIC",
    "contenders",
    "floor",
    "function",
    "of_length",
    "plain",
]

MEMORY_BOUND = True  # the part between the products
BITS_BY_THREADS = ("hidden",)  # a product of PyTorch's over the vocabulary


def function(**inputs):  # type: ignore[no-untyped-def]
    return linear_distillation(**inputs) if "teacher" in inputs else linear_cross_entropy(**inputs)


def plain(**inputs):  # type: ignore[no-untyped-def]
    return plain_distillation(**inputs) if "teacher" in inputs else plain_labels(**inputs)


def _case(
    rows: int,
    cols: int,
    vocab: int,
    ignored: float = 0.3,
    bias: bool = False,
    teacher: str = "",
    labels: bool = True,
    gradients: bool = True,
    **options: Any,
) -> Case:
    """`teacher`: "" for none, "logits" or "probabilities"."""

    def make(g: torch.Generator, dtype: torch.dtype) -> Inputs:
        targets = torch.randint(vocab, (rows,), generator=g)
        targets[torch.rand(rows, generator=g) < ignored] = options.get("ignore_index", -100)
        inputs: Inputs = {
            "hidden": normal(g, rows, cols, dtype=dtype),
            "weight": normal(g, vocab, cols, dtype=dtype, scale=2 * cols**-0.5),
            **({"targets": targets} if labels else {}),
            **options,
        }
        if teacher:
            z = normal(g, rows, vocab, dtype=torch.float32, scale=2)
            inputs["teacher"] = (z.softmax(-1) if teacher == "probabilities" else z).to(dtype)
            inputs["probabilities"] = teacher == "probabilities"
        return inputs | ({"bias": normal(g, vocab, dtype=dtype)} if bias else {})

    described = "".join(f" {k}={v}" for k, v in options.items())
    distilled = f" from {teacher}{'' if labels else ' alone'}" if teacher else ""
    name = f"{rows}x{cols}x{vocab} ignored {ignored}{' bias' if bias else ''}{distilled}{described}"
    wanted = ("hidden", "weight", "bias") if bias else ("hidden", "weight")
    return Case(name, make, wanted if gradients else ())


CASES = [
    _case(1, 5, 3, ignored=0.0),
    _case(37, 24, 133, chunk_rows=8),
    _case(37, 24, 133, chunk_rows=8, reduction="none"),
    _case(30, 16, 133, bias=True, label_smoothing=0.1, z_loss=1e-2, chunk_rows=16),
    _case(30, 16, 77, bias=True, label_smoothing=0.1, z_loss=1e-2, chunk_rows=7, reduction="none"),
    _case(19, 33, 65, ignore_index=3, reduction="sum"),
    _case(5, 8, 40, ignored=1.1),
    _case(5, 8, 40, ignored=1.1, reduction="none"),
    _case(0, 8, 40),
    _case(21, 12, 133, teacher="logits", chunk_rows=8, temperature=2.0),
    _case(9, 12, 65, teacher="logits", bias=True, alpha=0.3, reduction="none"),
    _case(7, 8, 41, teacher="probabilities", labels=False, alpha=1.0, temperature=3.0, reduction="sum"),
    _case(5, 8, 40, teacher="logits", ignored=1.1),
    # several times what the Triton kernels hold of a row at once, as a real vocabulary; larger logits come later
    _case(5, 4, 40_000, bias=True, label_smoothing=0.1, z_loss=1e-2),
    _case(5, 4, 40_000, teacher="logits", alpha=0.3, temperature=2.0),
]
TRAFFIC = _case(20, 8, 3000)


def of_length(rows: int) -> Case:
    return _case(rows, 8, 133, chunk_rows=64)


BENCHMARKS = {
    "SmolLM2-135M": _case(1600, 576, 49152, gradients=False),
    "SmolLM2-135M, distillation": _case(1600, 576, 49152, gradients=False, teacher="logits", temperature=2.0),
    "Llama 7B": _case(1024, 4096, 32000, gradients=False),
}


def contenders(hidden: torch.Tensor, weight: torch.Tensor, **inputs: Any) -> dict[str, Callable[[], Any]]:
    """Loss and its gradient in hidden, as training with a frozen head needs them; labelled rows alone for PyTorch too.

    "torch, chunks" is PyTorch's best with as little memory: the same chunks, one after the other.
    """
    kept = inputs["targets"] != -100
    rows = {k: v[kept] for k, v in inputs.items() if k in ("targets", "teacher")}
    options = {k: v for k, v in inputs.items() if k not in rows}

    def gradient(loss: Callable[..., torch.Tensor], hidden: torch.Tensor, rows: Inputs) -> torch.Tensor:
        hidden = hidden.detach().requires_grad_()
        return torch.autograd.grad(loss(hidden=hidden, weight=weight, **rows, **options), hidden)[0]

    def chunks() -> list[torch.Tensor]:
        parts = ({k: v[i : i + 384] for k, v in (rows | {"hidden": hidden[kept]}).items()} for i in range(0, n, 384))
        return [gradient(plain, part.pop("hidden"), part) for part in parts]

    n = int(kept.sum())
    return {
        "leantune": lambda: gradient(function, hidden, {k: inputs[k] for k in rows}),
        "torch": lambda: gradient(plain, hidden[kept], rows),
        "torch, chunks": chunks,
    }


def floor(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None = None, **_: Any
) -> Floor:
    """Logits read, their gradient written in the forward pass (fp32), the teacher read; two products of a head."""
    rows, vocabulary = int((targets != -100).sum()), weight.shape[0]
    taught = 0 if teacher is None else teacher.element_size()
    return Floor(forward_bytes=rows * vocabulary * (8 + taught), forward_flop=4 * rows * vocabulary * weight.shape[1])
