"""Packed attention by csrc/attention/cpu.cpp."""

from __future__ import annotations

from functools import partial

from leantune_kernels.attention import c_interface
from leantune_kernels.cpu import lib, refuses

__all__ = ["backward", "forward", "refuses"]

forward = partial(c_interface.forward, lib.attention_forward)
backward = partial(c_interface.backward, lib.attention_backward)
