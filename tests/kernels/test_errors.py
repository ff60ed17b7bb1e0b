"""Mistakes in a call: each is refused with a message that names the argument, what it is and what it must be."""

import math
import re

import numpy as np
import pytest
import torch

import leantune_kernels
from leantune_kernels import native
from leantune_kernels.activation import gelu, silu
from leantune_kernels.adamw import adamw_step
from leantune_kernels.adamw_8bit import adamw_8bit_step, zero_states
from leantune_kernels.attention import attention
from leantune_kernels.bottleneck import bottleneck
from leantune_kernels.dispatch import CannotServe, Op, forced
from leantune_kernels.dropout import dropout
from leantune_kernels.embedding import embedding
from leantune_kernels.gated_mlp import gated_mlp
from leantune_kernels.glu import geglu, swiglu
from leantune_kernels.grad_norm import clip_grad_norm_, grad_norm
from leantune_kernels.int8 import linear as int8_linear
from leantune_kernels.int8 import quantise as int8_quantise
from leantune_kernels.layer_norm import add_layer_norm, layer_norm
from leantune_kernels.linear_cross_entropy import linear_cross_entropy
from leantune_kernels.low_rank import lora_linear
from leantune_kernels.nf4 import dequantise as nf4_dequantise
from leantune_kernels.nf4 import linear as nf4_linear
from leantune_kernels.nf4 import quantise as nf4_quantise
from leantune_kernels.rms_norm import add_rms_norm, rms_norm
from leantune_kernels.rmsprop import rmsprop_step
from leantune_kernels.rope import rope, rope_qk
from leantune_kernels.sgd import sgd_step

ONE = torch.ones(4)
SQUARE = torch.ones(4, 4)
FACTORS = (torch.ones(2, 4), torch.ones(4, 2))
TABLE = torch.ones(4, 2)
ENDS = torch.tensor([0, 4], dtype=torch.int32)
LONG = torch.arange(4)

# Every public op as a function of its main tensor [4, 4] ([4, 1, 4] for heads).
OPS = {
    "rms_norm": lambda x: rms_norm(x, ONE),
    "add_rms_norm": lambda x: add_rms_norm(x, x, ONE),
    "layer_norm": lambda x: layer_norm(x, ONE, ONE),
    "add_layer_norm": lambda x: add_layer_norm(x, x, ONE),
    "silu": silu,
    "gelu": gelu,
    "swiglu": lambda x: swiglu(x, x),
    "geglu": lambda x: geglu(x, x),
    "dropout": lambda x: dropout(x, 0.5, 0, 0),
    "dropout of nothing": lambda x: dropout(x, 0.0, 0, 0),
    "bottleneck": lambda x: bottleneck(x, *FACTORS),
    "gated_mlp": lambda x: gated_mlp(x, SQUARE, SQUARE, SQUARE),
    "lora_linear": lambda x: lora_linear(x, SQUARE, None, *FACTORS, 1.0),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, SQUARE, LONG),
    "its weight": lambda w: linear_cross_entropy(SQUARE, w, LONG),
    "embedding": lambda w: embedding(LONG, w),
    "rope": lambda x: rope(x[:, None], TABLE, TABLE, LONG),
    "rope_qk": lambda x: rope_qk(x[:, None], x[:, None], TABLE, TABLE, LONG),
    "attention": lambda x: attention(x[:, None], x[:, None], x[:, None], ENDS),
    "nf4.quantise": nf4_quantise,
    "nf4.linear": lambda x: nf4_linear(x, nf4_quantise(SQUARE)),
    "int8.quantise": int8_quantise,
    "int8.linear": lambda x: int8_linear(x, int8_quantise(SQUARE)),
    "grad_norm": lambda g: grad_norm([g]),
    "clip_grad_norm_": lambda g: clip_grad_norm_([g], 1.0),
    "sgd_step": lambda p: sgd_step([p], [SQUARE], step=1, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.complex64])
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes_are_refused_by_name(op, dtype):
    with pytest.raises(ValueError, match=f"(?s){dtype}.*float32.*bfloat16.*float16"):
        OPS[op](SQUARE.to(dtype))


@pytest.mark.parametrize("op", OPS)
def test_the_same_calls_with_float32_are_served(op):
    OPS[op](SQUARE.clone())


