"""Records to token ids, with the mask of the tokens to train on taken from character offsets."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal, get_args

import numpy as np

from leantune.data.dataset import Dataset, Draft, assemble
from leantune.data.readers import Record, Records, Source, open_records
from leantune.data.records import as_messages, as_pair, as_text, check_fields, rename
from leantune.data.spans import RoleSpan, TrainOn, render_chat
from leantune.data.tokenizer import Span, Tokenizer
from leantune.errors import ConfigError, DataError

OnLong = Literal["truncate", "drop"]
_CHUNK = 512  # records encoded at once: enough to keep the tokenizer's threads busy, little memory
_UNLABELLED_FIX = "every sample needs one to learn from; mend or remove the record"


@dataclass(slots=True)
class _Prepared:
    """Text of one record with its spans in characters, before encoding.

    standalone: the text is no template's, so the tokenizer's start token and an end token are added.
    exact: labels say exactly what to train on; if not, white space after an end-of-turn token is left out.
    dated: the text comes from a template that asks for today's date.
    """

    text: str
    labels: list[Span]
    roles: list[RoleSpan]
    standalone: bool
    exact: bool = True
    dated: bool = False


@dataclass(slots=True)
class _Encoder:
    """Turns prepared records into drafts and keeps the counts.

    max_length: tokens a sample may have. on_long: what happens to one that has more.
    """

    tokenizer: Tokenizer
    max_length: int
    on_long: OnLong
    role_names: list[str] = field(default_factory=lambda: ["template"])
    unlabelled: int = 0
    dropped: int = 0

    def encode(self, prepared: list[_Prepared], numbers: list[int], at: Callable[[int], str]) -> Iterator[Draft]:
        encoded = self.tokenizer.encode_batch([p.text for p in prepared], prepared[0].standalone)
        for item, (ids, offsets), number in zip(prepared, encoded, numbers, strict=True):
            try:
                draft = self._draft(item, ids, offsets, number)
            except DataError as error:
                raise DataError(f"{at(number)}: {error}") from error
            if draft is not None:
                yield draft

    def _draft(self, item: _Prepared, ids: np.ndarray, offsets: np.ndarray, number: int) -> Draft | None:
        if item.standalone:
            ids, offsets = self._one_start(ids, offsets)
        special = self.tokenizer.special_ids[ids]
        mask = self._labels(item, ids, offsets, special)
        roles = np.zeros(len(ids), dtype=np.uint8)
        for role, start, end in item.roles:
            roles[_inside(offsets, start, end)] = self._role_code(role)
        roles[special] = 0
        if item.standalone:
            ids, mask, roles = self._with_end(ids, mask, roles)
        mask[:1] = False  # nothing comes before the first token to predict it from
        if not mask.any():
            raise DataError(f"no label token in the {len(ids)} tokens of the sample; {_UNLABELLED_FIX}")
        return self._fit(Draft(ids, mask, roles, number, truncated=False))

    def _fit(self, draft: Draft) -> Draft | None:
        n = self.max_length
        if len(draft.ids) <= n:
            return draft
        if self.on_long == "drop":
            self.dropped += 1
            return None
        if not draft.mask[:n].any():
            self.unlabelled += 1
            self.dropped += 1
            return None
        # Copies, so that the part cut off does not stay in memory.
        return Draft(draft.ids[:n].copy(), draft.mask[:n].copy(), draft.roles[:n].copy(), draft.number, truncated=True)

    def _one_start(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drop the tokenizer's start token where the text brings its own."""
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            return ids[1:], offsets[1:]
        return ids, offsets

    def _labels(self, item: _Prepared, ids: np.ndarray, offsets: np.ndarray, special: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(ids), dtype=bool)
        closings = set(offsets[special, 1].tolist())
        for start, end in item.labels:
            # Generation stops at the end-of-turn token, so the model never writes the white space after it.
            # Where no special token closes the turn, white space is its only end and stays a target.
            words_end = start + len(item.text[start:end].rstrip())
            if not item.exact and words_end in closings:
                end = words_end
            inside = _inside(offsets, start, end)
            _check_boundary(item.text, start, offsets, inside & ~special)
            mask |= inside
            if item.exact:
                mask |= self._end_of_turn(ids, offsets, end)
        return mask

    def _end_of_turn(self, ids: np.ndarray, offsets: np.ndarray, end: int) -> np.ndarray:
        """The end-of-turn token right after a span: marks often exclude it, yet it must be learnt."""
        stops = np.isin(ids, list(self.tokenizer.stop_ids))
        return stops & (offsets[:, 0] == end) & (offsets[:, 1] > end)

    def _with_end(
        self, ids: np.ndarray, mask: np.ndarray, roles: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Close the sample with a supervised end token, unless the text or the tokenizer wrote one."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so the model would never learn to stop; "
                'name it as "eos_token" in tokenizer_config.json'
            )
        if not len(ids) or ids[-1] != eos:
            ids = np.append(ids, np.int32(eos))
            mask, roles = np.append(mask, True), np.append(roles, np.uint8(0))
        mask[-1] = True
        return ids, mask, roles

    def _role_code(self, role: str) -> int:
        if role not in self.role_names:
            if len(self.role_names) == 256:
                raise DataError(f"role {role!r} is the 256th role of the data; use a few role names")
            self.role_names.append(role)
        return self.role_names.index(role)


