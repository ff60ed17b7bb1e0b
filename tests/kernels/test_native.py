"""leantune_kernels.native against plain NumPy in fp64: values, layouts, results in the caller's arrays, errors."""

import array
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune_kernels import native

KERNELS = Path(native.__file__).parent.parent
rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return np.asarray(rng.standard_normal(shape), dtype)


def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=tolerance)


def wide(x):
    return np.asarray(x, np.float64)


def rms_norm_fp64(x, weight, eps):
    x, weight = wide(x), wide(weight)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def derivative(function, x, dy, step=1e-6):
    """d sum(dy * function(x)) / dx by central differences in fp64."""
    x = wide(x)
    result = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][i] += step
        moved[1][i] -= step
        result[i] = ((function(moved[0]) - function(moved[1])) * dy).sum() / (2 * step)
    return result


# ---- values ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_rms_norm(rows, cols):
    x, weight, dy, residual = normal(rows, cols), normal(cols), normal(rows, cols), normal(rows, cols)
    y, rstd = native.rms_norm(x, weight, 1e-5)
    close(y, rms_norm_fp64(x, weight, 1e-5))
    dx, dweight = native.rms_norm_backward(dy, x, weight, rstd, residual)
    close(dx, derivative(lambda v: rms_norm_fp64(v, weight, 1e-5), x, dy) + residual, 1e-4)
    close(dweight, (dy * rms_norm_fp64(x, np.ones(cols), 1e-5)).sum(0), 1e-4)


def test_rms_norm_of_a_sum():
    x, residual, weight = normal(3, 7), normal(3, 7), normal(7)
    y, rstd, s = native.rms_norm(x, weight, 1e-5, residual)
    assert np.array_equal(s, x + residual)
    assert all(np.array_equal(a, b) for a, b in zip((y, rstd), native.rms_norm(s, weight, 1e-5), strict=True))


@pytest.mark.parametrize("bias", [None, normal(6)])
def test_layer_norm(bias):
    x, weight, dy, residual = normal(4, 6), normal(6), normal(4, 6), normal(4, 6)

    def plain(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + (0 if bias is None else bias)

    y, mean, rstd = native.layer_norm(x, weight, bias)
    close(y, plain(wide(x)))
    dx, dweight, dbias = native.layer_norm_backward(dy, x, weight, mean, rstd, residual)
    close(dx, derivative(plain, x, dy) + residual, 1e-4)
    close(dweight, (dy * (wide(x) - mean[:, None]) * rstd[:, None]).sum(0))
    close(dbias, wide(dy).sum(0))


def test_layer_norm_of_a_sum():
    x, residual, weight, bias = normal(3, 7), normal(3, 7), normal(7), normal(7)
    *found, s = native.layer_norm(x, weight, bias, residual=residual)
    assert np.array_equal(s, x + residual)
    assert all(np.array_equal(a, b) for a, b in zip(found, native.layer_norm(s, weight, bias), strict=True))


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)), otypes=[float])(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gated_forms(name):
    plain = ACTIVATIONS[name]
    x, up, dy = normal(3, 7), normal(3, 7), normal(3, 7)
    close(native.activation(x, name), plain(wide(x)))
    close(native.activation_backward(dy, x, name), derivative(plain, x, dy))
    close(native.glu(x, up, name), plain(wide(x)) * up)
    d_gate, d_up = native.glu_backward(dy, x, up, name)
    close(d_gate, derivative(plain, x, dy * up))
    close(d_up, plain(wide(x)) * dy)
    assert native.glu_backward(dy, x, up, name, out=(x, up))[0] is x
    assert np.array_equal(x, d_gate) and np.array_equal(up, d_up)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 2)])
