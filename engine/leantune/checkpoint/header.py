"""The safetensors header: 8 bytes of length (little endian), JSON, then the tensors' bytes without a gap.

A header comes from strangers, so nothing in it is believed before it is checked, and no check costs more than
the header's own size.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from leantune.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # the limit of PyTorch
LENGTH_BYTES = 8

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `begin` and `end` are byte offsets from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json_object(raw: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no NaN.

    Raises:
        CheckpointError: `raw` is none; the message starts with `source`.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise CheckpointError(f"{source}: JSON nested too deeply; the file is damaged") from None
    except ValueError as error:
        raise CheckpointError(f"{source}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read and strictly parse a JSON file; CheckpointError names it when it is missing or damaged."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_HEADER_BYTES:,} bytes of JSON; the file is damaged")
    return parse_json_object(raw, str(path))


def parse_header(data: torch.Tensor, source: str) -> dict[str, TensorEntry]:
    """Check the header of a safetensors file and return where its tensors lie.

    Args:
        data: uint8 [file size], the whole file.
        source: the file's name, for the errors.
    Raises:
        CheckpointError: names the file, the tensor and what is wrong with it.
    """
    file_size = data.numel()
    if file_size < LENGTH_BYTES:
        raise CheckpointError(f"{source}: {file_size} bytes are no safetensors file; get it again")
    header_bytes = int.from_bytes(data[:LENGTH_BYTES].numpy().tobytes(), "little")
    start = LENGTH_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{source}: the header claims {header_bytes:,} bytes, the limit is {MAX_HEADER_BYTES:,}; "
            "this is no safetensors file, or it is damaged"
        )
    if start > file_size:
        raise CheckpointError(
            f"{source}: truncated; the header claims {header_bytes:,} bytes, the file has {file_size:,}"
        )
    header = parse_json_object(data[LENGTH_BYTES:start].numpy().tobytes(), f"{source}: header")
    _check_metadata(header.pop("__metadata__", {}), source)
    entries = {name: _parse_entry(value, start, f"{source}: {name!r}") for name, value in header.items()}
    _check_layout(entries, start, file_size, source)
    return entries


def build_header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Header of a file that holds the tensors (name, dtype, shape) in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in entries:
        end = begin + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    return struct.pack("<Q", len(text)) + text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_metadata(metadata: object, source: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{source}: '__metadata__' must map strings to strings; the header is damaged")


def _parse_entry(value: object, start: int, source: str) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{source}: expected exactly dtype, shape and data_offsets; the header is damaged")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{source}: unknown dtype {value['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{source}: shape {_short(shape)} is no list of sizes; the header is damaged")
    # Counting a 0 as 1 keeps the strides in range, too: they are products that skip a dimension.
    if prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{source}: shape {_short(shape)} overflows; the header is damaged")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{source}: data_offsets {_short(offsets)} are no range; the header is damaged")
    begin, end = offsets
    nbytes = prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{source}: {end - begin} bytes for shape {list(shape)} of {value['dtype']}, which needs {nbytes}"
        )
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_layout(entries: dict[str, TensorEntry], start: int, file_size: int, source: str) -> None:
    """The tensors must cover the rest of the file once: no overlap, no hole, nothing beyond the end."""
    position, previous = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps with" if entry.begin < position else "leaves a hole after"
            raise CheckpointError(f"{source}: {name!r} {kind} {previous}; the header is damaged")
        if entry.end > file_size:
            raise CheckpointError(
                f"{source}: truncated; {name!r} ends at byte {entry.end:,}, the file has {file_size:,}; get it again"
            )
        position, previous = entry.end, repr(name)
    if position != file_size:
        raise CheckpointError(f"{source}: {file_size - position:,} bytes after the last tensor; get it again")
