"""`leantune.load` and the model it returns: the decoder with its tokenizer, its adapter and its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leantune import models
from leantune.checkpoint.atomic import atomic_directory
from leantune.checkpoint.header import read_json_object
from leantune.checkpoint.hub import resolve
from leantune.checkpoint.reader import CheckpointReader
from leantune.checkpoint.writer import PendingTensor, save_sharded, write_json
from leantune.data.tokenizer import Tokenizer
from leantune.errors import CheckpointError, ConfigError
from leantune.methods.lora import LoRA
from leantune.nn import Decoder, DecoderConfig, Linear
from leantune_kernels import low_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_BYTES = 5 * 10**9
# What a checkpoint directory holds beside weights; save_merged takes it along unchanged.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json", "vocab.json",
               "merges.txt", "added_tokens.json")  # fmt: skip


class Model(Decoder):
    """A decoder that knows where it came from. Calling it maps ids [batch, length] to logits; train it with Trainer."""

    def __init__(self, config: DecoderConfig, name_or_path: str, directory: Path) -> None:
        super().__init__(config, name_or_path)
        self.directory = directory
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read when first asked for. Raises DataError if the checkpoint has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_directory(self.directory)
        return self._tokenizer

    def save_adapter(self, directory: str | os.PathLike[str], overwrite: bool = False, portable: bool = False) -> None:
        """Writes what was trained, in PEFT's layout. Raises CheckpointError if `directory` holds something already.

        portable: one rank everywhere (zero-padded) and the scale folded into B, which PEFT, vLLM and llama.cpp all
        read alike; they differ on rank patterns, alpha patterns and rsLoRA.
        """
        if not hasattr(self.method, "save_adapter"):
            raise ConfigError("there is no adapter to save: apply LoRA first, or use save_merged() for whole models")
        self.method.save_adapter(self, directory, overwrite, portable)

    def load_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Puts a LoRA adapter in PEFT's layout on the model; its parameters are trainable. Raises CheckpointError."""
        LoRA.load_adapter(self, directory)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the adapter into the weights (added in fp32, rounded once). `unmerge` restores them bit by bit."""
        for linear in self.updated():
            if linear.base is None:
                linear.base = linear.weight.data
                linear.weight.data = _merged(linear).to(linear.base.dtype)

    def unmerge(self) -> None:
        """Takes the adapter out of the weights again: the very weights from before `merge` are put back."""
        for linear in self.updated():
            if linear.base is not None:
                linear.weight.data, linear.base = linear.base, None

    def save_merged(
        self,
        directory: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        max_shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        """Writes a Hugging Face checkpoint with the adapter folded in: config, weights, tokenizer.

        Updates are added in fp32 and rounded once to `dtype` (default: the dtype the checkpoint was stored in). Tensors
        are formed and written one at a time. Tied embeddings are written once.
        """
        stored = dtype or self._stored_dtype()
        with atomic_directory(directory, overwrite=overwrite) as folder:
            save_sharded(folder, list(self._merged_tensors(stored)), max_shard_bytes)
            raw = {k: v for k, v in self.config.raw.items() if k != "dtype"}
            raw["torch_dtype"] = str(stored).removeprefix("torch.")
            write_json(folder / "config.json", raw)
            for pattern in _COMPANIONS:
                for source in sorted(self.directory.glob(pattern)):
                    (folder / source.name).write_bytes(source.read_bytes())

    def _merged_tensors(self, dtype: torch.dtype) -> Iterator[PendingTensor]:
        linear_of = {id(m.weight): m for m in self.modules() if isinstance(m, Linear)}
        for name, parameter in self.named_parameters():
            if ".lora." in name:
                continue
            linear = linear_of.get(id(parameter))

            def load(parameter: torch.Tensor = parameter, linear: Linear | None = linear) -> torch.Tensor:
                with torch.no_grad():
                    if linear is not None and linear.lora is not None:
                        return _merged(linear).to(dtype)
                    return parameter.detach().to(dtype)

            nbytes = parameter.numel() * dtype.itemsize
            yield PendingTensor(name, nbytes, tuple(parameter.shape), dtype, load)

    def _stored_dtype(self) -> torch.dtype:
        given = self.config.raw.get("torch_dtype") or self.config.raw.get("dtype")
        return DTYPES.get(str(given), self.model.embed_tokens.weight.dtype)


def _merged(linear: Linear) -> torch.Tensor:
    """W + s*B*A in fp32, from the weight as it was loaded."""
    assert linear.lora is not None
    weight = linear.weight.data if linear.base is None else linear.base
    return low_rank.merge(weight, linear.lora.A, linear.lora.B, linear.lora.scale)


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Loads a Hugging Face checkpoint: a directory with config.json and safetensors, or a hub id.

    dtype: how weights are stored, such as torch.bfloat16 or "bfloat16"; default float32 on the CPU, the checkpoint's
    own on a GPU. On the CPU everything is computed in float32, so bfloat16 halves the memory of frozen weights at some
    cost in time (generation converts every weight for every token: use float32 there). Weights whose dtype fits stay in
    the memory map of the file: nothing is read before it is used, and nothing is held twice.

    Raises CheckpointError (missing or damaged files, tensors that disagree with the config) and ConfigError (a model
    or a config field that is not supported).
    """
    directory = resolve(path_or_hub_id)
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: this PyTorch sees no CUDA device; use device='cpu'")
    stored = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and stored not in DTYPES.values():
        raise ConfigError(f"dtype={dtype!s} is not supported; use one of {', '.join(DTYPES)}")
    raw = read_config(directory)
    model = Model(models.family(raw).config(raw), os.fspath(path_or_hub_id), directory)
    reader = CheckpointReader(directory)
    _check_tensors(model, reader)
    if stored is None and target.type == "cpu":
        stored = torch.float32
    for name, _ in list(model.named_parameters()):
        value = reader.get(name)
        keep_wide = target.type == "cpu" and value.dim() == 1  # norms and biases: small, and added to fp32
        _assign(model, name, value.to(target, torch.float32 if keep_wide else stored or value.dtype))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory. Raises CheckpointError if it is absent or not a JSON object."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a single file; give the directory that also holds config.json")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; is it a Hugging Face checkpoint directory?")
    return read_json_object(directory / "config.json")


def _check_tensors(model: Model, reader: CheckpointReader) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = [name for name in expected if name not in reader]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; if head and embedding are shared, config.json must say tie_word_embeddings: true"
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"{reader.path}: the checkpoint lacks {shown}{hint}")
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{reader.path}: {name} has shape {list(reader.shape(name))}, config.json asks for {list(shape)}"
            )
        if not reader.dtype(name).is_floating_point or reader.dtype(name).itemsize < 2:
            raise CheckpointError(
                f"{reader.path}: {name} is stored as {reader.dtype(name)}; quantised checkpoints are not supported, "
                "use the float original"
            )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    extra = [n for n in reader.names() if n not in expected and n not in tied and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(
            f"{reader.path}: {extra[0]} (and {len(extra) - 1} more) is not part of a {model.config.model_type} model "
            "with this config.json; loading without it would compute something else"
        )


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