def test_attention(causal, window):
    q, k, v, do = normal(7, 4, 5), normal(7, 2, 5), normal(7, 2, 5), normal(7, 4, 5)
    bounds = np.array([0, 3, 3, 7])
    options = {"causal": causal, "window": window}

    def plain(q, k, v):
        o = np.zeros(q.shape)
        for h in range(4):
            for t in range(7):
                own = [j for j in range(7) if (j < 3) == (t < 3) and (not causal or j <= t)]
                own = [j for j in own if window is None or abs(t - j) < window]
                p = np.exp(q[t, h] @ k[own, h // 2].T / 5**0.5)
                o[t, h] = p @ v[own, h // 2] / p.sum()
        return o

    o, lse = native.attention(q, k, v, bounds, **options)
    close(o, plain(*map(wide, (q, k, v))))
    dq, dk, dv = native.attention_backward(do, q, k, v, o, lse, bounds, **options)
    close(dq, derivative(lambda x: plain(x, wide(k), wide(v)), q, do), 1e-4)
    close(dk, derivative(lambda x: plain(wide(q), x, wide(v)), k, do), 1e-4)
    close(dv, derivative(lambda x: plain(wide(q), wide(k), x), v, do), 1e-4)


def test_embedding():
    weight, ids, dy = normal(5, 3), np.array([4, 0, 4, 1], np.int32), normal(4, 3)
    close(native.embedding(ids, weight, scale=2.0), 2 * wide(weight)[ids])
    wanted = np.zeros((5, 3))
    np.add.at(wanted, ids, 2 * wide(dy))
    close(native.embedding_backward(dy, ids, 5, scale=2.0), wanted)
    wanted[4] = 0
    out = np.full((5, 3), np.nan, np.float16)
    close(native.embedding_backward(dy, ids, 5, scale=2.0, padding_idx=4, out=out), wanted, 1e-2)


def test_rope_turns_and_turns_back():
    angles = normal(20, 3)
    cos, sin, positions = np.cos(angles), np.sin(angles), np.array([0, 19, 7], np.int32)
    x = normal(3, 2, 8)
    y = native.rope(x, cos, sin, positions)
    c, s = wide(cos)[positions][:, None], wide(sin)[positions][:, None]
    close(y, np.concatenate((x[..., :3] * c - x[..., 3:6] * s, x[..., 3:6] * c + x[..., :3] * s, x[..., 6:]), -1))
    close(native.rope(y, cos, sin, positions, inverse=True), x)
    assert native.rope(y, cos, sin, positions, inverse=True, out=y) is y
    close(y, x)


def test_dropout_keeps_the_share_it_should_and_repeats_itself():
    x = normal(100, 100)
    y = native.dropout(x, 0.25, seed=3, offset=17)
    kept = y != 0
    close(y[kept], x[kept] / 0.75)
    assert 0.73 < kept.mean() < 0.77
    assert np.array_equal(native.dropout(x.ravel()[1:], 0.25, seed=3, offset=18), y.ravel()[1:])


@pytest.mark.parametrize("bias", [None, normal(7)])
def test_lora_linear(bias):
    x, weight, A, B, dy = normal(5, 11), normal(7, 11), normal(3, 11), normal(7, 3), normal(5, 7)
    y = native.lora_linear(x, weight, bias, A, B, 0.5)
    close(y, wide(x) @ (wide(weight) + 0.5 * wide(B) @ A).T + (0 if bias is None else bias))
    dx, dA, dB = native.lora_linear_backward(dy, x, weight, A, B, 0.5)
    close(dx, wide(dy) @ (wide(weight) + 0.5 * wide(B) @ A))
    close(dA, 0.5 * (wide(dy) @ B).T @ x)
    close(dB, 0.5 * wide(dy).T @ (wide(x) @ A.T))


def test_low_rank_parts():
    x, dy, A, B, weight = normal(6, 9), normal(6, 4), normal(2, 9), normal(4, 2), normal(4, 9, dtype=np.float16)
    close(native.low_rank_merge(weight, A, B, 2.0), wide(weight) + 2 * wide(B) @ A)
    y = normal(6, 4)
    wanted = y + 2 * wide(x) @ A.T @ B.T
    assert native.low_rank_add(y, x, A, B, 2.0) is y
    close(y, wanted)
    once = native.low_rank_gradients(x, dy, A, B, 2.0)
    twice = native.low_rank_gradients(x, dy, A, B, 2.0, out=tuple(g.copy() for g in once), accumulate=True)
    for one, two in zip(once, twice, strict=True):
        close(two, 2 * one)


@pytest.mark.parametrize("targets", [[1, 0, 4, 2], [1, -100, 4, -100], [-100] * 4])
def test_cross_entropy(targets):
    logits, targets = normal(4, 5), np.array(targets)
    losses, gradient = native.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.01)
    chosen = targets != -100

    def plain(x):
        lse = np.log(np.exp(x).sum(1))
        label = x[np.arange(4), np.where(chosen, targets, 0)]
        return np.where(chosen, lse - 0.9 * label - 0.1 * x.mean(1) + 0.01 * lse**2, 0)

    close(losses, plain(wide(logits)))
    close(gradient, derivative(plain, logits, np.ones(4) / max(1, chosen.sum())))
    in_place, _ = native.cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.01, out=logits)
    assert np.array_equal(in_place, losses) and np.array_equal(logits, gradient)


def test_adamw_makes_new_arrays_or_updates_in_place():
    shapes = [(3, 5), (), (0,), (70,)]
    p, g, m, v = ([normal(*shape) for shape in shapes] for _ in range(4))
    v = [np.asarray(x * x) for x in v]
    numbers = {"step": 3, "lr": 0.1, "weight_decay": 0.2, "grad_scale": 0.5}
    new = native.adamw(p, g, m, v, **numbers)
    for i in range(len(shapes)):
        m_i = 0.9 * wide(m[i]) + 0.1 * 0.5 * g[i]
        v_i = 0.999 * wide(v[i]) + 0.001 * (0.5 * g[i]) ** 2
        p_i = p[i] * (1 - 0.1 * 0.2) - 0.1 / (1 - 0.9**3) * m_i / (np.sqrt(v_i / (1 - 0.999**3)) + 1e-8)
        for found, wanted in zip(new, (p_i, m_i, v_i), strict=True):
            close(found[i], wanted)
    assert native.adamw(p, g, m, v, **numbers, out=(p, m, v))[0][0] is p[0]
    for after, before in zip(new, (p, m, v), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))


