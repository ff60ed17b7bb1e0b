"""Llama: RMSNorm, rotary embedding, grouped-query attention, gated MLP (also SmolLM2, Llama 2 and 3, TinyLlama)."""

from __future__ import annotations

from typing import Any

from leantune.models import _fields as fields
from leantune.nn.config import DecoderConfig
from leantune.nn.mlp_block import ACTIVATIONS


def config(raw: dict[str, Any]) -> DecoderConfig:
    """The decoder's shape from config.json. Raises ConfigError that names the field."""
    heads, hidden = fields.count(raw, "num_attention_heads"), fields.count(raw, "hidden_size")
    fields.must_be(raw, "hidden_act", *ACTIVATIONS)
    fields.must_be(raw, "attention_dropout", 0, 0.0)
    fields.must_be(raw, "pretraining_tp", 1)
    fields.must_be(raw, "quantization_config")
    fields.must_be(raw, "sliding_window")
    return DecoderConfig(
        model_type="llama",
        vocab_size=fields.count(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.count(raw, "intermediate_size"),
        num_hidden_layers=fields.count(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.count(raw, "num_key_value_heads", heads),
        head_dim=fields.count(raw, "head_dim", hidden // heads),
        rms_norm_eps=fields.number(raw, "rms_norm_eps", 1e-6),
        rope=fields.rope(raw),
        max_position_embeddings=fields.count(raw, "max_position_embeddings", 2048),
        hidden_act=raw.get("hidden_act") or "silu",
        attention_bias=fields.flag(raw, "attention_bias"),
        mlp_bias=fields.flag(raw, "mlp_bias"),
        tie_word_embeddings=fields.flag(raw, "tie_word_embeddings"),
        raw=raw,
    )
