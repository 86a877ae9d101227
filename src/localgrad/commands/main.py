"""`localgrad COMMAND ...`: runs the command, and turns errors into one sentence and an exit code."""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from localgrad.errors import LocalGradError, LocalGradWarning, closest

COMMANDS = {
    "demo": ("", "see it work in minutes, on images that need no download"),
    "recipes": ("[WORDS]", "the named runs of the papers' tables"),
    "train": ("RECIPE [FLAGS]", "train one of them, or on your images with --data FOLDER"),
    "evaluate": ("RUN_FOLDER", "test the weights that a run left"),
    "predict": ("RUN_FOLDER IMAGES", "classes and probabilities of images"),
    "reproduce": ("[TABLE]", "run all rows of a table, and compare with the paper"),
    "analyse": ("RUN_FOLDER", "probes, CKA and pictures of what it learnt"),
    "time": ("RESULTS", "seconds of a step of every row, measured in turns"),
    "report": ("RESULTS", "all results on one page, beside the papers' values"),
    "units": ("MODEL", "the units of a network, where it can be cut"),
    "plan": ("MODEL", "the memory that a step would take, and the best cuts"),
}
"""Arguments and purpose of each command. The command is `main` in the module of the same name."""

USAGE = (
    "localgrad trains a network as gradient-isolated blocks, each with a local loss of its own.\n\n"
    + "".join(f"  {f'localgrad {name} {given}':36} {does}\n" for name, (given, does) in COMMANDS.items())
    + """
`localgrad COMMAND --help` says more. A first run, half a minute on a CPU:

  localgrad train digits-dgl-man --run-dir runs/first
"""
)
EXTRA = (
    "tyro",
    "rich",
    "lightning",
    "datasets",
    "torchvision",
    "sklearn",
    "safetensors",
    "matplotlib",
    "jinja2",
    "pydantic",
)
"""Modules that the extra `train` installs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 for success; 1 if runs of `reproduce` failed or `predict` could not read an image; 2 for
        invalid input, with a sentence on stderr; 130 after Ctrl-C; 143 after SIGTERM; 141 if the reader of the output
        has closed the pipe.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show ± gets a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(f"localgrad {version('localgrad')}")
        return 0
    try:
        with _plain_warnings():
            return _run(given[0], given[1:])
    except LocalGradError as error:
        print(f"localgrad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"localgrad: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    except BrokenPipeError:  # the reader of the output has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Context: prints the library's own warnings as sentences, without the line of code that Python adds."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, LocalGradWarning):
            print(f"localgrad: {message}", file=sys.stderr)
        else:
            before(message, category, *rest, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _run(name: str, arguments: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise LocalGradError(
            f"there is no command {name!r}{closest(name, list(COMMANDS))}; commands are {', '.join(COMMANDS)}"
        )
    try:
        return importlib.import_module(f"localgrad.commands.{name}").main(arguments)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise LocalGradError(f"the command line needs {error.name}: pip install 'localgrad[train]'") from error
