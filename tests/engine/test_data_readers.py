"""Every way a record can come in, and every way it can be wrong: the error names the place and the fix."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers_data import assistant, tokenizer, trained_text, user
from leantune import data
from leantune.errors import DataError

GOOD = {"prompt": "hello", "completion": "four"}
GOOD_LINE = json.dumps(GOOD)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(rows: Iterable[tuple[str, str]], separator: str) -> str:
    return "".join(f"{a}{separator}{b}\n" for a, b in [("prompt", "completion"), *rows])


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("a.jsonl", f"\n{GOOD_LINE}\n\n", "a.jsonl:2"),
        ("a.ndjson", GOOD_LINE, "a.ndjson:1"),
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD_LINE.encode(), "bom.jsonl:1"),
        ("windows.jsonl", GOOD_LINE + "\r\n\r\n", "windows.jsonl:1"),
        ("a.json", json.dumps([GOOD]), "a.json[0]"),
        ("A.CSV", table([("hello", "four")], ","), "A.CSV:2"),
        ("a.tsv", table([("hello", "four")], "\t"), "a.tsv:2"),
        ("bom.csv", b"\xef\xbb\xbf" + table([("hello", "four")], ",").encode(), "bom.csv:2"),
    ],
)
def test_text_formats(tmp_path: Path, name: str, content: str | bytes, source: str) -> None:
    dataset = data.chat(write(tmp_path / name, content), tokenizer())
    assert trained_text(dataset) == "four<|im_end|>"
    assert dataset[0].source == source


def test_quoted_fields_with_newlines_keep_the_line_numbers(tmp_path: Path) -> None:
    text = 'prompt,completion\n"hello,\nworld","say ""four"""\nhello,four\n'
    dataset = data.chat(write(tmp_path / "a.csv", text), tokenizer())
    assert trained_text(dataset) == 'say "four"<|im_end|>'
    assert [sample.source for sample in dataset] == ["a.csv:2", "a.csv:4"]


