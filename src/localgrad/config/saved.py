"""The JSON form of a config."""

import dataclasses
import types
import typing
from typing import Any, Literal

from localgrad.config.schema import TrainConfig
from localgrad.errors import LocalGradError, closest


def differences(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The fields in which two configs differ, each as one readable line `name: before -> after`."""
    old, new = flat(to_dict(before)), flat(to_dict(after))
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in old if old[name] != new[name]]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings, numbers, booleans and None, for JSON."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(values: Any) -> TrainConfig:
    """A config from what `to_dict` gave. Fields left out keep their defaults; nothing is evaluated as code.

    Raises:
        LocalGradError: with every unknown name and every value of a wrong type at once.
    """
    problems: list[str] = []
    config = _dataclass_from(TrainConfig, values, "config", problems)
    if problems:
        raise LocalGradError("this saved configuration cannot be used: " + "; ".join(problems))
    return config


def _dataclass_from(kind: Any, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{path} is {values!r}; it must be a table of names and values")
        return None
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            problems.append(f"{path} has no field {name!r}{closest(name, names)}; its fields are {', '.join(names)}")
    given = [name for name in names if name in values]
    known = {name: _value_from(hints[name], values[name], f"{path}.{name}", problems) for name in given}
    return None if problems else kind(**known)


def _value_from(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass_from(hint, value, path, problems)
    if fits(hint, value):
        return tuple(value) if isinstance(value, list) else float(value) if hint is float else value
    problems.append(f"{path} is {value!r}; it must be {getattr(hint, '__name__', None) or hint}")
    return None


def fits(hint: Any, value: Any) -> bool:
    """Whether a value read from a file is of a field's type; an int is a float too, a bool is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(option, value) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False
        alike = origin is list or arguments[-1] is Ellipsis
        items = [arguments[0]] * len(value) if alike else list(arguments)
        return len(items) == len(value) and all(fits(item, part) for item, part in zip(items, value, strict=True))
    if hint is float:
        return isinstance(value, float) or (fits(int, value) and abs(value) < 2**1023)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint in (None, type(None)) else isinstance(value, hint)
