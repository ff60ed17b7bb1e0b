"""Where records come from: files read line by line, lists, and any iterable of dicts.

Every reader yields `(number, record)`; `Records.at(number)` turns the number into the place that an
error message names, such as `train.jsonl:17`.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.errors import DataError

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
Record = Mapping[str, Any]
Numbered = Iterator[tuple[int, Record]]


@dataclass(slots=True)
class Records:
    """A stream of records that can say where each came from.

    name: what errors call the source. by_line: the numbers are lines (or rows) from 1, else items from 0.
    """

    name: str
    by_line: bool
    stream: Numbered

    def at(self, number: int) -> str:
        return place(self.name, self.by_line, number)


def place(name: str, by_line: bool, number: int) -> str:
    """Where a record came from, as errors say it: "train.jsonl:17", or "records[17]" without lines."""
    return f"{name}:{number}" if by_line else f"{name}[{number}]"


def open_records(source: Source) -> Records:
    """Stream the records of a file (.jsonl, .json, .csv, .tsv, .parquet) or of an iterable of dicts.

    Raises DataError, at once for a source that cannot be read at all and while streaming for a bad record.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source))
    if isinstance(source, Mapping):
        raise DataError(
            f"data source is one {type(source).__name__} with the keys {_names(source)}; "
            "pass a list of records, or one split of it such as data['train']"
        )
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise DataError(
            f"data source is a {type(source).__name__}; pass a file path, a list of dicts, or another iterable of dicts"
        )
    return Records("records", False, _items("records", source))


def _open_file(path: Path) -> Records:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise DataError(f"{path}: unknown data format '{suffix}'; use a file that ends in one of {known}")
    with _readable(path):
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise DataError(f"{path}: the data file {what}; pass the path of one file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; write at least one record")
        path.open("rb").close()  # so that a file without read permission is refused at once
    reader = _READERS[suffix]
    return Records(path.name, suffix != ".json", reader(path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: the data file cannot be read: {error.strerror}; check path and permissions"
        ) from error


def _items(name: str, values: Iterable[Any]) -> Numbered:
    for number, value in enumerate(values):
        yield number, _object(value, place(name, False, number))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that only \\n ends a line and a bad byte has a line."""
    with _readable(path), path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path.name}:{number}: byte 0x{raw[error.start]:02x} at offset {error.start} of the "
                    "line is not UTF-8; save the file as UTF-8"
                ) from error


def _jsonl(path: Path) -> Numbered:
    for number, line in _lines(path):
        if not line.isspace():  # a blank line, most often the last one, holds no record
            yield number, _object(_parse(line.rstrip(), path, number), f"{path.name}:{number}")


def _json_array(path: Path) -> Numbered:
    """One array of objects. Unlike the other formats it is parsed whole; JSONL is the streaming form."""
    value = _parse("".join(line for _, line in _lines(path)), path, 1)
    if not isinstance(value, list):
        raise DataError(
            f"{path.name}: holds one {_kind(value)}; write an array of objects, "
            "or rename a file with one object a line to .jsonl"
        )
    yield from _items(path.name, value)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path.name}:{line}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}; "
            f"{_json_fix(path)}"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nesting without end
        raise DataError(f"{path.name}:{first_line}: not usable JSON: {error}; {_json_fix(path)}") from error


def _json_fix(path: Path) -> str:
    return "write an array of objects" if path.suffix.lower() == ".json" else "write one JSON object per line"


def _csv(path: Path) -> Numbered:
    """Rows as dicts keyed by the header; a row is numbered by the line it starts on."""
    rows = csv.reader(
        (line for _, line in _lines(path)),
        dialect="excel-tab" if path.suffix.lower() == ".tsv" else "excel",
        strict=True,
    )
    header: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(
                f"{path.name}:{start}: not valid CSV: {error}; close every quote, "
                "and double the quotes inside a quoted field"
            ) from error
        if row is None:
            return
        if header is None:
            header = _header(row, path)
        elif row:
            if len(row) != len(header):
                raise DataError(
                    f"{path.name}:{start}: {len(row)} fields where the header has {len(header)} "
                    f"({_names(header)}); quote fields that hold the separator"
                )
            yield start, dict(zip(header, row, strict=True))
        start = rows.line_num + 1


def _header(row: list[str], path: Path) -> list[str]:
    if len(set(row)) != len(row) or not all(name.strip() for name in row):
        raise DataError(
            f"{path.name}:1: the header ({_names(row)}) has an empty or repeated name; "
            "the first line must name each column once"
        )
    return row


def _parquet(path: Path) -> Numbered:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path.name}: reading Parquet needs pyarrow; pip install 'leantune[data]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (ArrowException, OSError) as error:
        raise DataError(f"{path.name}: not a readable Parquet file after row {number}: {error}") from error


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, Mapping):
        raise DataError(f'{where}: a record must be an object, this is {_kind(value)}; write {{"key": ...}}')
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(repr(key) for key in keys)


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_array,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
