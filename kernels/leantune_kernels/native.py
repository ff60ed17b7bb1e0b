"""The C++ kernels on NumPy, JAX and other arrays, without PyTorch and without differentiation.

Arguments are arrays of any library that has `__dlpack__` or the buffer protocol, in the host's memory, and are read
where they lie (copied where the last dimension is not contiguous). Results are new NumPy arrays, or `out` where given,
which must be writable: a NumPy array, a PyTorch tensor, a writable buffer, but no JAX array, which cannot be changed.
`out` may be an argument itself where each element of the result needs that element alone, or its row in the norms; any
other overlap with what a kernel reads is refused (the optimizers trust their lists to be apart from one another).
A result in bfloat16 needs `out`, or an argument in ml_dtypes' bfloat16 as JAX has. Arithmetic and statistics are
float32 whatever the storage. Every function raises ValueError or TypeError that names the argument which does not fit.
LEANTUNE_IMPL does not apply: it is the C++ kernels that run.
Every op is here but gated_mlp: dense products around glu, without a kernel of its own.

Shapes: T rows (tokens), H columns (hidden size), I columns (intermediate size), K inputs, N outputs, r rank, V
vocabulary. Threads: as many as the process may use processors, or as OMP_NUM_THREADS says; see set_num_threads.
"""

from __future__ import annotations

import os
import sys

from leantune_kernels import _native as lib
from leantune_kernels.native_layers import (
    activation,
    activation_backward,
    attention,
    attention_backward,
    dropout,
    embedding,
    embedding_backward,
    glu,
    glu_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    rope,
)
from leantune_kernels.native_optimizers import (
    adamw,
    adamw_8bit,
    clip_factor,
    grad_norm,
    rmsprop,
    sgd,
)
from leantune_kernels.native_quantised import (
    NF4Weight,
    int8_dequantise,
    int8_linear,
    int8_quantise,
    nf4_dequantise,
    nf4_linear,
    nf4_quantise,
    pack_bf16,
    unpack_bf16,
)
from leantune_kernels.native_training import (
    bottleneck,
    bottleneck_backward,
    cross_entropy,
    distillation,
    lora_linear,
    lora_linear_backward,
    low_rank_add,
    low_rank_gradients,
    low_rank_merge,
)

__all__ = [
    "NF4Weight",
    "activation",
    "activation_backward",
    "adamw",
    "adamw_8bit",
    "attention",
    "attention_backward",
    "bottleneck",
    "bottleneck_backward",
    "clip_factor",
    "cross_entropy",
    "distillation",
    "dropout",
    "embedding",
    "embedding_backward",
    "glu",
    "glu_backward",
    "grad_norm",
    "int8_dequantise",
    "int8_linear",
    "int8_quantise",
    "layer_norm",
    "layer_norm_backward",
    "lora_linear",
    "lora_linear_backward",
    "low_rank_add",
    "low_rank_gradients",
    "low_rank_merge",
    "nf4_dequantise",
    "nf4_linear",
    "nf4_quantise",
    "num_threads",
    "pack_bf16",
    "rms_norm",
    "rms_norm_backward",
    "rmsprop",
    "rope",
    "set_num_threads",
    "sgd",
    "unpack_bf16",
]


def _set_up_threads() -> None:
    """PyTorch's OpenMP runtime where the process has PyTorch, so that they share threads; else a pool of our own."""
    if "torch" in sys.modules:
        lib.adopt_openmp()
    elif os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        lib.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


_set_up_threads()


def set_num_threads(threads: int) -> None:
    """Threads of every later call; 0 for as many as there are processors."""
    lib.set_num_threads(threads)


def num_threads() -> int:
    return lib.num_threads()
