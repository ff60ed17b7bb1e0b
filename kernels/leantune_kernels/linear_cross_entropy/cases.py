"""Inputs of linear_cross_entropy and linear_distillation: odd sizes, several chunks, ignored rows, every option."""

from __future__ import annotations

from typing import Any

import torch

from leantune_kernels.linear_cross_entropy import linear_cross_entropy, linear_distillation
from leantune_kernels.linear_cross_entropy.reference import plain as plain_labels
from leantune_kernels.linear_cross_entropy.reference import plain_distillation
from leantune_kernels.testing import Case, Inputs, normal

__all__ = ["CASES", "function", "plain"]


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
    return Case(name, make, ("hidden", "weight", "bias") if bias else ("hidden", "weight"))


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
]
