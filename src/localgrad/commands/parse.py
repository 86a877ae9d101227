"""Parsing of a command's flags."""

from collections.abc import Sequence
from typing import Any

SHORT = {
    "--data": "--data.source",
    "--train-limit": "--data.train-limit",
    "--test-limit": "--data.test-limit",
    "--epochs": "--optim.epochs",
    "--warmup-epochs": "--optim.warmup-epochs",
    "--batch-size": "--optim.batch-size",
    "--lr": "--optim.lr",
}
"""Short names of flags, and what they stand for."""


def parse(kind: Any, arguments: Sequence[str], program: str, text: str) -> Any:
    """Parses flags into a dataclass."""
    import tyro

    return tyro.cli(kind, args=list(arguments), prog=program, description=text)


def full_flag(argument: str) -> str:
    """A flag of `train` by its full name; an underscore in it is a hyphen."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return SHORT.get(name, name) + equals + value
