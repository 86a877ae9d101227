"""Values of files as dataclasses, by pydantic: strict about types, and all that is wrong in one message."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from localgrad.errors import LocalGradError, closest

Kind = TypeVar("Kind")
MOST_PROBLEMS = 6
"""Problems that a message names; of the others it gives the number."""
MOST_LETTERS = 60
"""Letters of a value that a message repeats."""


def parse(kind: type[Kind], values: Any, name: str = "") -> Kind:
    """Makes a dataclass of what a JSON file or a checkpoint holds.

    An integer is a float too, a list is a tuple where the field is one; nothing else is converted. Fields left out
    keep their defaults. Unknown names are ignored, but in dataclasses that say `__pydantic_config__` otherwise.

    Args:
        kind: the dataclass; those in its fields are made too.
        values: what `json.load` gave.
        name: what messages call the values, as `config`; without one they name the fields alone.

    Raises:
        LocalGradError: in one line, every field that is missing, unknown, or of another type.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps({name: values}))[name]
    except ValidationError as error:
        problems = [_sentence(kind, problem) for problem in error.errors(include_url=False)]
    except (TypeError, ValueError, RecursionError) as error:  # what JSON cannot hold
        problems = [f"{name or 'it'} holds what is no JSON: {str(error)[:MOST_LETTERS]}"]
    more = len(problems) - MOST_PROBLEMS
    raise LocalGradError("; ".join(problems[:MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # a dataclass takes no config of an adapter, but inherits that of what it is in
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
    if what == "value_error":  # of a check in __post_init__
        return str(problem["ctx"]["error"]) if where == "it" else f"{where}: {problem['ctx']['error']}"
    return f"{where} is {given}; {problem['msg'].replace('Input', 'it', 1)}"


def _is_named(part: object) -> bool:
    return part != ""


def _kind_at(kind: Any, path: Sequence[Any]) -> Any:
    """The dataclass at a path of names and positions below another one; positions lead to what a list holds."""
    for name in path:
        if isinstance(name, int):
            continue
        kind = typing.get_type_hints(kind)[name]
        while arguments := [each for each in typing.get_args(kind) if each is not type(None)]:
            kind = arguments[0]
    return kind
