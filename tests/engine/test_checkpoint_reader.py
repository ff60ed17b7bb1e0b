"""The reader against well-formed, damaged and hostile files."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from leantune.checkpoint.header import DTYPES, MAX_HEADER_BYTES
from leantune.checkpoint.reader import CheckpointReader
from leantune.errors import CheckpointError

TENSORS = {
    "model.norm.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "lm_head.weight": torch.arange(8, dtype=torch.bfloat16).view(2, 2, 2),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def write_header(path: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    return write_raw(path, json.dumps(header).encode(), data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shards(directory: Path, **edits: Any) -> Path:
    """Two shards, a and b with one tensor each, and an index."""
    save_file({"a": torch.ones(2)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, directory / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"} | edits
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        reader = CheckpointReader(path)
        assert reader.names() == sorted(TENSORS)
        assert "scalar" in reader and "nothing" not in reader
        for name, tensor in TENSORS.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
            assert reader.get(name).dtype == tensor.dtype and torch.equal(reader.get(name), tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    got = CheckpointReader(tmp_path).get("t")
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_tensors_are_private_maps_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"big": torch.ones(16 * 2**20), "other": torch.ones(3)}, path)
    anonymous = _status_kib("RssAnon")
    reader = CheckpointReader(path)
    big, other = reader.get("big"), reader.get("other")
    assert float(big.sum()) == 16 * 2**20
    assert _status_kib("RssAnon") - anonymous < 8 * 1024, "64 MiB were copied"
    assert big.untyped_storage().nbytes() == 64 * 2**20, "a tensor must not drag the whole file along"
    assert big.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    big[0] = 7  # private: the file must not change
    assert float(CheckpointReader(path).get("big")[0]) == 1
    del reader, other
    path.unlink()
    assert float(big[0]) == 7 and float(big[-1]) == 1
    assert _is_mapped(path)
    del big
    assert not _is_mapped(path)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise AssertionError(field)


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_replacing_the_file_while_mapped_is_safe(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    old = CheckpointReader(tmp_path)
    save_file({"a": torch.zeros(5)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    assert torch.equal(old.get("a"), torch.ones(10))
    assert torch.equal(CheckpointReader(tmp_path).get("a"), torch.zeros(5))


def test_many_shards_keep_no_descriptor_open(tmp_path: Path) -> None:
    weight_map = {f"t{n}": f"model-{n:05d}-of-00300.safetensors" for n in range(300)}
    for name, file in weight_map.items():
        save_file({name: torch.ones(1)}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = CheckpointReader(tmp_path)
    tensors = [reader.get(name) for name in reader.names()]
    assert len(tensors) == 300 and len(list(Path("/proc/self/fd").iterdir())) == before


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    data = b"\x01" + struct.pack("<3f", 1.5, 2.5, 3.5)
    header = {"odd": entry(0, 1, [1]), "f": entry(1, 13, [3], "F32")}
    got = CheckpointReader(write_header(tmp_path / "a.safetensors", header, data)).get("f")
    assert got.tolist() == [1.5, 2.5, 3.5] and got.data_ptr() % 4 == 0


def test_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.wieght'; the nearest .*'model\.norm\.weight'"):
        CheckpointReader(tmp_path).get("model.norm.wieght")


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


RAW_HEADERS: dict[str, tuple[bytes, int | None, str]] = {
    "length of 2^63": (b"{}", 2**63, "claims 9,223,372,036,854,775,808 bytes, the limit"),
    "length above the limit": (b"{}", MAX_HEADER_BYTES + 1, "the limit is 100,000,000"),
    "length beyond the file": (b"{}", 1000, "truncated; the header claims 1,000 bytes"),
    "length cut off": (b"{}", 1, "not valid JSON"),
    "not JSON": (b"hello", None, "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', None, "not valid JSON"),
    "not an object": (b"[1, 2]", None, "expected a JSON object, found list"),
    "empty header": (b"", None, "not valid JSON"),
    "key twice": (b'{"a": {}, "a": {}}', None, "'a' appears twice"),
    "key twice in an entry": (b'{"a": {"dtype": "U8", "dtype": "I8"}}', None, "'dtype' appears twice"),
    "nesting bomb": (nested(200_000), None, "nested too deeply"),
    "endless number": (b'{"a": ' + b"9" * 100_000 + b"}", None, "not valid JSON"),
    "NaN": (b'{"a": NaN}', None, "NaN is not JSON"),
    "lone surrogate": (b'{"\\ud800": 5}', None, "expected exactly dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("header, length, message", RAW_HEADERS.values(), ids=RAW_HEADERS)
def test_hostile_header_bytes(tmp_path: Path, header: bytes, length: int | None, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, length=length)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


HEADERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown dtype": ({"a": entry(0, 4, [4], "F3")}, 4, "'a': unknown dtype 'F3'; known are"),
    "dtype no string": ({"a": entry(0, 4, [4], ["U8"])}, 4, "unknown dtype"),  # type: ignore[arg-type]
    "negative size": ({"a": entry(0, 4, [-4])}, 4, "no list of sizes"),
    "size no integer": ({"a": entry(0, 4, [4.0])}, 4, "no list of sizes"),  # type: ignore[list-item]
    "size a boolean": ({"a": entry(0, 1, [True])}, 1, "no list of sizes"),
    "huge size": ({"a": entry(0, 4, [2**64])}, 4, "no list of sizes"),
    "product wraps to 0": ({"a": entry(0, 0, [2**32, 2**32])}, 0, "overflows"),
    "0 hides an overflow": ({"a": entry(0, 0, [0, 2**40, 2**40])}, 0, "overflows"),
    "too many dimensions": ({"a": entry(0, 1, [1] * 65)}, 1, "no list of sizes"),
    "shape no list": ({"a": entry(0, 1, "1")}, 1, "no list of sizes"),  # type: ignore[arg-type]
    "shape too large for the range": ({"a": entry(0, 4, [5])}, 4, "4 bytes for shape"),
    "begin after end": ({"a": entry(4, 0, [4])}, 4, "no range"),
    "negative begin": ({"a": entry(-4, 0, [4])}, 4, "no range"),
    "three offsets": ({"a": entry(0, 4, [4]) | {"data_offsets": [0, 4, 8]}}, 4, "no range"),
    "beyond the end": ({"a": entry(0, 8, [8])}, 4, "truncated; 'a' ends at byte"),
    "far beyond the end": ({"a": entry(0, 2**62, [2**62])}, 4, "truncated; 'a' ends at byte"),
    "overlap": ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, 6, "'b' overlaps with 'a'"),
    "same range": ({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}, 4, "'b' overlaps with 'a'"),
    "hole": ({"a": entry(0, 4, [4]), "b": entry(6, 8, [2])}, 8, "'b' leaves a hole after 'a'"),
    "hole at the start": ({"a": entry(2, 4, [2])}, 4, "'a' leaves a hole after the header"),
    "bytes after the end": ({"a": entry(0, 4, [4])}, 6, "2 bytes after the last tensor"),
    "field missing": ({"a": {"dtype": "U8", "shape": [1]}}, 1, "expected exactly dtype"),
    "field too many": ({"a": entry(0, 1, [1]) | {"strides": [1]}}, 1, "expected exactly dtype"),
    "metadata no map": ({"__metadata__": ["pt"]}, 0, "'__metadata__' must map strings to strings"),
    "metadata no strings": ({"__metadata__": {"step": 3}}, 0, "'__metadata__' must map strings to strings"),
}


@pytest.mark.parametrize("header, nbytes, message", HEADERS.values(), ids=HEADERS)
def test_hostile_headers(tmp_path: Path, header: dict[str, Any], nbytes: int, message: str) -> None:
    path = write_header(tmp_path / "model.safetensors", header, bytes(nbytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", [0, 1, 7, 8, 40, -1])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"is empty|no safetensors file|truncated"):
        CheckpointReader(tmp_path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "valid.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_never_crash(valid: Path, flips: list[tuple[int, int]]) -> None:
    """A damaged file is refused by name, or (damage in names and data) has tensors of the sizes it had."""
    content = bytearray(valid.read_bytes())
    for position, mask in flips:
        # Two flips of three hit the header, where the danger is.
        end = len(content) if position % 3 == 0 else 8 + int.from_bytes(valid.read_bytes()[:8], "little")
        content[position % end] ^= mask
    path = valid.with_name("flipped.safetensors")
    path.write_bytes(content)
    try:
        reader = CheckpointReader(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    tensors = [reader.get(name) for name in reader.names()]
    assert sum(t.nbytes for t in tensors) == sum(t.nbytes for t in TENSORS.values())
    assert all(reader.shape(name) == tuple(t.shape) for name, t in zip(reader.names(), tensors, strict=True))


def test_sharded(tmp_path: Path) -> None:
    reader = CheckpointReader(shards(tmp_path))
    assert reader.names() == ["a", "b"]
    assert torch.equal(reader.get("a"), torch.ones(2)) and torch.equal(reader.get("b"), torch.zeros(3))


def test_missing_shard_is_named_with_its_size(tmp_path: Path) -> None:
    shards(tmp_path, c="model-00002-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing shard model-00002-of-00002\.safetensors \(2 tensors\)"):
        CheckpointReader(tmp_path)


def test_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    shards(tmp_path, c="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'c' is not in model-00001-of-00002\.safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "a\0.safetensors",
        3,
    ],
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"c": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"'c' is in .*(plain file name|not a .safetensors file)"):
        CheckpointReader(shards(folder, c=file))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1, "a": 2}}']
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CheckpointReader(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_pickles_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pickles can run code|no safetensors file"):
        CheckpointReader(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_paths_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"but weights\.safetensors; to read that file alone"):
        CheckpointReader(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        CheckpointReader(tmp_path / "model.gguf")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        CheckpointReader(tmp_path / "folder.safetensors")


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(tmp_path / "a.safetensors")
