"""The gated MLP with the gated activation of the CUDA implementation of `glu`."""

from __future__ import annotations

from functools import partial

from leantune_kernels.cuda import refuses
from leantune_kernels.gated_mlp import products
from leantune_kernels.glu import cuda_impl as glu

__all__ = ["backward_", "forward", "refuses"]

forward = partial(products.forward, glu)
backward_ = partial(products.backward_, glu)
