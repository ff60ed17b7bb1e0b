"""Functions that write to the caller's tensors count it, as PyTorch's own do: autograd then refuses a stale graph."""

import pytest
import torch

from leantune_kernels import activation, dropout, gated_mlp, glu, grad_norm, layer_norm, low_rank, rms_norm, rope
from leantune_kernels.adamw import adamw_step
from leantune_kernels.sgd import sgd_step


def test_a_backward_pass_through_updated_weights_is_refused():
    p = torch.ones(3, requires_grad=True)
    loss = (p**3).sum()
    adamw_step([p], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_counts_for_what_it_changes():
    params = [torch.ones(3, dtype=torch.bfloat16), torch.ones(3)]
    master = torch.ones(3)
    with torch.inference_mode():
        params.append(torch.ones(3))  # has no counter
    before = [t._version for t in (*params[:2], master)]
    sgd_step(params, [torch.ones(3), None, torch.ones(3)], step=1, lr=0.1, masters=[master, None, None])
    after = [t._version for t in (*params[:2], master)]
    assert after[0] > before[0] and after[1] == before[1] and after[2] > before[2]


A, B, WEIGHT, TABLE = torch.ones(2, 4), torch.ones(4, 2), torch.ones(4), torch.ones(3, 2)
MLP = gated_mlp.Weights(torch.ones(4, 4), torch.ones(4, 4), torch.ones(4, 4))


@pytest.mark.parametrize(
    "write",
    [
        lambda y: rope.apply_(y.view(3, 1, 4), TABLE, TABLE, torch.arange(3)),
        lambda y: rope.apply_(torch.ones(3, 1, 4), TABLE, TABLE, torch.arange(3), k=y.view(3, 1, 4)),
        lambda y: glu.backward_(y, torch.ones(3, 4), torch.ones(3, 4)),
        lambda y: glu.backward_(torch.ones(3, 4), torch.ones(3, 4), y),
        lambda y: glu.forward(torch.ones(3, 4), torch.ones(3, 4), out=y),
        lambda y: low_rank.add_(y, torch.ones(3, 4), A, B, 1.0),
        lambda y: low_rank.input_gradient_(y, torch.ones(3, 4), A, B, 1.0),
        lambda y: low_rank.merge(torch.ones(3, 4), None, None, 1.0, out=y),
        lambda y: grad_norm.clip_grad_norm_([y], 0.5),
        lambda y: gated_mlp.backward_(torch.ones(3, 4), torch.ones(3, 4), y, torch.ones(3, 4), MLP),
        lambda y: rms_norm.forward(torch.ones(3, 4), WEIGHT, 1e-6, out=y),
        lambda y: rms_norm.forward(torch.ones(3, 4), WEIGHT, 1e-6, residual=y, summed=y),
        lambda y: layer_norm.forward(torch.ones(3, 4), WEIGHT, None, 1e-6, out=y),
        lambda y: activation.forward(torch.ones(3, 4), "silu", out=y),
        lambda y: dropout.forward(torch.ones(3, 4), 0.5, 0, 0, out=y),
    ],
)
def test_a_write_in_place_counts(write):
    y = torch.ones(3, 4)
    before = y._version
    write(y)
    assert y._version > before
