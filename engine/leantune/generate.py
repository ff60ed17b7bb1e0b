"""Text from a model: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from leantune.checkpoint.header import read_json_object
from leantune.errors import ConfigError, DataError
from leantune.nn.inference import Cache, advance

if TYPE_CHECKING:
    from leantune.model import Model


def generate(
    model: Model,
    prompt: str | Sequence[Mapping[str, str]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's continuation of `prompt`, until an end token or `max_new_tokens`.

    prompt: text to go on with, or chat messages [{"role": ..., "content": ...}], which the checkpoint's template
    renders. temperature: 0 takes the likeliest token each time. top_k: only the k likeliest (0: all). top_p: only the
    likeliest whose probabilities reach p together. on_text: receives each new piece of text as it comes.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: needed are >= 0, >= 0 and in (0, 1]"
        )
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise DataError("the prompt is empty; give some text")
    limit = model.config.max_position_embeddings
    if len(ids) >= limit:
        raise DataError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; shorten it")
    ends = end_tokens(model)
    capacity = min(len(ids) + max_new_tokens, limit)
    cache = Cache(model, capacity)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    was_training = model.training
    model.eval()
    produced: list[int] = []
    shown = ""
    try:
        logits = advance(model, torch.tensor(ids, device=model.device), cache)
        while True:
            token = choose(logits.float().cpu(), temperature, top_k, top_p, generator)
            if token in ends:
                break
            produced.append(token)
            if on_text is not None:
                text = tokenizer.decode(produced)
                if not text.endswith("\ufffd"):  # the bytes of a character may be spread over tokens
                    on_text(text[len(shown) :])
                    shown = text
            if len(produced) == max_new_tokens or cache.length == capacity:
                break
            logits = advance(model, torch.tensor([token], device=model.device), cache)
    finally:
        model.train(was_training)
    text = tokenizer.decode(produced)
    if on_text is not None and len(text) > len(shown):
        on_text(text[len(shown) :])
    return text


def end_tokens(model: Model) -> set[int]:
    """Ids that end a text: the tokenizer's, the config's and generation_config.json's."""
    found = {model.tokenizer.eos_token_id}
    sources = [model.config.raw]
    if (model.directory / "generation_config.json").is_file():
        sources.append(read_json_object(model.directory / "generation_config.json"))
    for source in sources:
        given = source.get("eos_token_id")
        found |= set(given) if isinstance(given, list) else {given}
    return {i for i in found if isinstance(i, int)}


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits [vocab_size]."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.numel())).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        beyond = ranked.cumsum(0) - ranked >= top_p  # the first token always stays
        probabilities = probabilities.clone()
        probabilities[order[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
