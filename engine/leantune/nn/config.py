"""What a decoder is built from. A family (leantune/models) fills it from a checkpoint's config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from leantune.errors import ConfigError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `kind` is Hugging Face's rope_type: "default", "linear" or "llama3"."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, dim: int) -> torch.Tensor:
        """[dim/2] fp32 angles per position (RoFormer, arXiv:2104.09864; llama3: frequency-dependent interpolation)."""
        frequencies = 1.0 / (self.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            # Wavelengths beyond the original context are stretched by `factor`, short ones kept, blended in between.
            turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = keep.clamp(0.0, 1.0)
            return frequencies * (keep + (1.0 - keep) / self.factor)
        return frequencies


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder-only transformer, in Hugging Face's terms; sizes are positive."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json as it was

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim={self.head_dim} is odd; rotary embedding needs an even one")
