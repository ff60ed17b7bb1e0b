"""`leantune train`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from leantune.commands import options
from leantune.commands.options import note
from leantune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from leantune.loop import EpochResult, Trainer
    from leantune.model import Model
    from leantune.recipe import Recipe

_WHAT, _HOW, _STEPS, _RUN = "Model and data", "Method", "Optimisation", "Run"
_OUTPUTS = ("adapter", "model", "merged")  # directories that a run leaves in --out


def _option(panel: str, metavar: str, help: str, default: str | bool = False, flag: str | None = None) -> Any:
    """An option without a value of its own: what is not given is left to the file and to the defaults."""
    flags = () if flag is None else (flag,)
    return Option(*flags, help=help, metavar=metavar, show_default=default, rich_help_panel=panel)


def train(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file with the options below, named as there, with _ for -.", metavar="CONFIG.toml"),
    ] = None,
    model: Annotated[str | None, _option(_WHAT, "PATH|ID", options.MODEL)] = None,
    adapter: Annotated[str | None, _option(_WHAT, "DIR", "Saved adapter to go on with (PEFT's included).")] = None,
    data: Annotated[str | None, _option(_WHAT, "FILE", options.DATA)] = None,
    field: Annotated[list[str] | None, _option(_WHAT, "COLUMN=NAME", options.FIELD)] = None,
    eval_data: Annotated[str | None, _option(_WHAT, "FILE", "Data to measure the loss on; same format.")] = None,
    max_length: Annotated[int | None, _option(_WHAT, "TOKENS", options.MAX_LENGTH, "2048")] = None,
    on_long: Annotated[str | None, _option(_WHAT, "truncate|drop", options.ON_LONG, "truncate")] = None,
    train_on: Annotated[str | None, _option(_WHAT, "assistant|last|all", options.TRAIN_ON, "assistant")] = None,
    dtype: Annotated[str | None, _option(_WHAT, "NAME", options.DTYPE, "float32")] = None,
    method: Annotated[str | None, _option(_HOW, "lora|full", "What is trained.", "lora")] = None,
    rank: Annotated[int | None, _option(_HOW, "R", "LoRA: rank of the update.", "16")] = None,
    alpha: Annotated[float | None, _option(_HOW, "X", "LoRA: the update is scaled by alpha / rank.", "32.0")] = None,
    dropout: Annotated[float | None, _option(_HOW, "P", "LoRA: probability on the update's input.", "0.0")] = None,
    targets: Annotated[
        str | None,
        _option(
            _HOW,
            "WHICH",
            "LoRA: layers to update. all-linear, names (q_proj,v_proj), or re: and a regular expression over paths.",
            "all-linear",
        ),
    ] = None,
    lr: Annotated[float | None, _option(_STEPS, "X", "Peak learning rate.", "0.0002")] = None,
    schedule: Annotated[
        str | None, _option(_STEPS, "NAME", "Learning rate after warm-up: constant, linear or cosine.", "linear")
    ] = None,
    warmup: Annotated[
        float | None, _option(_STEPS, "N", "Warm-up in steps, or as a fraction of all steps if below 1.", "0.0")
    ] = None,
    epochs: Annotated[
        int | None, _option(_STEPS, "N", "Passes over the data.", "1, unless --max-steps is given")
    ] = None,
    max_steps: Annotated[int | None, _option(_STEPS, "N", "Optimizer steps at most.", "no limit")] = None,
    batch_tokens: Annotated[
        int | None, _option(_STEPS, "TOKENS", "Tokens in a micro-batch at most.", "2048, unless --batch-size is given")
    ] = None,
    batch_size: Annotated[
        int | None, _option(_STEPS, "N", "Sequences in a micro-batch at most.", "no limit")
    ] = None,
    accumulation: Annotated[int | None, _option(_STEPS, "N", "Micro-batches in an optimizer step.", "1")] = None,
    shuffle: Annotated[
        bool | None, _option(_STEPS, "", "New order in every epoch.", "shuffle", "--shuffle/--no-shuffle")
    ] = None,
    seed: Annotated[int | None, _option(_STEPS, "N", "Of order, initial update and dropout.", "0")] = None,
    out: Annotated[
        str | None, _option(_RUN, "DIR", "Directory of the run: adapter, checkpoints, metrics, loss curve, recipe.")
    ] = None,
    threads: Annotated[int | None, _option(_RUN, "N", options.THREADS, options.ALL_CORES)] = None,
    save_every: Annotated[
        int | None, _option(_RUN, "STEPS", "Checkpoint every so many steps.", "every epoch and ten minutes")
    ] = None,
    eval_every: Annotated[
        int | None, _option(_RUN, "STEPS", "Measure --eval-data every so many steps.", "every epoch")
    ] = None,
    merge: Annotated[
        bool | None, _option(_RUN, "", "Also write the merged checkpoint, to OUT/merged.", flag="--merge")
    ] = None,
    resume: Annotated[bool, _option(_RUN, "", "Go on from the last checkpoint in --out.", flag="--resume")] = False,
    overwrite: Annotated[bool, _option(_RUN, "", "Replace the run that is in --out.", flag="--overwrite")] = False,
    assignments: Annotated[
        list[str] | None,
        _option(_RUN, "KEY=VALUE", "Any other setting, such as weight_decay=0.1, use_rslora=true. Repeatable.",
                flag="--set"),
    ] = None,
) -> None:  # fmt: skip
    """Fine-tune a model on a data file.

    Flags win over CONFIG.toml, which wins over the defaults. Ctrl-C (or SIGTERM) saves after the step under way; the
    same command with --resume goes on from there. OUT/recipe.toml repeats the run.
    """
    from leantune import recipe

    flags = {k: v for k, v in context.params.items() if v not in (None, [], ()) and k not in _NOT_SETTINGS}
    run(recipe.read(config, flags, assignments or []), resume, overwrite)


_NOT_SETTINGS = ("config", "resume", "overwrite", "assignments")


def run(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> None:
    """Trains as the recipe says and writes the results into `recipe.out`."""
    from leantune.checkpoint.atomic import atomic_file
    from leantune.loop import Trainer, check_output
    from leantune.recipe import FILE_NAME

    if resume and overwrite:
        raise ConfigError("resume goes on with the run in out, overwrite deletes it; give one of them")
    out = Path(recipe.out)
    check_output(out, resume, overwrite)
    _check_outputs(recipe, out, resume or overwrite)
    options.set_threads(recipe.threads)
    with _terminable():
        model = options.load_model(recipe.model, recipe.adapter, recipe.dtype)
        encoding = (model.tokenizer, recipe.field, recipe.max_length, recipe.on_long, recipe.train_on)
        data, eval_data = options.read_data(recipe.data, *encoding), None
        note(options.counted(recipe.data, data))
        if recipe.eval_data is not None:
            eval_data = options.read_data(recipe.eval_data, *encoding)
            note(options.counted(recipe.eval_data, eval_data))
        if recipe.tuning is not None:
            recipe.tuning.apply(model)
        note(_trained(model))
        settings = asdict(recipe.train) | {"out": out, "resume": resume, "overwrite": overwrite}
        trainer = Trainer(model, data, eval_data=eval_data, **settings)
        if overwrite:
            _clear_outputs(out)
        with atomic_file(out / FILE_NAME) as file:
            file.write(recipe.to_toml().encode())
        results = trainer.fit(recipe.epochs, recipe.max_steps)
        _report(trainer, results, recipe)
        _write(model, recipe, out, replace=bool(results))


def _check_outputs(recipe: Recipe, out: Path, replace: bool) -> None:
    """Before any work: results of an earlier run, which the end of this one would replace."""
    for path in (out / name for name in _OUTPUTS):
        if recipe.adapter is not None and path.resolve() == Path(recipe.adapter).resolve():
            raise ConfigError(
                f"out={recipe.out!r} would replace the adapter that training goes on with; choose another"
            )
        if path.is_dir() and any(path.iterdir()) and not replace:
            raise CheckpointError(
                f"out={recipe.out!r} holds results already ({path.name}); choose another directory, or replace them "
                "with --overwrite"
            )


def _clear_outputs(out: Path) -> None:
    """Results of the run that is replaced must not pass for this one's if it is interrupted."""
    from leantune.checkpoint.atomic import atomic_directory

    for path in (out / name for name in _OUTPUTS):
        if path.is_dir():
            with atomic_directory(path, overwrite=True):
                pass  # an empty directory in its place; refused where there is more than a checkpoint in it
            path.rmdir()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does at that moment: the trainer saves, anything else stops."""

    def like_interrupt(signum: int, frame: Any) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # ignored, as in a shell's background job
            raise KeyboardInterrupt
        handler(signum, frame)

    before = signal.signal(signal.SIGTERM, like_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _trained(model: Model) -> str:
    """What is trained, in words."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return f"{model.name_or_path}: {trained:,} parameters are trained, {frozen:,} are frozen"


