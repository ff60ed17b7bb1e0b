"""leantune_kernels.native against the PyTorch client, to the bit where the same kernel sees the same numbers.

What is quantised, adapters, distillation, every type of parameter; and that native has all that the library has.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leantune_kernels
from leantune_kernels import _native as lib
from leantune_kernels import activation_pack, adamw, adamw_8bit, bottleneck, int8, native, nf4, rmsprop, sgd
from leantune_kernels.linear_cross_entropy import linear_distillation

KERNELS = Path(native.__file__).parent
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _the_pytorch_client_takes_the_same_kernels(monkeypatch):
    monkeypatch.setenv("LEANTUNE_IMPL", "cpu")


def normal(*shape, dtype=np.float32):
    return np.asarray(rng.standard_normal(shape), dtype)


def equal(a, b):
    """The same dtype, shape and bits."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# ---- NF4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from(["float32", "float16"]))
@settings(max_examples=25, deadline=None)
def test_nf4_is_the_pytorch_clients(double_quant, shape, dtype):
    weight = normal(*shape, dtype=dtype)
    w, theirs = native.nf4_quantise(weight, double_quant), nf4.quantise(torch.tensor(weight), double_quant)
    assert w.shape == tuple(weight.shape) and (w.scales is None) == (not double_quant)
    for mine, other in zip(w[:4], (theirs.codes, theirs.absmax, theirs.scales, theirs.offset), strict=True):
        assert (mine is None and other is None) or equal(mine, other)
    assert equal(native.nf4_dequantise(w), nf4.dequantise(theirs, torch.float32))
    half = torch.full(weight.shape, torch.nan, dtype=torch.bfloat16)
    assert native.nf4_dequantise(w, out=half) is half and torch.equal(half, nf4.dequantise(theirs, torch.bfloat16))
    assert native.nf4_dequantise(w, "float16").dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_products_with_codes_are_the_pytorch_clients(rows, dtype):
    x, bias = normal(rows, 128, dtype=dtype), normal(7, dtype=dtype)
    weight = normal(7, 128)
    x_, bias_ = torch.tensor(x), torch.tensor(bias)
    w, theirs = native.nf4_quantise(weight), nf4.quantise(torch.tensor(weight))
    q, theirs8 = native.int8_quantise(weight), int8.quantise(torch.tensor(weight))
    for mine, their_bias in ((bias, bias_), (None, None)):
        wanted = nf4.fused_linear(x_, theirs, their_bias, x_.new_empty(rows, 7))
        assert equal(native.nf4_linear(x, w, mine), wanted)
        wanted = int8.fused_linear(x_, theirs8, their_bias, x_.new_empty(rows, 7))
        assert equal(native.int8_linear(x, *q, mine), wanted)
    padded = np.full((rows, 11), np.nan, dtype)
    assert native.nf4_linear(x, w, out=padded[:, 2:9]).base is padded
    assert equal(padded[:, 2:9].copy(), native.nf4_linear(x, w)) and np.isnan(padded[:, [0, 1, 9, 10]]).all()


def test_jax_arrays_in_bfloat16():
    jax = pytest.importorskip("jax", reason="JAX is not installed (pip install 'leantune[embed]')")
    weight, x = (jax.numpy.asarray(normal(*s), dtype=jax.numpy.bfloat16) for s in ((6, 64), (2, 64)))
    as_torch = [torch.tensor(np.asarray(a, np.float32)).bfloat16() for a in (weight, x)]
    w, theirs = native.nf4_quantise(weight), nf4.quantise(as_torch[0])
    assert equal(w.codes, theirs.codes)
    y = native.nf4_linear(x, native.NF4Weight(*map(jax.numpy.asarray, w[:4]), w.shape))
    wanted = nf4.fused_linear(as_torch[1], theirs, None, torch.empty(2, 6, dtype=torch.bfloat16))
    assert y.dtype.name == "bfloat16" and np.array_equal(np.asarray(y, np.float32), wanted.float().numpy())
    assert np.array_equal(native.pack_bf16(weight).view(np.int16), as_torch[0].view(torch.int16).numpy())
    with pytest.raises(ValueError, match="out is a read-only jaxlib"):
        native.nf4_dequantise(w, out=weight)


