"""Configs as plain values for JSON, back from them, and compared."""

import dataclasses
from typing import Any

from localgrad.config.schema import TrainConfig
from localgrad.config.typed import parse
from localgrad.errors import LocalGradError


def differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The fields in which two configs differ, one line each: `name: before -> after`."""
    old, new = flat(to_dict(before)), flat(to_dict(after))
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in old if old[name] != new[name]]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts, lists, strings, numbers, booleans and None, for JSON."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(values: Any) -> TrainConfig:
    """A config from the dict of `to_dict`. Missing fields get their defaults; nothing is evaluated as code.

    Raises:
        LocalGradError: names are unknown or values have a wrong type; the message lists them.
    """
    try:
        return parse(TrainConfig, values, "config")
    except LocalGradError as problem:
        raise LocalGradError(f"this saved configuration cannot be used: {problem}") from None
