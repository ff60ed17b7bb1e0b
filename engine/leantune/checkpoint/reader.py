"""Reads safetensors checkpoints, one file or many shards, through memory maps.

A tensor is a window on the file: nothing is read before it is used and nothing is copied. The map is private,
so writing to such a tensor never reaches the file, and it stays valid when the file is replaced or deleted,
because the old content lives as long as a tensor needs it. (A file truncated in place is another matter;
leantune never does that.)
"""

import difflib
import os
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple, cast

import torch

from leantune.checkpoint.header import TensorEntry, parse_header, read_json_object
from leantune.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class _Shard(NamedTuple):
    path: Path
    storage: torch.UntypedStorage
    entries: dict[str, TensorEntry]


class CheckpointReader:
    """The tensors of a checkpoint by name; every header is checked before anything is handed out.

    Args:
        path: a directory with `model.safetensors` or `model.safetensors.index.json`, or a `*.safetensors`.
    Raises:
        CheckpointError: a file or a tensor is missing, damaged or of another format; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._shards: dict[str, _Shard] = {}  # by tensor name
        single = _single_file(self.path)
        if single is not None:
            shard = _open_shard(single)
            self._shards = dict.fromkeys(shard.entries, shard)
        else:
            self._open_index(self.path / INDEX_NAME)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shards)

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without touching its data."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor, without touching its data."""
        return self._entry(name).dtype

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, in the dtype of the file.

        It is a private memory map (copied only where the file does not align it to its element size) with a
        storage of its own, valid for as long as it is referenced, with or without this reader.

        Raises:
            CheckpointError: there is no such tensor.
        """
        entry = self._entry(name)
        window = self._shards[name].storage[entry.begin : entry.end]
        data = torch.empty(0, dtype=torch.uint8).set_(window)
        if entry.begin % entry.dtype.itemsize:
            data = data.clone()  # reading it in place would be undefined behaviour
        return data.view(entry.dtype).view(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._shards:
            near = difflib.get_close_matches(name, self._shards, n=1)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise CheckpointError(f"{self.path} has no tensor {name!r}{hint}")
        return self._shards[name].entries[name]

    def _open_index(self, index: Path) -> None:
        weight_map = _read_weight_map(index)
        counts = Counter(weight_map.values())
        missing = [name for name in counts if not (index.parent / name).is_file()]
        if missing:
            what = ", ".join(f"{name} ({counts[name]} tensors)" for name in missing)
            raise CheckpointError(f"{index.parent}: missing shard {what}; get the missing files again")
        shards = {name: _open_shard(index.parent / name) for name in counts}
        for name, file in weight_map.items():
            if name not in shards[file].entries:
                raise CheckpointError(f"{index}: tensor {name!r} is not in {file}, where the index puts it")
            self._shards[name] = shards[file]


def _single_file(path: Path) -> Path | None:
    """The one file to read, or None when there is an index of shards."""
    if path.is_dir():
        if (path / SINGLE_NAME).is_file():
            return path / SINGLE_NAME
        if (path / INDEX_NAME).is_file():
            return None
        raise CheckpointError(_explain_no_weights(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint directory or a .safetensors file")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; other formats must be converted first")
    return path


def _explain_no_weights(directory: Path) -> str:
    message = f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}"
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{message}, only {pickles[0]}; pickles can run code and are not read: convert it, "
            "e.g. transformers' from_pretrained(dir).save_pretrained(new_dir), where you trust it"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return f"{message}, but {others[0]}; to read that file alone, give its path"
    return f"{message}; give the directory of a checkpoint"


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must map tensor names to files; the index is damaged")
    for name, file in weight_map.items():
        # A shard lies beside its index: anything else could make us read any file of the machine.
        if not isinstance(file, str) or file != Path(file).name or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index}: {name!r} is in {file!r}, which is not a plain file name; refused")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is in {file!r}, which is not a .safetensors file")
    return weight_map


def _open_shard(path: Path) -> _Shard:
    """Map a file and check its header; no file descriptor stays open."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if status.st_size == 0:
            raise CheckpointError(f"{path} is empty; get it again")
        storage = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, status.st_size))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except RuntimeError as error:  # what PyTorch makes of a failed open or mmap
        raise CheckpointError(f"cannot map {path} into memory: {error}") from error
    # The header is read through the same map as the tensors, so a file replaced meanwhile cannot mix the two.
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    return _Shard(path, storage, parse_header(data, str(path)))