def test_sgd_and_rmsprop_are_pytorchs():
    p, g, state = normal(3, 5), normal(3, 5), np.zeros((3, 5), np.float32)
    for kernel, optimizer, numbers in (
        (native.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (native.rmsprop, torch.optim.RMSprop, {"alpha": 0.9}),
    ):
        own = torch.nn.Parameter(torch.tensor(p))
        reference = optimizer([own], lr=0.1, weight_decay=0.01, **numbers)
        params, states = [p], [state]
        for step in (1, 2, 3):
            own.grad = torch.tensor(g * step)
            reference.step()
            params, states = kernel(params, [g * step], states, step=step, lr=0.1, weight_decay=0.01, **numbers)
        close(params[0], own.detach().numpy())


def test_bfloat16_parameters_are_rounded_stochastically():
    p, grad = torch.ones(4096, dtype=torch.bfloat16), torch.ones(4096)
    m, v = torch.zeros(4096), torch.zeros(4096)
    native.adamw([p], [grad], [m], [v], step=1, lr=1e-3, out=([p], [m], [v]))
    assert abs(float(p.float().mean()) - (1 - 1e-3)) < 2e-4 and len(p.unique()) == 2


def test_grad_norm_and_clipping():
    grads = [normal(7, 3), normal(5, dtype=np.float16), np.zeros((0, 2), np.float32)]
    norm = native.grad_norm(grads)
    assert norm == pytest.approx(np.sqrt(sum((wide(g) ** 2).sum() for g in grads)), rel=1e-6)
    assert native.clip_factor(norm, norm / 2) == pytest.approx(0.5, rel=1e-5) and native.clip_factor(1.0, 2.0) == 1.0
    assert native.grad_norm([]) == 0.0


# ---- where the elements lie ------------------------------------------------------------------------------------------


def test_any_strides_of_the_input():
    x, weight = normal(6, 9), normal(9)
    y = native.rms_norm(x, weight)[0]
    layouts = [np.asfortranarray(x), x[::-1].copy()[::-1], np.pad(x, ((0, 0), (2, 3)))[:, 2:-3]]
    for layout in layouts:
        assert np.array_equal(native.rms_norm(layout, np.repeat(weight, 2)[::2])[0], y)
    one = np.broadcast_to(np.float32(2), x.shape)  # all strides 0
    assert np.array_equal(native.rms_norm(one, weight)[0], native.rms_norm(one.copy(), weight)[0])


def test_buffers_of_all_kinds():
    x, weight = normal(2, 3), normal(3)
    y = native.rms_norm(x, weight)[0]
    memory = mmap.mmap(-1, x.nbytes)
    memory.write(x.tobytes())
    views = [memoryview(x), memoryview(memory).cast("f", (2, 3)), torch.from_numpy(x), x.view()]
    for each in views:
        assert np.array_equal(native.rms_norm(each, array.array("f", weight.tolist()))[0], y)
    out = memoryview(bytearray(x.nbytes)).cast("f", (2, 3))
    assert native.rms_norm(x, weight, out=out)[0] is out
    assert np.array_equal(np.asarray(out), y)


def test_results_in_the_callers_arrays():
    x, weight, dy = normal(4, 6), normal(6), normal(4, 6)
    y, rstd = native.rms_norm(x, weight)
    padded = np.full((4, 10), np.nan, np.float32)
    assert native.rms_norm(x, weight, out=padded[:, 2:8])[0].base is padded
    assert np.array_equal(padded[:, 2:8], y) and np.isnan(padded[:, :2]).all() and np.isnan(padded[:, 8:]).all()
    wanted, _ = native.rms_norm_backward(dy, x, weight, rstd)
    assert native.rms_norm_backward(dy, x, weight, rstd, out=dy)[0] is dy
    assert np.array_equal(dy, wanted)


def test_bfloat16_needs_an_array_of_that_type():
    x, weight = torch.from_numpy(normal(4, 6)).bfloat16(), normal(6)
    with pytest.raises(ValueError, match="pass an array of that type as out"):
        native.rms_norm(x, weight)
    out = torch.empty_like(x)
    assert native.rms_norm(x, weight, out=out)[0] is out
    close(out.float(), rms_norm_fp64(x.float().numpy(), weight, 1e-6), 1e-2)
    transposed = native.rms_norm(x.t().contiguous().t(), weight, out=torch.empty_like(x))[0]
    assert torch.equal(transposed, out)


def test_the_bfloat16_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed (it comes with JAX)")
    x, weight = normal(4, 6).astype(ml_dtypes.bfloat16), normal(6)
    y, _ = native.rms_norm(x, weight)
    assert y.dtype == x.dtype
    close(y.astype(np.float32), rms_norm_fp64(x.astype(np.float32), weight, 1e-6), 1e-2)


def test_jax_arrays_are_read_where_they_lie_and_never_written():
    jax = pytest.importorskip("jax", reason="JAX is not installed (pip install 'leantune[embed]')")
    x, weight = normal(4, 6), normal(6)
    on_jax = jax.numpy.asarray(x, dtype=jax.numpy.bfloat16)
    y, _ = native.rms_norm(on_jax, jax.numpy.asarray(weight))
    assert y.dtype.name == "bfloat16"
    with pytest.raises(ValueError, match="out is a read-only jaxlib.*JAX arrays cannot be changed"):
        native.rms_norm(x, weight, out=jax.numpy.asarray(x))
    with pytest.raises(ValueError, match="x cannot be read through DLPack"):
        jax.jit(lambda a: native.rms_norm(a, weight)[0])(x)


# ---- errors ----------------------------------------------------------------------------------------------------------


def read_only(x):
    x.flags.writeable = False
    return x


class OnAnotherDevice:
    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        raise AssertionError("not to be asked for")


X, W, S = normal(2, 3), normal(3), normal(3, 3)
H = X.astype(np.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.rms_norm([1.0], W), "x is a list, without __dlpack__ or a buffer of numbers"),
        (lambda: native.rms_norm(X.astype(np.float64), W), r"x is float64 of shape \[2, 3\]; it must be float32 or"),
        (lambda: native.rms_norm(X.astype(">f4"), W), "x has dtype .*pass plain numbers in native layout"),
        (lambda: native.rms_norm(X[0], W), r"x is float32 of shape \[3\]; .* of shape \[T, H\]"),
        (lambda: native.rms_norm(X, W[:2]), r"weight is float32 of shape \[2\]; .* of shape \[3\]"),
        (lambda: native.rms_norm(X, W, out=np.empty((2, 2), np.float32)), r"out is float32 of shape \[2, 2\]"),
        (lambda: native.rms_norm(X, W, out=read_only(X.copy())), "out is a read-only numpy.ndarray; pass a writable"),
        (lambda: native.rms_norm(X, W, out=np.asfortranarray(X)), "out has .* contiguous in its last dimension"),
        (lambda: native.rms_norm(OnAnotherDevice(), W), "x cannot be read .* device is of DLPack type 2; move it"),
        (lambda: native.rms_norm(torch.ones(2, 3, requires_grad=True), W), r"x cannot .* use tensor.detach\(\)"),
        (lambda: native.cross_entropy(X, np.array([-100, 3])), r"targets\[1\]=3 is outside \[0, 3\), the columns of"),
        (
            lambda: native.cross_entropy(X, np.array([0, 0]), label_smoothing=2),
            r"label_smoothing=2 is outside \[0, 1\]",
        ),
        (lambda: native.distillation(X, X), "alpha=0.5 needs targets; without them use alpha=1.0"),
        (lambda: native.distillation(X, X, alpha=1.5), r"alpha=1.5 is outside \[0, 1\]"),
        (lambda: native.distillation(X, X, alpha=1, temperature=0), "temperature=0 must be positive and finite"),
        (lambda: native.distillation(X, X[:1], alpha=1), r"teacher is float32 of shape \[1, 3\]; .* of shape \[2, 3\]"),
        (lambda: native.distillation(X, X, alpha=1, out=X), "out is teacher itself, which is read until the end"),
        (lambda: native.bottleneck(X, X, X.T, activation="tanh"), "activation='tanh' is none of silu, gelu, gelu_tanh"),
        (lambda: native.bottleneck(X, X[:0], X.T), r"down has 0 rows, the rank; it must be in \[1, 256\]"),
        (lambda: native.bottleneck(X, X, X), r"up is float32 of shape \[2, 3\]; it must be float32 of shape \[3, 2\]"),
        (lambda: native.bottleneck(X, X, X.T, out=X), "out is x itself, which is read until the end; pass another"),
        (lambda: native.lora_linear(S, S, None, S, S, 1.0, out=S), "out is x itself"),
        (lambda: native.lora_linear_backward(S, S, S, S, S, 1.0, out=S), "out is dy itself"),
        (lambda: native.low_rank_add(S, S, S, S, 1.0), "y is x itself"),
        (lambda: native.glu(X, X, "relu"), "activation='relu' is none of silu, gelu, gelu_tanh"),
        (lambda: native.attention(X[None], X[None], X[None], [0, 1]), "cu_seqlens is a list"),
        (lambda: native.attention(X[None], X[None], X[None], np.array([0, 2])), r"cu_seqlens=\[0, 2\] must start at 0"),
        (lambda: native.embedding(np.array([2]), X), r"ids\[0\]=2 is outside \[0, 2\), the rows of weight"),
        (lambda: native.rope(X[None], X, X, np.array([2])), r"cos has 3 columns; at most half of x's 3 can be turned"),
        (lambda: native.dropout(X, 1.0, 0), r"p=1.0, seed=0, offset=0; they must be in \[0, 1\)"),
        (lambda: native.adamw([X], [], [X], [X], step=1, lr=1.0), "grads has 0 arrays; params has 1"),
        (lambda: native.adamw([X], [W], [X], [X], step=1, lr=1.0), r"grads\[0\] is float32 of shape \[3\]"),
        (lambda: native.adamw([X], [X], [X], [X], step=0, lr=1.0), "step=0 must be 1 for the first update"),
        (lambda: native.adamw([X], [X], [X], [X], step=1, lr=1.0, beta2=1), r"beta2=1 is outside \[0, 1\)"),
        (lambda: native.sgd([X], [X], [X], step=1, lr=1.0, seed=-1), r"seed=-1 is outside \[0, 2\^64\)"),
        (lambda: native.sgd([X], [X], [X], step=1, lr=1.0, out=([X],)), "out has 1 lists; it takes params, momentum_"),
        (lambda: native.sgd([X], [X], [X], step=1, lr=1.0, out=([X], [])), r"out\[1\] has 0 arrays; params has 1"),
        (lambda: native.sgd([X], [X], [X], step=1, lr=1.0, masters=[X]), r"params\[0\] is float32; masters\[0\] must"),
        (lambda: native.sgd([H], [X], [X], step=1, lr=1.0), r"params\[0\] is float16, .*; give masters\[0\], its"),
        (lambda: native.sgd([H], [X], [X], step=1, lr=1.0, masters=[]), "masters has 0 arrays; params has 1"),
        (lambda: native.low_rank_gradients(X, X, W[None], W[:, None], 1.0, accumulate=True), "needs `out`"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "threads"), [("1", "1"), ("3", "3"), ("", str(len(os.sched_getaffinity(0))))])
