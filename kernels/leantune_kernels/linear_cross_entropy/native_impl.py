"""The elementwise part of linear_cross_entropy by csrc/linear_cross_entropy/cpu.cpp."""

from __future__ import annotations

from functools import partial

from leantune_kernels.cpu import lib, refuses
from leantune_kernels.linear_cross_entropy import c_interface

__all__ = ["cross_entropy_rows", "distillation_rows", "refuses"]

cross_entropy_rows = partial(c_interface.cross_entropy_rows, lib.cross_entropy_rows)
distillation_rows = partial(c_interface.distillation_rows, lib.distillation_rows)
