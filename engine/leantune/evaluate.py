"""Loss of a model on a data set, the same whatever the batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from leantune.config import DEFAULT_BATCH_TOKENS
from leantune.data.batch import collate, plan_epoch
from leantune.data.dataset import Dataset
from leantune.errors import DataError
from leantune.nn import Decoder


@dataclass(frozen=True)
class EvalResult:
    """loss: mean negative log-likelihood in nats over the label tokens; perplexity: e^loss; tokens: label tokens."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(model: Decoder, data: Dataset, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> EvalResult:
    """Mean loss over all label tokens of `data`: one sum divided by one count, so batching does not show.

    batch_tokens: tokens held at a time; a single longer sample is still taken whole. Raises DataError if there is no
    label token.
    """
    check_fits(model, data)
    longest = int(data.lengths.max()) if len(data) else 0
    limit = max(batch_tokens, longest)
    plan = plan_epoch(data.lengths, batch_size=None, batch_tokens=limit, accumulation=1, shuffle=False, seed=0, epoch=0)
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for (indices,) in plan:
                batch = collate(data, indices).to(model.device)
                if batch.label_tokens:
                    packed = model.packed(batch.cu_seqlens, batch.position_ids)
                    total += float(model.loss_sum(batch.input_ids, batch.targets, packed))
                    tokens += batch.label_tokens
    finally:
        model.train(training)
    if tokens == 0:
        raise DataError("the evaluation data has no label token; nothing can be measured")
    loss = total / tokens
    return EvalResult(loss, math.exp(loss) if loss < 700 else math.inf, tokens)


def check_fits(model: Decoder, data: Dataset) -> None:
    """DataError if a sample is longer than the model's context or has an id outside its vocabulary."""
    if not len(data):
        raise DataError("the data set is empty")
    longest, limit = int(data.lengths.max()), model.config.max_position_embeddings
    if longest > limit:
        where = data[int(data.lengths.argmax())].source
        raise DataError(f"{where} has {longest} tokens, the model's context is {limit}; use max_length={limit}")
    largest = int(data.input_ids.max())
    if largest >= model.config.vocab_size:
        raise DataError(
            f"the data has token id {largest}, the model's vocabulary has {model.config.vocab_size}; "
            "encode it with this model's own tokenizer"
        )
