"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leantune.nn import Decoder


@dataclass
class Full:
    """Trains all parameters, in fp32 whatever they were stored in."""

    name = "full"

    def apply(self, model: Decoder) -> Decoder:
        """Makes every parameter trainable. Weights leave the checkpoint's memory map the first time they are written."""
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32)
            parameter.requires_grad_(True)
        model.method = self
        return model
