"""The command line: `localgrad COMMAND ...`, one function a command."""

import io
import os
import sys
from collections.abc import Callable, Sequence

from localgrad.commands.analyse import analyse
from localgrad.commands.demo import demo
from localgrad.commands.evaluate import evaluate
from localgrad.commands.plan import plan
from localgrad.commands.recipes import recipes
from localgrad.commands.report import report
from localgrad.commands.reproduce import reproduce
from localgrad.commands.time import time
from localgrad.commands.train import train
from localgrad.commands.units import units
from localgrad.errors import LocalGradError

USAGE = """\
localgrad trains a network as gradient-isolated blocks, each with a local loss of its own.

  localgrad demo                       see it work in minutes, on images that need no download
  localgrad recipes [WORDS]            the named runs of the papers' tables
  localgrad train RECIPE [FLAGS]       train one of them
  localgrad evaluate RUN_FOLDER        test the weights that a run left
  localgrad reproduce [TABLE]          run all rows of a table, for any seeds, and compare with the paper
  localgrad analyse RUN_FOLDER         probes, CKA and pictures of what it learnt
  localgrad time RESULTS               seconds of a step of every row, measured in turns
  localgrad report RESULTS             all results on one page, beside the papers' values
  localgrad units MODEL                the units of a network, where it can be cut
  localgrad plan MODEL                 the memory that a step would take, and the best cuts

`localgrad COMMAND --help` says more. A first run, half a minute on a CPU:

  localgrad train digits-dgl-man --run-dir runs/first
"""


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "recipes": recipes,
    "train": train,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "analyse": analyse,
    "time": time,
    "report": report,
    "units": units,
    "plan": plan,
}


EXTRAS = dict.fromkeys(
    (
        *("torchvision", "lightning", "datasets", "huggingface_hub", "pyarrow", "PIL", "sklearn", "tyro"),
        *("safetensors", "matplotlib", "rich", "jinja2", "pydantic"),
    ),
    "train",
) | {"timm": "timm", "tensorboard": "tensorboard"}
"""The extra that brings a package, by the name it is imported by."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 where runs of `reproduce` failed, 2 for input that cannot be used (one line on stderr), 130
        when interrupted by Ctrl-C, 143 by SIGTERM, 141 where the reader of the output has gone.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot print ± gets a question mark
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
        if given[0] not in COMMANDS:
            from localgrad.errors import closest

            raise LocalGradError(
                f"there is no command {given[0]!r}{closest(given[0], list(COMMANDS))}; "
                f"commands are {', '.join(COMMANDS)}"
            )
        return COMMANDS[given[0]](given[1:])
    except ModuleNotFoundError as error:
        if (error.name or "localgrad").partition(".")[0] not in EXTRAS:
            raise
        extra = EXTRAS[str(error.name).partition(".")[0]]
        print(
            f"localgrad: `localgrad {given[0]}` needs {error.name}: pip install 'localgrad[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except LocalGradError as error:
        print(f"localgrad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"localgrad: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return getattr(interruption, "exit_code", 130)
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