@pytest.mark.parametrize("op", leantune_kernels.ops())
@pytest.mark.parametrize("setting", [None, "reference"])
def test_no_implementation_takes_other_dtypes_not_even_the_reference(op, setting, monkeypatch):
    if setting:
        monkeypatch.setenv("LEANTUNE_IMPL", setting)
    for dtype in (torch.float64, torch.int64, torch.bool):
        x = torch.empty(0, dtype=dtype)
        assert "float32, bfloat16 and float16" in Op(f"leantune_kernels.{op}").refusal("reference", x)
        with pytest.raises(CannotServe, match=f"{op}: a tensor is {dtype}; float32, bfloat16 and float16 are served"):
            Op(f"leantune_kernels.{op}").pick(x)


def test_inside_a_graph_other_dtypes_are_refused_and_indices_do_not_decide(monkeypatch):
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="x is torch.float64"):
        torch.compile(rms_norm, backend="eager")(SQUARE.double(), ONE)
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")  # which takes no integers
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    assert torch.equal(compiled(LONG, SQUARE), SQUARE)
    w = int8_quantise(SQUARE)
    compiled = torch.compile(lambda x: int8_linear(x, w), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(20, 4)), int8_linear(torch.ones(20, 4), w))


# ---- LEANTUNE_IMPL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rmsnorm:reference", "'rmsnorm' is no op; use .*rms_norm"),
        ("foo:cpu", "'foo' is no op"),
        (":cpu", "'' is no op"),
        ("rms_norm:warp", "'warp' is no implementation; use cuda, triton, cpu, reference"),
        ("cpu,reference", "names both cpu and reference for all ops; keep one"),
        ("rms_norm:cpu,rope:cpu,rms_norm:reference", "names both cpu and reference for rms_norm; keep one"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_whatever_op_runs(setting, message, monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", setting)
    with pytest.raises(CannotServe, match=f"LEANTUNE_IMPL={re.escape(setting)}.*{message}"):
        rms_norm(SQUARE, ONE)
    with pytest.raises(CannotServe, match=message):
        silu(SQUARE)


@pytest.mark.parametrize("setting", ["reference, rms_norm : cpu", "rms_norm:cpu,reference,reference", "rms_norm:cpu,,"])
def test_the_entry_of_an_op_goes_before_that_of_all(setting):
    assert forced(setting, "rms_norm") == "cpu"
    assert forced(setting, "rope") == ("reference" if "reference" in setting else None)


# ---- numbers ---------------------------------------------------------------------------------------------------------

STEP = {"step": 1, "lr": 0.1}


def moments():
    return [torch.ones(4)], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)]


def adamw(**numbers):
    adamw_step(*moments(), **STEP | numbers)


def adamw_8bit(**numbers):
    adamw_8bit_step([torch.ones(4)], [torch.ones(4)], *zero_states([torch.ones(4)]), **STEP | numbers)


def sgd(**numbers):
    sgd_step(*moments()[:3], **STEP | numbers)


def rmsprop(**numbers):
    rmsprop_step(*moments()[:3], **STEP | numbers)


def arrays(count):
    return [[np.ones(4, np.float32)] for _ in range(count)]


OPTIMIZERS = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "sgd": sgd,
    "rmsprop": rmsprop,
    "native.adamw": lambda **numbers: native.adamw(*arrays(4), **STEP | numbers),
    "native.sgd": lambda **numbers: native.sgd(*arrays(3), **STEP | numbers),
    "native.rmsprop": lambda **numbers: native.rmsprop(*arrays(3), **STEP | numbers),
}


NUMBERS = {"lr": "adam sgd rms", "weight_decay": "adam sgd rms", "eps": "adam rms", "beta1": "adam", "beta2": "adam"}
NUMBERS |= {"alpha": "rms", "momentum": "sgd"}  # of which optimizers


