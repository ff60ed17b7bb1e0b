"""Encoded samples, held as a few flat arrays however many samples there are."""

import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from leantune.data.readers import place
from leantune.data.tokenizer import Tokenizer

RoleRun = tuple[str, int, int]  # (role, start, end) in tokens


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One encoded sequence.

    input_ids: int32 [n].
    label_mask: bool [n]; True where the token is a target. Never True at 0, which nothing predicts.
    roles: runs that cover the sequence; "template" is markup, the others are the roles of the data.
    source: where the record came from, such as "train.jsonl:17".
    truncated: whether the end was cut off at max_length.
    """

    input_ids: np.ndarray
    label_mask: np.ndarray
    roles: list[RoleRun]
    source: str
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class DataStats:
    """What a data set holds and what was left out of it.

    samples, tokens, label_tokens: counts over the samples kept.
    truncated: samples kept but cut at max_length.
    dropped: samples left out; unlabelled of them because the cut took their last label token.
    """

    samples: int
    tokens: int
    label_tokens: int
    truncated: int
    dropped: int
    unlabelled: int


@dataclass(slots=True)
class Draft:
    """One sample before it is stored: ids int32 [n], mask bool [n], role codes uint8 [n]."""

    ids: np.ndarray
    mask: np.ndarray
    roles: np.ndarray
    number: int
    truncated: bool


@dataclass(eq=False, repr=False)
class Dataset(Sequence[Sample]):
    """A sequence of samples. `dataset[i]` makes a view, so keep indices rather than samples.

    lengths: int64 [samples], tokens of each sample.
    fingerprint: SHA-256 over tokens and masks, the same for the same training data.
    dated: the chat template asks for today's date, so the same records may have another fingerprint tomorrow.
    """

    tokenizer: Tokenizer
    stats: DataStats
    input_ids: np.ndarray  # int32 [tokens]
    label_mask: np.ndarray  # bool [tokens]
    offsets: np.ndarray  # int64 [samples + 1], where each sample starts
    role_names: list[str]
    role_codes: np.ndarray  # uint8 [runs]
    role_starts: np.ndarray  # int64 [runs], first token of each run; no run crosses a sample
    numbers: np.ndarray  # int64 [samples], line or item in the source
    truncated: np.ndarray  # bool [samples]
    source_name: str
    by_line: bool
    dated: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        s = self.stats
        return f"Dataset({self.source_name!r}: {s.samples} samples, {s.tokens} tokens, {s.label_tokens} targets)"

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        start, end = self.offsets[index], self.offsets[index + 1]
        return Sample(
            input_ids=self.input_ids[start:end],
            label_mask=self.label_mask[start:end],
            roles=self._roles(start, end),
            source=place(self.source_name, self.by_line, int(self.numbers[index])),
            truncated=bool(self.truncated[index]),
        )

    def _roles(self, start: int, end: int) -> list[RoleRun]:
        first, last = np.searchsorted(self.role_starts, [start, end])
        edges = [*(self.role_starts[first:last] - start).tolist(), int(end - start)]
        names = [self.role_names[code] for code in self.role_codes[first:last]]
        return [(name, edges[i], edges[i + 1]) for i, name in enumerate(names)]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array, kind in ((self.offsets, "<i8"), (self.input_ids, "<i4"), (self.label_mask, "u1")):
            digest.update(array.astype(kind).tobytes())
        return digest.hexdigest()


def assemble(
    drafts: list[Draft],
    tokenizer: Tokenizer,
    role_names: list[str],
    source: tuple[str, bool],
    unlabelled: int,
    dropped: int,
    dated: bool = False,
) -> Dataset:
    """Join drafts (at least one) into a Dataset; source is its name and whether it counts lines."""
    ids = np.concatenate([d.ids for d in drafts])
    mask = np.concatenate([d.mask for d in drafts])
    roles = np.concatenate([d.roles for d in drafts])
    offsets = np.concatenate([[0], np.cumsum([len(d.ids) for d in drafts])]).astype(np.int64)
    begins = np.ones(len(roles), dtype=bool)
    begins[1:] = roles[1:] != roles[:-1]
    begins[offsets[:-1]] = True
    starts = np.flatnonzero(begins)
    truncated = np.array([d.truncated for d in drafts])
    stats = DataStats(
        samples=len(drafts),
        tokens=len(ids),
        label_tokens=int(mask.sum()),
        truncated=int(truncated.sum()),
        dropped=dropped,
        unlabelled=unlabelled,
    )
    return Dataset(
        tokenizer=tokenizer,
        stats=stats,
        input_ids=ids,
        label_mask=mask,
        offsets=offsets,
        role_names=role_names,
        role_codes=roles[starts],
        role_starts=starts,
        numbers=np.array([d.number for d in drafts], dtype=np.int64),
        truncated=truncated,
        source_name=source[0],
        by_line=source[1],
        dated=dated,
    )
