"""From what a user types, a local directory or the id of a model on the Hugging Face hub, to files."""

import os
import re
from pathlib import Path

from leantune.errors import CheckpointError

# Nothing but what is read: no pickles, no weights of other frameworks.
PATTERNS = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
]
_NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}", re.ASCII)


def resolve(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Find a checkpoint: an existing path is used as it is, a hub id ("org/name") goes through the cache.

    Raises:
        CheckpointError: the path does not exist, or the model cannot be had (the message says why).
    """
    text = os.fspath(path_or_hub_id)
    if not text:
        raise CheckpointError("the model is empty; give a checkpoint directory or a hub id such as org/name")
    path = Path(text).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_hub_id, Path) or not is_hub_id(text):
        raise CheckpointError(f"the directory {text} does not exist; check the path")
    return _download(text)


def is_hub_id(text: str) -> bool:
    """Whether `text` follows the hub's rules for model ids; whatever starts like a path does not."""
    return bool(_HUB_ID.fullmatch(text)) and not re.search(r"--|\.\.|\.git$", text)


def _download(hub_id: str) -> Path:
    import huggingface_hub  # here, so that `import leantune` stays fast
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=PATTERNS))
    except GatedRepoError as error:
        raise CheckpointError(
            f"the model {hub_id!r} is gated; accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {hub_id!r} (or it is private), and there is no directory of that name; "
            "check the spelling, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the HTTP client differs between releases of the library, and so do its errors
        first_line = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"there is no directory {hub_id!r}, and the hub cannot be asked for a model of that name: give a "
            f"checkpoint directory, or check the network and HF_HUB_OFFLINE ({type(error).__name__}: {first_line})"
        ) from error
