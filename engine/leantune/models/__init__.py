"""Model families, one file each, named after the Hugging Face `model_type`.

A family module defines `config(raw: dict) -> DecoderConfig`, which reads config.json and refuses, by name, any field
that would change the computation and is not supported. Its tensors are named as the Decoder's parameters.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from leantune.errors import ConfigError


def families() -> list[str]:
    """The `model_type`s that can be loaded."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def family(raw: dict[str, Any]) -> ModuleType:
    """The module for the `model_type` of a config.json. Raises ConfigError for one that is unknown or absent."""
    model_type = raw.get("model_type")
    if model_type not in families():
        raise ConfigError(
            f"config.json: model_type={model_type!r} is not supported; leantune loads {', '.join(families())}"
        )
    return importlib.import_module(f"{__name__}.{model_type}")
