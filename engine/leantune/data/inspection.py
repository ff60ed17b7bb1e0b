"""What is trained, token by token, for a person to check before a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from leantune.data.batch import IGNORED, PackedBatch, collate
from leantune.data.dataset import Dataset

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_COLOURS = {
    "template": "bright_black",
    "system": "magenta",
    "user": "cyan",
    "prompt": "cyan",
    "assistant": "green",
    "completion": "green",
    "text": "green",
    "tool": "yellow",
}
_TRAINED = "bold reverse"
_VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


def inspect(dataset: Dataset, index: int | Sequence[int], console: "Console | None" = None) -> None:
    """Print a sample, or several packed as a training batch packs them.

    index: a sample number, or several to see them side by side in one batch.
    console: where to print; the default is the terminal.
    Shows the text in the colours of the roles with the targets highlighted, then one row per token: its
    segment (which sequence of the pack), position, role, whether it is a target, id and text; then a summary.
    """
    from rich.console import Console

    indices = [index] if isinstance(index, (int, np.integer)) else list(index)
    batch = collate(dataset, indices)
    roles = [name for i in indices for name, start, end in dataset[i].roles for _ in range(end - start)]
    # A token is trained if the one before it has it as target: read from what training gets, not the mask.
    trained = [False, *(batch.targets[:-1] != IGNORED).tolist()]
    out = console or Console()
    out.print(
        _legend(roles),
        _flow(dataset, batch, roles, trained),
        _table(dataset, batch, roles, trained),
        sep="\n\n",
    )
    out.print(_summary(dataset, batch))


def visible(text: str) -> str:
    """White space and control characters made visible."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


def _style(role: str, trained: bool) -> str:
    colour = _COLOURS.get(role, "blue")
    return f"{_TRAINED} {colour}" if trained else colour


def _legend(roles: list[str]) -> "Text":
    from rich.text import Text

    legend = Text("legend: ")
    for role in dict.fromkeys(roles):
        legend.append(role, _style(role, False)).append("  ")
    legend.append("target (trained)", _TRAINED).append("  · space  ↵ newline  ⇥ tab")
    return legend


def _flow(dataset: Dataset, batch: PackedBatch, roles: list[str], trained: list[bool]) -> "RenderableType":
    from rich.text import Text

    flow = Text()
    positions = batch.position_ids.tolist()
    for t, token_id in enumerate(batch.input_ids.tolist()):
        if t and not positions[t]:
            flow.append("\n")
        token = dataset.tokenizer.token_text(token_id)
        flow.append(visible(token) + "\n" * token.endswith("\n"), _style(roles[t], trained[t]))
    return flow


def _table(dataset: Dataset, batch: PackedBatch, roles: list[str], trained: list[bool]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("segment", "position", "role", "target", "id", "token"):
        table.add_column(name, justify="right" if name in ("segment", "position", "id") else "left")
    starts = batch.cu_seqlens.numpy()
    segments = np.repeat(np.arange(len(batch.indices)), np.diff(starts)).tolist()
    positions = batch.position_ids.tolist()
    for t, token_id in enumerate(batch.input_ids.tolist()):
        style = _style(roles[t], False)
        table.add_row(
            str(segments[t]),
            str(positions[t]),
            Text(roles[t], style),
            "yes" if trained[t] else "",
            str(token_id),
            Text(visible(dataset.tokenizer.token_text(token_id)), _style(roles[t], trained[t])),
        )
    return table


def _summary(dataset: Dataset, batch: PackedBatch) -> "Text":
    from rich.text import Text

    summary = Text()
    for segment, index in enumerate(batch.indices):
        sample = dataset[index]
        cut = ", truncated" if sample.truncated else ""
        labels = int(sample.label_mask.sum())
        summary.append(f"segment {segment}: sample {index} from {sample.source}: {_share(labels, len(sample))}{cut}\n")
    stats = dataset.stats
    summary.append(f"batch: {_share(batch.label_tokens, batch.tokens)}\n")
    summary.append(
        f"data set: {stats.samples} samples, {_share(stats.label_tokens, stats.tokens)}, "
        f"{stats.truncated} truncated, {stats.dropped} dropped"
        + (f" ({stats.unlabelled} of the dropped because the cut left no target)" if stats.unlabelled else "")
    )
    return summary


def _share(labels: int, tokens: int) -> str:
    return f"{tokens} tokens, {labels} targets ({labels / tokens:.1%})"
