"""TODO commands.time."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from localgrad.commands.parse import parse
from localgrad.errors import LocalGradError

TIME_HELP = """Measure how long a step takes of every training that has a finished run below a folder, in turns.

Runs that were made at different times, or beside others, cannot be compared by their seconds. Here the trainings take
turns, a step each, so that whatever else the machine does hits all alike. All networks are in memory at once. Writes
step-times.json into the folder. From there `localgrad report` takes the seconds of each table of which all rows are in
it, for runs of the same device (a processor's number of threads counts).

Examples:
  localgrad time results/first
  OMP_NUM_THREADS=1 localgrad time results/first --data path/to/cifar10 --rounds 30
"""


def time(arguments: Sequence[str]) -> int:
    """`localgrad time RESULTS`."""
    import tyro

    @dataclass(frozen=True)
    class Time:
        results: tyro.conf.Positional[Path]
        """Folder with results, in any subfolders."""
        data: str | None = None
        """Other images: a hub name or a folder; those of the runs unless given."""
        rounds: int = 15
        """Steps of each training that count."""
        accelerator: str = "auto"
        """Device: auto, cpu, cuda or mps."""
        output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
        """The file; step-times.json in the folder of the results unless given."""

    options = parse(Time, arguments, "localgrad time", TIME_HELP)
    path = options.output or options.results / "step-times.json"
    if path.is_dir() or (options.output is not None and not path.parent.is_dir()):  # before minutes of work
        raise LocalGradError(f"{path} cannot be a file: give --output with another name, in a folder that is there")
    from localgrad.results.step_times import show_times, time_results
    from localgrad.runs.files import write_json
    from localgrad.runs.result import as_file

    found = time_results(
        options.results,
        data=options.data,
        rounds=options.rounds,
        accelerator=options.accelerator,
        warn=lambda text: print(f"localgrad: {text}", file=sys.stderr),
    )
    show_times(found)
    write_json(path, as_file("step-times", found))
    print(f"wrote {path}")
    return 0
