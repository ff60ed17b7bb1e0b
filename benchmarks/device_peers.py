"""What races beside PyTorch on a GPU alone: its compiler, and the ops that Liger Kernel has, where it is installed.

Liger's backward passes overwrite what they have read, as its users' do: its functions get inputs of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

Thunk = Callable[[], Any]


def compiled(thunks: dict[str, Thunk]) -> dict[str, Thunk]:
    """torch.compile of PyTorch's own contender, the one made of most operations where there are several."""
    names = [name for name in ("torch", "torch foreach", *thunks) if name in thunks and name.startswith("torch")]
    return {"torch.compile": torch.compile(thunks[names[0]], dynamic=False)}


def functions(op: str, inputs: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """{"liger": a function of the op's arguments}, or nothing where Liger lacks the op or what `inputs` asks of it."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional as liger

    def rms_norm(x: Any, weight: Any, eps: float, residual: Any = None) -> Any:
        if residual is None:
            return liger.liger_rms_norm(x, weight, eps)
        summed = x + residual
        return liger.liger_rms_norm(summed, weight, eps), summed

    def layer_norm(x: Any, weight: Any, bias: Any, eps: float, residual: Any = None) -> Any:
        if residual is None:
            return liger.liger_layer_norm(x, weight, bias, eps)
        summed = x + residual
        return liger.liger_layer_norm(summed, weight, bias, eps), summed

    def glu(gate: Any, up: Any, activation: str) -> Any:
        return (liger.liger_swiglu if activation == "silu" else liger.liger_geglu)(gate, up)

    known: dict[str, Callable[..., Any]] = {"rms_norm": rms_norm, "layer_norm": layer_norm}
    if inputs.get("activation") in ("silu", "gelu_tanh"):
        known["glu"] = glu
    return {"liger": known[op]} if op in known else {}


def thunks(op: str, inputs: dict[str, Any]) -> dict[str, Thunk]:
    """{"liger": a thunk} for ops whose cases.py makes its own contenders, or nothing; see `functions`."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    if op == "rope" and not inputs["interleaved"]:
        return {"liger": _rope(**inputs)}
    if op == "linear_cross_entropy":
        return {"liger": _distillation(**inputs) if "teacher" in inputs else _cross_entropy(**inputs)}
    return {}


def _rope(q: Any, k: Any, cos: Any, sin: Any, positions: Any, interleaved: bool) -> Thunk:
    from liger_kernel.transformers import functional as liger

    q, k = (x.clone().transpose(0, 1)[None] for x in (q, k))  # [1, heads, T, head_dim], over rows of [T, heads, ...]
    cos, sin = (torch.cat((t, t), -1)[positions][None].to(q.dtype) for t in (cos, sin))
    return lambda: liger.liger_rope(q, k, cos, sin)


def _cross_entropy(hidden: Any, weight: Any, targets: Any) -> Thunk:
    from liger_kernel.transformers import functional as liger

    def run() -> Any:
        x = hidden.detach().requires_grad_()
        return torch.autograd.grad(liger.liger_fused_linear_cross_entropy(x, weight, targets), x)[0]

    return run


def _distillation(
    hidden: Any, weight: Any, targets: Any, teacher: Any, temperature: float, probabilities: bool, alpha: float = 0.5
) -> Thunk:
    """Liger fuses a teacher's head alone, so logits are formed here: its JSD at beta = 0 is the divergence."""
    from liger_kernel.transformers import functional as liger

    if probabilities:
        raise ValueError("probabilities=True; Liger's loss takes a teacher's logits")

    def run() -> Any:
        x = hidden.detach().requires_grad_()
        logits = x @ weight.t()
        log_q, log_p = ((t / temperature).log_softmax(-1) for t in (logits, teacher))
        soft = liger.liger_jsd(log_q, log_p, shift_labels=targets, beta=0.0)
        loss = alpha * temperature**2 * soft + (1 - alpha) * liger.liger_cross_entropy(logits.clone(), targets)
        return torch.autograd.grad(loss, x)[0]

    return run
