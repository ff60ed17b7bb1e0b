"""The state of a training run: tensors in safetensors, the rest in JSON, never a pickle.

A run directory holds `checkpoint-<step>/` directories, each written atomically.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from leantune.checkpoint.atomic import atomic_directory, leftovers, remove_directory
from leantune.checkpoint.header import read_json_object
from leantune.checkpoint.reader import CheckpointReader
from leantune.checkpoint.writer import save_tensors, write_json
from leantune.errors import CheckpointError

logger = logging.getLogger("leantune")

TENSORS_NAME = "training_state.safetensors"
META_NAME = "training_state.json"
FORMAT = "leantune-training-state"
VERSION = 1
_DIRECTORY = re.compile(r"checkpoint-(\d+)")
_BLOCK_BYTES = 1 << 20


def save_state(directory: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write a training state atomically; an earlier state of the same name is replaced.

    Args:
        directory: usually `<run>/checkpoint-<step>`.
        tensors: parameters, optimizer state, generator state.
        meta: anything that JSON gives back unchanged (no tuples, no NaN, string keys only).
    Raises:
        CheckpointError: `meta` does not survive JSON, or the directory cannot be written.
    """
    folder = Path(directory)
    _check_meta(meta, folder)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_directory(folder, overwrite=True, nbytes=nbytes) as temporary:
        save_tensors(temporary / TENSORS_NAME, tensors)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "bytes": (temporary / TENSORS_NAME).stat().st_size,
            "sha256": file_sha256(temporary / TENSORS_NAME),
            "meta": dict(meta),
        }
        write_json(temporary / META_NAME, record)


def load_state(directory: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a training state back, after checking the tensors' checksum.

    Returns:
        (tensors, meta) as given to `save_state`; the tensors are on the CPU, memory-mapped.
    Raises:
        CheckpointError: a file is missing, damaged or not of this format; the message names it.
    """
    folder = Path(directory).expanduser()
    record = _read_record(folder)
    path = folder / TENSORS_NAME
    if file_sha256(path) != record["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {META_NAME}; delete {folder} to go on from "
            "the checkpoint before"
        )
    reader = CheckpointReader(path)
    return {name: reader.get(name) for name in reader.names()}, record["meta"]


def latest_state(run: str | os.PathLike[str]) -> Path | None:
    """The complete `checkpoint-<step>` of the highest step in `run`, or None.

    Incomplete ones and what a killed process left behind are skipped, each with a warning that names it.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        return None
    for leftover in leftovers(folder):
        logger.warning("ignored %s, left behind by a killed run; the next save removes it", leftover)
    states = _complete_states(folder)
    return states[-1] if states else None


def prune(run: str | os.PathLike[str], keep: int) -> list[Path]:
    """Delete all complete checkpoints of `run` but the newest `keep`; returns the deleted, oldest first."""
    if keep < 1:
        raise CheckpointError(f"keep={keep} would delete every checkpoint; use keep >= 1")
    doomed = _complete_states(Path(run).expanduser())[:-keep]
    for path in doomed:
        remove_directory(path)
    return doomed


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; the file is streamed."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _check_meta(meta: Mapping[str, Any], folder: Path) -> None:
    try:
        returned = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write {folder}: meta does not fit into JSON: {error}") from error
    for key, value in meta.items():
        if returned.get(key) != value:
            raise CheckpointError(
                f"cannot write {folder}: JSON would change meta[{key!r}]; use lists for tuples and strings for keys"
            )


def _read_record(folder: Path) -> dict[str, Any]:
    """The JSON part, checked as far as that is cheap: fields, and presence and size of the tensors' file."""
    path = folder / META_NAME
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint directory {folder} does not exist")
    record = read_json_object(path)
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format {record.get('format')!r} version {record.get('version')!r} is not read; this "
            f"release reads {FORMAT!r} version {VERSION}"
        )
    kinds = {"bytes": int, "sha256": str, "meta": dict}
    wrong = [key for key, kind in kinds.items() if type(record.get(key)) is not kind]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]!r} is missing or of the wrong type; the file is damaged")
    tensors = folder / TENSORS_NAME
    size = tensors.stat().st_size if tensors.is_file() else None
    if size != record["bytes"]:
        found = "missing" if size is None else f"{size:,} bytes long"
        raise CheckpointError(f"{tensors} is {found}, {META_NAME} says {record['bytes']:,} bytes; it is damaged")
    return record


def _complete_states(run: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    found: list[tuple[int, Path]] = []
    for path in run.iterdir():
        match = _DIRECTORY.fullmatch(path.name)
        if match is None:
            continue
        try:
            _read_record(path)
        except CheckpointError as error:
            logger.warning("ignored %s: %s", path, error)
            continue
        found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]
