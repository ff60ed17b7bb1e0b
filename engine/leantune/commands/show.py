"""`leantune inspect-data` and `kernels`: what a run would be made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Annotated

import typer
from typer import Option

from leantune.commands import options
from leantune.errors import ConfigError, DataError


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
        bool,
        Option(
            "--json",
            metavar="",
            help="Print {op: {implementation: null if it can serve, else why not}}, with --check a list of reports.",
        ),
    ] = False,
    device: Annotated[str, Option(help="Device that tensors would lie on, such as cuda.", metavar="NAME")] = "cpu",
    dtype: Annotated[
        list[str] | None,
        Option(
            help="float32, bfloat16 or float16. Repeatable with --check.",
            show_default="float32; all of them with --check",
            metavar="NAME",
        ),
    ] = None,
    check: Annotated[
        bool,
        Option(
            "--check",
            metavar="",
            help="Run the conformance kit; the exit code is 1 if a check fails, or if what is named was not checked.",
        ),
    ] = False,
    op: Annotated[
        list[str] | None, Option(help="With --check: an op; all by default. Repeatable.", metavar="NAME")
    ] = None,
    implementation: Annotated[
        list[str] | None,
        Option(
            help="With --check: cuda, triton, cpu or reference; all that can serve by default. Repeatable.",
            metavar="NAME",
        ),
    ] = None,
    impl: Annotated[
        str | None,
        Option(
            help="With --check and --op: check this function of your own instead. Cases pass it all arguments by name.",
            metavar="MODULE:FUNCTION",
        ),
    ] = None,
) -> None:
    """List every op with its implementations: which can serve a tensor here, and why others cannot.

    The first that can is used, from left to right. LEANTUNE_IMPL=reference (or rms_norm:cpu,rope:reference) forces.

    What it forces is shown with the op, and in --json as the op's "forced".

    --check runs every op's own cases on these implementations: errors against float64, outputs in memory full of NaN,
    upstream gradients of any strides, arguments left as they were, the same bits twice. A function of your own takes
    the arguments of the op's cases by name: impl(x=, weight=, eps=, residual=) for rms_norm.
    """
    from leantune_kernels import conformance

    try:
        if check:
            reports = list(conformance.check(op or (), implementation or (), dtype or (), device, impl))
            if as_json:
                typer.echo(json.dumps(conformance.as_json(reports), indent=2, allow_nan=False))
            else:
                conformance.show(reports)
            raise typer.Exit(conformance.exit_code(reports))
        if op or implementation or impl or (dtype and dtype[1:]):
            raise ConfigError("--op, --implementation, --impl and a second --dtype are for --check; add it")
        table = conformance.support(device, dtype[0] if dtype else "float32")
        forced = _forced(table)
    except conformance.UnknownName as error:
        raise ConfigError(str(error)) from error
    if as_json:
        marks = {op: {"forced": name} for op, name in forced.items()}
        typer.echo(json.dumps({op: found | marks.get(op, {}) for op, found in table.items()}, indent=2))
    else:
        _show_support(table, forced)


def _forced(ops: Iterable[str]) -> dict[str, str]:
    """{op: the implementation that LEANTUNE_IMPL forces}, without the ops that it leaves open."""
    from leantune_kernels import dispatch

    setting = os.environ.get("LEANTUNE_IMPL")
    return {op: name for op in ops if (name := dispatch.forced(setting, op)) is not None}


def _show_support(table: dict[str, dict[str, str | None]], forced: dict[str, str]) -> None:
    """Two lines an op, with numbers for the reasons, which repeat themselves."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from leantune_kernels import dispatch

    console, reasons = Console(), list[str]()
    wide = max(map(len, table)) + 2
    console.print(Text(" " * wide + "".join(name.ljust(11) for name in dispatch.IMPLEMENTATIONS), "bold"))
    for op, found in table.items():
        line = Text(op.ljust(wide), "bold")
        for reason in found.values():
            if reason is None:
                line.append("yes".ljust(11), "green")
            else:
                reasons += [] if reason in reasons else [reason]
                line.append(f"no ({reasons.index(reason) + 1})".ljust(11), "dim")
        console.print(line)
        if op in forced:
            console.print(Padding(Text(f"LEANTUNE_IMPL forces {forced[op]}", "yellow"), (0, 0, 0, 2)))
        console.print(Padding(Text(dispatch.Op(f"leantune_kernels.{op}").about, "dim"), (0, 0, 0, 2)))
    for number, reason in enumerate(reasons, 1):
        console.print(Text(f"({number}) {reason}"), highlight=False)
