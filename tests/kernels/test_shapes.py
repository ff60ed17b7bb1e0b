"""Any shape: rows, columns and vocabularies that no list names, in every implementation."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers_kernels import each_of
from leantune_kernels import testing
from leantune_kernels.activation import ACTIVATIONS
from leantune_kernels.activation import cases as activation
from leantune_kernels.activation_pack import cases as activation_pack
from leantune_kernels.dropout import cases as dropout
from leantune_kernels.glu import cases as glu
from leantune_kernels.layer_norm import cases as layer_norm
from leantune_kernels.linear_cross_entropy import cases as linear_cross_entropy
from leantune_kernels.low_rank import cases as low_rank
from leantune_kernels.rms_norm import cases as rms_norm
from leantune_kernels.testing import Case, normal

implementation = each_of("reference", "cpu", "triton", "cuda", autouse=True)
any_shape = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
sizes = st.integers(2, 300)  # of a single column the norms leave nothing but rounding


def accept(cases, shapes, targets=None, **options):
    """`shapes` of the float arguments, differentiated where the op can be; `targets`: how many of how many."""

    def inputs(g, dtype):
        floats = {name: normal(g, *shape, dtype=dtype) for name, shape in shapes.items()}
        labels = {} if targets is None else {"targets": torch.randint(targets[1], targets[:1], generator=g)}
        return floats | labels | options

    wanted = tuple(shapes) if cases.CASES[0].differentiable else ()
    testing.accept(Case(f"{shapes} {options}", inputs, wanted), torch.float32, cases.function, cases.plain)


@any_shape
@given(rows=st.integers(0, 90), cols=sizes)
def test_rms_norm(rows, cols):
    accept(rms_norm, {"x": (rows, cols), "weight": (cols,)}, eps=1e-5)


@any_shape
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3), offset=st.integers(0, 2**40))
def test_dropout(shape, offset):
    accept(dropout, {"x": shape}, p=0.3, seed=9, offset=offset)


@any_shape
@given(rows=st.integers(0, 60), cols=sizes, mode=st.sampled_from(["bf16", "int8"]))
def test_activation_pack(rows, cols, mode):
    accept(activation_pack, {"x": (rows, cols)}, mode=mode)


@any_shape
@given(rows=st.integers(0, 40), cols=st.integers(1, 40), vocab=sizes, chunk=st.integers(1, 50))
def test_linear_cross_entropy(rows, cols, vocab, chunk):
    shapes = {"hidden": (rows, cols), "weight": (vocab, cols)}
    accept(linear_cross_entropy, shapes, (rows, vocab), chunk_rows=chunk)


@any_shape
@given(rows=st.integers(0, 90), cols=sizes)
def test_layer_norm_of_a_sum(rows, cols):
    shapes = {"x": (rows, cols), "residual": (rows, cols), "weight": (cols,), "bias": (cols,)}
    accept(layer_norm, shapes, eps=1e-5)


@any_shape
@given(rows=st.integers(0, 60), cols=sizes, name=st.sampled_from(list(ACTIVATIONS)))
def test_activations(rows, cols, name):
    accept(activation, {"x": (rows, cols)}, activation=name)
    accept(glu, {"gate": (rows, cols), "up": (rows, cols)}, activation=name)


@any_shape
@given(rows=st.integers(0, 60), inputs=st.integers(1, 90), outputs=st.integers(1, 90), rank=st.integers(1, 40))
def test_lora_linear(rows, inputs, outputs, rank):
    shapes = {"x": (rows, inputs), "weight": (outputs, inputs), "A": (rank, inputs), "B": (outputs, rank)}
    accept(low_rank, shapes, bias=None, scale=0.5)
