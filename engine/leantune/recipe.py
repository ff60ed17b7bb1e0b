"""The recipe of a training run: flags over a TOML file over defaults, checked before anything is loaded.

One flat set of keys: those of Recipe, of TrainConfig and of the chosen method. A TOML file and `--set` take them all.
"""

from __future__ import annotations

import difflib
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from dataclasses import field as default_of
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from leantune import methods
from leantune.config import TrainConfig
from leantune.errors import ConfigError
from leantune.methods import Full, LoRA
from leantune.model import DTYPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "recipe.toml"
METHODS: dict[str, Any] = {getattr(methods, name).name: getattr(methods, name) for name in methods.__all__}
_REGEX = "re:"  # marks a regular expression in `targets`
_HEADER = """\
# The settings of this run, defaults included. Repeat it with
#     leantune train {path} --out ANOTHER-DIRECTORY
# from the directory it was started in, which its relative paths refer to.
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    model: checkpoint directory or hub id. data, eval_data: files. field: column -> name, such as question -> prompt.
    out: directory of the run. adapter: a saved adapter to go on with; the method's settings are then its own.
    epochs, max_steps: one epoch if neither is given. dtype: how frozen weights are held. merge: also write the merged
    checkpoint. train: the trainer's settings. tuning: the method, None with `adapter`.
    """

    model: str
    data: str
    out: str
    adapter: str | None = None
    field: dict[str, str] = default_of(default_factory=dict)
    eval_data: str | None = None
    max_length: int = 2048
    on_long: str = "truncate"
    train_on: str = "assistant"
    method: str = "lora"
    epochs: int | None = None
    max_steps: int | None = None
    dtype: str | None = None
    threads: int | None = None
    merge: bool = False
    train: TrainConfig = default_of(default_factory=TrainConfig)
    tuning: LoRA | Full | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is unknown; use {', '.join(DTYPES)}")
        if self.method == Full.name and self.adapter is not None:
            raise ConfigError("adapter goes on with an adapter, method='full' trains all weights; merge it first")
        if self.method == Full.name and self.merge:
            raise ConfigError("merge=true is for adapters; method='full' writes a whole model anyway")

    def to_toml(self) -> str:
        """All settings in effect, as a file that `read` takes back."""
        values = {name: getattr(self, name) for name in _RUN}
        values |= {name: getattr(self.train, name) for name in _TRAIN} | {"out": self.out}
        if self.tuning is not None:
            values |= {f.name: getattr(self.tuning, f.name) for f in fields(self.tuning)}
        lines = [
            f"{key} = {_toml(_written(key, value))}"
            for key, value in values.items()
            if value != {} and not (value is None and key in _OPTIONAL)
        ]
        return _HEADER.format(path=Path(self.out) / FILE_NAME) + "\n".join(lines) + "\n"


