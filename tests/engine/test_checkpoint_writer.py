"""What the writer writes, others read; what it cannot write, it names."""

import errno
import json
import os
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from leantune.checkpoint.header import DTYPES
from leantune.checkpoint.reader import CheckpointReader
from leantune.checkpoint.writer import PendingTensor, save_sharded, save_tensors
from leantune.errors import CheckpointError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def pending(tensors: dict[str, torch.Tensor]) -> Iterator[PendingTensor]:
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        yield PendingTensor(name, nbytes, tuple(tensor.shape), tensor.dtype, partial(torch.clone, tensor))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and torch.equal(left[n], right[n])
        for n in left
    )


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=6))
def test_safetensors_reads_every_dtype_and_shape(tmp_path: Path, specs: list[tuple[str, list[int]]]) -> None:
    tensors = {f"t{i}": torch.ones(shape).to(DTYPES[dtype]) for i, (dtype, shape) in enumerate(specs)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_odd_sizes_stay_aligned_for_a_reader_without_copies(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(5, dtype=torch.float16),
        "c": torch.ones(3),
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    reader = CheckpointReader(tmp_path / "a.safetensors")
    base = reader.get("c").untyped_storage().data_ptr()
    for name in tensors:  # a copy would lie somewhere else altogether
        assert abs(reader.get(name).data_ptr() - base) < 64
    assert same({name: reader.get(name) for name in tensors}, tensors)


def test_views_and_aliases_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "alias": base,
        "expanded": torch.ones(1).expand(4),
        "conjugated": torch.complex(base, base).conj(),
        "parameter": torch.nn.Parameter(base.clone()),
        'häßlich "\\': base,
    }
    save_tensors(tmp_path / "a.safetensors", iter(tensors.items()))
    assert same(load_file(tmp_path / "a.safetensors"), {n: t.detach().resolve_conj() for n, t in tensors.items()})


def test_metadata_and_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    for name in ("one", "two"):
        save_tensors(tmp_path / name, tensors)
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "'a' is given twice"),
        ([("__metadata__", torch.ones(1))], "'__metadata__' is reserved"),
        (
            [("a", torch.ones(1, dtype=torch.complex128))],
            "'a' is torch.complex128, which safetensors cannot hold",
        ),
        ([("a", torch.ones(1, device="meta"))], "'a' is a torch.strided tensor on meta"),
        ([("a", torch.ones(2, 2).to_sparse())], "'a' is a torch.sparse_coo tensor"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, pairs: list[tuple[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_tensors(tmp_path / "a.safetensors", pairs)
    assert names(tmp_path) == []


def test_one_file_when_it_fits(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert save_sharded(tmp_path / "m", pending(tensors), 16) == [tmp_path / "m" / "model.safetensors"]
    assert names(tmp_path / "m") == ["model.safetensors"]
    assert same(load_file(tmp_path / "m" / "model.safetensors"), tensors)


def test_shards_have_the_names_and_the_index_of_hugging_face(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "big": torch.ones(100), "b": torch.zeros(1), "c": torch.zeros(2)}
    files = save_sharded(tmp_path, pending(tensors), 12)
    expected = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [file.name for file in files] == [*expected, "model.safetensors.index.json"]
    assert names(tmp_path) == sorted(file.name for file in files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 4 * 105}
    assert index["weight_map"] == {"a": expected[0], "big": expected[1], "b": expected[2], "c": expected[2]}
    reader = CheckpointReader(tmp_path)
    assert same({name: reader.get(name) for name in reader.names()}, tensors)


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    """`load` of the next tensor is called when the one before is gone."""
    made: list[weakref.ref[torch.Tensor]] = []

    def load() -> torch.Tensor:
        assert all(tensor() is None for tensor in made), "two tensors at once"
        tensor = torch.ones(4)
        made.append(weakref.ref(tensor))
        return tensor

    save_sharded(tmp_path, [(f"t{n}", 16, [4], torch.float32, load) for n in range(6)], 40)
    assert len(CheckpointReader(tmp_path).names()) == 6


def test_announcement_and_tensor_must_agree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' was announced as \[4\] torch.float32, but is \[3\] torch.float32"):
        save_sharded(tmp_path, [("a", 16, [4], torch.float32, lambda: torch.ones(3))])
    with pytest.raises(CheckpointError, match=r"'a' announces 15 bytes; \[4\] of torch.float32 needs 16"):
        save_sharded(tmp_path, [("a", 15, [4], torch.float32, lambda: torch.ones(4))])
    with pytest.raises(CheckpointError, match="max_shard_bytes=0 must be at least 1"):
        save_sharded(tmp_path, [], 0)
    assert names(tmp_path) == []


def test_weights_are_not_mixed_with_those_of_another_checkpoint(tmp_path: Path) -> None:
    save_sharded(tmp_path, pending({"a": torch.ones(2), "b": torch.ones(2)}), 8)
    with pytest.raises(CheckpointError, match=r"already holds model-00001-of-00002.safetensors"):
        save_sharded(tmp_path, pending({"a": torch.ones(2)}))


def test_disk_that_fills_in_the_middle(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_tensors(tmp_path / "model.safetensors", {"old": torch.ones(1)})
    tensors = [
        PendingTensor("a", 4, (1,), torch.float32, lambda: torch.ones(1)),
        ("b", 4, [1], torch.float32, fail),
    ]
    with pytest.raises(CheckpointError, match="disk is full"):
        save_sharded(tmp_path / "out", tensors)
    assert names(tmp_path / "out") == []
    with pytest.raises(CheckpointError, match=r"[\d,]+ bytes needed, [\d,]+ bytes free"):
        save_tensors(tmp_path / "model.safetensors", {"new": torch.empty(1).expand(2**58)})
    assert load_file(tmp_path / "model.safetensors").keys() == {"old"}


def test_transformers_loads_what_we_shard(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    files = save_sharded(tmp_path, pending(model.state_dict()), 4096)
    assert len(files) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
