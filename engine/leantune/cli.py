"""The command `leantune`: its sub-commands, and what becomes of their errors."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from leantune.commands import show, train, use
from leantune.errors import LeantuneError

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class _Group(TyperGroup):
    """Ends a command that fails with a message and an exit code instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.secho("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (LeantuneError, RuntimeError) as error:
            if _interrupted(error):
                typer.secho(str(error), err=True)
                raise typer.Exit(INTERRUPTED) from None
            if os.environ.get("LEANTUNE_DEBUG") == "1" or not _explains_itself(error):
                raise
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


def _explains_itself(error: Exception) -> bool:
    from leantune_kernels.dispatch import CannotServe

    return isinstance(error, (LeantuneError, CannotServe))


def _interrupted(error: Exception) -> bool:
    from leantune.loop import TrainingInterrupted

    return isinstance(error, TrainingInterrupted)


def _version(wanted: bool) -> None:
    if wanted:
        from leantune import __version__

        typer.echo(f"leantune {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", no_args_is_help=True)(train.train)
app.command("eval")(use.evaluate)
app.command("merge")(use.merge)
app.command("generate")(use.generate)
app.command("inspect-data")(show.inspect_data)
app.command("kernels")(show.kernels)


@app.callback()
def _leantune(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, metavar="", help="Print it.")
    ] = False,
) -> None:
    """Fine-tune transformer language models where hardware is scarce."""


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
