"""The elementwise part of linear_cross_entropy by csrc/linear_cross_entropy/cuda.cu."""

from __future__ import annotations

from leantune_kernels.cuda import lib, refuses, stream
from leantune_kernels.linear_cross_entropy import c_interface

__all__ = ["cross_entropy_rows", "distillation_rows", "refuses"]


def cross_entropy_rows(*, logits, **options):  # type: ignore[no-untyped-def]
    with stream(logits) as s:
        return c_interface.cross_entropy_rows(
            lambda *given: lib.cross_entropy_rows(*given, s), logits=logits, **options
        )


def distillation_rows(*, logits, **options):  # type: ignore[no-untyped-def]
    with stream(logits) as s:
        return c_interface.distillation_rows(lambda *given: lib.distillation_rows(*given, s), logits=logits, **options)
