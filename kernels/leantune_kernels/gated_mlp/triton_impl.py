"""The gated MLP with the gated activation of the Triton implementation of `glu`."""

from __future__ import annotations

from functools import partial

from leantune_kernels.gated_mlp import products
from leantune_kernels.glu import triton_impl as glu
from leantune_kernels.triton_runtime import refuses

__all__ = ["backward_", "forward", "refuses"]

forward = partial(products.forward, glu)
backward_ = partial(products.backward_, glu)