# ---- int8 and bfloat16 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_int8_by_rows(dtype):
    x = normal(4, 9, dtype=dtype)
    x[2] = 0
    codes, scales = native.int8_quantise(x)
    theirs, packed = int8.quantise(torch.tensor(x)), activation_pack.pack(torch.tensor(x), "int8")
    assert equal(codes, theirs.codes) and equal(scales, theirs.scales)
    assert equal(codes, packed.data) and equal(scales, packed.scales)
    values = native.int8_dequantise(codes, scales)
    assert equal(values, int8.dequantise(theirs, torch.float32)) and not values[2].any()
    assert equal(native.int8_dequantise(codes, scales, out=x), int8.dequantise(theirs, theirs.dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [0, 5])
def test_activations_kept_in_bfloat16(rows, dtype):
    x = normal(rows, 19, dtype=dtype)
    theirs = activation_pack.pack(torch.tensor(x), "bf16")
    packed = native.pack_bf16(x[:, ::-1][:, ::-1])
    assert packed.dtype == np.uint16 and equal(packed.view(np.int16), theirs.data.view(torch.int16))
    out = torch.empty(rows, 19, dtype=torch.bfloat16)
    assert native.pack_bf16(x, out) is out and torch.equal(out, theirs.data)
    for source in (packed, out):
        assert equal(native.unpack_bf16(source, x.dtype.name), activation_pack.unpack(theirs))
    padded = np.full((rows, 25), np.nan, np.float32)
    native.unpack_bf16(packed, out=padded[:, 3:22])
    assert np.array_equal(padded[:, 3:22], theirs.data.float()) and np.isnan(padded[:, [2, 22]]).all()


# ---- adapters and losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, [1, 0, 4, 2], [1, -100, 4, -100]])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 2.0), (0.3, 1.0)])
def test_distillation(targets, alpha, temperature):
    """By a head that is the identity, the PyTorch client has the same logits, and so the same bits."""
    if targets is None and alpha < 1:
        return
    logits, teacher = normal(4, 5), normal(4, 5, dtype=np.float16)
    numbers = {"alpha": alpha, "temperature": temperature}
    targets = None if targets is None else np.array(targets)
    losses, gradient = native.distillation(logits, teacher, targets, **numbers)
    x, head = torch.tensor(logits, requires_grad=True), torch.eye(5)
    labels = None if targets is None else torch.tensor(targets)
    linear_distillation(x, head, torch.tensor(teacher), labels, **numbers).backward()
    each = linear_distillation(x, head, torch.tensor(teacher), labels, **numbers, reduction="none")
    assert np.array_equal(losses.astype(np.float32), each.detach().numpy()) and np.array_equal(gradient, x.grad.numpy())
    in_place, out = native.distillation(logits, teacher, targets, **numbers, out=logits)
    assert out is logits and np.array_equal(in_place, losses) and np.array_equal(logits, gradient)


@pytest.mark.parametrize("activation", bottleneck.ACTIVATIONS)
@pytest.mark.parametrize("rows", [0, 7])
def test_bottleneck_is_the_pytorch_clients(rows, activation):
    x, dy, down, up, down_bias, up_bias = (normal(*s) for s in ((rows, 9), (rows, 9), (3, 9), (9, 3), (3,), (9,)))
    y = native.bottleneck(x, down, up, down_bias, up_bias, 0.5, activation)
    found = native.bottleneck_backward(dy, x, down, up, down_bias, 0.5, activation)
    x_, dy_, *weights = map(torch.tensor, (x, dy, down, up, down_bias, up_bias))
    weights = bottleneck.Weights(*weights)
    assert equal(y, bottleneck.forward(x_, weights, 0.5, activation))
    wanted = bottleneck.backward(dy_, x_, weights, 0.5, activation, (True,) * 5)
    assert all(equal(a, b) for a, b in zip(found, wanted, strict=True))
    without = native.bottleneck(x, down, up, activation=activation)
    assert np.array_equal(
        without, bottleneck.forward(x_, weights._replace(down_bias=None, up_bias=None), 1.0, activation)
    )


# ---- optimizers ------------------------------------------------------------------------------------------------------

STEPS = {
    "adamw": adamw.adamw_step,
    "adamw_8bit": adamw_8bit.adamw_8bit_step,
    "sgd": sgd.sgd_step,
    "rmsprop": rmsprop.rmsprop_step,
}


@pytest.mark.parametrize("name", STEPS)
def test_parameters_of_every_type_follow_the_pytorch_client(name):
    """float16 and bfloat16 beside a master, float32, and bfloat16 alone, which is rounded by the same noise."""
    g = torch.Generator().manual_seed(1)
    exact = [torch.randn(shape, generator=g) for shape in ((5, 7), (), (700,), (2, 300), (0, 3))]
    masters = [exact[0].clone(), None, exact[2].clone(), None, None]
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    params = [p.to(dtype) for p, dtype in zip(exact, dtypes, strict=True)]
    if name == "adamw_8bit":
        states = adamw_8bit.zero_states(params)
    else:
        states = tuple([torch.zeros(p.shape) for p in params] for _ in range(2 if name == "adamw" else 1))
    own, mine = (copy.deepcopy((params, *states, masters)) for _ in range(2))
    for step in (1, 2):
        grads = [torch.randn(p.shape, generator=g).to(dtype) for p, dtype in zip(params, dtypes[::-1], strict=True)]
        numbers = {"step": step, "lr": 0.01, "weight_decay": 0.1, "grad_scale": 0.5, "seed": 7}
        numbers |= {"momentum": 0.9} if name == "sgd" else {}
        STEPS[name](own[0], grads, *own[1:-1], masters=own[-1], **numbers)
        found = getattr(native, name)(mine[0], grads, *mine[1:-1], masters=mine[-1], **numbers, out=mine)
    assert len(found) == len(mine)
    for theirs, before, after in zip(own, mine, found, strict=True):
        assert all(a is b for a, b in zip(before, after, strict=True))
        assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(after, theirs, strict=True))