def test_without_pytorch_the_library_has_threads_of_its_own(asked, threads):
    code = "import sys; from leantune_kernels import native; print(native.num_threads(), 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), "OMP_NUM_THREADS": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [threads, "False"]


def test_with_pytorch_its_threads_are_used():
    code = "import torch; torch.set_num_threads(1); from leantune_kernels import native; print(native.num_threads())"
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


B, Q, W4 = normal(7, 3), normal(4, 2, 8), normal(4)  # a buffer whose parts overlap; a projection's output
CU = np.array([0, 4], np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.rms_norm(B[:6], W, out=B[1:]), "out overlaps x; pass x itself or another array"),
        (lambda: native.rms_norm(B[1:], W, out=B[:6]), "out overlaps x"),
        (lambda: native.rms_norm(B[::2], W, out=B[:4]), "out overlaps x"),
        (lambda: native.rms_norm(B.ravel()[1:19].reshape(6, 3), W, out=B[:6]), "out overlaps x"),
        (lambda: native.rms_norm(X, W, residual=B[:2], out=B[1:3]), "out overlaps residual"),
        (lambda: native.rms_norm(X, B[1], out=B[:2]), "out overlaps weight, which is read until the end; pass another"),
        (lambda: native.layer_norm(X, W, B[1], out=B[:2]), "out overlaps bias"),
        (lambda: native.rms_norm_backward(B[:2], X, W, X[:, 0], out=B[1:3]), "out overlaps dy"),
        (lambda: native.layer_norm_backward(X, B[:2], W, W[:2], W[:2], out=B[1:3]), "out overlaps x"),
        (lambda: native.layer_norm_backward(X, X, W, B.ravel()[:2], W[:2], out=B[:2]), "out overlaps mean"),
        (lambda: native.activation(B[:2], "silu", B[1:3]), "out overlaps x"),
        (lambda: native.activation_backward(X, B[:2], "silu", B[1:3]), "out overlaps x"),
        (lambda: native.glu(X, B[:2], out=B[1:3]), "out overlaps up"),
        (lambda: native.glu_backward(X, X, X, out=(B[:2], B[1:3])), r"out\[0\] overlaps out\[1\]"),
        (lambda: native.glu_backward(X, B[:2], X, out=(B[3:5], B[1:3])), r"out\[1\] overlaps gate"),
        (lambda: native.dropout(B[:2], 0.5, 1, out=B[1:3]), "out overlaps x"),
        (lambda: native.attention(Q, Q, Q, CU, out=Q), "out is q itself"),
        (lambda: native.embedding(np.array([1, 0]), B[:2], out=B[1:3]), "out overlaps weight"),
        (lambda: native.embedding_backward(B[:2], np.array([1, 0]), 2, out=B[1:3]), "out overlaps dy"),
        (lambda: native.lora_linear(X, S, W, S, B[:3], 1.0, out=B[2:4]), "out overlaps B"),
        (lambda: native.lora_linear_backward(X, X, B[:3], S, S, 1.0, out=B[2:4]), "out overlaps weight"),
        (lambda: native.low_rank_gradients(X, X, S, S, 1.0, out=(B[:3], B[2:5])), r"out\[0\] overlaps out\[1\]"),
        (lambda: native.low_rank_merge(B[:3], S, S, 1.0, out=B[1:4]), "out overlaps weight"),
        (lambda: native.bottleneck(X, B[:2], X.T, out=B[1:3]), "out overlaps down"),
        (lambda: native.distillation(X, B[:2], alpha=1, out=B[1:3]), "out overlaps teacher"),
        (lambda: native.int8_linear(S, S.view(np.int8)[:, :3], W, out=S), "out is x itself"),
        (lambda: native.pack_bf16(S, S.view(np.uint16)[:, :3]), "out has"),
        (lambda: native.pack_bf16(S, S.view(np.uint16).ravel()[:9].reshape(3, 3)), "out overlaps x"),
        (lambda: native.unpack_bf16(S.view(np.uint16).ravel()[:9].reshape(3, 3), out=S), "out overlaps packed"),
    ],
)
def test_results_that_overlap_what_is_still_read_are_refused(call, message):
    before = [a.copy() for a in (B, Q, S, X, W)]
    with pytest.raises(ValueError, match=message):
        call()
    assert all(np.array_equal(a, b) for a, b in zip((B, Q, S, X, W), before, strict=True))


