"""Files: checkpoints, adapters, training state. Reads nothing it has not checked, writes all or nothing."""

from leantune.checkpoint.atomic import atomic_directory, atomic_file
from leantune.checkpoint.hub import resolve
from leantune.checkpoint.peft import AdapterFile, as_portable, load_adapter, save_adapter, write_lora_adapter
from leantune.checkpoint.reader import CheckpointReader
from leantune.checkpoint.state import latest_state, load_state, prune, save_state
from leantune.checkpoint.writer import PendingTensor, save_sharded, save_tensors

__all__ = [
    "AdapterFile",
    "CheckpointReader",
    "PendingTensor",
    "as_portable",
    "atomic_directory",
    "atomic_file",
    "latest_state",
    "load_adapter",
    "load_state",
    "prune",
    "resolve",
    "save_adapter",
    "save_sharded",
    "save_state",
    "save_tensors",
    "write_lora_adapter",
]
