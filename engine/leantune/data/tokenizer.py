"""The tokenizer of a checkpoint directory: `tokenizer.json` and the settings beside it."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leantune.errors import DataError

if TYPE_CHECKING:
    import tokenizers

    from leantune.data.template import ChatTemplate

Span = tuple[int, int]  # [start, end) in characters of a text

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, with character offsets and the checkpoint's chat template.

    backend: the `tokenizers.Tokenizer`; its stored padding and truncation are switched off.
    special_tokens: text of the special tokens by name ("bos_token", ...).
    templates: chat templates by name; "default" is the one in use, "tool_use" serves chats with tools.
    stop_ids: further ids that end a turn besides eos, as generation_config.json lists them.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        _keep_whitespace_in_offsets(backend)
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.templates = dict(templates or {})
        # A special token that the vocabulary holds as an ordinary word would be split in a rendered chat.
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        known = [t for t in self.special_tokens.values() if backend.token_to_id(t) is not None]
        backend.add_special_tokens([token for token in known if token not in added])
        self.added = backend.get_added_tokens_decoder()
        eos = self.eos_token_id
        self.stop_ids = frozenset(stop_ids) | frozenset([] if eos is None else [eos])
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint directory.

        Raises DataError for a missing or damaged file, naming it.
        """
        import tokenizers

        root = Path(path)
        file = root / "tokenizer.json"
        if not file.is_file():
            raise DataError(
                f"{root}: no tokenizer.json; save the fast tokenizer there "
                "(transformers.AutoTokenizer.from_pretrained(...).save_pretrained(dir))"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises bare Exception for any parse error
            raise DataError(f"{file}: not a readable tokenizer file: {error}; fetch it again") from error
        config = _read_json(root / "tokenizer_config.json")
        special = _special_tokens(_read_json(root / "special_tokens_map.json") | config)
        return cls(backend, special, _templates(root, config), _stop_ids(root / "generation_config.json"))

    # Ids and text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [n], offsets int64 [n, 2]) of each text, encoded in parallel.

        Offsets are the [start, end) characters behind a token; parts of one character all have its span.
        """
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [
            (np.array(e.ids, dtype=np.int32), np.array(e.offsets, dtype=np.int64).reshape(-1, 2)) for e in encodings
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def token_text(self, token_id: int) -> str:
        """What a token stands for, for people: text where it is whole characters, else its bytes in hex."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return f"<id {token_id}>"
        if token_id in self.added:
            return token
        if not self._byte_level:
            return token.replace("▁", " ")
        if any(char not in _BYTE_OF for char in token):
            return token
        raw = bytes(_BYTE_OF[char] for char in token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> np.ndarray:
        """bool [vocab_size]: True for the ids of special (markup) tokens."""
        table = np.zeros(max([self.vocab_size - 1, *self.added]) + 1, dtype=bool)
        table[[i for i, token in self.added.items() if token.special]] = True
        return table

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Text of the special (markup) tokens."""
        return tuple(token.content for token in self.added.values() if token.special)

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)

    # Special tokens

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    # Chat

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template."""
        return self.templates.get("default")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Render messages to the text the model is trained on; encode it with add_special_tokens=False.

        variables: further names for the template, such as tools or enable_thinking.
        Raises DataError when there is no template, or it fails.
        """
        return self._render(messages, add_generation_prompt, variables)[0]

    def render_with_generation_spans(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> tuple[str, list[Span]]:
        """The rendered text and the [start, end) characters of each `{% generation %}` block in it."""
        return self._render(messages, False, variables)

    def has_generation_marks(self, tools: Sequence[Any] | None = None) -> bool:
        return self._template(tools).has_generation_marks

    def is_dated(self, tools: Sequence[Any] | None = None) -> bool:
        """Whether the chat template asks for today's date."""
        return self._template(tools).dated

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        names = {"tools": None, "documents": None, **self.special_tokens, **variables}
        chat = [_with_reasoning(message) for message in messages]
        template = self._template(names["tools"])
        return template.render({**names, "messages": chat, "add_generation_prompt": add_generation_prompt})

    def _template(self, tools: Sequence[Any] | None) -> "ChatTemplate":
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            others = f" under the name 'default' (it has {', '.join(self.templates)})" if self.templates else ""
            raise DataError(
                f"the tokenizer has no chat template{others}; use the checkpoint's instruct version, add a "
                "chat_template.jinja to its directory, or train on prompt and completion without a template"
            )
        if name not in self._compiled:
            from leantune.data.template import ChatTemplate

            self._compiled[name] = ChatTemplate(self.templates[name])
        return self._compiled[name]


def _keep_whitespace_in_offsets(backend: "tokenizers.Tokenizer") -> None:
    """Byte-level post-processors trim spaces from offsets by default; masks need the true character range."""
    processor = backend.post_processor
    if processor is None:
        return
    state = json.loads(processor.__getstate__())
    for part in [state, *state.get("processors", [])]:
        if "trim_offsets" in part:
            part["trim_offsets"] = False
    processor.__setstate__(json.dumps(state).encode())
    backend.post_processor = processor


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning under one of two names, data sets write it under three."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, not an object; fetch the file again")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; a file writes each as text or as an object with its text under "content"."""
    values = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {name: v.get("content") if isinstance(v, dict) else v for name, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _stop_ids(path: Path) -> list[int]:
    """The ids under "eos_token_id" of a generation_config.json, written as one or as a list."""
    value = _read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise DataError(f"{path}: eos_token_id={value!r} must be a token id or a list of them")
    return ids


def _templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name; chat_template.jinja wins over the entry in tokenizer_config.json."""
    file = root / "chat_template.jinja"
    if file.is_file():
        try:
            return {"default": _read(file).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    items = [] if entry is None else entry
    if not isinstance(items, list) or not all(_is_named_template(item) for item in items):
        raise DataError(
            f"{root / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            '{"name": ..., "template": ...} with strings in both; mend it, or put the template into chat_template.jinja'
        )
    return {item["name"]: item["template"] for item in items}


def _is_named_template(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("name", "template"))


def _byte_alphabet() -> dict[str, int]:
    """Bytes by their characters in byte-level BPE: printable Latin-1 is itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
