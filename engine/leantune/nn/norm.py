"""The norm at the entrance of a block, and the end of the block's backward pass that goes back through it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from leantune.nn.arena import Buffer
from leantune.nn.batch import Packed
from leantune.nn.linear import Gradients, LinearGroup
from leantune_kernels import rms_norm


class RMSNorm(nn.Module):
    """Weight [H], kept in fp32 (it is small, and statistics are fp32 anyway)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
        self.eps = eps

    def entrance(self, x: torch.Tensor, batch: Packed) -> tuple[Buffer, torch.Tensor]:
        """(h [T, H] on loan, rstd [T]): the normed x and the statistic that the backward pass needs."""
        h = batch.arena.take(x.shape[0], x.shape[1], x.dtype)
        _, rstd = rms_norm.forward(x, self.weight, self.eps, h.tensor)
        return h, rstd

    def exit(
        self,
        x: torch.Tensor,
        rstd: torch.Tensor,
        h: Buffer,
        group: LinearGroup,
        dy: torch.Tensor,
        dout: torch.Tensor,
        needed: tuple[bool, bool, Sequence[bool]],
        batch: Packed,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Gradients]:
        """Backward of y = group(norm(x)) beside the residual x, whose gradient is `dout`.

        h: the normed x, or a buffer given back, in which case it is computed again. dy: gradient of y. needed: of x, of
        the norm's weight, and of each of the group's tensors. Returns these three, None where not needed.
        """
        need_x, need_weight, need_group = needed
        if h.tensor is None:
            if any(need_group):
                h, _ = self.entrance(x, batch)
            else:
                h = batch.arena.take(x.shape[0], x.shape[1], x.dtype)
        gradients = group.parameter_gradients(h.tensor, dy, need_group, batch)
        if not (need_x or need_weight):
            return None, None, gradients
        dh = group.input_gradient(dy, h.tensor, batch)  # h itself is not needed any more
        out = torch.empty_like(x)
        dx, dweight = rms_norm.backward(dh, x, self.weight, rstd, dout, out, need_dweight=need_weight)
        return dx if need_x else None, dweight, gradients
