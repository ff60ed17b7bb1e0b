"""LoRA adapters in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors`.

This module knows the files and no model. `A` is [r, in_features], `B` is [out_features, r]; the layer
computes `x W^T + scale * (x A^T) B^T`.
"""

import logging
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leantune.checkpoint.atomic import atomic_directory
from leantune.checkpoint.header import read_json_object
from leantune.checkpoint.reader import CheckpointReader
from leantune.checkpoint.writer import save_tensors, write_json
from leantune.errors import CheckpointError

logger = logging.getLogger("leantune")

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight")

# Keys that leave what the adapter computes alone: who made it, where it goes, how it was trained.
_NEUTRAL_KEYS = frozenset(
    """
    peft_type task_type base_model_name_or_path revision peft_version auto_mapping inference_mode
    r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern bias fan_in_fan_out init_lora_weights
    target_modules exclude_modules layers_to_transform layers_pattern megatron_core megatron_config
    loftq_config eva_config corda_config lora_ga_config qalora_group_size
    """.split()  # noqa: SIM905
)
# The other initialisations change the base weights, so the adapter does not fit the checkpoint it names.
_NEUTRAL_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass
class AdapterFile:
    """An adapter as its files have it.

    Attributes:
        config: the content of `adapter_config.json`.
        tensors: module path in the base model -> {"lora_A": [r, in_features], "lora_B": [out_features, r]}.
    """

    config: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]

    def rank_for(self, module: str) -> int:
        """Rank of a module: the first hit in `rank_pattern`, else `r`."""
        return int(self._lookup("rank_pattern", module, self.config["r"]))

    def alpha_for(self, module: str) -> float:
        """Alpha of a module: the first hit in `alpha_pattern`, else `lora_alpha`."""
        return float(self._lookup("alpha_pattern", module, self.config["lora_alpha"]))

    def scale_for(self, module: str) -> float:
        """Factor of B A: alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732)."""
        rank = self.rank_for(module)
        return self.alpha_for(module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _lookup(self, pattern: str, module: str, default: float) -> float:
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default


def load_adapter(directory: str | os.PathLike[str]) -> AdapterFile:
    """Read a LoRA adapter that leantune or PEFT wrote; the tensors are memory-mapped, in the file's dtype.

    Raises:
        CheckpointError: a file is missing or damaged, the config asks for something that this engine would
            compute differently (the key is named), or a tensor is missing, unexpected or of the wrong shape.
    """
    folder = Path(directory).expanduser()
    _check_files(folder)
    config = read_json_object(folder / CONFIG_NAME)
    _check_config(config, str(folder / CONFIG_NAME))
    reader = CheckpointReader(folder / TENSORS_NAME)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name in reader.names():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{reader.path}: unexpected tensor {name!r}; only {_PREFIX}<module>.lora_A.weight and "
                ".lora_B.weight are read: save the adapter without embeddings and fully trained modules"
            )
        tensors.setdefault(match["module"], {})[match["part"]] = reader.get(name)
    adapter = AdapterFile(config, tensors)
    _check_tensors(adapter, str(reader.path))
    return adapter


def save_adapter(directory: str | os.PathLike[str], adapter: AdapterFile, *, overwrite: bool = False) -> None:
    """Write an adapter atomically, after the same checks as at loading.

    What vLLM or llama.cpp would misread is named in a warning; `as_portable` makes an adapter that all read.

    Raises:
        CheckpointError: config and tensors disagree, the directory exists, or it cannot be written.
    """
    folder = Path(directory)
    _check_adapter(adapter, str(folder))
    for warning in loader_warnings(adapter.config):
        logger.warning("adapter %s: %s", folder, warning)
    named = {
        f"{_PREFIX}{module}.{part}.weight": tensor
        for module, pair in adapter.tensors.items()
        for part, tensor in pair.items()
    }
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    with atomic_directory(folder, overwrite=overwrite, nbytes=nbytes) as temporary:
        write_json(temporary / CONFIG_NAME, adapter.config)
        save_tensors(temporary / TENSORS_NAME, named)