def _report(trainer: Trainer, results: list[EpochResult], recipe: Recipe) -> None:
    if not results:
        typer.echo(
            f"the run in {recipe.out} is finished already, at step {trainer.step}; raise epochs or max_steps to go on"
        )
        return
    last = results[-1]
    measured = "" if last.eval_loss is None else f", evaluation loss {last.eval_loss:.4f}"
    typer.echo(f"done: step {trainer.step}, training loss of epoch {last.epoch} {last.loss:.4f}{measured}")


def _write(model: Model, recipe: Recipe, out: Path, replace: bool) -> None:
    """Writes the results, those that exist only with `replace`, and says how to use them."""
    from leantune.methods import Full

    use = f"leantune generate --model {shlex.quote(recipe.model)} --adapter {shlex.quote(str(out / 'adapter'))}"
    if recipe.method == Full.name:
        use = f"leantune generate --model {shlex.quote(str(out / 'model'))}"
        if replace or not (out / "model").exists():
            model.save_merged(out / "model", overwrite=True)
            typer.echo(f"wrote {out / 'model'}")
    elif replace or not (out / "adapter").exists():
        model.save_adapter(out / "adapter", overwrite=True)
        typer.echo(f"wrote {out / 'adapter'}")
    if recipe.merge and (replace or not (out / "merged").exists()):
        model.save_merged(out / "merged", overwrite=True)
        typer.echo(f"wrote {out / 'merged'}")
    typer.echo(f"use it:\n  {use} --prompt TEXT")
