"""`leantune eval`, `merge` and `generate`: what is done with a model, trained or not."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated

import typer
from typer import Option

from leantune.commands import options
from leantune.errors import ConfigError, DataError


def evaluate(
    model: options.ModelName,
    data: options.Data,
    adapter: options.Adapter = None,
    field: options.Field = None,
    max_length: options.MaxLength = 2048,
    on_long: options.OnLong = "truncate",
    train_on: options.TrainOn = "assistant",
    batch_tokens: Annotated[
        int, Option(min=1, help="Tokens held at a time; the result does not depend on it.", metavar="TOKENS")
    ] = 2048,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure the loss of a model on a data file.

    Prints loss (mean over the targets, in nats per token), perplexity (e to the loss) and tokens (number of targets).
    """
    from leantune.evaluate import evaluate

    options.set_threads(threads)
    loaded = options.load_model(model, adapter, dtype)
    fields = options.fields_of(field)
    dataset = options.read_data(data, loaded.tokenizer, fields, max_length, on_long, train_on)
    options.note(options.counted(data, dataset))
    result = evaluate(loaded, dataset, batch_tokens)
    if not math.isfinite(result.loss):
        raise DataError(f"{data}: the loss is {result.loss}; the model's weights or the data are damaged")
    if as_json:
        # JSON has no infinity: a perplexity beyond double precision is null.
        perplexity = result.perplexity if math.isfinite(result.perplexity) else None
        typer.echo(json.dumps({"loss": result.loss, "perplexity": perplexity, "tokens": result.tokens}))
    else:
        typer.echo(f"loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  tokens {result.tokens}")


def merge(
    model: options.ModelName,
    adapter: Annotated[str, Option(help=options.ADAPTER, metavar="DIR", show_default=False)],
    out: Annotated[
        str, Option(help="Directory to write, in Hugging Face's layout.", metavar="DIR", show_default=False)
    ],
    dtype: Annotated[
        str | None, Option(help="How to store it: float32, bfloat16 or float16.", show_default="as the model is")
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", metavar="", help="Replace a checkpoint that is in --out.")
    ] = False,
    threads: options.Threads = None,
) -> None:
    """Add an adapter to its model's weights and write the result as a checkpoint of its own.

    Sums are formed in float32 and rounded once.
    """
    options.set_threads(threads)
    stored = None if dtype is None else options.dtype_of(dtype)
    loaded = options.load_model(model, adapter, _held_dtype(model))
    loaded.save_merged(out, dtype=stored, overwrite=overwrite)
    typer.echo(f"wrote {out}")


def _held_dtype(model: str) -> str | None:
    """The dtype of a checkpoint all in one dtype: its weights then stay in the file until they are merged."""
    from leantune.checkpoint.hub import resolve
    from leantune.checkpoint.reader import CheckpointReader
    from leantune.model import DTYPES

    reader = CheckpointReader(resolve(model))
    found = {reader.dtype(name) for name in reader.names()}
    return next((name for name, dtype in DTYPES.items() if found == {dtype}), None)


def generate(
    model: options.ModelName,
    adapter: options.Adapter = None,
    prompt: Annotated[
        str | None, Option(help="What to say to the model.", metavar="TEXT", show_default="standard input")
    ] = None,
    system: Annotated[str | None, Option(help="System message of the chat.", metavar="TEXT")] = None,
    raw: Annotated[
        bool, Option("--raw", metavar="", help="Go on with the text as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to write at most.", metavar="TOKENS")] = 256,
    temperature: Annotated[
        float, Option(min=0, help="Randomness; 0 takes the likeliest token each time.", metavar="X")
    ] = 0.0,
    top_k: Annotated[int, Option(min=0, help="Draw from the k likeliest tokens; 0: from all.", metavar="K")] = 0,
    top_p: Annotated[
        float, Option(help="Draw from the likeliest tokens that reach this probability together.", metavar="P")
    ] = 1.0,
    seed: Annotated[int, Option(help="Seed of the draws.", metavar="N")] = 0,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Write text, as it comes, to standard output: the answer to a prompt, or with --raw the text's continuation."""
    from leantune.generate import generate

    if raw and system is not None:
        raise ConfigError("--system is for chats, --raw uses no chat template; give one of them")
    text = _prompt(prompt)
    options.set_threads(threads)
    loaded = options.load_model(model, adapter, dtype)
    if not raw and loaded.tokenizer.chat_template is None:
        raise ConfigError(f"{model} has no chat template; use --raw to go on with the text as it is")
    turns = [] if system is None else [{"role": "system", "content": system}]
    generate(
        loaded,
        text if raw else [*turns, {"role": "user", "content": text}],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=lambda piece: typer.echo(piece, nl=False),
    )
    typer.echo()


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        options.note("reading the prompt from standard input; Ctrl-D ends it")
    text = sys.stdin.read().rstrip("\n") if given is None else given
    if not text.strip():
        raise DataError("the prompt is empty; give --prompt TEXT, or text on standard input")
    return text
