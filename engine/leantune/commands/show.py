"""`leantune inspect-data` and `kernels`: what a run would be made of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from leantune.commands import options
from leantune.errors import DataError

if TYPE_CHECKING:
    from rich.text import Text


def inspect_data(
    model: options.ModelName,
    data: options.Data,
    field: options.Field = None,
    index: Annotated[
        list[int] | None,
        Option(min=0, help="Sample to show, from 0. Repeat it to see samples packed into one batch.", show_default="0"),
    ] = None,
    max_length: options.MaxLength = 2048,
    on_long: options.OnLong = "truncate",
    train_on: options.TrainOn = "assistant",
) -> None:
    """Show, token by token and in colour, what training on a data file would see.

    For each token: the sequence it belongs to (segment), its position, its role, whether it is a target, id and text.
    """
    from leantune import data as formats
    from leantune.checkpoint.hub import resolve

    tokenizer = formats.Tokenizer.from_directory(resolve(model))
    fields = options.fields_of(field)
    dataset = options.read_data(data, tokenizer, fields, max_length, on_long, train_on)
    chosen = index or [0]
    if max(chosen) >= len(dataset):
        raise DataError(f"index={max(chosen)}: {data} has {len(dataset)} samples, numbered from 0")
    formats.inspect(dataset, chosen)


def kernels(
    as_json: Annotated[
        bool, Option("--json", metavar="", help="Print {op: {implementation: null if it can serve, else why not}}.")
    ] = False,
) -> None:
    """List every op with its implementations: which can serve a float32 CPU tensor here, and why others cannot.

    The first that can is used, from left to right. LEANTUNE_IMPL=reference (or rms_norm:cpu,rope:reference) forces.
    """
    from leantune_kernels import dispatch

    table = dispatch.table()
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(show_lines=True)
    shown.add_column("op", no_wrap=True)
    for name in dispatch.IMPLEMENTATIONS:
        shown.add_column(name)
    for op, reasons in table.items():
        shown.add_row(op, *(_cell(reasons[name]) for name in dispatch.IMPLEMENTATIONS))
    Console().print(shown)


def _cell(reason: str | None) -> Text:
    from rich.text import Text

    return Text("yes", "green") if reason is None else Text(reason, "dim")
