"""Training data: records in, encoded samples with masks out, packed into batches without padding."""

from leantune.data.batch import PackedBatch, collate, plan_epoch
from leantune.data.dataset import Dataset, DataStats, Sample
from leantune.data.encode import auto, chat, completion, text
from leantune.data.inspection import inspect
from leantune.data.tokenizer import Tokenizer

__all__ = [
    "DataStats",
    "Dataset",
    "PackedBatch",
    "Sample",
    "Tokenizer",
    "auto",
    "chat",
    "collate",
    "completion",
    "inspect",
    "plan_epoch",
    "text",
]