def write_lora_adapter(
    directory: str | os.PathLike[str],
    *,
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int,
    alpha: float,
    use_rslora: bool,
    dropout: float,
    target_modules: Sequence[str] | str,
    base_model_name_or_path: str | None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    overwrite: bool = False,
    portable: bool = False,
) -> None:
    """Write a LoRA adapter for PEFT: the keys that every release knows, plus what differs from its defaults.

    Args:
        modules: module path in the base model -> (A [r, in_features], B [out_features, r]).
        target_modules: suffixes of module paths, or one regular expression over whole paths.
        portable: write the form that `as_portable` makes, which PEFT, vLLM and llama.cpp read alike.
    Raises:
        CheckpointError: as for `save_adapter`.
    """
    targets = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": _integer_if_whole(alpha),
        "target_modules": targets,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if use_rslora:
        config["use_rslora"] = True
    if rank_pattern:
        config["rank_pattern"] = dict(rank_pattern)
    if alpha_pattern:
        config["alpha_pattern"] = {key: _integer_if_whole(value) for key, value in alpha_pattern.items()}
    tensors = {module: {"lora_A": a, "lora_B": b} for module, (a, b) in modules.items()}
    adapter = AdapterFile(config, tensors)
    if portable:
        _check_adapter(adapter, str(directory))
        adapter = as_portable(adapter)
    save_adapter(directory, adapter, overwrite=overwrite)


def loader_warnings(config: Mapping[str, Any]) -> list[str]:
    """What other loaders would compute differently from PEFT for this config, in words."""
    warnings = []
    if config.get("rank_pattern"):
        warnings.append("vLLM ignores rank_pattern; save with portable=True for it")
    if config.get("alpha_pattern"):
        warnings.append("vLLM and llama.cpp ignore alpha_pattern; save with portable=True for them")
    if config.get("use_rslora"):
        warnings.append("llama.cpp ignores use_rslora and mis-scales; save with portable=True for it")
    return warnings


def as_portable(adapter: AdapterFile) -> AdapterFile:
    """The same function in a form that PEFT, vLLM and llama.cpp read alike.

    One rank everywhere (zero-padded), the scale multiplied into B in fp32 and rounded once, alpha = r.
    """
    rank = max(adapter.rank_for(module) for module in adapter.tensors)
    dropped = ("use_rslora", "rank_pattern", "alpha_pattern")
    config = {key: value for key, value in adapter.config.items() if key not in dropped}
    config |= {"r": rank, "lora_alpha": rank}
    tensors = {}
    for module, pair in adapter.tensors.items():
        a, b = pair["lora_A"], pair["lora_B"]
        missing = rank - a.shape[0]
        scaled = (b.float() * adapter.scale_for(module)).to(b.dtype)
        tensors[module] = {
            "lora_A": torch.nn.functional.pad(a, (0, 0, 0, missing)),
            "lora_B": torch.nn.functional.pad(scaled, (0, missing)),
        }
    return AdapterFile(config, tensors)


def _integer_if_whole(value: float) -> float:
    """PEFT's alpha is an integer; a fraction is kept."""
    return int(value) if float(value).is_integer() else value


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"the adapter directory {folder} does not exist")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}; give the directory of a PEFT adapter")
    if not (folder / TENSORS_NAME).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{folder} has only adapter_model.bin, a pickle, which can run code and is not read; where "
                "you trust it, convert it with PEFT: PeftModel.from_pretrained(...).save_pretrained(new_dir)"
            )
        raise CheckpointError(f"{folder} has no {TENSORS_NAME}; get the file again")


def _check_adapter(adapter: AdapterFile, folder: str) -> None:
    """What is about to be written must be what would be read."""
    _check_config(adapter.config, f"{folder}/{CONFIG_NAME}")
    _check_tensors(adapter, folder)
    _check_targets(adapter, folder)


