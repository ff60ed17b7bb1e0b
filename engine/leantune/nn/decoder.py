"""A decoder-only transformer: embedding, layers, final norm, vocabulary head; and its loss without logits.

Module paths and parameter names are those of Hugging Face's Llama, which the other decoder families share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from leantune.errors import ConfigError
from leantune.nn.arena import Arena
from leantune.nn.attention_block import Attention, AttentionBlock
from leantune.nn.batch import Packed
from leantune.nn.config import DecoderConfig
from leantune.nn.linear import Linear
from leantune.nn.mlp_block import MLP, MLPBlock
from leantune.nn.norm import RMSNorm
from leantune_kernels import linear_cross_entropy, rms_norm

IGNORED = -100  # the target of a token that carries no label
_LOSS_ROWS = 256  # rows of logits held at a time


class Layer(nn.Module):
    """One transformer layer, [T, H] -> [T, H]: its modules, and the two blocks that compute with them."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        path = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, f"{path}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, f"{path}.mlp")
        self.attention_block = AttentionBlock(config, self.input_layernorm, self.self_attn)
        self.mlp_block = MLPBlock(config, self.post_attention_layernorm, self.mlp)

    def forward(self, x: torch.Tensor, batch: Packed) -> torch.Tensor:
        return self.mlp_block(self.attention_block(x, batch), batch)


class Embedding(nn.Module):
    """Weight [vocab_size, H], shared with the head where the config ties them."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width, device="meta"), requires_grad=False)


class Backbone(nn.Module):
    """Embedding, layers and final norm, under the names that Hugging Face gives them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The network; its parameters are on the meta device until a checkpoint fills them, and frozen.

    `policy` is what the layers keep for the backward pass: "all", "selective" (default) or "full" recomputation.
    """

    def __init__(self, config: DecoderConfig, name_or_path: str = "") -> None:
        super().__init__()
        self.config = config
        self.name_or_path = name_or_path
        self.model = Backbone(config)
        self.lm_head = Linear("lm_head", config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.policy = "selective"
        self.method: Any = None  # the fine-tuning method applied last
        self.arena = Arena()
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None
        for index, linear in enumerate(self.linears()):
            linear.index = index

    def linears(self) -> list[Linear]:
        """The linear layers inside the transformer layers (the vocabulary head is not among them), in order."""
        return [m for m in self.model.layers.modules() if isinstance(m, Linear)]

    def updated(self) -> list[Linear]:
        """The linear layers that carry a low-rank update, merged or not."""
        return [linear for linear in self.linears() if linear.lora is not None]

    def require_no_update(self) -> None:
        """ConfigError if the model carries an adapter, which the caller is about to train past or to replace."""
        if self.updated():
            raise ConfigError(
                "the model carries a LoRA adapter already; load the checkpoint anew, or save_merged() it and load that"
            )

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of activations: fp32 on the CPU, whatever the weights are stored in; the weights' own on a GPU."""
        return torch.float32 if self.device.type == "cpu" else self.model.embed_tokens.weight.dtype

    def packed(
        self,
        cu_seqlens: torch.Tensor,
        positions: torch.Tensor,
        dropout_key: tuple[int, int, int] | None = None,
        length: int | None = None,
    ) -> Packed:
        """The layers' view of a batch. `length`: positions to prepare, default the longest in the batch."""
        if self.arena.device != self.device:
            self.arena = Arena(self.device)
        longest = length if length is not None else (int(positions.max()) + 1 if positions.numel() else 1)
        cos, sin = self._rotation(longest)
        key = dropout_key if self.training else None
        return Packed(cu_seqlens, positions, cos, sin, self.arena, self.policy, key)

    def hidden(self, input_ids: torch.Tensor, batch: Packed) -> torch.Tensor:
        """[T] ids -> [T, H] hidden states before the final norm."""
        x = F.embedding(input_ids, self.model.embed_tokens.weight).to(self.compute_dtype)
        for layer in self.model.layers:
            x = layer(x, batch)
        return x

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H] hidden states -> [N, vocab_size] logits."""
        normed = rms_norm.rms_norm(x, self.model.norm.weight, self.model.norm.eps)
        return F.linear(normed, self.lm_head.weight.to(normed.dtype))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] ids of equally long sequences -> [batch, length, vocab_size] logits.

        No dropout is applied here, in training mode either: a mask needs the step it belongs to (see `packed`).
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            given = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids is {given}; it must be an integer tensor [batch, length]")
        sequences, length = input_ids.shape
        cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32, device=input_ids.device) * length
        positions = torch.arange(length, device=input_ids.device).repeat(sequences)
        x = self.hidden(input_ids.reshape(-1), self.packed(cu_seqlens, positions, length=length))
        return self.head(x).view(sequences, length, -1)

    def loss_sum(self, input_ids: torch.Tensor, targets: torch.Tensor, batch: Packed) -> torch.Tensor:
        """Sum over label tokens of the negative log-likelihood, a scalar; logits are never held as a whole.

        input_ids [T]; targets [T], the id that follows each token or -100 where it carries no label.
        """
        x = self.hidden(input_ids, batch)
        rows = (targets != IGNORED).nonzero().squeeze(1)
        normed = rms_norm.rms_norm(x.index_select(0, rows), self.model.norm.weight, self.model.norm.eps)
        logits = batch.arena.take(min(_LOSS_ROWS, rows.numel()), self.config.vocab_size, planned=False)
        return linear_cross_entropy.linear_cross_entropy(
            normed,
            self.lm_head.weight,
            targets.index_select(0, rows),
            reduction="sum",
            chunk_rows=_LOSS_ROWS,
            workspace=logits.tensor,
        )

    def _rotation(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [at least length, head_dim/2], grown by doubling and kept."""
        if self._rope is None or self._rope[0].shape[0] < length or self._rope[0].device != self.device:
            size = max(256, 1 << (length - 1).bit_length())
            angles = torch.outer(torch.arange(size).float(), self.config.rope.inverse_frequencies(self.config.head_dim))
            self._rope = angles.cos().to(self.device), angles.sin().to(self.device)
        return self._rope