def test_a_step_makes_new_arrays():
    p, g = [normal(3, 5), normal(300, dtype=np.float16)], [normal(3, 5), normal(300)]
    masters = [None, p[1].astype(np.float32)]
    states = [[np.zeros(x.shape, np.uint8) for x in p], [np.zeros(n, np.float32) for n in (1, 2)]] * 2
    before = copy.deepcopy((p, states, masters))
    new = native.adamw_8bit(p, g, *states, step=1, lr=0.1, masters=masters)
    again = native.adamw_8bit(p, g, *states, step=1, lr=0.1, masters=masters, out=new)
    assert [len(each) for each in new] == [2] * 6 and new[-1][0] is None and again[2][1] is new[2][1]
    assert all(np.array_equal(a, b) for a, b in zip(p, before[0], strict=True)) and not states[1][0].any()
    assert np.array_equal(masters[1], before[2][1]) and not np.array_equal(new[-1][1], masters[1])
    assert np.array_equal(new[0][1], new[-1][1].astype(np.float16))
    assert all(np.abs(a - b).max() == pytest.approx(0.1, rel=1e-2) for a, b in zip(new[0], p, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------

X = normal(2, 64)
Q, PLAIN, CODES = native.nf4_quantise(X), native.nf4_quantise(X, double_quant=False), native.int8_quantise(X)
EIGHT = [np.zeros((2, 64), np.uint8)], [np.zeros(1, np.float32)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.nf4_quantise(X.astype(np.float64)), "weight is float64 of shape"),
        (lambda: native.nf4_dequantise(Q, "int8"), "dtype='int8' is none of float32, bfloat16, float16"),
        (lambda: native.nf4_dequantise(Q, "bfloat16"), "pass an array of that type as out"),
        (lambda: native.nf4_dequantise(Q, out=X[:, ::2]), r"out is float32 of shape \[2, 32\]"),
        (lambda: native.nf4_dequantise(Q, out=np.asfortranarray(X)), "out has .* it must be contiguous"),
        (lambda: native.nf4_dequantise(Q._replace(codes=Q.codes[1:])), r"w.codes is uint8 of shape \[63\]; .* \[64\]"),
        (lambda: native.nf4_dequantise(Q._replace(absmax=PLAIN.absmax)), "w.absmax is float32 .* must be uint8"),
        (lambda: native.nf4_dequantise(Q._replace(scales=None)), "w.absmax is uint8 .* must be float32"),
        (lambda: native.nf4_dequantise(Q._replace(offset=None)), "w.offset is None; with w.scales it is the mean"),
        (lambda: native.nf4_dequantise(Q._replace(shape=(2, 65))), "w.codes is uint8 of shape"),
        (lambda: native.nf4_linear(X, Q._replace(shape=(4, 32))), r"w has shape \[4, 32\]; .* K a multiple of 64"),
        (lambda: native.nf4_linear(X[:, :9], Q), r"x is float32 of shape \[2, 9\]; .* of shape \[T, 64\]"),
        (lambda: native.nf4_linear(X, Q, X[0]), r"bias is float32 of shape \[64\]; .* of shape \[2\]"),
        (lambda: native.int8_dequantise(CODES[0], CODES[1][1:]), r"scales is float32 of shape \[1\]; .* \[2\]"),
        (lambda: native.int8_linear(X, X, CODES[1]), r"codes is float32 .* must be int8 of shape \[N, K\]"),
        (lambda: native.int8_linear(X, *CODES, X[0, :2].astype(np.float16)), "bias is float16 .* must be float32"),
        (lambda: native.unpack_bf16(X), "packed is float32 .* must be uint16 or bfloat16"),
        (lambda: native.pack_bf16(X, X.copy()), "out is float32 .* must be uint16 or bfloat16"),
        (lambda: native.adamw_8bit([X], [X], [X], *EIGHT[1:], *EIGHT, step=1, lr=1.0), r"exp_avgs\[0\] is float32"),
        (
            lambda: native.adamw_8bit([X], [X], EIGHT[0], [X], *EIGHT, step=1, lr=1.0),
            r"exp_avg_absmaxes\[0\] is float32 of shape \[2, 64\]; it must be float32 of shape \[1\]",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ---- all of the library ----------------------------------------------------------------------------------------------

OPS = {
    "activation": {"activation", "activation_backward"},
    "activation_pack": {"pack_bf16", "unpack_bf16", "int8_quantise", "int8_dequantise"},
    "adamw": {"adamw"},
    "adamw_8bit": {"adamw_8bit"},
    "attention": {"attention", "attention_backward"},
    "bottleneck": {"bottleneck", "bottleneck_backward"},
    "dropout": {"dropout"},
    "embedding": {"embedding", "embedding_backward"},
    "glu": {"glu", "glu_backward"},
    "grad_norm": {"grad_norm", "clip_factor"},
    "int8": {"int8_quantise", "int8_dequantise", "int8_linear"},
    "layer_norm": {"layer_norm", "layer_norm_backward"},
    "linear_cross_entropy": {"cross_entropy", "distillation"},
    "low_rank": {"lora_linear", "lora_linear_backward", "low_rank_add", "low_rank_gradients", "low_rank_merge"},
    "nf4": {"NF4Weight", "nf4_quantise", "nf4_dequantise", "nf4_linear"},
    "rms_norm": {"rms_norm", "rms_norm_backward"},
    "rmsprop": {"rmsprop"},
    "rope": {"rope"},
    "sgd": {"sgd"},
}
NOT_THERE = {"gated_mlp": "dense products of PyTorch's around glu; the C++ library has no function of its own for it"}
NOT_CALLED = {
    "scale": "gradients times a factor in place, which grad_scale of the optimizers does without a pass of its own",
    "isa": "for tests; LEANTUNE_ISA is the setting",
    "set_isa": "for tests; LEANTUNE_ISA is the setting",
}


def test_every_op_is_there_or_has_a_reason():
    assert sorted({**OPS, **NOT_THERE}) == leantune_kernels.ops() and not OPS.keys() & NOT_THERE.keys()
    assert set().union(*OPS.values()) | {"num_threads", "set_num_threads"} == set(native.__all__)


def test_every_function_of_the_library_is_called_or_has_a_reason():
    text = "".join(path.read_text() for path in (*KERNELS.glob("native*.py"), KERNELS / "arrays.py"))
    called = set(re.findall(r"\b(?:lib|_native)\.(\w+)\(", text))
    assert {name for name in dir(lib) if callable(getattr(lib, name))} - called == set(NOT_CALLED)


WITHOUT_PYTORCH = """
import sys
import numpy as np
from leantune_kernels import native
x = np.ones((2, 64), np.float32)
native.nf4_linear(x, native.nf4_quantise(x))
native.unpack_bf16(native.pack_bf16(native.int8_dequantise(*native.int8_quantise(x))))
native.bottleneck(x, x[:1], x[:1].T)
native.distillation(x, x, alpha=1.0)
codes, absmax = [np.zeros((2, 64), np.uint8)], [np.zeros(1, np.float32)]
print(native.adamw_8bit([x], [x], codes, absmax, codes, absmax, step=1, lr=0.5)[0][0][0, 0], "torch" in sys.modules)
"""


def test_none_of_it_needs_pytorch():
    environment = {**os.environ, "PYTHONPATH": str(KERNELS.parent)}
    command = [sys.executable, "-c", WITHOUT_PYTORCH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.5", "False"]
