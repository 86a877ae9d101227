"""Turn a function into a command: its parameters are the flags, its docstring is their help."""

import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from localgrad.commands.help import Boxes, flags, printed_to, refusal, show_help
from localgrad.commands.interrupts import raise_again
from localgrad.errors import closest

Output = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]
"""A file or folder to write, given as `--output` or `-o`."""
WORDS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH", bool: "True|False"}
"""Name of a value in the help, by type."""
QUIET_SECONDS = 0.7
"""Seconds of importing after which a line says that PyTorch is loading."""

SHORT = {
    "--data": "--data.source",
    "--train-limit": "--data.train-limit",
    "--test-limit": "--data.test-limit",
    "--test-split": "--data.test-split",
    "--test-fraction": "--data.test-fraction",
    "--split-seed": "--data.split-seed",
    "--epochs": "--optim.epochs",
    "--warmup-epochs": "--optim.warmup-epochs",
    "--batch-size": "--optim.batch-size",
    "--lr": "--optim.lr",
    "--init-from": "--model.weights",
    "--freeze": "--model.freeze",
}
"""Short names of flags of `train`, with their full names."""


def call(command: Callable[..., int], arguments: Sequence[str], name: str, text: str | None) -> int:
    """Parse the arguments and call the command with them.

    Args:
        command: the function. A parameter that is marked Positional is given without a flag.
        arguments: the arguments of the command line.
        name: name of the command, such as `localgrad train`.
        text: text of `--help` before the flags.
    """
    words = [name.replace("_", "-") if name.startswith("--") else name for name in arguments]

    @wraps(command)
    def parsed(*values: Any, **named: Any) -> Callable[[], int]:
        return lambda: command(*values, **named)

    settings: dict[str, Any] = {
        "prog": name,
        "description": "",
        "registry": _registry(),
        "config": (tyro.conf.PositionalMetavarFromFieldName,),
    }

    def parse(given: Sequence[str]) -> Callable[[], int]:
        return tyro.cli(parsed, args=given, **settings)

    if {"-h", "--help"} & {*words}:
        show_help(text or "", lambda: parse(words))
    boxes = Boxes()
    try:
        with printed_to(boxes):
            run = parse(words)
    except SystemExit:
        known = flags(lambda: parse(["--help"]))
        known += [short for short, full in SHORT.items() if full in known]
        unknown = next((word for word in words if word.startswith("--") and word.partition("=")[0] not in known), "")
        meant = closest(unknown, known, count=1) if unknown else ""
        tell(f"{refusal(boxes.getvalue())}{meant}; {name} --help lists all")
        raise
    return run()


def full_flag(argument: str) -> str:
    """The full name of a flag of `train`, with hyphens for underscores."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return SHORT.get(name, name) + equals + value


@contextmanager
def loading(quiet: bool = False, more: bool = False, seconds: float = QUIET_SECONDS) -> Iterator[None]:
    """Context for imports: prints a line if they take `seconds`. Ctrl-C raises again after it, unless `more` follow."""
    what = ("localgrad: loading PyTorch ...",)
    timer = threading.Timer(seconds, print, what, {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if not quiet and "torch" not in sys.modules:
        timer.start()
    try:
        yield
        if not more:
            raise_again()
    finally:
        timer.cancel()


def tell(text: str) -> None:
    """Print a line to stderr."""
    print(f"localgrad: {text}", file=sys.stderr, flush=True)


def _registry() -> ConstructorRegistry:
    """Rules that name values in plain words: `PATH` instead of tyro's `{None}|PATH`."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_simple)
    registry.primitive_rule(_optional)
    return registry


def _simple(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind: Any = info.type
    if kind not in WORDS or kind is bool:  # tyro makes a bool a flag and its negation
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=WORDS[kind],
        instance_from_str=lambda given: _value(kind, given[0]),
        is_instance=lambda value: isinstance(value, kind) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    options = typing.get_args(info.type)
    if typing.get_origin(info.type) not in (typing.Union, types.UnionType) or type(None) not in options:
        return None
    inner = next(option for option in options if option is not type(None))
    many = typing.get_origin(inner) is tuple
    kind: Any = typing.get_args(inner)[0] if many else inner
    if len(options) != 2 or kind not in WORDS:
        return None

    def read(given: list[str]) -> Any:
        if given == ["None"]:
            return None
        return tuple(_value(kind, each) for each in given) if many else _value(kind, given[0])

    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=f"[{WORDS[kind]} ...]" if many else WORDS[kind],
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple if many else kind),
        str_from_instance=lambda value: ["None"] if value is None else [*map(str, value if many else (value,))],
    )


def _value(kind: Any, given: str) -> Any:
    if kind is bool:
        if given not in ("True", "False"):
            raise ValueError(f"{given!r}: give True or False")
        return given == "True"
    try:
        return kind(given)
    except ValueError:
        raise ValueError(f"{given!r} is no {'whole number' if kind is int else 'number'}") from None
