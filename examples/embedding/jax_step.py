"""Trains an RMSNorm and a low-rank adapter on a frozen layer with JAX arrays; PyTorch is not imported.

    pip install 'leantune[embed]' && python examples/embedding/jax_step.py

The kernels become JAX functions that jax.jit and jax.grad understand: jax.pure_callback calls a kernel when the
compiled program gets there, jax.custom_vjp says which kernel is the backward pass. A kernel reads JAX's arrays where
they lie, and returns NumPy arrays. The model is that of numpy_step.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from leantune_kernels import native

TOKENS, HIDDEN, VOCABULARY, RANK, SCALE = 256, 64, 101, 8, 2.0
IGNORE = -100  # the target of a row without a label


def like(*arrays):
    """Shapes and dtypes, by which JAX knows what a callback returns."""
    return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, weight, eps):
    return rms_norm_forward(x, weight, eps)[0]


def rms_norm_forward(x, weight, eps):
    rstd = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    y, rstd = jax.pure_callback(partial(native.rms_norm, eps=eps), (*like(x), rstd), x, weight)
    return y, (x, weight, rstd)


def rms_norm_backward(eps, saved, dy):
    x, weight, _ = saved
    return jax.pure_callback(native.rms_norm_backward, like(x, weight), dy, *saved)


rms_norm.defvjp(rms_norm_forward, rms_norm_backward)


@jax.custom_vjp
def lora_linear(x, weight, A, B):
    y = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), x.dtype)
    return jax.pure_callback(lambda x, w, A, B: native.lora_linear(x, w, None, A, B, SCALE), y, x, weight, A, B)


def lora_linear_backward(saved, dy):
    x, weight, A, B = saved
    kernel = partial(native.lora_linear_backward, scale=SCALE)
    dx, dA, dB = jax.pure_callback(kernel, like(x, A, B), dy, x, weight, A, B)
    return dx, jnp.zeros_like(weight), dA, dB  # the weight is frozen


lora_linear.defvjp(lambda *inputs: (lora_linear(*inputs), inputs), lora_linear_backward)


@jax.custom_vjp
def cross_entropy(logits, targets):
    """The mean loss of the rows whose target is not IGNORE."""
    return cross_entropy_forward(logits, targets)[0]


def cross_entropy_forward(logits, targets):
    def kernel(logits, targets):
        losses, dlogits = native.cross_entropy(logits, targets, ignore_index=IGNORE)
        return losses.astype(np.float32), dlogits

    losses, dlogits = jax.pure_callback(kernel, like(logits[:, 0], logits), logits, targets)
    return losses.sum() / jnp.maximum(1, (targets != IGNORE).sum()), dlogits


cross_entropy.defvjp(cross_entropy_forward, lambda dlogits, dloss: (dloss * dlogits, None))


@jax.jit
@jax.value_and_grad
def loss_and_gradients(params, frozen, x, targets):
    h = rms_norm(x, params["norm"], 1e-5)
    return cross_entropy(lora_linear(h, frozen, params["A"], params["B"]), targets)


def adamw(params, grads, moments, step, lr, clip):
    """The kernel on the leaves of JAX's trees; JAX arrays cannot be changed, so it returns new ones."""
    leaves, tree = jax.tree.flatten(params)
    arrays = native.adamw(leaves, jax.tree.leaves(grads), *moments, step=step, lr=lr, grad_scale=clip)
    return jax.tree.unflatten(tree, [jnp.asarray(p) for p in arrays[0]]), arrays[1:]


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    frozen = jax.random.normal(keys[0], (VOCABULARY, HIDDEN)) / HIDDEN**0.5
    x = jax.random.normal(keys[1], (TOKENS, HIDDEN))
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCABULARY).at[::10].set(IGNORE)

    params = {
        "norm": jnp.ones(HIDDEN),
        "A": jax.random.normal(keys[3], (RANK, HIDDEN)) / HIDDEN**0.5,
        "B": jnp.zeros((VOCABULARY, RANK)),
    }
    moments = [[np.zeros(p.shape, np.float32) for p in jax.tree.leaves(params)] for _ in range(2)]
    for step in range(1, 11):
        loss, grads = loss_and_gradients(params, frozen, x, targets)
        norm = native.grad_norm(jax.tree.leaves(grads))
        params, moments = adamw(params, grads, moments, step, lr=2e-2, clip=native.clip_factor(norm, max_norm=1.0))
        print(f"step {step}  loss {loss:.4f}  gradient norm {norm:.3f}")


if __name__ == "__main__":
    main()
