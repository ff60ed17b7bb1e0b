"""A random Llama of a few kilobytes, as a checkpoint directory with the tokenizer of helpers_data."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import helpers_data

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of `tiny_model`; every field can be overridden, and others added."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": helpers_data.backend().get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "torch_dtype": "float32",
        **overrides,
    }


def tiny_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a Llama with this config.json has."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    products = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        for name, shape in products.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if config["attention_bias" if "attn" in name else "mlp_bias"]:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def tiny_model(directory: Path, **config_overrides: Any) -> Path:
    """Writes config.json, random model.safetensors (in `torch_dtype`) and the tokenizer; the same bits each time."""
    config = tiny_config(**config_overrides)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in tiny_shapes(config).items():
        value = torch.randn(shape, generator=generator) * 0.1
        is_norm = name.endswith("norm.weight")
        tensors[name] = (1 + value if is_norm else value).to(DTYPES[config["torch_dtype"]])
    helpers_data.write_directory(directory, eos_token="<|im_end|>")
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