def test_results_between_the_rows_of_an_argument_are_fine():
    """Columns beside it in one buffer, every other row, the argument itself, a logit's own place shifted."""
    wide, tall = normal(5, 8), normal(10, 4)
    expected = native.rms_norm(wide[:, :4].copy(), W4)[0]
    assert np.array_equal(native.rms_norm(wide[:, :4], W4, out=wide[:, 4:])[0], expected)
    expected = native.rms_norm(tall[::2].copy(), W4)[0]
    assert np.array_equal(native.rms_norm(tall[::2], W4, out=tall[1::2])[0], expected)
    assert np.array_equal(native.rms_norm(tall[::2], W4, out=tall[::2])[0], expected)
    assert np.array_equal(tall[::2], expected)
    one = normal(4)
    expected = native.activation(one[None].copy(), "silu")
    assert np.array_equal(native.activation(one[None], "silu", out=one.reshape(1, 4)), expected)
    targets, logits = np.array([0, 1, 2, 3]), normal(5, 4)
    losses, dlogits = native.cross_entropy(logits[:4].copy(), targets)
    found = native.cross_entropy(logits[:4], targets, out=logits[1:])  # the logits move there before the kernel runs
    assert np.array_equal(found[0], losses) and np.array_equal(found[1], dlogits)
