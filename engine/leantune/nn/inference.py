"""The decoder one step at a time, with a cache of keys and values: for generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from leantune.nn.batch import Packed
from leantune.nn.decoder import Decoder, Layer


class Cache:
    """Keys and values of one sequence, [layers][2, Hk, capacity, D]; `length` tokens of it are filled."""

    def __init__(self, model: Decoder, capacity: int) -> None:
        c = model.config
        shape = (2, c.num_key_value_heads, capacity, c.head_dim)
        self.layers = [
            torch.empty(shape, dtype=model.compute_dtype, device=model.device) for _ in range(c.num_hidden_layers)
        ]
        self.capacity, self.length = capacity, 0


@torch.no_grad()
def advance(model: Decoder, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Feeds ids [n] after those in the cache and returns the logits [vocab_size] after the last of them.

    n is free for an empty cache (the prompt) and 1 after that. Raises ValueError if the cache is full.
    """
    n, begin = input_ids.shape[0], cache.length
    if begin + n > cache.capacity:
        raise ValueError(f"{begin + n} tokens exceed the cache's capacity={cache.capacity}")
    if begin and n != 1:
        raise ValueError(f"{n} ids after a filled cache; feed them one at a time")
    positions = torch.arange(begin, begin + n, device=input_ids.device)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32, device=input_ids.device)
    batch = model.packed(cu_seqlens, positions, length=begin + n)
    x = F.embedding(input_ids, model.model.embed_tokens.weight).to(model.compute_dtype)
    for layer, kept in zip(model.model.layers, cache.layers, strict=True):
        assert isinstance(layer, Layer)
        x = _mlp(layer, _attend(layer, x, kept, begin, batch), batch)
    cache.length += n
    return model.head(x[-1:])[0]


def _attend(layer: Layer, x: torch.Tensor, kept: torch.Tensor, begin: int, batch: Packed) -> torch.Tensor:
    block, n = layer.attention_block, x.shape[0]
    _, qkv, _ = block.project(x, batch)
    q, k, v = block.split(qkv.tensor)
    kept[0, :, begin : begin + n] = k.transpose(0, 1)
    kept[1, :, begin : begin + n] = v.transpose(0, 1)
    keys, values = kept[:, None, :, : begin + n]
    o = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, is_causal=n > 1, scale=block.scale, enable_gqa=True
    )
    return block.o.forward(o[0].transpose(0, 1).reshape(n, -1), torch.empty_like(x), batch, residual=x)


def _mlp(layer: Layer, x: torch.Tensor, batch: Packed) -> torch.Tensor:
    block = layer.mlp_block
    _, gate_up, _ = block.expand(x, batch)
    a = block.gated(gate_up.tensor, x.new_empty(x.shape[0], block.width))
    return block.down.forward(a, torch.empty_like(x), batch, residual=x)
