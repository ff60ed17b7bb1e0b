"""LoRA: a trained low-rank update beside each frozen linear layer (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

import torch

from leantune.checkpoint.peft import load_adapter, write_lora_adapter
from leantune.errors import CheckpointError, ConfigError
from leantune.nn import Decoder, Linear, LowRank

_SIDES = ("in_features", "out_features")


@dataclass
class LoRA:
    """W x becomes W x + s B A x, with A [rank, in], B [out, rank] trained in fp32 and W frozen.

    s = alpha / rank, or alpha / sqrt(rank) with `use_rslora` (arXiv:2312.03732). dropout: probability on the input of
    A. targets: "all-linear" (every linear layer but the vocabulary head), a list of names such as ["q_proj"] (the end
    of a module path), or one regular expression over whole paths. A is drawn from `seed`, B starts at zero.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    use_rslora: bool = False
    seed: int = 0

    name = "lora"

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            self.targets = list(self.targets)  # a tuple would not survive the JSON of a checkpoint
            if not self.targets or not all(isinstance(name, str) for name in self.targets):
                raise ConfigError(f"targets={self.targets!r} must be 'all-linear', names, or a regular expression")
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout} must be in [0, 1)")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha={self.alpha} must be a positive number")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def apply(self, model: Decoder) -> Decoder:
        """Freezes the model and adds a trainable update to every target. Raises ConfigError, changing nothing."""
        chosen = self._targets(model)
        _check_rank(self.rank, chosen)
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for linear in chosen:
            lora = LowRank(linear.in_features, linear.out_features, self.rank, self.scale, self.dropout)
            lora.initialise(generator)
            linear.lora = lora.to(model.device)
        model.method = self
        return model

    def _targets(self, model: Decoder) -> list[Linear]:
        linears = model.linears()
        model.require_no_update()
        if self.targets == "all-linear":
            return linears
        names = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        matched = [linear for linear in linears if matches(self.targets, linear.path)]
        unmatched = [
            n for n in names if isinstance(self.targets, list) and not any(matches([n], li.path) for li in linears)
        ]
        if not matched or unmatched:
            known = sorted({linear.path.rpartition(".")[2] for linear in linears})
            raise ConfigError(
                f"targets={unmatched or self.targets!r} match no linear layer; names are {', '.join(known)} "
                f"(paths such as {linears[0].path}), or use 'all-linear'"
            )
        return matched

    def target_modules(self, model: Decoder) -> str | list[str]:
        """`target_modules` for PEFT: the targets as given, "all-linear" spelled out as the layers' names."""
        if self.targets == "all-linear":
            return sorted({linear.path.rpartition(".")[2] for linear in model.updated()})
        return self.targets

    def save_adapter(
        self, model: Decoder, directory: str | os.PathLike[str], overwrite: bool = False, portable: bool = False
    ) -> None:
        """Writes the adapter in PEFT's layout; see Model.save_adapter."""
        modules, ranks, alphas = {}, {}, {}
        for linear in model.updated():
            assert linear.lora is not None
            lora = linear.lora
            modules[linear.path] = (lora.A.detach(), lora.B.detach())
            rank = lora.A.shape[0]
            alpha = lora.scale * (math.sqrt(rank) if self.use_rslora else rank)
            if rank != self.rank:
                ranks[linear.path] = rank
            if not math.isclose(alpha, self.alpha, rel_tol=1e-6):
                alphas[linear.path] = alpha
        write_lora_adapter(
            directory,
            modules=modules,
            rank=self.rank,
            alpha=self.alpha,
            use_rslora=self.use_rslora,
            dropout=self.dropout,
            target_modules=self.target_modules(model),
            base_model_name_or_path=model.name_or_path,
            rank_pattern={re.escape(k): v for k, v in ranks.items()},
            alpha_pattern={re.escape(k): v for k, v in alphas.items()},
            overwrite=overwrite,
            portable=portable,
        )

    @classmethod
    def load_adapter(cls, model: Decoder, directory: str | os.PathLike[str]) -> LoRA:
        """Puts a saved adapter (PEFT's, ours or another tool's) on the model, ready to use or to train on."""
        file = load_adapter(directory)
        config = file.config
        method = cls(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=config["target_modules"],
            use_rslora=bool(config.get("use_rslora")),
        )
        linears = {linear.path: linear for linear in model.linears()}
        for path in file.tensors:
            if path not in linears:
                raise CheckpointError(
                    f"{directory}: the adapter has a module {path!r}, which this model lacks; it was trained on "
                    f"{config.get('base_model_name_or_path')!r}"
                )
        model.require_no_update()
        for path, pair in file.tensors.items():
            _check_shapes(linears[path], pair, directory)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for path, pair in file.tensors.items():
            linear = linears[path]
            lora = LowRank(
                linear.in_features,
                linear.out_features,
                pair["lora_A"].shape[0],
                file.scale_for(path),
                method.dropout,
            )
            with torch.no_grad():
                lora.A.copy_(pair["lora_A"])
                lora.B.copy_(pair["lora_B"])
            linear.lora = lora.to(model.device)
        model.method = method
        return method


def matches(targets: str | list[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression over the whole path, a list names ends of it."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, path) is not None
        except re.error as error:
            raise ConfigError(f"targets={targets!r} is not a valid regular expression: {error}") from error
    return any(path == name or path.endswith(f".{name}") for name in targets)


def _check_rank(rank: int, linears: list[Linear]) -> None:
    sizes = [(getattr(linear, name), name, linear.path) for linear in linears for name in _SIDES]
    size, name, path = min(sizes, key=lambda entry: entry[0])
    if rank > size:
        raise ConfigError(f"rank={rank} exceeds {name}={size} of {path!r}; use rank <= {size}")


def _check_shapes(linear: Linear, pair: dict[str, torch.Tensor], directory: str | os.PathLike[str]) -> None:
    found = (pair["lora_A"].shape[1], pair["lora_B"].shape[0])
    wanted = (linear.in_features, linear.out_features)
    if found != wanted:
        raise CheckpointError(
            f"{directory}: the adapter of {linear.path!r} is for in, out = {found}, the model's layer has {wanted}; "
            "this adapter belongs to another base model"
        )
