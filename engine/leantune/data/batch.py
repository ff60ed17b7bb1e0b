"""Samples packed into batches without padding, and the order in which an epoch takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from leantune.data.dataset import Sample
from leantune.errors import ConfigError, DataError

IGNORED = -100  # a target that carries no loss, as in torch.nn.functional.cross_entropy

MicroBatch = list[int]  # sample numbers
Step = list[MicroBatch]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences end to end; T is the number of tokens of all of them.

    input_ids: int64 [T].
    targets: int64 [T]; the id to predict after each token, -100 where there is none to learn. The last token
    of a sequence has none, so no target crosses into the next sequence.
    position_ids: int64 [T], from 0 in each sequence.
    cu_seqlens: int32 [sequences + 1], where each sequence starts, then T.
    indices: sample numbers, in the order packed.
    label_tokens: how many targets are not -100.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    indices: list[int]
    label_tokens: int

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "PackedBatch":
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
        )


def collate(samples: Sequence[Sample], indices: Sequence[int]) -> PackedBatch:
    """Pack samples[i] for each i in indices, in that order.

    Raises DataError for no indices.
    """
    if not len(indices):
        raise DataError("indices is empty; a batch needs at least one sample")
    chosen = [samples[i] for i in indices]
    lengths = np.array([len(sample) for sample in chosen])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([sample.input_ids for sample in chosen]).astype(np.int64)
    mask = np.concatenate([sample.label_mask for sample in chosen])
    mask[starts[:-1]] = False  # else a first token would be the target of the sequence before it
    targets = np.full(len(ids), IGNORED, dtype=np.int64)
    targets[:-1][mask[1:]] = ids[1:][mask[1:]]
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(starts[:-1], lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        indices=[int(i) for i in indices],
        label_tokens=int(mask.sum()),
    )


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int | None,
    batch_tokens: int | None,
    accumulation: int,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> list[Step]:
    """The steps of an epoch, each a list of micro-batches, each a list of sample numbers.

    lengths: tokens of each sample. batch_size: sequences a micro-batch may have; batch_tokens: tokens it may
    have; one or both. accumulation: micro-batches in a step; the last step of the epoch may have fewer.
    The order is a permutation drawn from (seed, epoch) alone, so a run resumes at any step from its number.

    Raises ConfigError for a setting, DataError for a sample longer than batch_tokens.
    """
    _check_plan(batch_size, batch_tokens, accumulation, seed, epoch)
    longest = int(np.argmax(lengths)) if len(lengths) else 0
    if batch_tokens is not None and len(lengths) and lengths[longest] > batch_tokens:
        raise DataError(
            f"sample {longest} has {lengths[longest]} tokens and batch_tokens={batch_tokens}; "
            "raise batch_tokens or lower max_length"
        )
    order = np.arange(len(lengths))
    if shuffle:
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(lengths))
    batches = list(_fill(order.tolist(), lengths, batch_size, batch_tokens))
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]


def _fill(
    order: list[int], lengths: Sequence[int] | np.ndarray, batch_size: int | None, batch_tokens: int | None
) -> Iterator[MicroBatch]:
    batch: MicroBatch = []
    tokens = 0
    for index in order:
        length = int(lengths[index])
        full = batch_size is not None and len(batch) == batch_size
        if batch and (full or (batch_tokens is not None and tokens + length > batch_tokens)):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


def _check_plan(batch_size: int | None, batch_tokens: int | None, accumulation: int, seed: int, epoch: int) -> None:
    if batch_size is None and batch_tokens is None:
        raise ConfigError("neither batch_size nor batch_tokens is given; set at least one")
    for name, value in (
        ("batch_size", batch_size),
        ("batch_tokens", batch_tokens),
        ("accumulation", accumulation),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not positive; use 1 or more")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ConfigError(f"{name}={value} is negative; use 0 or more")
