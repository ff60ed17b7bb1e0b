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
        """Makes every parameter trainable; a weight leaves the checkpoint's memory map when it is first written.

        Raises ConfigError for a model that carries an adapter.
        """
        model.require_no_update()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32)
            parameter.requires_grad_(True)
        model.method = self
        return model
