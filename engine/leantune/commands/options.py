"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from leantune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from leantune.data import Dataset, Tokenizer
    from leantune.model import Model

MODEL = "Checkpoint directory (config.json, *.safetensors, tokenizer.json) or Hugging Face hub id."
DATA = (
    "Data file: .jsonl, .json, .csv, .tsv or .parquet. Records are {messages}, {prompt, completion} or {text}, "
    "or become so through --field."
)
FIELD = "Column to read as prompt, completion, system, text or messages, such as question=prompt. Repeatable."
ADAPTER = "Adapter directory in PEFT's layout."
MAX_LENGTH = "Tokens a sample may have."
ON_LONG = "A sample longer than that: truncate it or drop it. Both are counted."
TRAIN_ON = "Targets in a chat: every assistant turn (assistant), only the last one (last), or all tokens (all)."
DTYPE = "How weights are held: float32, bfloat16 or float16. On a CPU computation is float32 all the same."
THREADS = "CPU threads."
ALL_CORES = "as many as PyTorch takes"

ModelName = Annotated[str, typer.Option("--model", help=MODEL, metavar="PATH|ID", show_default=False)]
Adapter = Annotated[str | None, typer.Option(help=ADAPTER, metavar="DIR")]
Data = Annotated[str, typer.Option(help=DATA, metavar="FILE", show_default=False)]
Field = Annotated[list[str] | None, typer.Option(help=FIELD, metavar="COLUMN=NAME", show_default=False)]
MaxLength = Annotated[int, typer.Option(help=MAX_LENGTH, metavar="TOKENS")]
OnLong = Annotated[str, typer.Option(help=ON_LONG, metavar="truncate|drop")]
TrainOn = Annotated[str, typer.Option(help=TRAIN_ON, metavar="assistant|last|all")]
Dtype = Annotated[str | None, typer.Option(help=DTYPE, show_default="float32", metavar="NAME")]
Threads = Annotated[int | None, typer.Option(min=1, help=THREADS, show_default=ALL_CORES, metavar="N")]


def note(text: str) -> None:
    """A line for the person who runs the command; results go to standard output, notes do not."""
    typer.echo(text, err=True)


def set_threads(threads: int | None) -> None:
    """Before anything runs: the kernels follow PyTorch's setting."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name. Raises ConfigError that lists the known ones."""
    from leantune.model import DTYPES

    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is unknown; use {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(model: str, adapter: str | None, dtype: str | None) -> Model:
    """The checkpoint with the adapter on it, if there is one."""
    from leantune.model import load

    loaded = load(model, dtype=None if dtype is None else dtype_of(dtype))
    if adapter is not None:
        loaded.load_adapter(adapter)
    return loaded


def fields_of(entries: list[str] | None) -> dict[str, str]:
    """{column: name} from "column=name" entries."""
    fields = {}
    for entry in entries or []:
        column, _, name = entry.rpartition("=")
        if not (column and name):
            raise ConfigError(f"--field {entry!r} must be COLUMN=NAME, such as question=prompt")
        fields[column] = name
    return fields


def read_data(
    path: str, tokenizer: Tokenizer, fields: dict[str, str], max_length: int, on_long: str, train_on: str
) -> Dataset:
    """The data set of a file, in the format that its first record shows."""
    from leantune import data

    settings: dict[str, Any] = {"max_length": max_length, "on_long": on_long, "train_on": train_on}
    return data.auto(path, tokenizer, fields=fields or None, **settings)


def counted(path: str, data: Dataset) -> str:
    """What a data set holds, and what was cut or left out."""
    stats = data.stats
    return (
        f"{path}: {stats.samples:,} samples, {stats.tokens:,} tokens, {stats.label_tokens:,} targets; "
        f"{stats.truncated:,} truncated, {stats.dropped:,} dropped"
    )
