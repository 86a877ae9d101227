"""Parse values of files into dataclasses with pydantic: types are strict, and one error lists the problems."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from localgrad.errors import LocalGradError, closest

Kind = TypeVar("Kind")
MOST_PROBLEMS = 6
"""Number of problems that a message names; it counts the others."""
MOST_LETTERS = 60
"""Number of characters of a value that a message repeats."""


def parse(kind: type[Kind], values: Any, name: str = "") -> Kind:
    """Make a dataclass from the values of a JSON file or a checkpoint.

    Integers are accepted for floats, and lists for tuples; nothing else is converted. Missing fields get their
    defaults. Unknown names are ignored, unless the dataclass forbids them in `__pydantic_config__`.

    Args:
        kind: the dataclass; its fields may be dataclasses too.
        values: plain values, such as `json.load` returns.
        name: name of the values in messages, such as `config`; without it messages name the fields alone.

    Raises:
        LocalGradError: fields are missing, unknown or of another type; one line lists them (see `MOST_PROBLEMS`).
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps({name: values}))[name]
    except ValidationError as error:
        problems = [_sentence(kind, problem) for problem in error.errors(include_url=False)]
    except (TypeError, ValueError, RecursionError) as error:  # values that JSON cannot hold
        problems = [f"{name or 'it'} holds what is no JSON: {str(error)[:MOST_LETTERS]}"]
    more = len(problems) - MOST_PROBLEMS
    raise LocalGradError("; ".join(problems[:MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # pydantic refuses an adapter's config for a dataclass, but a dataclass inherits the config of a dict around it
    named: Any = dict[str, kind]  # pyright: ignore[reportInvalidTypeForm]
    return TypeAdapter(named, config=ConfigDict(strict=True, allow_inf_nan=False, extra="ignore"))


def _sentence(kind: Any, problem: Mapping[str, Any]) -> str:
    name, *path = problem["loc"]
    given, what = repr(problem["input"]), problem["type"]
    if len(given) > MOST_LETTERS:
        given = f"{given[:MOST_LETTERS]}..."
    where = ".".join(map(str, filter(_is_named, (name, *path)))) or "it"
    parent = ".".join(map(str, filter(_is_named, (name, *path[:-1])))) or "it"
    last = str(path[-1]) if path else ""
    if what == "unexpected_keyword_argument":
        names = [field.name for field in dataclasses.fields(_kind_at(kind, path[:-1]))]
        hint = closest(last, names) or f"; its fields are {', '.join(names)}"
        return f"{parent} has no field {last!r}{hint}"
    if what == "missing":
        return f"{parent} has no {last!r}"
    if what == "value_error":  # raised by __post_init__
        return str(problem["ctx"]["error"]) if where == "it" else f"{where}: {problem['ctx']['error']}"
    return f"{where} is {given}; {problem['msg'].replace('Input', 'it', 1)}"


def _is_named(part: object) -> bool:
    return part != ""


def _kind_at(kind: Any, path: Sequence[Any]) -> Any:
    """The dataclass at a path of field names below another dataclass; positions in lists are skipped."""
    for name in path:
        if isinstance(name, int):
            continue
        kind = typing.get_type_hints(kind)[name]
        while arguments := [each for each in typing.get_args(kind) if each is not type(None)]:
            kind = arguments[0]
    return kind
