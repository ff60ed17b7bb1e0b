"""What the layers need to know about the tokens at hand, beside the hidden states themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leantune.nn.arena import Arena

POLICIES = ("all", "selective", "full")


@dataclass
class Packed:
    """T tokens of several sequences, laid end to end without padding.

    cu_seqlens: int32 [sequences + 1], where each begins and the last ends. positions: int64 [T], restart per sequence.
    cos, sin: fp32 [positions, head_dim/2]. policy: what is kept for the backward pass, "all", "selective" (norm,
    activation and low-rank products are recomputed) or "full" (each block is run again from its input).
    dropout_key: (seed, step, index of the first token within the step); a mask depends on nothing else, so that
    recomputation, micro-batching and resuming see the same one. None outside training.
    """

    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    arena: Arena
    policy: str = "selective"
    dropout_key: tuple[int, int, int] | None = None
