"""The record of a run: one JSON object a line, and the picture drawn from it."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leantune.checkpoint.atomic import atomic_file
from leantune.errors import TrainingError

FILE_NAME = "metrics.jsonl"
CURVE_NAME = "loss_curve.png"


class MetricsFile:
    """Appends rows to `metrics.jsonl`; each row is with the system when `write` returns,
    so a killed process loses none."""

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        """Keeps rows up to `resume_step`: what came after it is about to be done again."""
        self.path = directory / FILE_NAME
        kept = [row for row in read(self.path) if row["step"] <= resume_step] if resume_step else []
        with atomic_file(self.path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row. Raises TrainingError if the disk does not take it."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror}; free some space and resume") from error


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a killed process is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise TrainingError(f"{path}:{number + 1}: not a JSON object; repair or delete the line") from error
    return rows


def draw_curve(directory: Path) -> Path:
    """Draws loss and learning rate over steps, from metrics.jsonl, into loss_curve.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(directory / FILE_NAME)
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training loss")
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="evaluation loss")
    axes.set(xlabel="step", ylabel="loss (nats per label token)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    path = directory / CURVE_NAME
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    return path


def smoothed(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average with bias correction."""
    average, result = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**i))
    return result


def memory_bytes() -> int:
    """Resident memory of this process now, in bytes (its peak where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
