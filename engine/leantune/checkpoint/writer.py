"""Writes safetensors files by hand, so that a checkpoint is streamed: one tensor in memory at a time."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from leantune.checkpoint.atomic import atomic_file
from leantune.checkpoint.header import DTYPE_NAMES, build_header
from leantune.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from leantune.errors import CheckpointError

METADATA = {"format": "pt"}  # transformers refuses files without it
DEFAULT_SHARD_BYTES = 5 * 10**9


class PendingTensor(NamedTuple):
    """A tensor that is made when its turn comes to be written, and dropped after."""

    name: str
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Write tensors to one safetensors file, atomically.

    Tensors of any device and stride are written contiguous; two that share memory are written twice.

    Raises:
        CheckpointError: a name is given twice, a tensor has no data or a dtype the format lacks, or the file
            cannot be written; an existing file is then as it was.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    pending = [
        PendingTensor(name, tensor.numel() * tensor.element_size(), tuple(tensor.shape), tensor.dtype, _as(tensor))
        for name, tensor in pairs
    ]
    _check_pending(pending, str(path))
    _write_file(Path(path), pending, metadata)


def save_sharded(
    directory: str | os.PathLike[str],
    tensors: Iterable[PendingTensor | tuple[str, int, Sequence[int], torch.dtype, Callable[[], torch.Tensor]]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Write a checkpoint under Hugging Face's names, with one tensor in memory at a time.

    One file, `model.safetensors`, when the tensors fit; else `model-00001-of-0000N.safetensors` and so on,
    with an index. Each file is atomic; wrap the call in `atomic_directory` to make the whole checkpoint so.

    Args:
        directory: made if missing; must not hold model weights yet.
        tensors: (name, nbytes, shape, dtype, load); `load()` is called once, when the tensor is written.
        max_shard_bytes: limit of the tensors in a file, in bytes; a larger tensor gets its own file.
    Returns:
        The files written, the index last.
    Raises:
        CheckpointError: as for `save_tensors`, or `load()` gave another shape or dtype than was announced.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    folder = Path(directory)
    pending = [PendingTensor(item[0], item[1], tuple(item[2]), item[3], item[4]) for item in tensors]
    _check_pending(pending, str(folder))
    present = sorted(folder.glob("model*.safetensors*"))
    if present:
        raise CheckpointError(f"{folder} already holds {present[0].name}; choose an empty directory")
    shards = _split(pending, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_NAME, shards[0], METADATA)
        return [folder / SINGLE_NAME]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, METADATA)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in pending)}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)
    return [folder / name for name in dict.fromkeys(weight_map.values())] + [folder / INDEX_NAME]


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, atomically; a value that JSON cannot hold (NaN included) is a CheckpointError."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    with atomic_file(path) as file:
        file.write(text.encode("utf-8") + b"\n")


def _as(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _check_pending(pending: Sequence[PendingTensor], target: str) -> None:
    seen: set[str] = set()
    for name, nbytes, shape, dtype, _ in pending:
        if name in seen or name == "__metadata__":
            why = "is given twice" if name in seen else "is reserved by the format"
            raise CheckpointError(f"cannot write {target}: the tensor name {name!r} {why}")
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"cannot write {target}: {name!r} is {dtype}, which safetensors cannot hold")
        if nbytes != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"cannot write {target}: {name!r} announces {nbytes} bytes; {list(shape)} of {dtype} needs "
                f"{prod(shape) * dtype.itemsize}"
            )
        seen.add(name)


def _split(pending: Sequence[PendingTensor], limit: int) -> list[list[PendingTensor]]:
    """Fill the shards in order; at least one, perhaps empty."""
    shards: list[list[PendingTensor]] = [[]]
    used = 0
    for tensor in pending:
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def _write_file(path: Path, pending: Sequence[PendingTensor], metadata: Mapping[str, str]) -> None:
    # Widest elements first: the format allows no gaps, and so every tensor is aligned to its element size.
    ordered = sorted(pending, key=lambda tensor: -tensor.dtype.itemsize)
    header = build_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered], metadata)
    with atomic_file(path, nbytes=len(header) + sum(tensor.nbytes for tensor in ordered)) as file:
        file.write(header)
        for tensor in ordered:
            _write_tensor(file, tensor, path)


def _write_tensor(file: BinaryIO, pending: PendingTensor, path: Path) -> None:
    tensor = pending.load()
    if tuple(tensor.shape) != pending.shape or tensor.dtype != pending.dtype:
        raise CheckpointError(
            f"cannot write {path}: {pending.name!r} was announced as {list(pending.shape)} {pending.dtype}, "
            f"but is {list(tensor.shape)} {tensor.dtype}"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise CheckpointError(
            f"cannot write {path}: {pending.name!r} is a {tensor.layout} tensor on {tensor.device}; "
            "load or densify it first"
        )
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
