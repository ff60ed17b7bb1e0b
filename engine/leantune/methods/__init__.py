"""Fine-tuning methods, one file each: a class with `apply(model)`, found by its name in lower case on the CLI."""

from leantune.methods.full import Full
from leantune.methods.lora import LoRA

__all__ = ["Full", "LoRA"]