def _inside(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """Tokens that begin in [start, end); one that straddles start began before it and is not among them."""
    return (offsets[:, 0] >= start) & (offsets[:, 0] < end)


def _check_boundary(text: str, start: int, offsets: np.ndarray, words: np.ndarray) -> None:
    """Refuse a label span all of whose words went to a token that begins before it, and so to the prompt."""
    across = (offsets[:, 0] < start) & (offsets[:, 1] > start)
    if across.any() and not any(text[a:b].strip() for a, b in offsets[words].tolist()):
        a, b = offsets[across][0].tolist()
        raise DataError(
            f"the token {text[a:b]!r} has the end of the prompt and all there is to learn, so nothing would "
            "be trained; end the prompt before its white space and begin the answer with it"
        )


Prepare = Callable[[Record, str], _Prepared]


def chat(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int = 2048,
    on_long: OnLong = "truncate",
    fields: Mapping[str, str] | None = None,
    train_on: TrainOn = "assistant",
) -> Dataset:
    """Conversations, rendered by the checkpoint's chat template.

    source: a .jsonl, .json, .csv, .tsv or .parquet file, or an iterable of dicts. Records are
    {"messages": [{"role", "content"}, ...]} with optional "tools", or {"prompt", "completion"} with
    optional "system".
    max_length: tokens a sample may have; on_long says whether a longer one is cut ("truncate") or left
    out ("drop").
    fields: column -> name, such as {"question": "prompt", "answer": "completion"}.
    train_on: targets are what the model writes in every assistant turn ("assistant") or in the last one
    ("last"), with the end-of-turn token but not the white space after it; or every token but the first
    ("all").

    Raises DataError naming file and line for a record or a template that cannot be used, ConfigError for a
    setting out of range.
    """
    return _build(open_records(source), tokenizer, _chat(tokenizer, train_on), max_length, on_long, fields)


def completion(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int = 2048,
    on_long: OnLong = "truncate",
    fields: Mapping[str, str] | None = None,
) -> Dataset:
    """{"prompt", "completion"} records without a template; the completion and an end token are targets.

    The joint text is encoded once, and a token with characters of both parts counts as prompt.
    Other arguments and errors as in `chat`.
    """
    return _build(open_records(source), tokenizer, _prepare_pair, max_length, on_long, fields)


def text(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int = 2048,
    on_long: OnLong = "truncate",
    fields: Mapping[str, str] | None = None,
) -> Dataset:
    """{"text"} records; all tokens but the first are targets, and so is an end token that is added.

    Arguments and errors as in `chat`.
    """
    return _build(open_records(source), tokenizer, _prepare_text, max_length, on_long, fields)


def auto(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int = 2048,
    on_long: OnLong = "truncate",
    fields: Mapping[str, str] | None = None,
    train_on: TrainOn = "assistant",
) -> Dataset:
    """`chat`, `completion` or `text`, as the first record's keys and the tokenizer's chat template say.

    "messages" means chat; "prompt" and "completion" mean chat if there is a template, else completion; "text"
    is text. Arguments and errors as in `chat`; train_on other than "assistant" needs chat data.
    """
    check_fields(fields)
    records = open_records(source)
    first = next(records.stream, None)
    if first is None:
        raise _no_records(records.name)
    records.stream = chain([first], records.stream)
    keys = set(rename(first[1], fields, records.at(first[0])))
    pair = {"prompt", "completion"} <= keys
    if "messages" in keys or (pair and tokenizer.chat_template is not None):
        prepare = _chat(tokenizer, train_on)
    elif pair or "text" in keys:
        if train_on != "assistant":
            raise ConfigError(f"train_on={train_on!r} is for chat data, and {records.name} has none; leave it out")
        prepare = _prepare_pair if pair else _prepare_text
    else:
        raise DataError(
            f"{records.at(first[0])}: the record has {', '.join(map(repr, sorted(keys)))}, and none of "
            "'messages', 'prompt' with 'completion', or 'text'; "
            "map its columns: --field question=prompt --field answer=completion, or fields={'question': 'prompt', ...}"
        )
    return _build(records, tokenizer, prepare, max_length, on_long, fields)


def _chat(tokenizer: Tokenizer, train_on: TrainOn) -> Prepare:
    if train_on not in get_args(TrainOn):
        raise ConfigError(f"train_on={train_on!r} is unknown; use one of {', '.join(get_args(TrainOn))}")

    def prepare(record: Record, where: str) -> _Prepared:
        messages, tools = as_messages(record, where)
        try:
            chat = render_chat(tokenizer, messages, tools, train_on)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        dated = tokenizer.is_dated(tools)
        return _Prepared(chat.text, chat.labels, chat.roles, standalone=False, exact=chat.exact, dated=dated)

    return prepare


def _prepare_pair(record: Record, where: str) -> _Prepared:
    prompt, answer = as_pair(record, where)
    middle, end = len(prompt), len(prompt) + len(answer)
    roles = [("prompt", 0, middle), ("completion", middle, end)]
    return _Prepared(prompt + answer, [(middle, end)], roles, standalone=True)


def _prepare_text(record: Record, where: str) -> _Prepared:
    words = as_text(record, where)
    return _Prepared(words, [(0, len(words))], [("text", 0, len(words))], standalone=True)


def _build(
    records: Records,
    tokenizer: Tokenizer,
    prepare: Prepare,
    max_length: int,
    on_long: OnLong,
    fields: Mapping[str, str] | None,
) -> Dataset:
    check_fields(fields)
    if max_length < 2:
        raise ConfigError(f"max_length={max_length} leaves no token to predict; use 2 or more")
    if on_long not in get_args(OnLong):
        raise ConfigError(f"on_long={on_long!r} is unknown; use one of {', '.join(get_args(OnLong))}")
    encoder = _Encoder(tokenizer, max_length, on_long)
    drafts: list[Draft] = []
    empty, dated = True, False
    while chunk := list(islice(records.stream, _CHUNK)):
        empty = False
        places = [records.at(number) for number, _ in chunk]
        prepared = [
            prepare(rename(record, fields, where), where) for (_, record), where in zip(chunk, places, strict=True)
        ]
        dated = dated or any(item.dated for item in prepared)
        drafts += encoder.encode(prepared, [number for number, _ in chunk], records.at)
    if empty:
        raise _no_records(records.name)
    if not drafts:
        what = "keeps a label token within" if on_long == "truncate" else "fits in"
        raise DataError(
            f"{records.name}: none of {encoder.dropped} samples {what} max_length={max_length} tokens; raise max_length"
        )
    source = (records.name, records.by_line)
    return assemble(drafts, tokenizer, encoder.role_names, source, encoder.unlabelled, encoder.dropped, dated)


def _no_records(name: str) -> DataError:
    return DataError(f"{name}: there is no record; write at least one")