def read(file: Path | None, flags: Mapping[str, Any], assignments: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, `--set` assignments "key=value" and flags; the later win.

    Raises ConfigError that names the key and where it stands, for one that is unknown, has a value of the wrong type,
    or is at odds with another.
    """
    given = {} if file is None else _checked(_parse(file), f"{file}: ")
    assigned: dict[str, Any] = {}
    for entry in assignments:
        key, equals, text = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ConfigError(f"--set {entry!r} has no value; write --set {entry}=VALUE")
        if key in assigned or key in flags:
            raise ConfigError(f"--set {entry!r}: {key} is given twice; keep one of them")
        assigned[key] = text.strip()
    return _build(given | _checked(assigned, "--set ") | _checked(flags, ""), file)


def _build(given: Mapping[str, Any], file: Path | None) -> Recipe:
    for key in ("model", "data", "out"):
        if not given.get(key):
            raise ConfigError(f"{key} is missing; give --{key}" + (f", or {key} = ... in {file}" if file else ""))
    method = given.get("method", LoRA.name)
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown; use {', '.join(METHODS)}")
    own = {f.name for f in fields(METHODS[method])}
    tuning = {key: value for key, value in given.items() if key in own}
    foreign = [key for key in given if key not in {*_RUN, *_TRAIN, *own}]
    if foreign:
        raise ConfigError(f"{foreign[0]} is no setting of method={method!r}; leave it out")
    if given.get("adapter") is not None:
        fixed = [key for key in tuning if key not in _TRAIN]
        if fixed:
            raise ConfigError(f"{fixed[0]} is fixed by the adapter that training goes on with; leave it out")
    recipe = Recipe(
        **{key: value for key, value in given.items() if key in _RUN},
        train=TrainConfig.of({key: value for key, value in given.items() if key in _TRAIN}),
    )
    return recipe if recipe.adapter is not None else replace(recipe, tuning=METHODS[method](**tuning))


# ---- keys and values -------------------------------------------------------------------------------------------------

_RUN = [f.name for f in fields(Recipe) if f.name not in ("train", "tuning")]
_TRAIN = [f.name for f in fields(TrainConfig)]
_OPTIONAL = {f.name for f in (*fields(Recipe), *fields(TrainConfig)) if f.default is None}


def _hints() -> dict[str, Any]:
    """{key: type}, all keys."""
    found: dict[str, Any] = {}
    for owner in [*METHODS.values(), TrainConfig, Recipe]:
        hints = get_type_hints(owner)
        found |= {f.name: hints[f.name] for f in fields(owner) if f.name not in ("train", "tuning")}
    return found


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values in their keys' types. Raises ConfigError, which begins with `where`."""
    hints, result = _hints(), {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{where}unknown key {key!r}{_similar(key, hints)}; keys are {', '.join(sorted(hints))}")
        try:
            result[key] = _targets(value) if key == "targets" else _fit(value, hints[key])
        except ValueError as error:
            raise ConfigError(f"{where}{key}={value!r} must be {_named(hints[key])}") from error
    return result


def _similar(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _fit(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; text, as `--set` gives it, is read as that type. Raises ValueError."""
    if get_origin(hint) in (Union, types.UnionType):
        return _fit_first(value, get_args(hint))
    if get_origin(hint) is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
        return tuple(_fit(part, kind) for part, kind in zip(parts, get_args(hint), strict=True))
    if get_origin(hint) is dict:
        return _pairs(value)
    if hint is type(None) and (value is None or value == "none"):
        return None
    if hint is bool and (isinstance(value, bool) or value in ("true", "false")):
        return value in (True, "true")
    if hint in (int, float) and isinstance(value, (str, int, hint)) and not isinstance(value, bool):
        return hint(value)
    if hint is str and isinstance(value, str):
        return value
    raise ValueError


def _fit_first(value: Any, hints: Iterable[Any]) -> Any:
    for hint in sorted(hints, key=lambda hint: hint is not type(None)):
        try:
            return _fit(value, hint)
        except ValueError:
            continue
    raise ValueError


def _pairs(value: Any) -> dict[str, str]:
    """A table, or a list of "column=name"."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple)):
        # The name is what the last = leaves: columns come from files and may hold one.
        value = {column: name for column, _, name in (str(entry).rpartition("=") for entry in value)}
    if not isinstance(value, Mapping) or not all(k and isinstance(v, str) and v for k, v in value.items()):
        raise ValueError
    return dict(value)


def _targets(value: Any) -> str | list[str]:
    """The method's `targets` from "all-linear", "q_proj,v_proj", "re:EXPRESSION" or a list of names."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError
    if value.startswith(_REGEX):
        return value.removeprefix(_REGEX)
    return value if value == "all-linear" else [name.strip() for name in value.split(",")]


def _named(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        names = [_named(option) for option in get_args(hint) if get_origin(option) is None]
        return " or ".join(names)
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} numbers, such as 0.9,0.95"
    if get_origin(hint) is dict:
        return "COLUMN=NAME, such as question=prompt"
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    return kinds[hint]


# ---- TOML ------------------------------------------------------------------------------------------------------------


def _parse(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # TOML or UTF-8
        raise ConfigError(f"{file}: not a TOML file: {error}") from error


def _written(key: str, value: Any) -> Any:
    return _REGEX + value if key == "targets" and isinstance(value, str) and value != "all-linear" else value


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    # A JSON string is a TOML string, but for the one control character that JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