def test_parquet_with_nested_messages(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{**user("hello"), "name": None}, assistant("four")]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    dataset = data.chat(tmp_path / "a.parquet", tokenizer())
    assert [trained_text(dataset, i) for i in range(3)] == ["four<|im_end|>"] * 3
    assert dataset[2].source == "a.parquet:3"
    write(tmp_path / "bad.parquet", b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad.parquet: not a readable Parquet file"):
        data.chat(tmp_path / "bad.parquet", tokenizer())


def test_datasets_objects_and_iterables(tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets")
    expected = data.chat([GOOD, GOOD], tokenizer()).fingerprint
    split = hub.Dataset.from_list([GOOD, GOOD])
    assert data.chat(split, tokenizer()).fingerprint == expected
    assert data.chat(split.to_iterable_dataset(), tokenizer()).fingerprint == expected
    with pytest.raises(DataError, match=r"DatasetDict with the keys 'train'; .*data\['train'\]"):
        data.chat(hub.DatasetDict(train=split), tokenizer())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "hello",', r"not valid JSON: .* at column \d+; write one JSON object per line"),
        ("{'prompt': 1}", "not valid JSON"),
        ("[1, 2]", "a record must be an object, this is array"),
        ("null", "this is null"),
        ('"hello"', "this is string"),
        ("[" * 100_000, "not usable JSON"),
        ('{"prompt": "hello"}', "no 'completion'; the record has 'prompt'"),
        ('{"question": "hello"}', "no 'messages', nor 'prompt' and 'completion'; the record has 'question'"),
        ("{}", "the record has no keys"),
        ('{"prompt": "hello", "completion": null}', "'completion' is null"),
        ('{"prompt": "hello", "completion": 4}', "'completion' is of type int; it must be text"),
        ('{"prompt": "", "completion": "four"}', "'prompt' is empty"),
        ('{"prompt": "hello", "completion": " \\n"}', "'completion' is empty"),
        ('{"prompt": "hello", "completion": "\\ud83d"}', r"half of a surrogate pair \(U\+D83D\)"),
        ('{"prompt": "hello", "completion": "four", "system": 3}', "'system' is of type int"),
        ('{"messages": null}', "'messages' is null"),
        ('{"messages": "hello"}', "'messages' is of type str; it must be a list"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": ["hello"]}', r"messages\[0\] is of type str"),
        ('{"messages": [{"content": "hello"}]}', r"messages\[0\]: no 'role'"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]: no 'content'"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\]: 'content' is null"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', r"messages\[0\]: 'content' is of type list"),
        ('{"messages": [{"role": "user", "content": ""}]}', r"messages\[0\]: 'content' is empty"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "b"}', "'tools' is of type str"),
        ('{"messages": [{"role": "user", "content": "a", "x": {"y": "\\udc00"}}]}', "surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "train.jsonl", f"{GOOD_LINE}\n{line}\n{GOOD_LINE}\n")
    with pytest.raises(DataError, match=r"^train\.jsonl:2: ") as error:
        data.chat(path, tokenizer())
    assert error.match(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\n \n", "a.jsonl: there is no record"),
        (
            "a.jsonl",
            f"{GOOD_LINE}\n".encode() + b'{"prompt": "caf\xe9"}',
            "a.jsonl:2: byte 0xe9 at offset 15",
        ),
        ("a.jsonl", GOOD_LINE.encode("utf-16"), "a.jsonl:1: byte 0xff"),
        ("a.json", GOOD_LINE, "a.json: holds one object; write an array of objects, or rename"),
        ("a.json", "[]", "a.json: there is no record"),
        ("a.json", '[\n{"prompt": }]', "a.json:2: not valid JSON.*write an array"),
        ("a.json", "[3]", r"a.json\[0\]: a record must be an object, this is int"),
        ("a.csv", "prompt,completion\n", "a.csv: there is no record"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: the header"),
        ("a.csv", "prompt,\na,b\n", "a.csv:1: the header"),
        ("a.csv", table([("a", "b"), ("c", "d,e")], ","), "a.csv:3: 3 fields where the header has 2"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv:3: 1 fields where the header has 2"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', "a.csv:3: not valid CSV"),
        ("a.csv", table([("a", "")], ","), "a.csv:2: 'completion' is empty"),
        ("a.csv", b"prompt,completion\na,\xff\n", "a.csv:2: byte 0xff"),
        ("a.csv", "messages\nhello\n", "a.csv:2: 'messages' is of type str"),
        ("a.txt", "hello", "unknown data format '.txt'; use a file that ends in one of"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.chat(write(tmp_path / name, content), tokenizer())


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none.jsonl", "none.jsonl: the data file does not exist"),
        (tmp_path / "d.jsonl", "is a directory"),
        (GOOD, "data source is one dict with the keys 'prompt', 'completion'"),
        (7, "data source is a int"),
        (b"train.jsonl", "data source is a bytes"),
        ([GOOD, "hello"], r"records\[1\]: a record must be an object, this is string"),
        ([{"messages": [{**user("a"), "image": object()}]}], r"messages\[0\] holds a object"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            data.chat(source, tokenizer())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")  # the superuser may read everything

    path = write(tmp_path / name, GOOD_LINE)
    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(DataError, match=f"{name}: the data file cannot be read: Permission denied; check"):
        data.chat(path, tokenizer())


def test_a_column_that_fields_names_must_be_there() -> None:
    with pytest.raises(DataError, match=r"records\[0\]: no column 'question' to map; the record has 'prompt'"):
        data.chat([GOOD], tokenizer(), fields={"question": "prompt"})


def test_files_are_read_as_they_are_needed() -> None:
    taken = []

    def endless() -> Iterator[dict[str, str]]:
        for i in range(10_000):
            taken.append(i)
            yield GOOD if i < 600 else {}

    with pytest.raises(DataError, match=r"records\[600\]"):
        data.chat(endless(), tokenizer())
    assert len(taken) < 2_000
