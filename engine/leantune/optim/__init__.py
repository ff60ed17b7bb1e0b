"""Optimizers and learning-rate schedules."""

from leantune.optim.adamw import AdamW
from leantune.optim.schedule import SCHEDULES, Schedule

__all__ = ["SCHEDULES", "AdamW", "Schedule"]
