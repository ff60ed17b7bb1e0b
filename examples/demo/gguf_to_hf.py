"""Turns a Llama-architecture GGUF file into a Hugging Face checkpoint directory.

Writes fp32 safetensors, config and tokenizer. Needs `gguf` (reading, dequantising), `safetensors` and
`tokenizers`, not `transformers`.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

CONTROL_TOKEN = 3  # GGUF token type of <|im_start|> and its like


def convert(gguf_path: Path, out: Path) -> None:
    """Writes all of `FILES` into the existing directory `out`; ValueError for a model it cannot represent."""
    reader = GGUFReader(str(gguf_path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama":
        found = metadata.get("general.architecture")
        raise ValueError(f"{gguf_path}: general.architecture={found!r}; only 'llama' is converted here")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = model_config(metadata, tied=tied)

    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", _token_ids(metadata))
    _write_json(out / "tokenizer_config.json", tokenizer_config(metadata))
    (out / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")
    build_tokenizer(metadata).save(str(out / "tokenizer.json"))

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if ".attn_q." in tensor.name:
            values = undo_rope_permutation(values, heads)
        elif ".attn_k." in tensor.name:
            values = undo_rope_permutation(values, kv_heads)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(values)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; ValueError for an unknown tensor."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, kind = name.partition(".")
    if stem in TOP_NAMES and kind == "weight":
        return f"{TOP_NAMES[stem]}.{kind}"
    raise ValueError(f"tensor {name!r} is not part of a Llama model this converter knows")


def undo_rope_permutation(values: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of every head in the rows of q and k; this parts them again.

    `values` is [heads * head_dim, in] or [heads * head_dim]; the result has the same shape.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def model_config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The `config.json` of a LlamaForCausalLM with the sizes of the GGUF metadata."""

    def llama(key: str) -> Any:
        return metadata[f"llama.{key}"]

    heads = llama("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.rope.dimension_count", llama("embedding_length") // heads),
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": _shortest(llama("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "torch_dtype": "float32",
        **_token_ids(metadata),
    }


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as SmolLM trained it: every digit alone, no added space, no start token."""
    kind = (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer.ggml.model, .pre = {kind}; only ('gpt2', 'smollm') is converted here")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: the special tokens, and the class that reads `tokenizer.json` as it is."""
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{long}_token_id"]]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{long}_token_id" in metadata
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        **special,
    }


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {name: f"tokenizer.ggml.{short}_token_id" for name, short in names.items()}
    return {name: int(metadata[key]) for name, key in keys.items() if key in metadata}


def _shortest(value: float) -> float:
    """The shortest decimal of the same fp32 value: GGUF's 1e-5 would otherwise print as 9.999999747e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