@pytest.mark.parametrize("value", [math.nan, -0.1, math.inf])
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(o, name) for o in OPTIMIZERS for name, have in NUMBERS.items() if any(part in o for part in have.split())],
)
def test_numbers_that_corrupt_parameters_are_refused(optimizer, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} is outside \\[0, "):
        OPTIMIZERS[optimizer](**{name: value})


def test_a_rate_of_one_tensor_is_named():
    with pytest.raises(ValueError, match=r"lr\[0\]=nan is outside \[0, inf\)"):
        adamw(lr=[math.nan])


@pytest.mark.parametrize("eps", [-1.0, math.nan])
def test_norms_refuse_an_eps_that_gives_nan(eps):
    x, weight = SQUARE.numpy(), ONE.numpy()
    for norm in (
        lambda: rms_norm(SQUARE, ONE, eps),
        lambda: add_rms_norm(SQUARE, SQUARE, ONE, eps),
        lambda: layer_norm(SQUARE, ONE, None, eps),
        lambda: add_layer_norm(SQUARE, SQUARE, ONE, None, eps),
        lambda: native.rms_norm(x, weight, eps),
        lambda: native.layer_norm(x, weight, None, eps),
    ):
        with pytest.raises(ValueError, match=f"eps={eps} is outside"):
            norm()


# ---- the wrong kind of argument --------------------------------------------------------------------------------------

ARRAY = SQUARE.numpy()


@pytest.mark.parametrize("op", [o for o in OPS if not o.endswith(("quantise", "grad_norm", "grad_norm_", "step"))])
def test_what_is_no_tensor_is_named(op):
    with pytest.raises(TypeError, match=r"\w+ is a numpy.ndarray; pass a torch.Tensor"):
        OPS[op](ARRAY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(SQUARE, None), "weight is None; pass a torch.Tensor"),
        (lambda: layer_norm(SQUARE, None), "weight is None; pass a torch.Tensor"),
        (lambda: add_rms_norm(SQUARE, None, ONE), "residual is None; pass a torch.Tensor"),
        (lambda: linear_cross_entropy(SQUARE, None, LONG), "weight is None; pass a torch.Tensor"),
        (lambda: linear_cross_entropy(SQUARE, SQUARE, [0, 1, 2, 3]), "targets is a list; pass a torch.Tensor"),
        (lambda: lora_linear(SQUARE, SQUARE, None, None, FACTORS[1], 1.0), "A is None; pass a torch.Tensor"),
        (lambda: nf4_linear(SQUARE, SQUARE), r"w is a torch.Tensor; pass nf4.quantise\(weight\)"),
        (lambda: nf4_linear(SQUARE, int8_quantise(SQUARE)), "w is a .*Int8Weight; pass nf4.quantise"),
        (lambda: nf4_dequantise(SQUARE), "w is a torch.Tensor; pass nf4.quantise"),
        (lambda: int8_linear(SQUARE, nf4_quantise(SQUARE)), "w is a .*NF4Weight; pass int8.quantise"),
        (lambda: native.nf4_linear(ARRAY, ARRAY), r"w is a ndarray; pass nf4_quantise\(weight\)"),
        (lambda: native.embedding([1, 2], ARRAY), "ids is a list, .*dtype=numpy.int64"),
        (lambda: native.rms_norm([1.0], ARRAY[0]), "x is a list, .*dtype=numpy.float32"),
    ],
)
def test_the_right_kind_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "bottleneck", "gated_mlp", "lora_linear", "add_rms_norm"])
def test_a_scalar_is_refused_by_name(op):
    with pytest.raises(ValueError, match=r"x has no dimensions; it must be \[\.\.\., "):
        OPS[op](torch.tensor(1.0))


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: attention(*[SQUARE[:, None]] * 3, ENDS.long()), "cu_seqlens.int()"),
        (lambda: rope(SQUARE[:, None], TABLE, TABLE, LONG.int()), "positions.long()"),
        (lambda: embedding(LONG.int(), SQUARE), "ids.long()"),
        (lambda: linear_cross_entropy(SQUARE, SQUARE, LONG.int()), "targets.long()"),
        (lambda: gated_mlp(SQUARE.bfloat16(), *[SQUARE] * 3), "gate_weight.to(torch.bfloat16)"),
        (lambda: lora_linear(SQUARE.bfloat16(), SQUARE, None, *FACTORS, 1.0), "weight.to(torch.bfloat16)"),
    ],
)
def test_the_conversion_is_named(call, fix):
    with pytest.raises(ValueError, match=re.escape(f"; use {fix}") + "$"):
        call()