def _check_config(config: Mapping[str, Any], source: str) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{source}: peft_type={config.get('peft_type')!r} is not read; only 'LORA' is")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{source}: bias={config['bias']!r} is not supported; only 'none' is")
    init = config.get("init_lora_weights", True)
    if init not in _NEUTRAL_INITS:
        raise CheckpointError(
            f"{source}: init_lora_weights={init!r} changes the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for key, value in config.items():
        if key not in _NEUTRAL_KEYS and value not in (None, False, [], {}):
            raise CheckpointError(
                f"{source}: {key}={value!r} is not supported and may change what the adapter computes; "
                "merge the adapter with PEFT, or train one without it"
            )
    _check_number(config.get("r"), "r", source, whole=True)
    _check_number(config.get("lora_alpha"), "lora_alpha", source)
    dropout = config.get("lora_dropout", 0.0)
    _check_number(dropout, "lora_dropout", source)
    if not 0 <= dropout < 1:
        raise CheckpointError(f"{source}: lora_dropout={dropout!r} must be at least 0 and less than 1")
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        raise CheckpointError(f"{source}: use_rslora={config['use_rslora']!r} must be true or false")
    _check_target_modules(config.get("target_modules"), source)
    for pattern, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        _check_pattern(config.get(pattern) or {}, pattern, source, whole)


def _check_target_modules(targets: object, source: str) -> None:
    """PEFT writes them always; without them nobody knows which layers to make."""
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(
            f"{source}: target_modules={targets!r} must be the names of the adapted modules, such as "
            '["q_proj", "v_proj"], or one regular expression'
        )
    if isinstance(targets, str):
        _check_expression(targets, f"target_modules={targets!r}", source)


def _check_expression(expression: str, name: str, source: str) -> None:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{source}: {name} is no regular expression: {error}") from error


def _check_pattern(patterns: object, name: str, source: str, whole: bool) -> None:
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{source}: {name}={patterns!r} must map module names to numbers")
    for key, value in patterns.items():
        _check_number(value, f"{name}[{key!r}]", source, whole=whole)
        _check_expression(rf"(.*\.)?({key})$", f"{name} key {key!r}", source)


def _check_number(value: object, name: str, source: str, whole: bool = False) -> None:
    kind = "a positive integer" if whole else "a finite number"
    if whole:
        fits = type(value) is int and value > 0
    else:  # an integer may be beyond every float
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    if not fits:
        raise CheckpointError(f"{source}: {name}={value!r} must be {kind}")


def _check_tensors(adapter: AdapterFile, source: str) -> None:
    if not adapter.tensors:
        raise CheckpointError(f"{source}: the adapter has no tensors")
    for module, pair in adapter.tensors.items():
        for part in ("lora_A", "lora_B"):
            if part not in pair:
                raise CheckpointError(f"{source}: {_PREFIX}{module}.{part}.weight is missing, its partner is there")
            if pair[part].ndim != 2 or not pair[part].is_floating_point():
                raise CheckpointError(
                    f"{source}: {part} of {module!r} is {list(pair[part].shape)} {pair[part].dtype}, "
                    "not a matrix of floating-point numbers"
                )
        a, b, rank = pair["lora_A"], pair["lora_B"], adapter.rank_for(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{source}: {module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but the config "
                f"gives rank {rank}; expected [{rank}, in_features] and [out_features, {rank}]"
            )


def _check_targets(adapter: AdapterFile, source: str) -> None:
    """PEFT makes layers only for targets; the tensors of other modules would be ignored in silence."""
    targets = adapter.config.get("target_modules")
    for module in adapter.tensors:
        if isinstance(targets, str):
            hit = re.fullmatch(targets, module) is not None
        else:
            hit = any(module == name or module.endswith(f".{name}") for name in targets or ())
        if not hit:
            raise CheckpointError(
                f"cannot write {source}: target_modules={targets!r} does not match {module!r}, so PEFT would "
                "ignore its tensors; name it in target_modules"
            )
