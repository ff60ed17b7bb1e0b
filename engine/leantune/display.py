"""What a run shows while it goes: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

QUIET_SECONDS = 15.0  # between lines where there is no terminal


class Display(Protocol):
    """Receives every step, and notes worth a line of their own."""

    def start(self, total: int, done: int) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, total: int, done: int) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Lines:
    """One line at the start, then one every QUIET_SECONDS, for logs."""

    def __init__(self) -> None:
        self._total, self._last = 0, 0.0

    def start(self, total: int, done: int) -> None:
        self._total = total

    def step(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS or row["step"] == self._total:
            self._last = now
            print(f"step {row['step']}/{self._total}  {_summary(row)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def stop(self) -> None: ...


class Bar:
    """A live progress bar with loss, tokens per second, memory and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._new = lambda: Progress(
            TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._progress = self._new()
        self._task: Any = None
        self._rate = 0.0

    def start(self, total: int, done: int) -> None:
        self._progress = self._new()  # one that was stopped cannot go on
        self._progress.start()
        self._task = self._progress.add_task("training", total=total, completed=done, summary="")

    def step(self, row: dict[str, Any]) -> None:
        rate = row["tokens_per_second"]
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        shown = _summary({**row, "tokens_per_second": self._rate})
        self._progress.update(self._task, completed=row["step"], summary=shown)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def _summary(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tok/s  {row['memory_bytes'] / 2**30:.2f} GiB"


def choose(progress: bool) -> Display:
    """A bar on a terminal, lines elsewhere, nothing with progress=False."""
    if not progress:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
