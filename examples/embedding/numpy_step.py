"""Trains an RMSNorm and a low-rank adapter on a frozen layer with NumPy arrays alone; PyTorch is not imported.

    python examples/embedding/numpy_step.py

The model is logits = lora_linear(rms_norm(x)); the loss is the mean cross-entropy of the rows that carry a label.
"""

import numpy as np

from leantune_kernels import native

TOKENS, HIDDEN, VOCABULARY, RANK, SCALE = 256, 64, 101, 8, 2.0
IGNORE = -100  # the target of a row without a label


def loss_and_gradients(params, frozen, x, targets):
    """The loss and the gradients of norm, A and B: every kernel's forward pass, then its backward pass."""
    norm, A, B = params
    h, rstd = native.rms_norm(x, norm, eps=1e-5)
    logits = native.lora_linear(h, frozen, None, A, B, SCALE)
    losses, dlogits = native.cross_entropy(logits, targets, ignore_index=IGNORE, out=logits)  # in place of the logits
    dh, dA, dB = native.lora_linear_backward(dlogits, h, frozen, A, B, SCALE)
    _, dnorm = native.rms_norm_backward(dh, x, norm, rstd, out=dh)  # in place of dh
    return losses.sum() / (targets != IGNORE).sum(), [dnorm, dA, dB]


def main():
    rng = np.random.default_rng(0)
    frozen = rng.standard_normal((VOCABULARY, HIDDEN), np.float32) / HIDDEN**0.5
    x = rng.standard_normal((TOKENS, HIDDEN), np.float32)
    targets = rng.integers(0, VOCABULARY, TOKENS)
    targets[::10] = IGNORE

    norm = np.ones(HIDDEN, np.float32)
    A = rng.standard_normal((RANK, HIDDEN), np.float32) / HIDDEN**0.5
    B = np.zeros((VOCABULARY, RANK), np.float32)
    params = [norm, A, B]
    state = params, [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for step in range(1, 11):
        loss, grads = loss_and_gradients(params, frozen, x, targets)
        norm_of_all = native.grad_norm(grads)
        clip = native.clip_factor(norm_of_all, max_norm=1.0)
        native.adamw(params, grads, *state[1:], step=step, lr=2e-2, grad_scale=clip, out=state)  # in place
        print(f"step {step}  loss {loss:.4f}  gradient norm {norm_of_all:.3f}")


if __name__ == "__main__":
    main()
