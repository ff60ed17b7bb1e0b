"""Training state: comes back bit for bit, or not at all with the damaged file named."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from leantune.checkpoint import atomic
from leantune.checkpoint.state import (
    META_NAME,
    TENSORS_NAME,
    file_sha256,
    latest_state,
    load_state,
    prune,
    save_state,
)
from leantune.errors import CheckpointError

META = {
    "step": 7,
    "epoch": 0.1 + 0.2,
    "generator": {"state": 2**127 + 1, "words": [1, 2, 3]},
    "note": "grün",
    "best": None,
}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "exp_avg.model.norm.weight": torch.randn(5, generator=generator),
        "weight": torch.randn(3, 2, generator=generator).bfloat16(),
        "rng": generator.get_state(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def test_round_trip_is_exact(tmp_path: Path) -> None:
    save_state(tmp_path / "run" / "checkpoint-7", tensors(), META)
    loaded, meta = load_state(tmp_path / "run" / "checkpoint-7")
    assert meta == META
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for number in (1, 2):
        save_state(tmp_path / "checkpoint-1", {"a": torch.tensor([number])}, {"number": number})
    loaded, meta = load_state(tmp_path / "checkpoint-1")
    assert loaded["a"].tolist() == [2] and meta == {"number": 2}


@pytest.mark.parametrize(
    "meta, message",
    [
        ({"betas": (0.9, 0.999)}, r"JSON would change meta\['betas'\]"),
        ({"a": {1: 2}}, r"JSON would change meta\['a'\]"),
        ({3: "x"}, r"JSON would change meta\[3\]"),
        ({"loss": float("nan")}, "does not fit into JSON"),
        ({"t": torch.ones(1)}, "does not fit into JSON.*Tensor"),
    ],
)
def test_meta_that_json_would_change_is_refused(tmp_path: Path, meta: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_state(tmp_path / "checkpoint-1", {}, meta)
    assert names(tmp_path) == []


def test_every_flipped_byte_of_the_tensors_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    save_state(folder, {"a": torch.arange(4.0)}, {})
    content = (folder / TENSORS_NAME).read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / TENSORS_NAME).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{TENSORS_NAME} is damaged: .*delete .*checkpoint-1 to go on"):
            load_state(folder)


def test_damaged_states_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(CheckpointError, match="checkpoint-1 does not exist"):
        load_state(folder)
    folder.mkdir()
    with pytest.raises(CheckpointError, match=f"cannot read .*{META_NAME}"):
        load_state(folder)
    shutil.rmtree(folder)
    save_state(folder, tensors(), META)
    record = json.loads((folder / META_NAME).read_text())
    (folder / TENSORS_NAME).write_bytes((folder / TENSORS_NAME).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{TENSORS_NAME} is [\d,]+ bytes long, .* says"):
        load_state(folder)
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS_NAME} is missing"):
        load_state(folder)
    for edit, message in [
        ({"format": "other"}, "format 'other' version 1 is not read"),
        ({"version": 2}, "version 2 is not read; this release reads"),
        ({"sha256": 5}, "'sha256' is missing or of the wrong type"),
        ({"bytes": "many"}, "'bytes' is missing or of the wrong type"),
        ({"meta": []}, "'meta' is missing or of the wrong type"),
    ]:
        (folder / META_NAME).write_text(json.dumps(record | edit))
        with pytest.raises(CheckpointError, match=message):
            load_state(folder)


def test_latest_is_the_highest_complete_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_state(tmp_path / "nowhere") is None
    assert latest_state(tmp_path) is None
    for step in (9, 10, 11, 12):
        save_state(tmp_path / f"checkpoint-{step}", {"a": torch.ones(3)}, {"step": step})
    (tmp_path / "checkpoint-11" / TENSORS_NAME).unlink()
    (tmp_path / "checkpoint-12" / META_NAME).write_text("{")
    (tmp_path / "checkpoint-best").mkdir()
    leftover = tmp_path / f".checkpoint-13.leantune-{atomic._HOST}-{2**22 + 1}-0123abcd.tmp"
    leftover.mkdir()
    with caplog.at_level(logging.WARNING, logger="leantune"):
        assert latest_state(tmp_path) == tmp_path / "checkpoint-10"
    text = caplog.text
    assert "checkpoint-11" in text and "checkpoint-12" in text and leftover.name in text
    assert leftover.exists()
    save_state(tmp_path / "checkpoint-14", {"a": torch.ones(3)}, {"step": 14})
    assert not leftover.exists()


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save_state(tmp_path / f"checkpoint-{step}", {"a": torch.ones(3)}, {})
    (tmp_path / "checkpoint-1").mkdir()  # somebody else's
    assert prune(tmp_path, 2) == [tmp_path / "checkpoint-5"]
    assert prune(tmp_path, 2) == []
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-100", "checkpoint-20"]
    with pytest.raises(CheckpointError, match="keep=0 would delete every checkpoint"):
        prune(tmp_path, 0)


def test_loaded_tensors_outlive_their_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path / f"checkpoint-{step}", {"a": torch.full((3,), float(step))}, {})
    loaded, _ = load_state(tmp_path / "checkpoint-1")
    prune(tmp_path, 1)
    assert loaded["a"].add_(1).tolist() == [2, 2, 2]


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
