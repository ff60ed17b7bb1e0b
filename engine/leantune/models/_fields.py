"""Reading config.json: helpers that use a field, or refuse it by name."""

from __future__ import annotations

from typing import Any

from leantune.errors import ConfigError
from leantune.nn.config import RopeConfig


def required(raw: dict[str, Any], name: str) -> Any:
    """raw[name]; ConfigError if it is absent."""
    if raw.get(name) is None:
        raise ConfigError(f"config.json: {name!r} is missing; is this directory a complete Hugging Face checkpoint?")
    return raw[name]


def count(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number; `default` where absent or null, ConfigError where there is none."""
    value = raw.get(name)
    if value is None:
        value = required(raw, name) if default is None else default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {name}={value!r} must be a positive integer")
    return value


def must_be(raw: dict[str, Any], name: str, *allowed: Any) -> None:
    """ConfigError unless the field is absent, null or one of the values that change nothing."""
    value = raw.get(name)
    if value is not None and value not in allowed:
        raise ConfigError(
            f"config.json: {name}={value!r} is not supported (it changes the computation); supported: "
            + ", ".join(repr(a) for a in allowed)
        )


def number(raw: dict[str, Any], name: str, default: float, where: str = "") -> float:
    """A finite positive number, `default` where absent."""
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {where}{name}={value!r} must be a positive number")
    return float(value)


def flag(raw: dict[str, Any], name: str, default: bool = False) -> bool:
    """A boolean field, `default` where absent or null."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {name}={value!r} must be true or false")
    return value


def rope(raw: dict[str, Any]) -> RopeConfig:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"config.json: rope_parameters={given!r} must be an object")
    kind = given.get("rope_type", given.get("type", "default"))
    where = "rope_parameters."
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"config.json: {where}rope_type={kind!r} is not supported; supported: default, linear, llama3"
        )
    must_be({**raw, **given}, "partial_rotary_factor", 1, 1.0)
    theta = number(given if "rope_theta" in given else raw, "rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = number({"factor": required(given, "factor")}, "factor", 1.0, where)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    original = count({**raw, **given}, "original_max_position_embeddings", count(raw, "max_position_embeddings"))
    low, high = number(given, "low_freq_factor", 1.0, where), number(given, "high_freq_factor", 4.0, where)
    if low >= high:
        raise ConfigError(f"config.json: {where}low_freq_factor={low} must be below high_freq_factor={high}")
    return RopeConfig(theta, kind, factor, low, high, original)
