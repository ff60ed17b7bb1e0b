"""What a record must look like, and its fields taken out with every mistake named."""

from collections.abc import Mapping
from typing import Any

from leantune.data.readers import Record
from leantune.errors import ConfigError, DataError

Message = dict[str, Any]

FIELD_NAMES = ("messages", "tools", "system", "prompt", "completion", "text")


def check_fields(fields: Mapping[str, str] | None) -> None:
    """Refuse a field mapping whose right-hand sides are not names that the readers know."""
    targets = list((fields or {}).values())
    for column, name in (fields or {}).items():
        if name not in FIELD_NAMES:
            raise ConfigError(f"fields maps {column!r} to {name!r}; map to one of {', '.join(FIELD_NAMES)}")
        if targets.count(name) > 1:
            raise ConfigError(f"fields maps more than one column to {name!r}; map one column to each name")


def rename(record: Record, fields: Mapping[str, str] | None, where: str) -> Record:
    """The record with its columns renamed by `fields` (column -> name); other columns stay."""
    if not fields:
        return record
    for column in fields:
        if column not in record:
            raise DataError(f"{where}: no column {column!r} to map; the record has {_keys(record)}")
    kept = {key: value for key, value in record.items() if key not in fields}
    return kept | {name: record[column] for column, name in fields.items()}


def as_text(record: Record, where: str) -> str:
    """The record's text. Raises DataError that begins with `where`."""
    return _string(record, "text", where)


def as_pair(record: Record, where: str) -> tuple[str, str]:
    """(prompt, completion) of the record. Raises DataError that begins with `where`."""
    return _string(record, "prompt", where), _string(record, "completion", where)


def as_messages(record: Record, where: str) -> tuple[list[Message], list[Any] | None]:
    """The messages of a chat record and its tools, as plain data that is safe to give to a template.

    Takes {"messages": [...]} with an optional "tools" list, or {"prompt", "completion"} with an
    optional "system"; an empty or null "system" means none, as a table with that column needs.
    """
    if "messages" in record:
        return _messages(record["messages"], where), _tools(record.get("tools"), where)
    if "prompt" not in record and "completion" not in record:
        raise DataError(
            f"{where}: no 'messages', nor 'prompt' and 'completion'; the record has {_keys(record)}; "
            "map its columns: --field question=prompt --field answer=completion, or fields={'question': 'prompt', ...}"
        )
    prompt, completion = as_pair(record, where)
    messages: list[Message] = []
    if record.get("system") not in (None, ""):
        messages.append({"role": "system", "content": _string(record, "system", where)})
    messages.append({"role": "user", "content": prompt})
    messages.append({"role": "assistant", "content": completion})
    return messages, None


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: 'messages' is {_type(value)}; it must be a list of {{role, content}} objects")
    if not value:
        raise DataError(f"{where}: 'messages' is empty; write at least a user and an assistant message")
    return [_message(message, f"{where}: messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {_type(value)}; it must be an object with 'role' and 'content'")
    # Templates expect a missing key where a table or an API writes null; a tool call may lack content.
    message = {str(key): _plain(item, where) for key, item in value.items() if item is not None}
    _check_string(value, "role", where + ":")
    if "content" in message or not message.get("tool_calls"):
        _check_string(value, "content", where + ":")
    return message


def _tools(value: Any, where: str) -> list[Any] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: 'tools' is {_type(value)}; it must be a list of JSON schemas")
    return [_plain(tool, f"{where}: 'tools'") for tool in value] or None


def _plain(value: Any, where: str) -> Any:
    """Nested data rebuilt from plain types: a template must not hold an object with methods of its own."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, str):
        _check_unicode(value, where)
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise DataError(f"{where} holds a {type(value).__name__}; use text, numbers, lists and objects only")


def _string(record: Record, key: str, where: str) -> str:
    _check_string(record, key, f"{where}:")
    return str.__str__(record[key])


def _check_string(record: Record, key: str, where: str) -> None:
    if key not in record:
        raise DataError(f"{where} no {key!r}; the record has {_keys(record)}; add it, or map a column to it")
    value = record[key]
    if value is None:
        raise DataError(f"{where} {key!r} is null; give it text or remove the record")
    if not isinstance(value, str):
        raise DataError(f"{where} {key!r} is {_type(value)}; it must be text")
    if not value.strip():
        raise DataError(f"{where} {key!r} is empty; give it text or remove the record")
    _check_unicode(value, f"{where} {key!r}")


def _check_unicode(value: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair (U+{ord(value[error.start]):04X}) at character "
            f"{error.start}; write the whole character"
        ) from error


def _type(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _keys(record: Record) -> str:
    return ", ".join(repr(key) for key in record) or "no keys"
