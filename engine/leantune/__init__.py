"""leantune: fine-tuning of transformer language models where hardware is scarce.

import leantune as lt
model = lt.load("path/or/hub-id")
lt.LoRA(rank=16, alpha=32).apply(model)
trainer = lt.Trainer(model, lt.data.chat("train.jsonl", model.tokenizer), lr=2e-4)
for epoch in trainer.epochs(3): print(epoch.loss)
model.save_adapter("out/")
"""

from leantune import data
from leantune.errors import CheckpointError, ConfigError, DataError, LeantuneError, TrainingError
from leantune.evaluate import EvalResult, evaluate
from leantune.generate import generate
from leantune.loop import EpochResult, StepLog, Trainer, TrainingInterrupted
from leantune.methods import Full, LoRA
from leantune.model import Model, load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EpochResult",
    "EvalResult",
    "Full",
    "LeantuneError",
    "LoRA",
    "Model",
    "StepLog",
    "Trainer",
    "TrainingError",
    "TrainingInterrupted",
    "data",
    "evaluate",
    "generate",
    "load",
]
