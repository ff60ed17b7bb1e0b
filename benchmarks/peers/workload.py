"""What all peers of a benchmark run share: tokenised samples, batches, arguments and the report."""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

WINDOW_STEPS = 64  # samples are sorted by length within this many steps, as length-grouped samplers do


@dataclass(frozen=True)
class Workload:
    """Tokenised samples, one after the other, and the sample numbers of every step in two orders.

    `given`: the shuffled data as it comes. `alike`: batches of like length. Both are [steps, sequences].
    """

    input_ids: np.ndarray  # int32 [tokens]
    label_mask: np.ndarray  # bool [tokens], True where the token is a target
    offsets: np.ndarray  # int64 [samples + 1]
    given: np.ndarray
    alike: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "Workload":
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})

    def write(self, path: Path) -> None:
        np.savez(path, **{name: np.asarray(value) for name, value in vars(self).items()})

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32 [n], label_mask bool [n]) of one sample."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[span], self.label_mask[span]

    def batch(self, indices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.sample(int(index)) for index in indices]


def plan(lengths: np.ndarray, *, steps: int, sequences: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps of both orders, drawn from one shuffled window of samples.

    `alike` sorts the window by length and takes every k-th batch of it, shortest and longest included in
    proportion, so that a few steps stand for the whole window.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    window = rng.permutation(len(lengths))[: max(steps, WINDOW_STEPS) * sequences]
    batches = len(window) // sequences
    if batches < steps:
        raise SystemExit(f"--steps {steps} x --sequences {sequences} needs more than the {len(lengths)} samples")
    window = window[: batches * sequences]
    given = window.reshape(batches, sequences)[:steps]
    alike = window[np.argsort(lengths[window], kind="stable")].reshape(batches, sequences)
    picked = (np.arange(steps) * 2 + 1) * batches // (2 * steps)  # the middle of each of `steps` equal parts
    return given, alike[rng.permutation(picked)]


@dataclass
class Report:
    """What a peer prints, as one JSON line at the end: lists have one entry a step, the first a warm-up."""

    peer: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    label_tokens: list[int] = field(default_factory=list)
    engine_seconds: list[float] = field(default_factory=list)  # of the dense products: the engine's steps between
    peak_bytes: int = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - start)

    def count(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Counts real tokens, no padding, and label tokens; nothing predicts a first token."""
        self.tokens.append(sum(len(ids) for ids, _ in batch))
        self.label_tokens.append(sum(int(mask[1:].sum()) for _, mask in batch))

    def print(self) -> None:
        """Adds the peak resident memory of this process (Linux counts it in KiB) and prints the line."""
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(asdict(self)), flush=True)


def peer_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that every peer takes; `bench_train.py` fills them in."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--peer", required=True, help="name under which the result is reported")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--adapter", type=Path, required=True, help="initial adapter, PEFT layout")
    parser.add_argument("--workload", type=Path, required=True, help=".npz file of tokenised samples and steps")
    parser.add_argument("--order", choices=("given", "alike"), default="given", help="which batches")
    parser.add_argument("--lr", type=float, required=True, help="learning rate, constant")
    parser.add_argument("--threads", type=int, required=True, help="compute threads")
    return parser
